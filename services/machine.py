"""Checks of the machine before a service loads anything; a failed check is one sentence.

The memory estimate is a lower bound (weights plus the measured size of an empty service, without
activations and fragmentation), so that no working setup is refused. Raises ValueError for a problem
that a restart cannot solve, and MemoryError for memory that another process holds.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from services.boot import one_line
from shared.adapters import LINEAR_MODULES
from shared.model_folder import linear_shapes, weight_files

_GPU_TIMEOUT_S = 120.0
_V2_FILES = ("memory.max", "memory.current", ("file", "shmem", "slab_reclaimable"))
_V1_FILES = ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_cache", "total_shmem", ""))
_UNLIMITED_V1 = 1 << 60  # cgroup v1 writes a number at least this large for "no limit".


def size(num_bytes: float) -> str:
    """1.5 GiB, or 64 MiB."""
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.0f} MiB"


# --- weights ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class WeightBytes:
    """Sizes of the weights of a checkpoint, in bytes."""

    stored: int  # As stored, but at most 16 bits an element because wider ones are converted.
    bf16: int  # All weights in bf16.
    nf4: int  # As a QLoRA base: linears of the decoder layers in 4 bits, the rest in 16.
    linears: int  # The linears that an adapter can target, in bf16.


def weight_bytes(model_dir: Path) -> WeightBytes:
    """Sizes from the file headers alone. Raises ValueError for a truncated file."""
    from safetensors import SafetensorError, safe_open

    linears = linear_shapes(model_dir)
    stored = bf16 = nf4 = adapted = 0
    for path in weight_files(model_dir):
        try:
            with safe_open(path, framework="np") as tensors:
                for name in tensors.keys():  # noqa: SIM118 (not a dict)
                    tensor = tensors.get_slice(name)
                    num, dtype = math.prod(tensor.get_shape()), tensor.get_dtype()
                    is_packed = dtype == "U8"  # Two 4-bit weights per element.
                    stored += num if is_packed or dtype.startswith("F8") else 2 * num
                    bf16 += 4 * num if is_packed else 2 * num
                    is_linear = name.removesuffix(".weight") in linears
                    if is_linear and name.removesuffix(".weight").endswith(LINEAR_MODULES):
                        adapted += 4 * num if is_packed else 2 * num
                    nf4 += num if is_packed else num // 2 if is_linear else 2 * num
        except SafetensorError as error:
            raise ValueError(
                f"{path} is not a complete safetensors file ({one_line(error)}): copy or download "
                "it again"
            ) from error
    return WeightBytes(stored=stored, bf16=bf16, nf4=nf4, linears=adapted)


# --- memory -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Memory:
    total_bytes: int
    free_bytes: int
    where: str  # Where the memory is, as a phrase such as "on this machine".


def memory(root: Path = Path("/")) -> Memory:
    """The memory that this process can still use, on the machine or in its tightest cgroup.

    Page cache counts as free, and so does swap as far as the cgroups allow it.
    """
    lines = (line.partition(":") for line in (root / "proc/meminfo").read_text().splitlines())
    info = {name: int(value.split()[0]) * 1024 for name, _, value in lines}
    groups = list(_cgroups(root))
    swap = int(min([info["SwapTotal"], *(group.swap_limit for group in groups)]))
    left = (max(group.swap_limit - group.swap_used, 0) for group in groups)
    swap_free = int(min([info["SwapFree"], *left]))
    tightest = Memory(info["MemTotal"] + swap, info["MemAvailable"] + swap_free, "on this machine")
    for group in groups:
        if group.limit - group.used + swap_free < tightest.free_bytes:
            where = f"in this container (its limit is {size(group.limit)})"
            free = max(int(group.limit - group.used + swap_free), 0)
            tightest = Memory(int(group.limit) + swap, free, where)
    return tightest


@dataclass(frozen=True, slots=True)
class _Cgroup:
    """Memory and swap of one cgroup, in bytes; a missing limit is infinite."""

    limit: float
    used: int
    swap_limit: float
    swap_used: float


def _cgroups(root: Path) -> Iterator[_Cgroup]:
    """The cgroups of this process that may limit memory or swap."""
    for line in (root / "proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            mount, files = root / "sys/fs/cgroup/memory", _V1_FILES
        elif not controllers:
            mount, files = root / "sys/fs/cgroup", _V2_FILES
        else:
            continue
        # In a container the mount may already be the process's group: the path below is missing.
        group = mount / path.strip("/")
        for folder in (group, *group.parents):
            if folder.is_relative_to(mount) and (folder / files[0]).exists():
                used = _used(folder, *files[1:]) if (folder / files[1]).exists() else 0
                yield _Cgroup(_bytes(folder / files[0]), used, *_swap(folder))


def _swap(folder: Path) -> tuple[float, float]:
    """Limit and use of a cgroup's swap, in bytes."""
    if (folder / "memory.swap.max").exists():
        return _bytes(folder / "memory.swap.max"), _bytes(folder / "memory.swap.current")
    if (folder / "memory.memsw.limit_in_bytes").exists():  # Memory and swap together.
        both, both_used, limit, used = (
            _bytes(folder / f"memory.{name}_in_bytes")
            for name in ("memsw.limit", "memsw.usage", "limit", "usage")
        )
        return both if both == math.inf else max(both - limit, 0), both_used - used
    return math.inf, 0


def _bytes(file: Path) -> float:
    text = file.read_text().strip()
    return math.inf if text == "max" or int(text) >= _UNLIMITED_V1 else int(text)


def _used(folder: Path, current: str, stat: tuple[str, str, str]) -> int:
    """Bytes in use, less reclaimable page cache and slab; shared memory is not reclaimable."""
    lines = (line.split() for line in (folder / "memory.stat").read_text().splitlines())
    values = {name: int(value) for name, value in lines}
    cache, shared, slab = (values.get(name, 0) for name in stat)
    return int((folder / current).read_text()) - (cache - shared) - slab


def check_memory(what: str, parts: Mapping[str, int], memory: Memory) -> None:
    """Raise unless the sum of `parts` (purpose -> bytes) is free.

    Raises ValueError if it exceeds the total memory, MemoryError if it exceeds the free memory.
    """
    needed = sum(parts.values())
    if needed <= memory.free_bytes:
        return
    listed = ", ".join(f"{name} {size(num_bytes)}" for name, num_bytes in parts.items())
    sentence = (
        f"{what} needs at least {size(needed)} of memory ({listed}), but only "
        f"{size(memory.free_bytes)} of {size(memory.total_bytes)} are free {memory.where}: give it "
        "more memory, or choose a smaller model"
    )
    raise ValueError(sentence) if needed > memory.total_bytes else MemoryError(sentence)


# --- GPUs ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Gpu:
    name: str
    capability: tuple[int, int]  # CUDA compute capability; (9, 0) is Hopper.
    memory: Memory


def gpus(setting: str, num: int | None = None) -> list[Gpu]:
    """The first `num` GPUs that torch sees, or all. `setting` is the setting that needs a GPU.

    The process holds some memory of each GPU until it ends. Raises ValueError without a GPU.
    """
    import torch

    try:
        with warnings.catch_warnings(action="ignore"):  # The warnings repeat the error.
            torch.cuda.init()
            found = [
                (
                    torch.cuda.get_device_name(i),
                    torch.cuda.get_device_capability(i),
                    *torch.cuda.mem_get_info(i),
                )
                for i in range(torch.cuda.device_count())[:num]
            ]
    except (AssertionError, RuntimeError) as error:
        raise ValueError(_no_gpu(setting, one_line(error))) from error
    if not found:
        raise ValueError(_no_gpu(setting, "none is visible"))
    return [
        Gpu(name, capability, Memory(total, free, f"on GPU {i} ({name})"))
        for i, (name, capability, free, total) in enumerate(found)
    ]


def _no_gpu(setting: str, reason: str) -> str:
    if "not compiled with CUDA" in reason:
        return f"{setting}: this torch is a CPU build; install the CUDA build, or set cpu"
    reason = reason.removeprefix("AssertionError: ").partition(". ")[0].rstrip(".")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", os.environ.get("NVIDIA_VISIBLE_DEVICES"))
    which = "" if visible is None else f"; visible GPUs: {visible!r}"
    return (
        f"{setting}: torch cannot use a GPU ({reason}{which}); give the service GPU ids that "
        "`nvidia-smi -L` lists and a driver that supports its CUDA version, or set cpu"
    )


def gpus_by_a_child(setting: str) -> list[Gpu]:
    """`gpus`, called in a child process, which releases its GPU memory when it ends."""
    try:
        result = subprocess.run(
            [sys.executable, "-m", "services.machine", setting],
            capture_output=True,
            text=True,
            check=False,
            timeout=_GPU_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired as error:
        raise TimeoutError(
            f"{setting}: the driver did not answer within {_GPU_TIMEOUT_S:g} s; run `nvidia-smi` "
            "on the host"
        ) from error
    if result.returncode != 0:
        reason = result.stderr.strip() or f"the GPU check exited with {result.returncode}"
        raise ValueError(reason.splitlines()[-1])
    return [
        Gpu(gpu["name"], tuple(gpu["capability"]), Memory(**gpu["memory"]))
        for gpu in json.loads(result.stdout)
    ]


# --- folders ------------------------------------------------------------------------------------


def check_writable(setting: str, folder: Path) -> None:
    """Create the folder, and raise ValueError unless this user can write to it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(unwritable(setting, folder, error)) from error


def unwritable(setting: str, folder: Path, error: OSError) -> str:
    return (
        f"{setting}: {folder} is not writable ({os.strerror(error.errno or 0)}); mount a volume "
        f"there that user {os.getuid()} can write to, or set {setting} to another folder"
    )


if __name__ == "__main__":
    try:
        print(json.dumps([asdict(gpu) for gpu in gpus(sys.argv[1])]))
    except ValueError as failure:
        sys.exit(str(failure))
