"""Seconds from starting `python -m services.rollout` until /readyz succeeds: first and later boots.

All boots share only a ROLLOUT_CACHE_DIR, which is empty before the first. Every other folder in
which libraries cache compiled code is emptied before each boot, as in a new container. Its path
stays the same, as in a container, because vLLM's cache key contains a path below XDG_CACHE_HOME.
"""

from __future__ import annotations

import argparse
import re
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks import engines
from benchmarks.checkpoints import SHAPES, work_folder, write_checkpoint
from benchmarks.engines import say
from benchmarks.replica import replica_process
from benchmarks.report import Report

MAX_RATIO = 0.5
# Variables that would move compiled code out of ROLLOUT_CACHE_DIR.
_CACHES = ("VLLM_CACHE_ROOT", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")
# Variables that name folders which default to the user's home or /tmp.
_HOMES = (
    "XDG_CACHE_HOME",
    "TMPDIR",
    "TRITON_HOME",
    "CUDA_CACHE_PATH",
    "FLASHINFER_WORKSPACE_BASE",
)
# Matches the log lines that show the phases of a boot.
_PHASE = re.compile(r"\b(?:took|takes|in total|finished in|Initializing|AOT|failure|rollout)\b")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    engines.add_arguments(parser, tuple(SHAPES))
    parser.add_argument("--boots", type=int, default=2)
    parser.add_argument("--serving-mode", choices=("lora", "merged"), default="lora")
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.85)
    parser.add_argument("--logs", type=Path, help="folder to save the replicas' logs in")
    arguments = parser.parse_args()
    if arguments.logs:
        arguments.logs.mkdir(parents=True, exist_ok=True)
    seconds = []
    with work_folder() as folder:
        model = folder / "model"
        write_checkpoint(arguments.shape, model, device=arguments.device)
        arguments.cache_dir = folder / "cache"
        for number in range(1, 1 + arguments.boots):
            seconds.append(_boot(arguments, model, folder / "home"))
            if arguments.logs:
                shutil.copy(folder / "home" / "log", arguments.logs / f"boot-{number}.log")
            say(f"boot {number}: {seconds[-1]:.1f} s")
    _report(arguments, seconds).publish(keep=arguments.report)


def _boot(arguments: argparse.Namespace, model: Path, own: Path) -> float:
    """Seconds until a replica is ready; it starts with an empty folder `own` for its caches."""
    shutil.rmtree(own, ignore_errors=True)
    own.mkdir()
    log = own / "log"
    settings = engines.replica_settings(
        arguments,
        model,
        serving_mode=arguments.serving_mode,
        gpu_memory_utilization=arguments.gpu_memory_utilization,
        max_model_len=4096,
    )
    extra = {name: str(own) for name in _HOMES}
    started = time.perf_counter()
    with replica_process(settings, log, extra=extra, without=_CACHES):
        elapsed_s = time.perf_counter() - started
    for line in log.read_text(errors="replace").splitlines():
        if _PHASE.search(line):
            say(line[-200:])
    return elapsed_s


def _report(arguments: argparse.Namespace, seconds: Sequence[float]) -> Report:
    return Report(
        name="boot",
        variant=f"{arguments.device}-{arguments.shape}",
        title="Time until a replica is ready: first and later boots",
        setting=(
            f"Qwen3 shape {arguments.shape}, random weights in 16 bits in shared memory, serving "
            f"mode {arguments.serving_mode}; all boots share a cache folder, empty at first."
        ),
        header=("boot", "seconds to ready", "of the first"),
        rows=[
            (str(number), f"{elapsed_s:.1f}", f"{elapsed_s / seconds[0]:.2f}")
            for number, elapsed_s in enumerate(seconds, 1)
        ],
        conclusion=(
            f"The second boot takes {seconds[1] / seconds[0]:.2f} of the first (target at most "
            f"{MAX_RATIO:g})."
            if len(seconds) > 1
            else "A single boot gives no ratio."
        ),
    )


if __name__ == "__main__":
    main()
