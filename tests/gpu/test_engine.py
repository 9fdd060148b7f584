"""What CPUs have no kernels for: CUDA graphs, FlashAttention over an FP8 KV cache, its size;
and whether sampler logprobs and a refusal are with it what they are on a CPU."""

from __future__ import annotations

import re

import pytest

from shared.errors import InvalidAdapter
from shared.schemas import RolloutStatus
from tests.adapters import adapter_file, make_manifest, make_tensors
from tests.gpu import machine
from tests.gpu.conftest import Report
from tests.gpu.reference import Reference
from tests.gpu.replicas import Replicas, gap, run_on
from tests.publisher import PROBE
from tests.replica_process import ReplicaProcess

pytestmark = pytest.mark.anyio

# Mean |Δlogprob| to float32, nats: what bf16 kernels make, and an FP8 KV cache on top.
NOISE = {"exact-bf16": 0.02, "exact-fp8": 0.06}
TEMPERATURE = 0.7
SAMPLED = 40  # tokens of each completion


# --- boot ---------------------------------------------------------------------------------------


def test_the_default_is_an_fp8_cache_read_by_flash_attention_under_cuda_graphs(
    replicas: Replicas,
) -> None:
    replica = replicas["exact-fp8"]
    status = RolloutStatus.model_validate_json(replica.get("/status").content)
    log = replica.log.read_text()
    assert (status.state, status.kv_cache_dtype) == ("ready", "fp8")
    assert re.search(r"Using \S*FLASH_ATTN (attention )?backend", log), log
    assert "Using FlashAttention version 3" in log, log
    assert re.search(r"Graph capturing finished in \d+ secs", log), log


def test_an_fp8_cache_of_the_same_bytes_holds_nearly_twice_the_tokens(
    replicas: Replicas, report: Report
) -> None:
    fp8, bf16 = (num_cached_tokens(replicas[name]) for name in ("exact-fp8", "exact-bf16"))
    report("tokens in a KV cache of 1 GiB, fp8 and bf16", (fp8, bf16))
    assert fp8 >= 1.95 * bf16


def num_cached_tokens(replica: ReplicaProcess) -> int:
    """The capacity of the KV cache."""
    (labels,) = re.findall(r"^vllm:cache_config_info\{(.*)\} 1", replica.get("/metrics").text, re.M)
    fields = dict(re.findall(r'(\w+)="([^"]*)"', labels))
    return int(fields["num_gpu_blocks"]) * int(fields["block_size"])


# --- logprobs -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NOISE)
async def test_sampler_logprobs_are_of_the_tempered_distribution(
    replicas: Replicas, name: str, report: Report
) -> None:
    replica = replicas[name]
    async with run_on(replica) as run:
        answer = await run.generate(
            PROBE,
            policy=run.policy(0),
            n=16,
            temperature=TEMPERATURE,
            max_tokens=SAMPLED,
            seed=1,
            ignore_eos=True,
        )
    reference = Reference(replica.base_dir(), machine.DEVICE)
    ours: list[float] = []
    expected: dict[float, list[float]] = {TEMPERATURE: [], 1.0: []}
    for completion in answer.groups[0].completions:
        ours += completion.logprobs
        for temperature, logprobs in expected.items():
            ids = (*PROBE, *completion.token_ids)
            logprobs += reference.of_tokens(ids, temperature=temperature)[-SAMPLED:]
    tempered, untempered = gap(ours, expected[TEMPERATURE]), gap(ours, expected[1.0])
    report(f"mean |Δlogprob| of {name} to float32, tempered and not", (tempered, untempered))
    assert tempered < NOISE[name]
    assert untempered > 3 * tempered


# --- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NOISE)
async def test_a_nan_adapter_is_refused_and_all_answer_as_before(
    replicas: Replicas, name: str
) -> None:
    async with run_on(replicas[name]) as run:
        served = [run.policy(0), await run.publish(1)]
        before = [await run.score(PROBE, policy) for policy in served]
        manifest = make_manifest(run.base, run.policy(2))
        tensors = make_tensors(manifest, run.shapes, seed=2)
        next(t for n, t in tensors.items() if n.endswith("lora_B.weight"))[3] = float("nan")
        with pytest.raises(InvalidAdapter, match="NaN or Inf"):
            await run.client.sync_weights(adapter_file(manifest, tensors))
        assert (await run.client.policies()).newest == served[1]
        for policy, expected in zip(served, before, strict=True):
            # Many at once: a NaN that had come into the KV cache would be in some of them.
            answer = await run.generate(PROBE, policy=policy, n=64, max_tokens=64, ignore_eos=True)
            sequences = [(*PROBE, *c.token_ids) for c in answer.groups[0].completions]
            scored = await run.scores(sequences, policy)
            sampled = [c.logprobs for c in answer.groups[0].completions]
            for ours, theirs in zip(sampled, scored, strict=True):
                assert gap(ours, theirs[len(PROBE) - 1 :]) < 2 * NOISE[name]
            assert await run.score(PROBE, policy) == pytest.approx(expected, abs=NOISE[name])
