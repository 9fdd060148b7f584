"""What the trainer can tell before it loads anything: each lack is one sentence, in seconds."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from services.base_model import resolve_checkpoint
from services.machine import Gpu, check_memory, check_writable, gpus, memory, weight_bytes
from services.trainer.settings import TrainerSettings

log = logging.getLogger(__name__)
# Private memory that importing transformers, bitsandbytes and peft adds to torch: measured 160 MB.
_LIBRARY_BYTES = 128 << 20


def check_start(settings: TrainerSettings) -> None:
    """Raises ValueError, OSError or MemoryError where the trainer cannot run."""
    check_writable("TRAINER_RUNS_DIR", settings.runs_dir)
    uses_gpu = settings.device == "cuda"
    if settings.device == "auto" and torch.version.cuda:
        uses_gpu = torch.cuda.is_available()
        if not uses_gpu:
            log.warning(
                "torch can use no GPU here: training on the CPU; TRAINER_DEVICE=cuda says why"
            )
    first_gpu = gpus(f"TRAINER_DEVICE={settings.device}", 1)[0] if uses_gpu else None
    check_fits(
        f"TRAINER_MODEL {settings.model}",
        resolve_checkpoint(settings.model, "TRAINER_MODEL"),
        gpu=first_gpu,
        load_in_4bit=settings.load_in_4bit,
        num_processes=settings.data_parallel_size,
    )


def check_fits(
    what: str, source: Path, *, gpu: Gpu | None, load_in_4bit: bool, num_processes: int = 1
) -> None:
    """Raises MemoryError or ValueError for a base that cannot be loaded; `gpu` None means the
    CPU."""
    weights = weight_bytes(source)
    parts = {"weights": weights.nf4 if load_in_4bit else weights.stored}
    if gpu is None:  # All processes share the host's memory.
        parts["libraries"] = _LIBRARY_BYTES
        parts = {name: num_processes * size for name, size in parts.items()}
    check_memory(what, parts, gpu.memory if gpu else memory())
