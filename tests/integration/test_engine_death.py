"""How a replica lives with a KV cache that is too small, and how it ends."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from pathlib import Path
from statistics import mean

import httpx
import pytest

from shared.errors import EngineDead, Unavailable
from shared.rollout_client import RolloutClient
from shared.schemas import (
    BASE_POLICY,
    Completion,
    GenerateRequest,
    GenerateResponse,
    SamplingParams,
    ScoreRequest,
    StreamTokens,
)
from tests.publisher import PROBE
from tests.reference_model import ReferenceModel
from tests.replica_process import ReplicaProcess, start_replica, until, wait_until_ready

pytestmark = pytest.mark.anyio

FP8_NOISE = 0.1  # mean |Δlogprob| between an FP8 and a bf16 KV cache, on random weights
EXIT_TIMEOUT_S = 30.0
BOOT_S = 5.0  # a boot takes longer, once the service listens
# One FP8 token takes 512 bytes here (4 layers × K and V × 2 heads × 32), a block has 128 tokens.
NUM_BLOCKS = 8


@pytest.fixture(scope="module")
def small_replica(
    tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path, base_cache: Path
) -> Iterator[ReplicaProcess]:
    replica = start_replica(
        tmp_path_factory.mktemp("small-replica"),
        tiny_checkpoint,
        base_cache,
        max_num_seqs=8,
        kv_cache_dtype="fp8",
        kv_cache_memory_bytes=NUM_BLOCKS * 128 * 512,
    )
    try:
        wait_until_ready(replica)
        yield replica
    finally:
        replica.end()


@pytest.fixture
def doomed_replica(
    tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path, base_cache: Path
) -> Iterator[ReplicaProcess]:
    replica = start_replica(tmp_path_factory.mktemp("doomed"), tiny_checkpoint, base_cache)
    try:
        wait_until_ready(replica)
        yield replica
    finally:
        replica.end()


def long_request(n: int, *, max_tokens: int = 400) -> GenerateRequest:
    sampling = SamplingParams(n=n, max_tokens=max_tokens, seed=11, ignore_eos=True)
    return GenerateRequest(prompts=(PROBE,), policy=BASE_POLICY, sampling=sampling)


async def start_long(
    replica: ReplicaProcess, client: RolloutClient, n: int = 4
) -> asyncio.Task[GenerateResponse]:
    """`n` completions of 400 tokens; returns once they run."""
    task = asyncio.ensure_future(client.generate(long_request(n)))
    await until(lambda: replica.metric("vllm:generation_tokens_total") > 0)
    return task


async def test_an_fp8_kv_cache_gives_nearly_the_bf16_logprobs(
    small_replica: ReplicaProcess,
) -> None:
    async with RolloutClient(small_replica.url) as client:
        assert (await client.status()).kv_cache_dtype == "fp8"
        answer = await client.generate(long_request(1, max_tokens=100))
    (completion,) = answer.groups[0].completions
    expected = ReferenceModel(small_replica.base_dir()).of_tokens((*PROBE, *completion.token_ids))
    gaps = [
        abs(a - b) for a, b in zip(completion.logprobs, expected[len(PROBE) - 1 :], strict=True)
    ]
    assert 0 < mean(gaps) < FP8_NOISE


async def test_completions_that_the_kv_cache_cannot_hold_are_preempted_and_still_complete(
    small_replica: ReplicaProcess,
) -> None:
    """Six completions of 441 tokens need 24 blocks, there are 8."""
    async with RolloutClient(small_replica.url) as client:
        preemptions = small_replica.metric("vllm:num_preemptions_total")
        together = (await client.generate(long_request(6))).groups[0].completions
        await until(
            lambda: small_replica.metric("vllm:num_preemptions_total") > preemptions, timeout_s=5
        )
        first, *_, last = together
        for k, completion in ((0, first), (5, last)):
            assert completion.finish_reason == "length"
            alone = await solo(client, seed=11 + k)
            assert completion.token_ids == alone.token_ids
            assert completion.logprobs == pytest.approx(alone.logprobs, abs=FP8_NOISE)
    assert [len(completion.token_ids) for completion in together] == [400] * 6


async def solo(client: RolloutClient, *, seed: int) -> Completion:
    request = long_request(1)
    sampling = request.sampling.model_copy(update={"seed": seed})
    answer = await client.generate(request.model_copy(update={"sampling": sampling}))
    return answer.groups[0].completions[0]


async def test_when_the_engine_is_killed_every_waiter_gets_503_and_the_process_ends(
    small_replica: ReplicaProcess,
) -> None:
    """The last test of this replica."""
    async with RolloutClient(small_replica.url, timeout_s=EXIT_TIMEOUT_S) as client:
        waiting = [await start_long(small_replica, client)]
        waiting += [asyncio.ensure_future(client.generate(long_request(2))) for _ in range(3)]
        async with aclosing(client.stream(long_request(2))) as records:
            while not isinstance(await anext(records), StreamTokens):
                pass
            await until(
                lambda: small_replica.metric("tandem_rollout_outstanding_completions") == 12
            )
            os.kill(small_replica.engine_pid(), signal.SIGKILL)
            with pytest.raises(EngineDead):
                await read_to_the_end(records)
        answers = await asyncio.gather(*waiting, return_exceptions=True)
    assert [type(answer) for answer in answers] == [EngineDead] * 4
    assert await asyncio.to_thread(small_replica.process.wait, EXIT_TIMEOUT_S) == 1
    with pytest.raises(httpx.ConnectError):
        small_replica.get("/readyz")
    assert "the engine process died" in small_replica.log.read_text()


async def read_to_the_end(records: AsyncIterator[object]) -> None:
    async for _ in records:
        pass


async def test_sigterm_ends_a_replica_that_still_boots(
    tmp_path: Path, tiny_checkpoint: Path, base_cache: Path
) -> None:
    replica = start_replica(tmp_path / "booting", tiny_checkpoint, base_cache)
    try:
        await until(lambda: listens(replica))
        started = time.monotonic()
        replica.process.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(replica.process.wait, EXIT_TIMEOUT_S) == 0
        assert time.monotonic() - started < BOOT_S
        assert "ready" not in replica.log.read_text()
    finally:
        replica.end()


def listens(replica: ReplicaProcess) -> bool:
    with contextlib.suppress(httpx.TransportError):
        return replica.get("/healthz").is_success
    return False


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_stop_finishes_what_runs_then_exits_0_and_leaves_nothing(
    number: signal.Signals, doomed_replica: ReplicaProcess
) -> None:
    """Ctrl-C in a terminal goes to the engine, too."""
    engine = doomed_replica.engine_pid()
    async with RolloutClient(doomed_replica.url, timeout_s=EXIT_TIMEOUT_S) as client:
        running = await start_long(doomed_replica, client)
        if number == signal.SIGINT:
            os.kill(engine, number)
        doomed_replica.process.send_signal(number)
        await until(lambda: doomed_replica.get("/readyz").status_code == 503)
        assert doomed_replica.get("/healthz").is_success
        await until(lambda: "NotReady" in score_after_drain(doomed_replica))
        (group,) = (await running).groups
    assert [len(completion.token_ids) for completion in group.completions] == [400] * 4
    assert await asyncio.to_thread(doomed_replica.process.wait, EXIT_TIMEOUT_S) == 0
    assert list(doomed_replica.adapter_dir.iterdir()) == []
    assert not is_running(engine)


def score_after_drain(replica: ReplicaProcess) -> str:
    body = ScoreRequest(sequences=((1, 3),)).model_dump_json()
    headers = {"Content-Type": "application/json"}
    response = httpx.post(replica.url + "/score", content=body, headers=headers, trust_env=False)
    return response.text


async def test_kill_9_of_the_service_leaves_no_engine_behind(
    doomed_replica: ReplicaProcess,
) -> None:
    engine = doomed_replica.engine_pid()
    async with RolloutClient(doomed_replica.url, timeout_s=EXIT_TIMEOUT_S) as client:
        running = await start_long(doomed_replica, client)
        doomed_replica.process.kill()
        with pytest.raises(Unavailable):
            await running
    assert await asyncio.to_thread(doomed_replica.process.wait, EXIT_TIMEOUT_S) == -signal.SIGKILL
    await until(lambda: not is_running(engine))


def is_running(pid: int) -> bool:
    """A zombie that nobody reaps is not running."""
    with contextlib.suppress(FileNotFoundError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False
