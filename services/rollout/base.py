"""The base the trainer trains: source checkpoint -> NF4 -> dequantized bf16 checkpoint, cached.

QLoRA computes with 4-bit weights; a replica that serves the original 16-bit ones samples from
another model. So each linear is quantized and dequantized exactly as the trainer's bitsandbytes
config does, once, and vLLM loads the result as an ordinary bf16 model. Quantizing runs in a process
of its own, which takes its memory (on a GPU also its CUDA context) with it when it ends.
"""

from __future__ import annotations

import logging
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

from services.base_model import resolve_checkpoint, write_dense
from services.boot import one_line
from services.machine import check_memory, check_writable, memory, size, weight_bytes
from shared.model_folder import base_identity, linear_shapes
from shared.schemas import BaseIdentity, QuantizationRecipe

log = logging.getLogger(__name__)
_ABANDONED_S = 24 * 3600.0
_TORCH_BYTES = 256 << 20  # private memory with torch, transformers, bitsandbytes: measured 308 MB


@dataclass(frozen=True, slots=True)
class Base:
    """What the engine loads (`path`) and whose weights these are (`identity`)."""

    path: Path
    identity: BaseIdentity
    linear_shapes: dict[str, tuple[int, int]]  # Module path -> (out, in).


def prepare_base(model: str, *, exact: bool, cache_dir: Path, device: str) -> Base:
    """The base to serve. With `exact` the dequantized NF4 weights, built on first use."""
    source = resolve_checkpoint(model, "ROLLOUT_MODEL")
    if not exact:
        return Base(source, base_identity(source, None), linear_shapes(source))
    recipe = QuantizationRecipe()
    identity = base_identity(source, recipe)
    digests = identity.weights, identity.recipe, identity.tokenizer, identity.chat_template
    name = "-".join((digest or "none")[:16] for digest in digests)
    path = cache_dir.expanduser() / "bases" / name
    if not path.is_dir():
        _build(source, path, device)
    return Base(path, identity, linear_shapes(path))


def _build(source: Path, path: Path, device: str) -> None:
    check_writable("ROLLOUT_CACHE_DIR", path.parent)
    for abandoned in path.parent.glob(path.name + ".*"):  # Left by a process that was killed.
        if time.time() - abandoned.stat().st_mtime > _ABANDONED_S:
            shutil.rmtree(abandoned, ignore_errors=True)
    _check_room(source, path.parent, device)
    building = Path(tempfile.mkdtemp(prefix=path.name + ".", dir=path.parent))
    log.info("building the exact base of %s in %s (once)", source, path)
    command = [sys.executable, "-m", "services.rollout.base", str(source), str(building), device]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode != 0:
            raise _build_failure(source, path.parent, result)
        try:
            building.rename(path)
        except OSError:
            if not path.is_dir():  # Otherwise another replica was faster.
                raise
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _check_room(source: Path, folder: Path, device: str) -> None:
    """Raise unless memory and disk can hold the base, in bf16 and where it is built in 4 bits."""
    weights = weight_bytes(source)
    parts = {"bf16 weights": weights.bf16, "torch": _TORCH_BYTES}
    if device == "cpu":
        parts["4-bit weights"] = weights.nf4
    check_memory(f"building the exact base of {source}", parts, memory())
    if (free := shutil.disk_usage(folder).free) < weights.bf16:
        raise ValueError(
            f"ROLLOUT_CACHE_DIR: {folder} has {size(free)} free, the exact base of {source} takes "
            f"{size(weights.bf16)}; give the volume more space, or set ROLLOUT_CACHE_DIR to another"
        )


def _build_failure(
    source: Path, folder: Path, result: subprocess.CompletedProcess[str]
) -> Exception:
    log.debug("building the base failed:\n%s", result.stderr)
    what = f"the exact base of {source} could not be built in {folder}"
    if result.returncode == -signal.SIGKILL:
        return MemoryError(f"{what}: the kernel killed it, as it does when memory runs out")
    if result.returncode < 0:
        return RuntimeError(f"{what}: it was ended by {signal.Signals(-result.returncode).name}")
    return ValueError(f"{what}: {result.stderr.strip().splitlines()[-1]}")


if __name__ == "__main__":
    try:
        write_dense(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
    except Exception as error:  # The last line of output is what the service passes on.
        traceback.print_exc()
        sys.exit(one_line(error))
