"""Can this machine run Tandem? One sentence per unmet requirement; exits 1 if there is one.

Standard library only, and readable by every Python since 3.6, so that an old one is told so.
"""

import ctypes
import platform
import re
import sys

OLDEST_PYTHON = (3, 11)
NEWEST_PYTHON = (3, 13)  # deploy/requirements/cpu.txt is resolved for these
MEMORY_GB = 8
MEMORY_TOLERANCE_GB = 1  # what firmware and kernel keep of an 8 GB machine
MEMORY_LIMITS = (
    "/sys/fs/cgroup/memory.max",
    "/sys/fs/cgroup/memory/memory.limit_in_bytes",
)


def main() -> int:
    system, machine = platform.system(), platform.machine()
    if (system, machine) != ("Linux", "x86_64"):
        tell(
            f"This machine is {system} on {machine}, and the pinned packages are built for x86-64 "
            "Linux: use such a machine, a virtual one included."
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
        f"{sys.executable} is Python {platform.python_version()}, and Tandem needs "
        f"{dotted(OLDEST_PYTHON)} or newer: install one and name it, as in "
        f"`make setup PYTHON=python{dotted(OLDEST_PYTHON)}`."
    ]


def python_notes() -> "list[str]":
    if sys.version_info[:2] <= NEWEST_PYTHON:
        return []
    return [
        f"{sys.executable} is Python {platform.python_version()}, and the pinned packages are "
        f"resolved for {dotted(OLDEST_PYTHON)} to {dotted(NEWEST_PYTHON)}: if the installation "
        f"fails, name another one, as in `make setup PYTHON=python{dotted(NEWEST_PYTHON)}`."
    ]


def numa_obstacles() -> "list[str]":
    try:
        ctypes.CDLL("libnuma.so.1")
    except OSError:
        return [
            "The library libnuma.so.1, which vLLM loads, is not on this machine: install it, on "
            "Debian and Ubuntu with `apt-get install libnuma1`, on Fedora with "
            "`dnf install numactl-libs`."
        ]
    return []


def memory_obstacles() -> "list[str]":
    memory_gb = available_memory_bytes() / 1e9
    if memory_gb >= MEMORY_GB - MEMORY_TOLERANCE_GB:
        return []
    return [
        f"This machine (or its container) has {memory_gb:.1f} GB of memory, and two services with "
        f"torch need about {MEMORY_GB} GB: give it more."
    ]


def available_memory_bytes() -> int:
    """What the machine has, or the limit of the container if that is less."""
    sizes = [int(found) * 1024 for found in re.findall(r"MemTotal: +(\d+)", read("/proc/meminfo"))]
    sizes += [int(text) for text in map(read, MEMORY_LIMITS) if text.isdigit()]
    return min(sizes)


def cpu_obstacles() -> "list[str]":
    if "avx2" in cpu_flags():
        return []
    return [
        "This CPU has no AVX2, which vLLM for CPU needs: use a machine with a newer CPU, or let "
        "the hypervisor show the host's (`-cpu host` in QEMU)."
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
    """The text of a file, stripped; empty if this kernel does not have it."""
    try:
        with open(path) as file:
            return file.read().strip()
    except OSError:
        return ""


def dotted(version: "tuple[int, int]") -> str:
    return "{}.{}".format(*version)


if __name__ == "__main__":
    sys.exit(main())
