"""The command line against fake services: its output, its requests and its exit codes."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from shared.adapters import read_header
from shared.errors import InvalidRequest, RunConflict
from shared.model_folder import base_identity, linear_shapes
from shared.schemas import (
    BaseIdentity,
    EvalRecord,
    GenerateResponse,
    PolicyId,
    ReplicasResponse,
    RunStatus,
    StateRecord,
    StreamTokens,
)
from tandem.cli import main
from tandem.cli.display import RunDisplay
from tandem.cli.generate import CompletionPrinter
from tests.adapters import adapter_file, make_manifest, make_tensors
from tests.replica_process import free_port
from tests.rollout.service import Service
from tests.tandem.fake_trainer import RUN, FakeTrainer, replica_status, step_record

pytestmark = pytest.mark.anyio
ROOT = Path(__file__).parents[2]
COMMANDS = (
    "demo", "trainer", "rollout", "run", "follow", "status", "replicas", "sync", "generate", "plan",
    "export",
)  # fmt: skip
NOWHERE = "http://127.0.0.1:9"
EVAL = EvalRecord(
    step=2, policy=RUN, num_prompts=8, sampled_reward=0.75, greedy_reward=0.875, eval_s=0.1
)


@pytest.fixture(autouse=True)
def _no_settings_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("TANDEM_", "TRAINER_", "ROLLOUT_")):
            monkeypatch.delenv(name)


@pytest.fixture
async def trainer() -> AsyncIterator[FakeTrainer]:
    trainer = FakeTrainer()
    async with trainer.listening():
        yield trainer


@dataclass(frozen=True, slots=True)
class Ended:
    code: int
    out: str
    err: str

    @property
    def documents(self) -> list[Any]:
        return [json.loads(line) for line in self.out.splitlines()]

    @property
    def problem(self) -> dict[str, Any]:
        problem: dict[str, Any] = json.loads(self.err)
        return problem


Cli = Callable[..., Any]  # `await cli(*arguments)` returns Ended


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Cli:
    async def call(*arguments: str | Path) -> Ended:
        code = await asyncio.to_thread(main, [str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Ended(code, captured.out, captured.err)

    return call


def environment(**settings: str) -> dict[str, str]:
    return {**os.environ, **settings}


# --- start, help, errors ------------------------------------------------------------------------


def test_help_imports_neither_torch_nor_vllm_and_names_every_command() -> None:
    program = (
        "import sys; from tandem.cli import main; main(['--help']); "
        "sys.exit(bool({'torch', 'vllm', 'transformers'} & set(sys.modules)))"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert ended.returncode == 0, ended.stderr
    for command in COMMANDS:
        assert f" {command} " in ended.stdout


def test_without_arguments_it_shows_its_help() -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "tandem"], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "Usage: tandem" in ended.stdout
    assert "\x1b" not in ended.stdout


def test_bash_gets_a_completion_script() -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "tandem"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment(_TANDEM_COMPLETE="complete_bash", COMP_WORDS="tandem rep", COMP_CWORD="1"),
        check=False,
    )
    assert ended.stdout.split() == ["replicas"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["statsu"], "No such command 'statsu'"),
        (["status", "--bogus"], "No such option: --bogus: see `tandem status --help`"),
        (["trainer"], "Missing option '--model'"),
        (["status", "--url", "ftp://x"], "'ftp://x' is not a URL: write http://host:port"),
        (["run", "nowhere.yaml"], "nowhere.yaml cannot be read (No such file or directory)"),
        (["run", "x.yaml", "--stop"], "pass only one"),
        (["run", "--detach"], "add a CONFIG or --stop"),
        (["generate", "x", "--temperature", "-1"], "temperature"),
        (["generate", "x", "--policy", "new", "--url", NOWHERE], "--policy new: use base"),
        (["sync", "nowhere"], "nowhere does not exist: pass an adapter file or folder"),
        (["export", "out", "--run", "nowhere"], "nowhere: no such folder"),
        (["export", "out", "--base", "original"], "--base only applies to --merged"),
        (["plan", "--model", "m", "--gpu", "H100"], "--context"),
        (["replicas", "--json", "add", "x"], "put --url and --json after `add`"),
    ],
)
async def test_bad_input_is_one_sentence_and_exit_code_2(
    arguments: Sequence[str], sentence: str, cli: Cli
) -> None:
    ended = await cli(*arguments)
    assert (ended.code, ended.out, ended.err.count("\n")) == (2, "", 1)
    assert sentence in ended.err


async def test_with_json_an_error_is_a_problem_of_rfc_9457(cli: Cli) -> None:
    ended = await cli("status", "--json", "--url", NOWHERE)
    assert (ended.code, ended.out) == (1, "")
    assert ended.problem["type"] == "urn:tandem:error:Unavailable"
    assert ended.problem["status"] == 503
    assert "tandem trainer" in ended.problem["detail"]
    usage = await cli("status", "--bogus", "--json")
    assert (usage.code, usage.problem["title"]) == (2, "InvalidRequest")


@pytest.mark.parametrize(
    "arguments", [["status"], ["replicas"], ["run"], ["follow"], ["run", "--stop"], ["export", "o"]]
)
async def test_without_a_trainer_it_says_how_to_start_one(
    arguments: Sequence[str], cli: Cli
) -> None:
    ended = await cli(*arguments, "--url", NOWHERE)
    assert (ended.code, ended.out) == (1, "")
    assert ended.err == (
        f"no trainer answers at {NOWHERE}: start one with `tandem trainer --model …`, or pass "
        "another --url\n"
    )


async def test_without_a_replica_it_says_how_to_start_one(cli: Cli) -> None:
    ended = await cli("generate", "x", "--url", NOWHERE)
    assert (ended.code, ended.out) == (1, "")
    assert ended.err.startswith(
        f"no replica answers at {NOWHERE}: start one with `tandem rollout --model …`"
    )


async def test_the_key_is_that_of_the_environment(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = FakeTrainer(api_key="secret")
    async with trainer.listening():
        refused = await cli("status", "--url", trainer.url)
        monkeypatch.setenv("TANDEM_API_KEY", "secret")
        accepted = await cli("status", "--url", trainer.url)
    assert refused.code == 2
    assert refused.err.startswith(f"{trainer.url} refused the API key: set TANDEM_API_KEY")
    assert accepted.code == 0


async def test_the_trainer_is_that_of_the_environment(
    trainer: FakeTrainer, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TANDEM_TRAINER_URL", trainer.url.removeprefix("http://"))
    assert f"trainer   {trainer.url} ready" in (await cli("status")).out


# --- run ----------------------------------------------------------------------------------------


async def test_run_submits_the_file_as_it_is_and_follows_to_the_end(
    trainer: FakeTrainer, cli: Cli, tmp_path: Path
) -> None:
    (tmp_path / "run.yaml").write_text("num_steps: 2  # a comment\n")
    trainer.begin()
    fresh = {"num_fresh_tokens": 64, "sampler_kl": 1.9e-5, "logprob_gap": 0.0023}
    trainer.events += [step_record(1, num_fresh_tokens=0), step_record(2, **fresh), EVAL]
    trainer.end("completed")
    ended = await cli("run", tmp_path / "run.yaml", "--url", trainer.url)
    assert (ended.code, ended.err) == (0, "")
    assert trainer.submitted == [b"num_steps: 2  # a comment\n"]
    lines = ended.out.splitlines()
    assert lines[0] == f"run sort-1 on {trainer.url}"
    (first_step, last_step) = [line for line in lines if line.startswith("step ")]
    assert "KL – · gap –" in first_step  # the step has no tokens
    assert "reward 0.250 · held out – · KL 1.9e-05 · gap 0.0023" in last_step
    assert "eval at step 2 · sampled 0.750 · greedy 0.875 · 8 prompts" in lines
    assert lines[-1].startswith("Run sort-1 completed at step 0; results in runs/sort-1.")
    assert "\x1b" not in ended.out


async def test_with_json_the_events_are_ndjson_and_nothing_else(
    trainer: FakeTrainer, cli: Cli
) -> None:
    trainer.begin()
    trainer.events += [step_record(1), EVAL]
    trainer.end("completed")
    ended = await cli("run", "--json", "--url", trainer.url)
    assert (ended.code, ended.err) == (0, "")
    assert ended.documents == [event.model_dump(mode="json") for event in trainer.events]


async def test_a_run_that_fails_is_exit_code_1_with_its_sentence(
    trainer: FakeTrainer, cli: Cli
) -> None:
    trainer.begin()
    trainer.end("failed", "the judge is away")
    ended = await cli("run", "--url", trainer.url)
    assert (ended.code, ended.err) == (1, "run sort-1 failed: the judge is away\n")
    as_json = await cli("follow", "--json", "--url", trainer.url)
    assert (as_json.code, as_json.problem["detail"]) == (1, "run sort-1 failed: the judge is away")


@pytest.mark.parametrize(
    ("state", "sentence"),
    [("suspended", "start it again to resume the run"), (None, "ended before the run did")],
)
async def test_a_trainer_that_goes_away_is_a_failure(
    state: str | None, sentence: str, trainer: FakeTrainer, cli: Cli
) -> None:
    trainer.begin()
    if state:
        trainer.end("suspended")
    trainer.cuts_events = True
    ended = await cli("run", "--url", trainer.url)
    assert ended.code == 1
    assert sentence in ended.err


@pytest.mark.parametrize(
    ("refusal", "code"),
    [
        (InvalidRequest("unknown field 'step': did you mean num_steps, line 1?"), 2),
        (RunConflict("run 'other' is running: stop it first"), 1),
    ],
)
async def test_a_config_that_is_refused_is_told_in_the_trainers_words(
    refusal: InvalidRequest, code: int, trainer: FakeTrainer, cli: Cli, tmp_path: Path
) -> None:
    (tmp_path / "run.yaml").write_text("step: 2\n")
    trainer.refusal = refusal
    ended = await cli("run", tmp_path / "run.yaml", "--url", trainer.url)
    assert (ended.code, ended.out, ended.err) == (code, "", refusal.detail + "\n")


async def test_detached_it_starts_the_run_and_leaves(
    trainer: FakeTrainer, cli: Cli, tmp_path: Path
) -> None:
    (tmp_path / "run.json").write_text("{}")
    ended = await cli("run", tmp_path / "run.json", "--detach", "--url", trainer.url)
    assert ended.code == 0
    assert "Started run sort-1 in runs/sort-1. `tandem run` attaches" in ended.out
    assert trainer.num_followers == 0
    as_json = await cli("run", tmp_path / "run.json", "-d", "--json", "--url", trainer.url)
    assert [RunStatus.model_validate(d) for d in as_json.documents] == [trainer.run]


async def test_ctrl_c_detaches_and_says_how_to_come_back_and_how_to_stop(
    trainer: FakeTrainer,
) -> None:
    trainer.begin()
    trainer.events += [step_record(1)]
    trainer.events.append(StateRecord(state="running"))
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tandem", "run", "--url", trainer.url),
        cwd=ROOT,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stdout
    while not (await process.stdout.readline()).startswith(b"step 1/2"):
        assert process.returncode is None
    process.send_signal(signal.SIGINT)
    _, err = await process.communicate()
    assert process.returncode == 130
    assert err.decode().strip() == (
        "Detached: run sort-1 continues. `tandem run` attaches again, `tandem run --stop` stops it."
    )
    assert trainer.run
    assert trainer.run.state == "running"


async def test_stop_stops_the_current_run(trainer: FakeTrainer, cli: Cli) -> None:
    trainer.begin()
    ended = await cli("run", "--stop", "--url", trainer.url)
    assert (ended.code, ended.out) == (0, "Run sort-1 stopped at step 0.\n")
    again = await cli("run", "--stop", "--url", trainer.url)
    assert (again.code, again.out) == (0, "Run sort-1 has already ended: stopped at step 0.\n")
    as_json = await cli("run", "--stop", "--json", "--url", trainer.url)
    assert as_json.documents[0]["state"] == "stopped"


@pytest.mark.parametrize("arguments", [["run"], ["run", "--stop"], ["follow"]])
async def test_without_a_run_it_says_how_to_start_one(
    arguments: Sequence[str], trainer: FakeTrainer, cli: Cli
) -> None:
    ended = await cli(*arguments, "--url", trainer.url)
    assert ended.code == 1
    assert ended.err == f"{trainer.url} has no run: start one with `tandem run CONFIG`\n"


def test_on_a_terminal_a_run_is_a_bar_a_fleet_and_its_last_ten_steps() -> None:
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=True, width=120, height=40, no_color=True)
    with RunDisplay(console, title="run sort-1", num_steps=50) as display:
        for step in range(1, 13):
            display.add(step_record(step, tokens_per_s=1234.5))
        display.add(EVAL)
        display.set_fleet(
            [
                replica_status("a:1", "serving"),
                replica_status("b:1", "quarantined", "base differs"),
            ]
        )
        shown.seek(0)
        shown.truncate()
        display._live.refresh()
    frame = shown.getvalue()
    assert "12/50" in frame
    assert "replicas: 1 of 2 serving" in frame
    assert "b:1 quarantined: base differs" in frame
    assert "1,234" in frame
    assert ("0.375" in frame, "0.250" in frame) == (True, False)  # steps 3 and 2


# --- status and replicas ------------------------------------------------------------------------


async def test_status_shows_the_run_and_who_serves_it(trainer: FakeTrainer, cli: Cli) -> None:
    trainer.begin(detail="waiting for a replica")
    assert trainer.run
    trainer.run = trainer.run.model_copy(update={"last_step": step_record(1), "last_eval": EVAL})
    trainer.replicas = [
        replica_status("10.0.0.1:8000", "serving"),
        replica_status("10.0.0.2:8000", "quarantined", "serves another base"),
    ]
    ended = await cli("status", "--url", trainer.url)
    assert ended.code == 0
    for text in (
        "model     tiny",
        "run       sort-1 running: waiting for a replica",
        "step 0 of 2 · policy sort-1.1@0 · runs/sort-1",
        "reward 0.125 · held out 0.750",
        "10.0.0.1:8000  serving      sort-1.1@0  0        145 ms     0.0020",
        "10.0.0.2:8000  quarantined",
        "serves another base",
    ):
        assert text in ended.out
    (document,) = (await cli("status", "--json", "--url", trainer.url)).documents
    assert document["trainer"]["run"]["run_id"] == "sort-1"
    assert [replica["state"] for replica in document["replicas"]] == ["serving", "quarantined"]


async def test_replicas_are_listed_added_and_removed(trainer: FakeTrainer, cli: Cli) -> None:
    at = ("--url", trainer.url)
    assert "There are no replicas" in (await cli("replicas", *at)).out
    added = await cli("replicas", "add", "127.0.0.1:8001", *at)
    assert (added.code, added.out.partition(";")[0]) == (0, "127.0.0.1:8001 is discovered")
    assert "127.0.0.1:8001  discovered" in (await cli("replicas", *at)).out
    (listed,) = (await cli("replicas", "--json", *at)).documents
    assert ReplicasResponse.model_validate(listed).replicas == tuple(trainer.replicas)
    removed = await cli("replicas", "remove", "127.0.0.1:8001", *at)
    assert (removed.code, trainer.replicas) == (0, [])
    again = await cli("replicas", "remove", "127.0.0.1:8001", *at)
    assert (again.code, again.err) == (2, "there is no replica '127.0.0.1:8001'\n")


async def test_a_replica_is_drained_by_its_id(
    trainer: FakeTrainer, service: Service, cli: Cli
) -> None:
    async with service.listening() as client:
        id = client.url.removeprefix("http://")
        trainer.replicas = [replica_status(id, "serving")]
        ended = await cli("replicas", "drain", id, "--url", trainer.url)
        assert (ended.code, ended.out.partition(":")[2].partition(" ")[2]) == (
            0,
            "is draining: it exits once its requests finish.\n",
        )
        assert service.replica.status().state == "draining"
    unknown = await cli("replicas", "drain", "other", "--url", trainer.url)
    assert (unknown.code, unknown.err) == (
        2,
        f"there is no replica 'other': the fleet has {id}; pass one of its ids, or a URL\n",
    )


# --- generate -----------------------------------------------------------------------------------


async def test_generate_with_json_is_the_answer_of_the_wire(service: Service, cli: Cli) -> None:
    async with service.listening() as client:
        ended = await cli("generate", "s1", "-n", "2", "--max-tokens", "3", "--json",
                          "--url", NOWHERE, "--url", client.url)  # fmt: skip
    assert (ended.code, ended.err) == (0, "")
    (document,) = ended.documents
    (group,) = GenerateResponse.model_validate(document).groups
    assert [len(completion.token_ids) for completion in group.completions] == [3, 3]
    assert group.sampling.temperature == 1.0


async def test_generate_shows_token_ids_and_logprobs(service: Service, cli: Cli) -> None:
    async with service.listening() as client:
        ended = await cli("generate", "s1", "--max-tokens", "2", "--logprobs", "--url", client.url)
    rows = [line.split() for line in ended.out.splitlines()]
    assert rows[-3:] == [["token", "logprob", "probability"]] + 2 * [["3", "-0.5000", "0.6065"]]
    assert ended.err == "policy base.1@0 · 2 tokens · length\n"


async def test_a_policy_that_is_not_there_is_bad_input(service: Service, cli: Cli) -> None:
    async with service.listening() as client:
        ended = await cli("generate", "s1", "--policy", "other.1@17", "--url", client.url)
    assert ended.code == 2
    assert "other.1@17" in ended.err


def test_completions_are_printed_one_after_the_other_each_as_it_comes(
    capsys: pytest.CaptureFixture[str],
) -> None:
    printer = CompletionPrinter(2, logprobs=False)

    def add(completion: int, text: str, *, end: bool = False) -> str:
        record = StreamTokens(
            group=0,
            completion=completion,
            token_ids=(3,),
            logprobs=(-0.5,),
            text=text,
            finish_reason="stop" if end else None,
        )
        printer.add(record)
        return capsys.readouterr().out

    assert add(1, "one ") == ""
    assert add(0, "zero ") == "[1] zero "
    assert add(1, "more") == ""
    assert add(0, "ends", end=True) == "ends\n[2] one more"
    assert add(1, "!", end=True) == "!\n"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("out", "expected"),
    [
        (Terminal(), "a\tb\n�]52;c;aGk=�c�31md�é\n"),
        (io.StringIO(), "a\tb\n\x1b]52;c;aGk=\x07c\x9b31md\ré\n"),
    ],
)
def test_control_characters_of_a_completion_reach_a_pipe_and_no_terminal(
    out: io.StringIO, expected: str
) -> None:
    record = StreamTokens(
        group=0,
        completion=0,
        token_ids=(3,),
        logprobs=(-0.5,),
        text="a\tb\n\x1b]52;c;aGk=\x07c\x9b31md\ré",
        finish_reason="stop",
    )
    with contextlib.redirect_stdout(out):
        CompletionPrinter(1, logprobs=False).add(record)
    assert out.getvalue() == expected


def test_control_characters_of_an_error_reach_no_terminal() -> None:
    with contextlib.redirect_stderr(Terminal()) as err:
        assert main(["generate", "x", "--policy", "\x1b[31m", "--url", NOWHERE]) == 2
    assert err.getvalue().startswith("--policy �[31m: use base")


# --- sync ---------------------------------------------------------------------------------------


@pytest.fixture
def base(tiny_checkpoint: Path) -> BaseIdentity:
    return base_identity(tiny_checkpoint, None)


def write_peft_adapter(folder: Path, checkpoint: Path, **changes: Any) -> None:
    """Write an adapter as PEFT saves it: in float32, with PEFT's config file."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], **changes)
    get_peft_model(model, config).save_pretrained(folder)


async def test_an_adapter_file_is_pushed_to_every_replica(
    serve: Callable[..., Service], base: BaseIdentity, tiny_checkpoint: Path, tmp_path: Path,
    cli: Cli
) -> None:  # fmt: skip
    manifest = make_manifest(base, PolicyId(run_id="mine", version=3))
    path = tmp_path / "adapter.safetensors"
    content = adapter_file(manifest, make_tensors(manifest, linear_shapes(tiny_checkpoint), seed=0))
    path.write_bytes(content)
    first, second = serve(), serve()
    await asyncio.gather(first.started(), second.started())
    async with first.listening() as one, second.listening() as two:
        at = ("--url", one.url, "--url", two.url)
        ended = await cli("sync", path, *at)
        again = await cli("sync", path, "--json", *at)
    assert (ended.code, ended.err) == (0, "")
    rows = [line.split() for line in ended.out.splitlines()]
    assert rows[0][-6:] == ["receive", "verify", "wait", "load", "in", "all"]
    assert [row[:4] for row in rows[1:]] == [
        [url, "mine.1@3", "loaded", f"{len(content):,}"] for url in (one.url, two.url)
    ]
    (document,) = again.documents
    assert [r["outcome"] for r in document["receipts"]] == ["already_resident"] * 2


async def test_a_replica_that_is_not_there_does_not_keep_the_adapter_from_the_others(
    service: Service, base: BaseIdentity, tiny_checkpoint: Path, tmp_path: Path, cli: Cli
) -> None:
    manifest = make_manifest(base, PolicyId(run_id="mine", version=1))
    path = tmp_path / "adapter.safetensors"
    path.write_bytes(
        adapter_file(manifest, make_tensors(manifest, linear_shapes(tiny_checkpoint), seed=0))
    )
    async with service.listening() as client:
        ended = await cli("sync", path, "--url", NOWHERE, "--url", client.url)
    assert (ended.code, "mine.1@1" in ended.out) == (1, True)
    assert f"no replica answers at {NOWHERE}" in ended.err


async def test_a_peft_folder_becomes_an_adapter_of_the_replicas_base(
    service: Service, base: BaseIdentity, tiny_checkpoint: Path, tmp_path: Path, cli: Cli
) -> None:
    write_peft_adapter(tmp_path / "peft", tiny_checkpoint)
    async with service.listening() as client:
        ended = await cli("sync", tmp_path / "peft", "--json", "--url", client.url)
        (receipt,) = ended.documents[0]["receipts"]
        again = await cli("sync", tmp_path / "peft", "--json", "--url", client.url)
        pushed = await client.adapter(1)
    assert receipt["policy"]["run_id"].startswith("peft-")
    assert again.documents[0]["receipts"][0]["outcome"] == "already_resident"
    (tmp_path / "pushed").write_bytes(pushed)
    manifest = read_header(tmp_path / "pushed").manifest
    assert (manifest.base, manifest.rank, manifest.scaling) == (base, 4, 2.0)
    assert manifest.target_modules == ("down_proj", "q_proj")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"use_dora": True},
            "was trained with use_dora: a replica serves LoRA adapters with one rank",
        ),
        ({"rank_pattern": {"q_proj": 2}}, "was trained with rank_pattern"),
        ({"bias": "lora_only"}, "was trained with bias='lora_only', which no replica serves"),
    ],
)
async def test_a_peft_adapter_that_cannot_be_served_is_named(
    changes: dict[str, Any], sentence: str, service: Service, tiny_checkpoint: Path,
    tmp_path: Path, cli: Cli
) -> None:  # fmt: skip
    write_peft_adapter(tmp_path, tiny_checkpoint, **changes)
    async with service.listening() as client:
        ended = await cli("sync", tmp_path, "--url", client.url)
    assert ended.code == 2
    assert sentence in ended.err


async def test_a_folder_that_is_no_adapter_is_refused(
    service: Service, tmp_path: Path, cli: Cli
) -> None:
    async with service.listening() as client:
        ended = await cli("sync", tmp_path, "--url", client.url)
    assert ended.code == 2
    assert "save the adapter to this folder with save_pretrained()" in ended.err


# --- services -----------------------------------------------------------------------------------


def test_the_rollout_service_starts_from_any_folder_with_the_options_as_settings(
    tmp_path: Path,
) -> None:
    """The user's folder may contain a package named like Tandem's, and a setting may be wrong."""
    (tmp_path / "services").mkdir()
    ended = subprocess.run(
        [sys.executable, "-c", "import sys; from tandem.cli import main; sys.exit(main())",
         "rollout", "--model", "m", "--port", "99999"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment(PYTHONPATH=str(ROOT), PYTHONSAFEPATH="1"),
        check=False,
    )  # fmt: skip
    assert ended.returncode == 2
    assert ended.stderr.startswith("ROLLOUT_PORT: Input should be less than or equal to 65535")


def test_the_trainer_takes_its_model_from_an_option_or_its_variable() -> None:
    for arguments, variable in ((["--model", "/nowhere"], "x"), ([], "/nowhere")):
        ended = subprocess.run(
            [sys.executable, "-m", "tandem", "trainer", "--port", str(free_port()), *arguments],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env=environment(TRAINER_MODEL=variable, TRAINER_DEVICE="cpu"),
            check=False,
            timeout=60,
        )
        assert ended.returncode == 2
        assert "TRAINER_MODEL /nowhere: no such folder" in ended.stderr


async def test_plan_is_the_planner_with_its_options_and_exit_codes(
    tiny_checkpoint: Path, cli: Cli
) -> None:
    options = ("--model", tiny_checkpoint, "--context", "128", "--completion", "64", "--json")
    fits = await cli("plan", "--gpu", "H100", *options)
    assert (fits.code, json.loads(fits.out)["fits"]) == (0, True)
    bad = await cli("plan", "--gpu", "H99", *options)
    assert (bad.code, bad.out) == (2, "")
    assert "H99" in bad.problem["detail"]
