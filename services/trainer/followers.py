"""The processes of ranks 1..N-1: rank 0 starts them, watches them, and ends them.

Rank 0 starts its followers itself, with the environment that torchrun would give them: torchrun
turns every exit code into 1, even 0 after a SIGTERM, and kills what has not stopped after 30 s.
`torchrun --standalone --nproc-per-node N -m services.trainer` works too, within these limits.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch.distributed import Store, TCPStore  # type: ignore[attr-defined]

from services.trainer.policy.ranks import Mirrored, dismiss_followers, is_launched

log = logging.getLogger(__name__)
_LEAVE_TIMEOUT_S = 10.0


_PR_SET_PDEATHSIG = 1  # prctl(2)


def own_rank() -> int:
    """The rank of this process, as set by whatever started it."""
    return int(os.environ["RANK"]) if is_launched() else 0


def num_processes(requested: int, device: str) -> int:
    """How many processes train: as many as torchrun started, otherwise `requested`.

    `device` is the setting. Raises ValueError, in one sentence, for what this host cannot do.
    """
    size = requested
    if is_launched():
        size = int(os.environ["WORLD_SIZE"])
        if int(os.environ.get("LOCAL_WORLD_SIZE", size)) != size:
            raise ValueError(
                f"torchrun started {size} processes on several hosts: start all of them on one"
            )
        if requested not in (1, size):
            raise ValueError(
                f"TRAINER_DATA_PARALLEL_SIZE is {requested} and torchrun started {size} processes: "
                "leave the setting out, or torchrun"
            )
    if size == 1:
        return 1
    uses_cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    if uses_cuda and size > (num_gpus := torch.cuda.device_count()):
        raise ValueError(
            f"TRAINER_DATA_PARALLEL_SIZE is {size}, this process sees {num_gpus} GPUs: set it to "
            "that at most, or give the trainer more"
        )
    return size


@contextlib.contextmanager
def followers(size: int) -> Iterator[None]:
    """Inside, ranks 1..size-1 run in processes of their own; a failing one ends this one too."""
    processes: list[subprocess.Popen[bytes]] = []
    leaving = threading.Event()
    if size > 1 and not is_launched():
        _store = _serve_rendezvous(size)  # Keeps the store alive.
        for rank in range(1, size):
            processes.append(_start_follower(rank))
            watch = (processes[-1], rank, leaving)
            threading.Thread(target=_watch, args=watch, daemon=True).start()
    try:
        yield
    finally:
        leaving.set()
        timeout_s = 0.0
        if dist.is_initialized():
            # Followers leave by themselves when the base cannot be loaded.
            with contextlib.suppress(RuntimeError):
                dismiss_followers()
            dist.destroy_process_group()
            timeout_s = _LEAVE_TIMEOUT_S
        for process in processes:
            try:
                process.wait(timeout_s)
            except subprocess.TimeoutExpired:  # It has nothing to save.
                process.kill()
                process.wait()


def _serve_rendezvous(size: int) -> Store:
    """Serve the store where the ranks meet, and export its address to this process and its
    children.

    The socket is our own, because a store's own would listen on all interfaces.
    """
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    os.environ.update(
        RANK="0",
        LOCAL_RANK="0",
        WORLD_SIZE=str(size),
        LOCAL_WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_USE_AGENT_STORE="True",  # Rank 0 joins the existing store.
    )
    return TCPStore(
        "127.0.0.1",
        port,
        is_master=True,
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )


def _start_follower(rank: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "services.trainer"],
        env=os.environ | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        stdin=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C is for rank 0 alone.
    )


def _watch(process: subprocess.Popen[bytes], rank: int, leaving: threading.Event) -> None:
    code = process.wait()
    if code and not leaving.is_set():  # A follower exits with 0 when rank 0 leaves.
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"exited with {code}"
        log.error(
            "training process %d (pid %d) %s: the trainer exits; the next start resumes from the "
            "checkpoint",
            rank,
            process.pid,
            how,
        )
        os._exit(1)


def follow(load: Callable[[], Mirrored]) -> int:
    """The life of a follower: load the policy and obey rank 0 until it leaves; returns the exit
    code."""
    # Rank 0 needs this process until it has stopped in good order.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    try:
        policy = load()
    except Exception as error:  # Rank 0 has been told, and ends.
        log.debug("loading failed", exc_info=error)
    else:
        while policy.ranks.obey(policy):
            pass
    if dist.is_initialized():
        dist.destroy_process_group()
    return 0
