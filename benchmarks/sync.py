"""From `policy.publish()` to the first token of the new version, against vLLM's own add_lora.

Both sides end in the same engine: Tandem's adapter arrives over HTTP and is verified; the peer
loads the same file from local shared memory by path. Each then samples one token under it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.replica import free_port, replica_thread
from benchmarks.report import Report
from services.rollout.engine import Adapter, Engine
from services.rollout.settings import RolloutSettings, prepare_environment
from shared.adapters import peft_config
from shared.rollout_client import RolloutClient
from shared.schemas import AdapterManifest, GenerateRequest, PolicyId, SamplingParams

_PROMPT = (1, 15, 5, 8, 4, 3, 7, 14)
_SHARED_MEMORY = "/dev/shm"
_ONE_TOKEN = SamplingParams(max_tokens=1, detokenize=False)


@dataclass(frozen=True, slots=True)
class Case:
    label: str
    mid: bool  # the 28-layer, 1,024-wide model instead of the demo's
    rank: int


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds of one sync and of its peer."""

    export_s: float
    transfer_s: float
    verify_s: float
    load_s: float
    first_token_s: float
    total_s: float
    add_lora_s: float  # to the first token
    num_bytes: int


CASES = (Case("0.5 MB", False, 24), Case("40 MB", True, 32), Case("160 MB", True, 128))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=[case.label for case in CASES], action="append")
    parser.add_argument("--report", action="store_true", help="keep it in benchmarks/reports/")
    arguments = parser.parse_args()

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for case in CASES:
            if not arguments.only or case.label in arguments.only:
                rows.append(_row(case, _measure(case, Path(folder), arguments.rounds)))
    Report(
        name="sync",
        title="From publish to the first token of the new version",
        setting=(
            "One replica on loopback, idle. Milliseconds, medians of "
            f"{arguments.rounds} versions after one to warm up; transfer is the HTTP call without "
            "verify and load; add_lora loads the same file from shared memory in the same engine. "
            "0.5 MB is the demo model, the others a random model of 28 layers and width 1,024."
        ),
        header=(
            "adapter",
            "bytes",
            "export",
            "transfer",
            "verify",
            "load",
            "first token",
            "total",
            "add_lora + first token",
            "ratio",
        ),
        rows=rows,
        conclusion="Ratio: total over add_lora and its first token.",
    ).publish(keep=arguments.report)


def _row(case: Case, times: Sequence[Times]) -> Sequence[str]:
    def median(name: str) -> float:
        return float(statistics.median(getattr(item, name) for item in times))

    names = ("export_s", "transfer_s", "verify_s", "load_s", "first_token_s", "total_s")
    milliseconds = [f"{1000 * median(name):.1f}" for name in (*names, "add_lora_s")]
    ratio = median("total_s") / median("add_lora_s")
    return (case.label, f"{times[0].num_bytes:,}", *milliseconds, f"{ratio:.2f}")


def _measure(case: Case, folder: Path, rounds: int) -> list[Times]:
    model = folder / ("mid" if case.mid else "tiny")
    settings = RolloutSettings(
        model=str(model),
        cache_dir=folder,
        port=free_port(),
        max_lora_rank=case.rank,
        max_model_len=64,
        max_num_seqs=8,
    )
    prepare_environment(settings)  # before torch: the engine is forked from this process
    if not model.exists():
        _make_model(case, model)
    with replica_thread(settings) as (url, replica, engine_loop):
        engine = replica.serving.engine
        return asyncio.run(_rounds(case, settings, url, engine, engine_loop, rounds))


def _make_model(case: Case, path: Path) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from examples.demo import model as demo

    if not case.mid:
        demo.save(demo.make_model(seed=0), path)
        return
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(demo.CHARACTERS),
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        pad_token_id=demo.PAD,
        bos_token_id=demo.BOS,
        eos_token_id=demo.EOS,
    )
    demo.save(LlamaForCausalLM(config), path)


async def _rounds(
    case: Case,
    settings: RolloutSettings,
    url: str,
    engine: Engine,
    engine_loop: asyncio.AbstractEventLoop,
    rounds: int,
) -> list[Times]:
    from services.trainer.policy import Policy
    from services.trainer.run_config import LoraConfig, OptimizerConfig, ReinforceConfig
    from services.trainer.samples import Sample

    policy = Policy.load(settings.model, device="cpu", gradient_checkpointing=False)
    policy.start(
        PolicyId(run_id="benchmark", version=0),
        LoraConfig(rank=case.rank, alpha=case.rank),
        OptimizerConfig(),
        seed=0,
    )
    plain = ReinforceConfig(whiten_advantages=False)
    sample = Sample(_PROMPT, (4, 5), (), (0, 0), 1.0, 0, (1.0,), False)
    times = []
    async with RolloutClient(url) as client:
        for number in range(rounds + 1):
            policy.update([sample], plain, max_tokens_per_micro_batch=64)

            started = time.perf_counter()
            adapter = policy.publish()
            exported = time.perf_counter()
            receipt = await client.sync_weights(adapter.content, digest=adapter.content_digest)
            synced = time.perf_counter()
            await client.generate(
                GenerateRequest(prompts=(_PROMPT,), sampling=_ONE_TOKEN, policy=adapter.policy)
            )
            ended = time.perf_counter()

            peer = _add_lora(engine, adapter.content, adapter.manifest, 1000 + number)
            add_lora_s = await asyncio.wrap_future(
                asyncio.run_coroutine_threadsafe(peer, engine_loop)
            )
            if number == 0:
                continue
            times.append(
                Times(
                    export_s=exported - started,
                    transfer_s=synced - exported - receipt.verify_s - receipt.load_s,
                    verify_s=receipt.verify_s,
                    load_s=receipt.load_s,
                    first_token_s=ended - synced,
                    total_s=ended - started,
                    add_lora_s=add_lora_s,
                    num_bytes=receipt.num_bytes,
                )
            )
    return times


async def _add_lora(engine: Engine, content: bytes, manifest: AdapterManifest, slot: int) -> float:
    """Seconds of the peer: the file already lies in shared memory, nothing checks it."""
    with tempfile.TemporaryDirectory(dir=_SHARED_MEMORY) as folder:
        path = Path(folder)
        (path / "adapter_model.safetensors").write_bytes(content)
        (path / "adapter_config.json").write_text(json.dumps(peft_config(manifest, "")))
        adapter = Adapter(slot_id=slot, name=f"peer-{slot}", path=path)
        started = time.perf_counter()
        await engine.load_adapter(adapter)
        async for _ in engine.generate(f"peer-{slot}", _PROMPT, _ONE_TOKEN, adapter, stream=False):
            pass
        elapsed_s = time.perf_counter() - started
        await engine.unload_adapter(adapter)
    return elapsed_s


if __name__ == "__main__":
    main()
