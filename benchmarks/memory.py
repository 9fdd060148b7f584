"""Compares GPU memory predicted by `python -m services.trainer plan` with what is measured.

    Tandem's policy update of each batch, alone on the GPU, in a separate process ─▶ peak
    the service in each serving mode, with half of the GPU ─▶ tokens that its KV cache holds

Weights are random; shapes are Qwen3's. Needs CUDA.
"""

from __future__ import annotations

import argparse
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from benchmarks import engines, kv_cache
from benchmarks.checkpoints import SHAPES, work_folder, write_checkpoint
from benchmarks.child import Child, ChildError
from benchmarks.engines import GIB, say
from benchmarks.policy_update import TANDEM, Batch, Measurement, Side
from benchmarks.report import Report
from services.trainer.plan import memory
from services.trainer.plan.inputs import read_model
from shared.schemas import QuantizationRecipe

MAX_ERROR = 0.10
_RANK = 32  # same as in policy_update.py
_NUM_SEQS = 256
_SHARE = 0.5  # fraction of the GPU's memory that vLLM may use
_OFFLOADS = replace(TANDEM, name="Tandem, offloaded", offloads=True)
# (side, batch, tokens per micro-batch); 1 means one row at a time.
_UPDATES = (
    (TANDEM, Batch(8, 8, 1024, 512), 16384),
    (_OFFLOADS, Batch(8, 8, 1024, 512), 16384),
    (TANDEM, Batch(16, 1, 512, 512), 16384),
    (TANDEM, Batch(2, 8, 512, 512), 16384),
    (TANDEM, Batch(1, 2, 16384, 16384), 1),
    (_OFFLOADS, Batch(1, 2, 16384, 16384), 1),
)


@dataclass(frozen=True, slots=True)
class Taken:
    """GPU memory of updates after the first, in bytes."""

    peak: int  # most memory allocated by torch
    reserved: int  # most memory reserved by torch's allocator
    context: int  # memory of the CUDA context


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    engines.add_arguments(parser, tuple(SHAPES))
    parser.add_argument("--serving-modes", nargs="*", default=["lora", "merged"])
    parser.add_argument("--skip-updates", action="store_true")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this benchmark needs a GPU, but torch finds no CUDA device")
    rows = [*_kv_caches(arguments)]
    if not arguments.skip_updates:
        rows = [*_updates(arguments), *rows]
    _report(arguments, rows).publish(keep=arguments.report)


@dataclass(frozen=True, slots=True)
class Row:
    what: str
    unit: str
    predicted: float
    measured: float
    note: str = ""

    @property
    def error(self) -> float:
        return self.predicted / self.measured - 1


def _updates(arguments: argparse.Namespace) -> Iterator[Row]:
    with work_folder() as folder:
        write_checkpoint(
            arguments.shape, folder / "base", device=arguments.device, recipe=QuantizationRecipe()
        )
        model = read_model(str(folder / "base"))
        for side, batch, max_tokens in _UPDATES:
            free, _ = torch.cuda.mem_get_info()
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as alone:
                measured = alone.submit(
                    _take, side, arguments.shape, folder / "base", batch, max_tokens, free
                ).result()
            predicted = memory.trainer_memory(
                model,
                memory.Batch(batch.groups, batch.group_size, batch.prompt, batch.completion),
                max_tokens=max_tokens,
                lora_rank=_RANK,
                optimizer="adamw",
                load_in_4bit=True,
                offload=side.offloads,
            )
            yield _said(
                Row(
                    f"update of {batch}{', offloaded' if side.offloads else ''}",
                    "GiB",
                    predicted.peak / GIB,
                    measured.peak / GIB,
                    f"reserved {measured.reserved / GIB:.2f} (planned for: "
                    f"{(predicted.total - memory.CONTEXT_BYTES) / GIB:.2f}), "
                    f"CUDA context {measured.context / GIB:.2f} "
                    f"({memory.CONTEXT_BYTES / GIB:.2f})",
                )
            )


def _take(
    side: Side, shape: str, checkpoint: Path, batch: Batch, max_tokens: int, free_before: int
) -> Taken:
    measurement = Measurement(checkpoint, SHAPES[shape].vocabulary, "cuda", max_tokens, rounds=2)
    [outcome] = measurement.here(side, [batch])
    if outcome is None:
        raise MemoryError(f"{batch} does not fit on this GPU")
    reserved = torch.cuda.max_memory_reserved()
    torch.cuda.empty_cache()
    taken = free_before - torch.cuda.mem_get_info()[0]
    return Taken(outcome.peak_bytes, reserved, taken - torch.cuda.memory_reserved())


def _kv_caches(arguments: argparse.Namespace) -> Iterator[Row]:
    if not arguments.serving_modes:
        return
    with work_folder() as folder:
        write_checkpoint(arguments.shape, folder / "model", device=arguments.device)
        model = read_model(str(folder / "model"))
        share = int(_SHARE * torch.cuda.mem_get_info()[1])
        for mode in arguments.serving_modes:
            settings = engines.replica_settings(
                arguments,
                folder / "model",
                serving_mode=mode,
                gpu_memory_utilization=_SHARE,
                max_num_seqs=_NUM_SEQS,
                max_lora_rank=_RANK,
                max_model_len=4096,
            )
            before = torch.cuda.mem_get_info()[0]
            try:
                with Child(mode, folder / f"{mode}.log", {}, engines.service, settings) as service:
                    seconds = service.wait_until_ready()
                    measured, dtype = service.run(kv_cache.kv_capacity)
                    taken = before - torch.cuda.mem_get_info()[0]
            except ChildError as error:  # other modes can still be measured
                say(f"left out: {error}")
                continue
            predicted = memory.replica_memory(
                model, lora_rank=_RANK, max_num_seqs=_NUM_SEQS, serving_mode=mode
            )
            yield _said(
                Row(
                    f"KV cache ({dtype}), serving mode {mode}",
                    "tokens",
                    predicted.kv_tokens(share, "fp8"),
                    measured,
                    f"the replica has {taken / GIB:.2f} GiB of the GPU (planned for: "
                    f"{(share + predicted.beside) / GIB:.2f}); ready after {seconds:.0f} s",
                )
            )


def _said(row: Row) -> Row:
    say(f"{row.what}: {' · '.join(_cells(row)[1:])}")
    return row


def _cells(row: Row) -> tuple[str, ...]:
    digits = 2 if row.unit == "GiB" else 0
    values = [f"{value:,.{digits}f} {row.unit}" for value in (row.predicted, row.measured)]
    return (row.what, *values, f"{row.error:+.1%}", row.note)


def _report(arguments: argparse.Namespace, rows: list[Row]) -> Report:
    worst = max((abs(row.error) for row in rows), default=0.0)
    return Report(
        name="memory",
        variant=f"{arguments.device}-{arguments.shape}",
        title="Memory predicted by the planner against memory measured",
        setting=(
            f"Qwen3 shape {arguments.shape}, LoRA of rank {_RANK}. Updates: NF4 weights, micro-"
            "batches of 16,384 tokens, or of one row for batches with a single group; peak of "
            f"torch's allocator after the first update. KV cache: vLLM with {_SHARE:g} of the GPU "
            f"and {_NUM_SEQS} sequences at once."
        ),
        header=("what", "predicted", "measured", "error", "beside it"),
        rows=[_cells(row) for row in rows],
        conclusion=f"The largest error is {worst:.1%} (target at most {MAX_ERROR:.0%}).",
    )


if __name__ == "__main__":
    main()
