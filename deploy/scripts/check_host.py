"""Checks whether this machine can run Tandem.

Prints one sentence per unmet requirement, and exits with 1 if there is any. Uses only the standard
library and runs on Python 3.6 or newer, so that it can tell an old Python that it is too old.
"""

import ctypes
import platform
import re
import sys

OLDEST_PYTHON = (3, 11)
NEWEST_PYTHON = (3, 13)  # deploy/requirements/cpu.txt is resolved for this range
MEMORY_GB = 8
MEMORY_TOLERANCE_GB = 1  # memory that firmware and kernel may reserve on an 8 GB machine
MEMORY_LIMITS = (
    "/sys/fs/cgroup/memory.max",
    "/sys/fs/cgroup/memory/memory.limit_in_bytes",
)


def main() -> int:
    system, machine = platform.system(), platform.machine()
    if (system, machine) != ("Linux", "x86_64"):
        tell(
            f"This machine is {system} on {machine}, but the pinned packages are built for x86-64 "
            "Linux: use such a machine or a virtual machine."
        )
        return 1
    unmet = [*python_obstacles(), *numa_obstacles(), *memory_obstacles(), *cpu_obstacles()]
    for sentence in unmet:
        tell(sentence)
    if not unmet:
        for sentence in [*python_notes(), *cpu_notes()]:
            tell("Note: " + sentence)
    return 1 if unmet else 0


def tell(sentence: str) -> None:
    print(sentence, file=sys.stderr)


def python_obstacles() -> "list[str]":
    if sys.version_info[:2] >= OLDEST_PYTHON:
        return []
    return [
        f"{sys.executable} is Python {platform.python_version()}, but Tandem needs "
        f"{dotted(OLDEST_PYTHON)} or newer: install it and run "
        f"`make setup PYTHON=python{dotted(OLDEST_PYTHON)}`."
    ]


def python_notes() -> "list[str]":
    if sys.version_info[:2] <= NEWEST_PYTHON:
        return []
    return [
        f"{sys.executable} is Python {platform.python_version()}, but the pinned packages are "
        f"resolved for {dotted(OLDEST_PYTHON)} to {dotted(NEWEST_PYTHON)}: if the installation "
        f"fails, run `make setup PYTHON=python{dotted(NEWEST_PYTHON)}`."
    ]


def numa_obstacles() -> "list[str]":
    try:
        ctypes.CDLL("libnuma.so.1")
    except OSError:
        return [
            "The library libnuma.so.1, which vLLM loads, is missing: install it with "
            "`apt-get install libnuma1` on Debian and Ubuntu, or `dnf install numactl-libs` on "
            "Fedora."
        ]
    return []


def memory_obstacles() -> "list[str]":
    memory_gb = available_memory_bytes() / 1e9
    if memory_gb >= MEMORY_GB - MEMORY_TOLERANCE_GB:
        return []
    return [
        f"This machine (or its container) has {memory_gb:.1f} GB of memory, but two services with "
        f"torch need about {MEMORY_GB} GB: add memory or raise the container's limit."
    ]


def available_memory_bytes() -> int:
    """Memory of the machine, or the limit of the container if that is lower."""
    sizes = [int(found) * 1024 for found in re.findall(r"MemTotal: +(\d+)", read("/proc/meminfo"))]
    sizes += [int(text) for text in map(read, MEMORY_LIMITS) if text.isdigit()]
    return min(sizes)


def cpu_obstacles() -> "list[str]":
    if "avx2" in cpu_flags():
        return []
    return [
        "This CPU has no AVX2, which vLLM for CPU needs: use a machine with a newer CPU, or let "
        "the hypervisor expose the host's CPU features (`-cpu host` in QEMU)."
    ]


def cpu_notes() -> "list[str]":
    if cpu_flags() & {"avx512f", "amx_tile"}:
        return []
    return [
        "this CPU has neither AVX-512 nor AMX, which an FP8 KV cache needs on a CPU: with "
        "ROLLOUT_KV_CACHE_DTYPE=fp8 the rollout service falls back to `auto`."
    ]


def cpu_flags() -> "set[str]":
    found = re.search(r"^flags\s*:(.*)$", read("/proc/cpuinfo"), re.MULTILINE)
    return set(found.group(1).split()) if found else set()


def read(path: str) -> str:
    """The stripped text of a file; empty if it cannot be read, for example on an older kernel."""
    try:
        with open(path) as file:
            return file.read().strip()
    except OSError:
        return ""


def dotted(version: "tuple[int, int]") -> str:
    return "{}.{}".format(*version)


if __name__ == "__main__":
    sys.exit(main())
