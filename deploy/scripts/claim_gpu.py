"""`claim_gpu.py COMMAND...`: claim a GPU that no other replica of this host uses, and run COMMAND.

All replicas of one service (`--scale rollout=N`) see the same GPUs. Each locks the file of its GPU
in a shared folder. The kernel releases the lock when the process ends, however it ends, and the
next waiting replica claims the GPU.

    ROLLOUT_GPUS     comma-separated ids of the GPUs that this container sees
    GPU_CLAIMS_DIR   shared folder with the lock files (default: /claims)
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
        print(
            "ROLLOUT_GPUS is empty: set it in .env, for example ROLLOUT_GPUS=1,2", file=sys.stderr
        )
        return 2
    if os.environ.get("ROLLOUT_TENSOR_PARALLEL_SIZE", "1") not in ("", "1"):
        print(
            "ROLLOUT_TENSOR_PARALLEL_SIZE: scaled replicas have one GPU each; remove this setting, "
            "or use named replicas (docker-compose.yml), whose ROLLOUT_0_GPU may list several GPUs",
            file=sys.stderr,
        )
        return 2
    folder = Path(os.environ.get("GPU_CLAIMS_DIR", "/claims"))
    seat = claim(len(gpus), folder)
    if seat is None:
        print(f"all GPUs are taken ({', '.join(gpus)}): waiting for one", file=sys.stderr)
    while seat is None:
        time.sleep(_RETRY_S)
        seat = claim(len(gpus), folder)
    print(f"took GPU {seat + 1} of {len(gpus)} ({', '.join(gpus)})", file=sys.stderr)
    os.environ["CUDA_VISIBLE_DEVICES"] = str(seat)  # containers number their GPUs from 0
    # Replicas that compile kernels into one folder at the same time would collide.
    if cache := os.environ.get("VLLM_CACHE_ROOT"):
        os.environ["VLLM_CACHE_ROOT"] = f"{cache}/gpu-{seat}"
    os.execvp(command[0], command)


def claim(num_seats: int, folder: Path) -> int | None:
    """Lock the first free seat, until this process or the command that replaces it ends.

    Returns the index of the seat, or None if all are taken.
    """
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
