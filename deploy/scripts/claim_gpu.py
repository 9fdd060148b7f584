"""`claim_gpu.py COMMAND...`: take a GPU that no other replica of this host has, then run COMMAND.

Replicas of one service (`--scale rollout=N`) see the same GPUs. Each locks a file per GPU in a
folder that they share; the kernel drops the lock with the process, however it ends, and the next
replica that waits takes the GPU over.

    ROLLOUT_GPUS     the ids that this container sees, separated by commas
    GPU_CLAIMS_DIR   the shared folder (/claims)
"""

from __future__ import annotations

import fcntl
import os
import sys
import time
from pathlib import Path

_RETRY_S = 1.0


def main(command: list[str]) -> int:
    gpus = [gpu.strip() for gpu in os.environ.get("ROLLOUT_GPUS", "").split(",") if gpu.strip()]
    if not gpus:
        print("ROLLOUT_GPUS names no GPU: set it in .env, as in ROLLOUT_GPUS=1,2", file=sys.stderr)
        return 2
    if os.environ.get("ROLLOUT_TENSOR_PARALLEL_SIZE", "1") not in ("", "1"):
        print(
            "ROLLOUT_TENSOR_PARALLEL_SIZE: replicas by number have one GPU each; leave it out, or "
            "use replicas by name (docker-compose.yml), whose ROLLOUT_0_GPU may name several",
            file=sys.stderr,
        )
        return 2
    folder = Path(os.environ.get("GPU_CLAIMS_DIR", "/claims"))
    seat = claim(len(gpus), folder)
    if seat is None:
        print(f"all GPUs of {', '.join(gpus)} are taken: waiting for one", file=sys.stderr)
    while seat is None:
        time.sleep(_RETRY_S)
        seat = claim(len(gpus), folder)
    print(f"took GPU {seat + 1} of {len(gpus)} ({', '.join(gpus)})", file=sys.stderr)
    os.environ["CUDA_VISIBLE_DEVICES"] = str(seat)  # a container counts its GPUs from 0
    if cache := os.environ.get(
        "VLLM_CACHE_ROOT"
    ):  # compiled at the same time, kernels would collide
        os.environ["VLLM_CACHE_ROOT"] = f"{cache}/gpu-{seat}"
    os.execvp(command[0], command)


def claim(num_seats: int, folder: Path) -> int | None:
    """The first free seat; it stays ours until this process, or what it becomes, ends."""
    for seat in range(num_seats):
        lock = os.open(folder / f"gpu-{seat}", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            continue
        os.set_inheritable(lock, True)
        return seat
    return None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
