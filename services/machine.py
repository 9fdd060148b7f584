"""What a service needs of its machine, looked at before anything is loaded: each lack one sentence.

Memory is estimated from below (weights, and what an empty service was measured to take; neither
activations nor fragmentation), so that nothing is refused that would run. Raises ValueError for
what starting again cannot mend, MemoryError for memory that another process holds.
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
_UNLIMITED_V1 = 1 << 60  # version 1 writes a number for no limit


def size(num_bytes: float) -> str:
    """1.5 GiB, or 64 MiB."""
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.0f} MiB"


# --- weights ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class WeightBytes:
    """What the weights of a checkpoint take: as they are stored, in bf16, and as a QLoRA base."""

    stored: int  # at most 16 bits an element: wider ones are converted
    bf16: int
    nf4: int  # linears of the decoder layers in 4 bits, the rest in 16
    linears: int  # those that an adapter may have, in bf16


def weight_bytes(model_dir: Path) -> WeightBytes:
    """Read from the headers alone. Raises ValueError for files that are not whole."""
    from safetensors import SafetensorError, safe_open

    linears = linear_shapes(model_dir)
    stored = bf16 = nf4 = adapted = 0
    for path in weight_files(model_dir):
        try:
            with safe_open(path, framework="np") as tensors:
                for name in tensors.keys():  # noqa: SIM118 (not a dict)
                    tensor = tensors.get_slice(name)
                    num, dtype = math.prod(tensor.get_shape()), tensor.get_dtype()
                    is_packed = dtype == "U8"  # two 4-bit weights to an element
                    stored += num if is_packed or dtype.startswith("F8") else 2 * num
                    bf16 += 4 * num if is_packed else 2 * num
                    is_linear = name.removesuffix(".weight") in linears
                    if is_linear and name.removesuffix(".weight").endswith(LINEAR_MODULES):
                        adapted += 4 * num if is_packed else 2 * num
                    nf4 += num if is_packed else num // 2 if is_linear else 2 * num
        except SafetensorError as error:
            raise ValueError(
                f"{path} is not a whole safetensors file ({one_line(error)}): copy or download it "
                "again"
            ) from error
    return WeightBytes(stored=stored, bf16=bf16, nf4=nf4, linears=adapted)


# --- memory -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Memory:
    total_bytes: int
    free_bytes: int
    where: str  # "on this machine"


def memory(root: Path = Path("/")) -> Memory:
    """The memory this process may still take: of the machine, or of its tightest cgroup.

    Page cache counts as free, and so does swap where the cgroups allow it.
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
    """In bytes; infinite where there is no limit."""

    limit: float
    used: int
    swap_limit: float
    swap_used: float


def _cgroups(root: Path) -> Iterator[_Cgroup]:
    """The cgroups that this process is in, as far as they limit memory or swap."""
    for line in (root / "proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            mount, files = root / "sys/fs/cgroup/memory", _V1_FILES
        elif not controllers:
            mount, files = root / "sys/fs/cgroup", _V2_FILES
        else:
            continue
        # In a container the mount may be its own group, below which the path does not exist.
        group = mount / path.strip("/")
        for folder in (group, *group.parents):
            if folder.is_relative_to(mount) and (folder / files[0]).exists():
                used = _used(folder, *files[1:]) if (folder / files[1]).exists() else 0
                yield _Cgroup(_bytes(folder / files[0]), used, *_swap(folder))


def _swap(folder: Path) -> tuple[float, float]:
    """Limit and use of a cgroup's swap."""
    if (folder / "memory.swap.max").exists():
        return _bytes(folder / "memory.swap.max"), _bytes(folder / "memory.swap.current")
    if (folder / "memory.memsw.limit_in_bytes").exists():  # of memory and swap together
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
    """Bytes in use that the kernel cannot take back: page cache it can, shared memory not."""
    lines = (line.split() for line in (folder / "memory.stat").read_text().splitlines())
    values = {name: int(value) for name, value in lines}
    cache, shared, slab = (values.get(name, 0) for name in stat)
    return int((folder / current).read_text()) - (cache - shared) - slab


def check_memory(what: str, parts: Mapping[str, int], memory: Memory) -> None:
    """Raise unless the sum of `parts` (what for -> bytes) is free."""
    needed = sum(parts.values())
    if needed <= memory.free_bytes:
        return
    listed = ", ".join(f"{name} {size(num_bytes)}" for name, num_bytes in parts.items())
    sentence = (
        f"{what} needs at least {size(needed)} of memory ({listed}), and "
        f"{size(memory.free_bytes)} of {size(memory.total_bytes)} are free {memory.where}: give it "
        "more memory, or choose a smaller model"
    )
    raise ValueError(sentence) if needed > memory.total_bytes else MemoryError(sentence)


# --- GPUs ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Gpu:
    name: str
    capability: tuple[int, int]  # CUDA's compute capability: (9, 0) is Hopper
    memory: Memory


def gpus(setting: str, num: int | None = None) -> list[Gpu]:
    """The first `num` GPUs torch sees, or all; at least one. `setting` is why a GPU is needed.

    The process then holds some memory of each until it ends.
    """
    import torch

    try:
        with warnings.catch_warnings(action="ignore"):  # they say what the error says
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
        raise ValueError(_no_gpu(setting, "there is none"))
    return [
        Gpu(name, capability, Memory(total, free, f"on GPU {i} ({name})"))
        for i, (name, capability, free, total) in enumerate(found)
    ]


def _no_gpu(setting: str, reason: str) -> str:
    if "not compiled with CUDA" in reason:
        return f"{setting}: this torch is built for CPUs; install or run the CUDA build, or set cpu"
    reason = reason.removeprefix("AssertionError: ").partition(". ")[0].rstrip(".")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", os.environ.get("NVIDIA_VISIBLE_DEVICES"))
    which = "" if visible is None else f", with the GPUs {visible!r} made visible"
    return (
        f"{setting}: torch can use no GPU ({reason}{which}); give the service GPU ids that "
        "`nvidia-smi -L` lists and a driver as new as its CUDA, or set cpu"
    )


def gpus_by_a_child(setting: str) -> list[Gpu]:
    """The same from a process of its own, which takes its share of the GPUs with it."""
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
            f"{setting}: the driver did not answer within {_GPU_TIMEOUT_S:g} s; see what "
            "`nvidia-smi` says on the host"
        ) from error
    if result.returncode != 0:
        reason = result.stderr.strip() or f"the look at it ended with {result.returncode}"
        raise ValueError(reason.splitlines()[-1])
    return [
        Gpu(gpu["name"], tuple(gpu["capability"]), Memory(**gpu["memory"]))
        for gpu in json.loads(result.stdout)
    ]


# --- folders ------------------------------------------------------------------------------------


def check_writable(setting: str, folder: Path) -> None:
    """Make the folder, and raise ValueError unless this user may write to it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(unwritable(setting, folder, error)) from error


def unwritable(setting: str, folder: Path, error: OSError) -> str:
    return (
        f"{setting}: {folder} cannot be written ({os.strerror(error.errno or 0)}); mount a volume "
        f"there that user {os.getuid()} may write to, or set {setting} to another folder"
    )


if __name__ == "__main__":
    try:
        print(json.dumps([asdict(gpu) for gpu in gpus(sys.argv[1])]))
    except ValueError as failure:
        sys.exit(str(failure))
