"""Rewards are numbers somebody computed; a failure to compute one is an error that names the
completion, never a 0."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import date
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from services.tokens import PromptEncoder
from services.trainer.data.rows import Prompt
from services.trainer.rewards import scorer
from services.trainer.rewards.batch import NoNumber, Reward, RewardBatch
from services.trainer.rewards.built_in import build_reward
from services.trainer.rewards.process import FunctionFailed, FunctionProcess
from services.trainer.rewards.scorer import Scorer, compute, overlong_penalty, punish_overlong
from services.trainer.run_config import (
    ExactMatchReward,
    FunctionReward,
    HttpReward,
    OverlongConfig,
    RegexReward,
    RewardConfig,
)
from shared.errors import RewardFailed
from shared.schemas import Completion, CompletionGroup, PolicyId, SamplingParams, Segment
from tests.replica_process import eventually

pytestmark = pytest.mark.anyio
BATCH = RewardBatch(
    prompts=["s21=", "s43="], completions=["12", "43"], columns={"answer": ["12", "34"]}
)


def function(name: str, **settings: Any) -> FunctionReward:
    return FunctionReward(path=f"tests.trainer.rewards.reward_functions:{name}", **settings)


@asynccontextmanager
async def built(config: RewardConfig) -> AsyncIterator[Reward]:
    reward = build_reward(config)
    try:
        yield reward
    finally:
        reward.close()


async def rewards_of(config: RewardConfig, batch: RewardBatch = BATCH) -> list[float]:
    async with built(config) as reward:
        return await compute(reward, batch)


async def test_exact_match_compares_with_the_column() -> None:
    assert await rewards_of(ExactMatchReward()) == [1.0, 0.0]


@pytest.mark.parametrize(
    ("pattern", "full", "expected"),
    [(r"\d\d", True, [1.0, 1.0]), (r"1", True, [0.0, 0.0]), (r"1", False, [1.0, 0.0])],
)
async def test_regex_matches_whole_or_anywhere(
    pattern: str, full: bool, expected: list[float]
) -> None:
    assert await rewards_of(RegexReward(pattern=pattern, full=full)) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("count_characters", [8.0, 8.0]),  # it gets prompts, completions and columns
        ("always_half", [0.5, 0.5]),  # a coroutine function is awaited
        ("an_array", [0.5, 0.5]),
        ("fractions", [0.5, 0.5]),
        ("interrupted_by_its_own_alarm", [1.0, 1.0]),
    ],
)
async def test_a_function_gives_numbers_of_any_kind(name: str, expected: list[float]) -> None:
    assert await rewards_of(function(name)) == expected


# --- before the run -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            ExactMatchReward(column="gold"),
            "needs the column 'gold'; dataset has answer, id besides the prompts",
        ),
        (ExactMatchReward(column="id"), "row 1 of dataset has nothing in column 'id'"),
        (FunctionReward(path="no_such_module:f"), "cannot be imported.*No module named"),
        (function("no_such_function"), "cannot be imported.*no_such_function"),
        (function("constant"), "cannot be imported.*constant is no function"),
        (function("needs_gold"), "needs the column 'gold'; dataset has answer, id"),
        (function("takes_no_columns"), "takes no argument 'answer'.*add \\*\\*columns"),
    ],
)
async def test_a_reward_that_cannot_work_is_refused_before_the_run(
    config: RewardConfig, message: str
) -> None:
    async with built(config) as reward:
        with pytest.raises(ValueError, match=message):
            await reward.check({"answer": ["12", "34"], "id": [1, None]}, dataset="dataset")


async def test_a_column_that_is_called_as_an_argument_is_refused_before_the_run() -> None:
    async with built(function("always_half")) as reward:
        with pytest.raises(ValueError, match=r"dataset has a column 'completions'.*rename it"):
            await reward.check({"completions": ["a"]}, dataset="dataset")


def test_a_pattern_that_does_not_compile_is_refused_before_the_run() -> None:
    with pytest.raises(ValueError, match="does not compile"):
        build_reward(RegexReward(pattern="("))


# --- failures -----------------------------------------------------------------------------------

_SECOND = "completion 1 of 2, '43' to the prompt 's43='"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("broken_by_43", f"raised ZeroDivisionError.* in .*reward_functions.py, line .*{_SECOND}"),
        ("broken_by_two", "raised RuntimeError.* 2 completions, and none of them is found"),
        ("forgets_to_return", "raised TypeError.*it returned None, not a list of numbers"),
        ("by_name", "raised TypeError.*not a list of numbers"),
        ("leaves_43_out", f"gave 1 values for 2 completions: {_SECOND}"),
        ("nan_for_43", f"gave nan, not a finite number, for {_SECOND}"),
        ("infinite", "gave inf, not a finite number, for completion 0 of 2, '12'"),
        ("nothing", "gave None, not a finite number, for completion 0"),
        ("text", "gave '0.5', not a finite number, for completion 0"),
        ("too_large", "gave 1000.*, not a finite number, for completion 0"),
        ("leaves", r"raised SystemExit\(3\)"),
        ("dies_of_43", f"ended its process, which was ended by SIGSEGV: {_SECOND}"),
    ],
)
async def test_a_function_that_fails_is_never_zero_and_names_the_completion(
    name: str, message: str
) -> None:
    """NeMo-RL#3589: failures became rewards of 0 and biased the baseline."""
    with pytest.raises(RewardFailed, match=rf"^reward function [\w.]+:{name} {message}"):
        await rewards_of(function(name))


_DIES_AND_COMES_BACK = """
import os, pathlib, signal, time

def reward(completions, **_):
    if "43" in completions:
        os.kill(os.getpid(), signal.SIGSEGV)
    return [1.0] * len(completions)

mark = pathlib.Path(__file__).with_suffix(".imported")
if mark.exists():
    {again}
mark.touch()
"""


@pytest.mark.parametrize(
    ("again", "message"),
    [
        ("time.sleep(5)", f": {_SECOND}"),  # longer than the search for the completion may take
        ("raise ImportError", " for 2 completions, and none of them is found"),
    ],
)
async def test_what_a_function_needs_to_come_back_is_no_fault_of_a_completion(
    again: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scorer, "_MAX_SEARCH_S", 4.0)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "comes_back.py").write_text(_DIES_AND_COMES_BACK.format(again=again))
    with pytest.raises(RewardFailed, match=f"was ended by SIGSEGV{message}"):
        await rewards_of(FunctionReward(path="comes_back:reward"))


# The deadline must be enough to start Python, and half of the search to try one completion, also
# on a machine that does much else.
_DEADLINE_S, _SEARCH_S = 4.0, 4.0


@pytest.mark.parametrize("name", ["sleeps_for_43", "hangs_in_c_for_43"])
async def test_a_function_that_hangs_ends_at_its_deadline_with_the_completion(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scorer, "_MAX_SEARCH_S", _SEARCH_S)
    with pytest.raises(RewardFailed, match=f"{name} took more than 4 s: {_SECOND}"):
        await rewards_of(function(name, timeout_s=_DEADLINE_S))


async def test_a_pattern_that_takes_forever_ends_at_its_deadline_with_the_completion(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(scorer, "_MAX_SEARCH_S", _SEARCH_S)
    batch = replace(BATCH, completions=["12", "a" * 64])
    with pytest.raises(RewardFailed, match=r"^reward regex '\(a\+\)\+b' took more.*: completion 1"):
        await rewards_of(RegexReward(pattern="(a+)+b", timeout_s=_DEADLINE_S), batch)


async def test_a_function_that_is_cancelled_leaves_no_process(tmp_path: Path) -> None:
    """A run is stopped while a reward is computed."""
    batch = replace(BATCH, columns={"path": [str(tmp_path / "never")] * 2})
    async with built(function("waits_for_a_file")) as reward:
        await reward.check(batch.columns, dataset="dataset")
        scoring = asyncio.ensure_future(compute(reward, batch))
        await asyncio.sleep(0.05)
        scoring.cancel()
        with pytest.raises(asyncio.CancelledError):
            await scoring
        (tmp_path / "never").touch()
        assert await compute(reward, batch) == [1.0, 1.0]  # in another process


async def test_a_function_lives_in_one_process_until_it_is_closed() -> None:
    async with built(function("process_id")) as reward:
        (first, _), (second, _) = await compute(reward, BATCH), await compute(reward, BATCH)
    assert first == second != os.getpid()
    assert not Path(f"/proc/{first:.0f}").exists()


async def test_a_function_that_cannot_be_imported_is_imported_anew_each_time() -> None:
    process = FunctionProcess("tests.trainer.rewards.reward_functions:no_such_function")
    for _ in range(2):
        with pytest.raises(FunctionFailed, match=r"raised AttributeError.*no_such_function"):
            await process.start(timeout_s=60)


async def test_a_process_that_ends_before_its_workers_takes_them_along(tmp_path: Path) -> None:
    """They have its end of the connection, on which nobody answers."""
    process = FunctionProcess("tests.trainer.rewards.reward_functions:leaves_a_worker")
    await process.start(timeout_s=60)
    arguments = {"completions": ["a"], "path": [str(tmp_path / "worker")]}
    async with asyncio.timeout(20):
        with pytest.raises(FunctionFailed, match="ended its process, which exited with 3"):
            await process.call(arguments, timeout_s=3)
    worker = int((tmp_path / "worker").read_text())
    assert eventually(lambda: has_ended(worker), timeout_s=10)


# --- what a function can reach (fault S10) --------------------------------------------------------

FUNCTIONS = "tests.trainer.rewards.reward_functions"


async def test_a_function_has_no_secret_but_those_named_for_rewards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("TANDEM_API_KEY", "HF_TOKEN", "TRAINER_MODEL", "OPENAI_API_KEY", "HTTP_PROXY"):
        monkeypatch.setenv(name, "secret")
    monkeypatch.setenv("REWARD_KEY", "for-rewards")
    monkeypatch.setenv("LC_ALL", "C.UTF-8")
    process = FunctionProcess(f"{FUNCTIONS}:environment")
    path = tmp_path / "environment"
    try:
        await process.start(timeout_s=60)
        await process.call({"completions": ["a"], "path": [str(path)]}, timeout_s=60)
    finally:
        process.close()
    environment = json.loads(path.read_text())
    assert "secret" not in environment.values()
    assert environment["REWARD_KEY"] == "for-rewards"
    assert environment["LC_ALL"] == "C.UTF-8"
    assert environment["PATH"] == os.environ["PATH"]


async def test_an_answered_object_does_not_run_in_the_trainer(tmp_path: Path) -> None:
    """The trainer used to unpickle answers: an object with __reduce__ ran a command."""
    made = tmp_path / "made"
    process = FunctionProcess(f"{FUNCTIONS}:answers_an_object")
    try:
        await process.start(timeout_s=60)
        (value,) = await process.call({"completions": ["a"], "path": [str(made)]}, timeout_s=60)
    finally:
        process.close()
    assert isinstance(value, NoNumber)
    assert not made.exists()


async def test_what_a_function_writes_itself_is_not_unpickled(tmp_path: Path) -> None:
    made = tmp_path / "made"
    process = FunctionProcess(f"{FUNCTIONS}:writes_an_object_itself")
    await process.start(timeout_s=60)
    with pytest.raises(FunctionFailed, match="wrote to its connection to the trainer"):
        await process.call({"completions": ["a"], "path": [str(made)]}, timeout_s=60)
    assert not made.exists()


async def test_an_answer_has_a_largest_size() -> None:
    process = FunctionProcess(f"{FUNCTIONS}:answers_at_length")
    await process.start(timeout_s=60)
    with pytest.raises(FunctionFailed, match="answered more than 4194304 bytes, and was ended"):
        await process.call({"completions": ["a"]}, timeout_s=60)
    process.close()


async def test_the_memory_of_a_function_can_be_limited() -> None:
    limit = 512 << 20
    process = FunctionProcess(f"{FUNCTIONS}:takes_memory", max_memory_bytes=limit)
    try:
        await process.start(timeout_s=60)
        with pytest.raises(
            FunctionFailed, match=rf"MemoryError.*; its max_memory_bytes is {limit}"
        ):
            await process.call({"completions": ["a"]}, timeout_s=60)
    finally:
        process.close()


_TRAINER = """
import asyncio
from services.trainer.rewards.process import FunctionProcess

async def main():
    process = FunctionProcess("tests.trainer.rewards.reward_functions:process_id")
    await process.start(timeout_s=60)
    (pid,) = await process.call({"completions": ["a"]}, timeout_s=60)
    print(int(pid), flush=True)
    await asyncio.sleep(600)

asyncio.run(main())
"""


def test_a_trainer_that_is_killed_leaves_no_reward_process() -> None:
    with subprocess.Popen([sys.executable, "-c", _TRAINER], stdout=subprocess.PIPE) as trainer:
        assert trainer.stdout
        pid = int(trainer.stdout.readline())
        assert Path(f"/proc/{pid}").exists()
        trainer.kill()
    assert eventually(lambda: has_ended(pid), timeout_s=10)


def has_ended(pid: int) -> bool:
    """Nobody may be there to take note of it: then it is a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


async def test_a_coroutine_function_keeps_its_event_loop() -> None:
    """A client that it opened lives in it."""
    async with built(function("event_loop")) as reward:
        assert await compute(reward, BATCH) == await compute(reward, BATCH)


async def test_a_long_text_is_shown_without_its_middle() -> None:
    batch = replace(BATCH, completions=["12", "4" + "0" * 500 + "3"])
    with pytest.raises(RewardFailed, match=r"'40{39}' \.\.\. '0{39}3' to the prompt"):
        await rewards_of(function("leaves_long_out"), batch)


async def test_a_reward_function_never_runs_twice_at_once(tiny_checkpoint: Path) -> None:
    """An evaluation scores while groups ahead are scored."""
    scorer = Scorer([function("alone")], PromptEncoder.load(tiny_checkpoint))
    try:
        await asyncio.gather(scorer.score(PROMPTS, GROUPS), scorer.score(PROMPTS, GROUPS))
    finally:
        scorer.close()


async def test_scores_are_weighted_sums_in_the_order_of_the_completions(
    tiny_checkpoint: Path,
) -> None:
    configs: list[RewardConfig] = [ExactMatchReward(weight=2.0), function("always_half")]
    scorer = Scorer(configs, PromptEncoder.load(tiny_checkpoint))
    scored = await scorer.score(PROMPTS, GROUPS)
    scorer.close()
    assert [[c.reward for c in group.completions] for group in scored] == [[2.5], [0.5]]
    assert [[c.rewards for c in group.completions] for group in scored] == [[(2, 0.5)], [(0, 0.5)]]


# --- overlong -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_tokens", "expected"), [(1, 0.0), (80, 0.0), (85, -0.5), (90, -1.0), (100, -2.0)]
)
def test_the_overlong_penalty_begins_at_the_buffer_and_is_full_at_max_tokens(
    num_tokens: int, expected: float
) -> None:
    penalty = overlong_penalty(num_tokens, max_tokens=100, buffer_tokens=20, penalty=2.0)
    assert penalty == pytest.approx(expected)


async def test_the_overlong_penalty_is_one_more_reward(tiny_checkpoint: Path) -> None:
    scored = await Scorer([ExactMatchReward()], PromptEncoder.load(tiny_checkpoint)).score(
        PROMPTS, GROUPS
    )
    config = OverlongConfig(buffer_tokens=2)
    (group, _) = punish_overlong(scored, config, max_tokens=4)
    (completion,) = group.completions  # of 3 tokens
    assert (completion.rewards, completion.reward) == ((1.0, -0.5), 0.5)


# --- HTTP ---------------------------------------------------------------------------------------


class RewardService(HTTPServer):
    """Answers each POST with the next of `answers`: (status, body)."""

    answers: list[tuple[int, bytes]]
    bodies: list[dict[str, Any]]
    authorizations: list[str | None]
    paths: list[str]


class _Handler(BaseHTTPRequestHandler):
    server: RewardService

    def do_POST(self) -> None:
        self.server.paths.append(self.path)
        length = int(self.headers["Content-Length"])
        self.server.authorizations.append(self.headers["Authorization"])
        self.server.bodies.append(json.loads(self.rfile.read(length)))
        status, body = self.server.answers.pop(0)
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def service() -> Iterator[RewardService]:
    server = RewardService(("127.0.0.1", 0), _Handler)
    server.answers, server.bodies, server.authorizations, server.paths = [], [], [], []
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def over_http(service: RewardService, **settings: Any) -> HttpReward:
    return HttpReward(url=f"http://127.0.0.1:{service.server_port}/reward", **settings)


async def test_a_reward_service_is_asked_with_the_whole_batch(service: RewardService) -> None:
    service.answers = [(200, b'{"rewards": [0.25, 1]}')]
    assert await rewards_of(over_http(service)) == [0.25, 1]
    assert service.bodies[0]["columns"] == {"answer": ["12", "34"]}


async def test_a_reward_service_is_reached_without_the_proxy_of_the_environment(
    service: RewardService, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault R4."""
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    service.answers = [(200, b'{"rewards": [1, 1]}')]
    assert await rewards_of(over_http(service)) == [1, 1]


async def test_requests_are_bounded_and_keep_the_completions_of_a_prompt_together(
    service: RewardService,
) -> None:
    batch = RewardBatch(["a", "b", "b", "c"], ["1", "2", "3", "4"], {"x": [5, 6, 7, 8]})
    service.answers = [(200, b'{"rewards": [1]}'), (200, b'{"rewards": [2, 3]}')]
    service.answers += [(200, b'{"rewards": [4]}')]
    config = over_http(service, max_completions_per_request=2, max_concurrent_requests=1)
    assert await rewards_of(config, batch) == [1, 2, 3, 4]
    assert [body["prompts"] for body in service.bodies] == [["a"], ["b", "b"], ["c"]]
    assert service.bodies[1]["columns"] == {"x": [6, 7]}


async def test_a_reward_service_gets_its_own_key(
    service: RewardService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REWARD_JUDGE_KEY", "secret")
    service.answers = [(200, b'{"rewards": [1, 1]}')]
    await rewards_of(over_http(service, api_key_env="REWARD_JUDGE_KEY"))
    assert service.authorizations == ["Bearer secret"]


def test_a_key_that_is_not_in_the_environment_is_said_before_the_run() -> None:
    with pytest.raises(ValueError, match="environment has no REWARD_NO_SUCH_KEY"):
        build_reward(HttpReward(url="http://judge", api_key_env="REWARD_NO_SUCH_KEY"))


async def test_the_query_of_a_reward_service_is_asked_with_and_not_shown(
    service: RewardService,
) -> None:
    service.answers = [(404, b"no")] * 2
    config = over_http(service)
    config = config.model_copy(update={"url": f"{config.url}?token=secret"})
    with pytest.raises(RewardFailed, match=r"^reward service http://[\w.:]+/reward refuses"):
        await rewards_of(config)
    assert service.paths == ["/reward?token=secret"] * 2


async def test_the_run_waits_for_a_reward_service_that_is_away_and_says_so(
    service: RewardService,
) -> None:
    service.answers = [(503, b"loading"), (429, b""), (200, b'{"rewards": [1, 0]}')]
    said: list[str] = []

    async def on_stall(why: str) -> None:
        said.append(why)

    assert await compute(build_reward(over_http(service), on_stall), BATCH) == [1, 0]
    waits, goes_on = said
    assert "has been away for" in waits
    assert "HTTP 503 'loading'" in waits
    assert goes_on == ""


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ([(503, b"")], "gave no rewards for 0 s: HTTP 503.*; start it"),
        (
            [(500, b"oh")] * 3 + [(200, b'{"rewards": [1]}'), (500, b"oh")],
            f"answers HTTP 500 'oh', 3 times in a row: {_SECOND}",
        ),
        ([(404, b"no")] * 2, "refuses the request: HTTP 404 'no': completion 0"),
        ([(302, b"")] * 2, "refuses the request: HTTP 302"),
        ([(200, b"[]")] * 2, r"must answer .* not '\[\]': completion 0"),
        ([(200, b"<html>")] * 2, "must answer .* not '<html>'"),
        ([(200, b'{"rewards": null}')] * 2, "must answer .* not .*null"),
        (
            [(200, b'{"rewards": [1]}'), (200, b'{"rewards": [1]}'), (200, b'{"rewards": []}')],
            f"gave 1 values for 2 completions: {_SECOND}",
        ),
        ([(200, b'{"rewards": [1, NaN]}')], f"gave nan, not a finite number, for {_SECOND}"),
        ([(200, b'{"rewards": [1, null]}')], f"gave None, not a finite number, for {_SECOND}"),
    ],
)
async def test_a_reward_service_without_rewards_is_an_error(
    service: RewardService, answers: list[tuple[int, bytes]], message: str
) -> None:
    service.answers = list(answers)
    outage_s = 0.0 if answers[0][0] == 503 else 60.0
    with pytest.raises(RewardFailed, match=rf"^reward service http://[\w.:]+/reward {message}"):
        await rewards_of(over_http(service, max_outage_s=outage_s))
    assert not service.answers


async def test_a_column_that_json_has_not_is_an_error(service: RewardService) -> None:
    batch = replace(BATCH, columns={"day": [date(2025, 1, 1)] * 2})
    with pytest.raises(RewardFailed, match=r"takes JSON.*date"):
        await rewards_of(over_http(service), batch)


async def test_a_reward_service_that_is_not_there_is_named_with_the_reason() -> None:
    config = HttpReward(url="http://127.0.0.1:9/reward", max_outage_s=0)
    with pytest.raises(RewardFailed, match=r"127\.0\.0\.1:9/reward gave no rewards.*ConnectError"):
        await rewards_of(config)


async def test_a_reward_service_that_never_answers_is_given_up() -> None:
    async def hang(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    async with await asyncio.start_server(hang, "127.0.0.1", 0) as server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/"
        with pytest.raises(RewardFailed, match=r"gave no rewards.*no answer within 0\.1 s"):
            await rewards_of(HttpReward(url=url, timeout_s=0.1, max_outage_s=0))


PROMPTS = [
    Prompt("s21=", (15, 5, 4, 14), {"answer": "12"}),
    Prompt("s43=", (15,), {"answer": "34"}),
]
GROUPS = [
    CompletionGroup(
        prompt_token_ids=prompt.token_ids,
        sampling=SamplingParams(),
        completions=(
            Completion(
                token_ids=ids,
                logprobs=(-1.0,) * len(ids),
                segments=(Segment(policy=PolicyId(run_id="r", version=0), num_tokens=len(ids)),),
                finish_reason="stop",
            ),
        ),
    )
    for prompt, ids in zip(PROMPTS, ((4, 5, 2), (7, 6, 2)), strict=True)
]
