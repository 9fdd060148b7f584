"""Data-parallel training: one policy on several GPUs of one host, one process for each.

    rank 0          the whole service; calls that change its policy are sent to the others
    ranks 1..N-1    followers: the same base and LoRA, the same calls with the same arguments,
                    on GPUs of the same kind, so that the same bits come out

In an update every rank computes a share of each optimizer step and gets the sum of all gradients,
so that all take the same step. After every call the ranks compare their weights. What fails on one
rank fails on all, and nothing has changed; when that is impossible (a process is gone, or weights
differ) all end, rank 0 with exit code 1, and the run resumes from its last checkpoint.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Concatenate, NoReturn, ParamSpec, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

log = logging.getLogger(__name__)
_STORE_TIMEOUT = timedelta(minutes=1)  # The store exists before its ranks start.
_CALL_TIMEOUT = timedelta(days=365)  # Followers wait for rank 0 without a limit.
_MEETING_TIMEOUT = timedelta(minutes=30)  # Between the first rank to arrive and the last.
_CAUSE_S = 2.0  # Lets the watcher of the processes say first why one is gone.

Params = ParamSpec("Params")
Result = TypeVar("Result")
Unit = TypeVar("Unit")


class Mirrored(Protocol):
    """A policy as the ranks see it."""

    @property
    def ranks(self) -> Ranks: ...

    def fingerprint(self) -> object:
        """Equal on all ranks whenever a mirrored call is over."""


class PeerFailed(RuntimeError):
    """Another rank failed in a call, so that it failed on all; the policy is what it was."""


@dataclass(frozen=True, slots=True)
class _Word:
    """What a rank says when all ranks meet."""

    value: Any = None
    failure: str = ""
    is_done: bool = False  # The rank has passed the point of no return.


class Ranks:
    """The processes that train one policy. A single one is rank 0 of 1 and waits for nobody.

    Every rank makes the same calls in the same order; a rank that fails makes no further call than
    the end of its `agreed`.
    """

    def __init__(
        self,
        rank: int = 0,
        size: int = 1,
        meetings: dist.ProcessGroup | None = None,
        gradients: dist.ProcessGroup | None = None,
    ) -> None:
        self.rank = rank
        self.size = size
        self._meetings = meetings  # A group whose waits have a limit.
        self._gradients = gradients
        # Calls come from several threads, but collectives run one at a time.
        self._calling = threading.Lock()

    @classmethod
    def join(cls, device: str) -> Ranks:
        """The ranks that the environment names, once all are present. `device`: cpu or cuda."""
        if not is_launched() or os.environ["WORLD_SIZE"] == "1":
            return cls()
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # All ranks are on one host.
        try:
            store, rank, size = next(rendezvous("env://", timeout=_STORE_TIMEOUT))
            dist.init_process_group(
                "gloo", store=store, rank=rank, world_size=size, timeout=_CALL_TIMEOUT
            )
            meetings = gradients = dist.new_group(backend="gloo", timeout=_MEETING_TIMEOUT)
            if device == "cuda":
                torch.cuda.set_device(rank)  # Applies to this thread.
                gradients = dist.new_group(backend="nccl")
                # Connect now, so that a failure shows at the start.
                dist.all_reduce(torch.zeros(1, device="cuda"), group=gradients)
        except RuntimeError as error:
            log.error("the %s training processes cannot meet: %s", os.environ["WORLD_SIZE"], error)
            os._exit(1)
        if rank == 0:
            log.info("%d processes train", size)
        return cls(rank, size, meetings, gradients)

    def device(self, kind: str) -> str:
        """The device of this rank, of the `kind` cpu or cuda."""
        return f"cuda:{self.rank}" if kind == "cuda" and self.size > 1 else kind

    # --- one call on all ranks ------------------------------------------------------------------

    def mirror(
        self,
        policy: Mirrored,
        method: Callable[..., Result],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Result:
        """Call a method of `policy`; on rank 0, every follower does so as well."""
        if self.size == 1:
            return method(policy, *args, **kwargs)
        with self._calling:
            if self.rank == 0:
                with self._connected():
                    _send((method.__name__, args, kwargs))
            with self.agreed(policy.fingerprint):
                return method(policy, *args, **kwargs)

    def obey(self, policy: Mirrored) -> bool:
        """On a follower: wait for the next call and make it; False once rank 0 has left."""
        try:
            received = [None]
            dist.broadcast_object_list(received, src=0)
        except RuntimeError:  # The connection broke, so rank 0 is gone or about to be.
            return False
        if received[0] is None:
            return False
        name, args, kwargs = received[0]
        try:
            getattr(policy, name)(*args, **kwargs)
        except Exception as error:  # Rank 0 has been told, and raises.
            log.debug("%s failed", name, exc_info=error)
        return True

    @contextlib.contextmanager
    def agreed(self, proof: Callable[[], object] = lambda: None) -> Iterator[None]:
        """What fails inside on one rank fails on all; at the end every `proof` must be equal.

        Raises PeerFailed when only others failed.
        """
        if self.size == 1:
            yield
            return
        try:
            yield
            value = proof()
        except PeerFailed:  # All ranks know already.
            raise
        except Exception as error:
            self._meet(_Word(failure=f"{type(error).__name__}: {error}"))
            raise
        values = [word.value for word in self._meet(_Word(value, is_done=True))]
        if any(value != values[0] for value in values):
            self._end("the LoRA weights of the ranks differ, which need GPUs of one kind")

    # --- within a call --------------------------------------------------------------------------

    def share(self, units: Sequence[Unit], cost: Callable[[Unit], int]) -> Sequence[Unit]:
        """This rank's part: about the same cost as any other rank's, mixing large and small
        units."""
        if self.size == 1:
            return units
        shares: list[list[Unit]] = [[] for _ in range(self.size)]
        costs = [0] * self.size
        for unit in sorted(units, key=cost, reverse=True):
            rank = costs.index(min(costs))
            shares[rank].append(unit)
            costs[rank] += cost(unit)
        return shares[self.rank]

    def add_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Replace every gradient by the sum over ranks, bit for bit the same everywhere."""
        if self.size == 1:
            return
        gradients = [p.grad for p in parameters if p.grad is not None]
        assert len(gradients) == len(parameters)
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        self._meet(_Word())
        with self._connected():
            dist.all_reduce(flat, group=self._gradients)
        parts = flat.split([gradient.numel() for gradient in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))

    def gather(self, value: Result) -> list[Result]:
        """Every rank's value, in rank order, on all ranks."""
        return [value] if self.size == 1 else [word.value for word in self._meet(_Word(value))]

    # --- meeting --------------------------------------------------------------------------------

    def _meet(self, word: _Word) -> list[_Word]:
        """Every rank's word. Raises PeerFailed when another rank failed and this one did not."""
        words: list[Any] = [None] * self.size
        with self._connected():
            dist.all_gather_object(words, word, group=self._meetings)
        failures = [f"rank {rank} failed: {w.failure}" for rank, w in enumerate(words) if w.failure]
        if failures and any(w.is_done for w in words):
            self._end(f"{failures[0]}, when another had changed its weights")
        if failures and not word.failure:
            raise PeerFailed(failures[0])
        return words

    @contextlib.contextmanager
    def _connected(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            time.sleep(_CAUSE_S)
            self._end(f"the connection of the training processes broke: {error}")

    def _end(self, reason: str) -> NoReturn:
        if self.rank == 0:
            log.error("%s: the trainer exits; the next start resumes from the checkpoint", reason)
        else:  # Rank 0 sees it as well.
            time.sleep(_CAUSE_S)
        os._exit(1)


AnyMirrored = TypeVar("AnyMirrored", bound=Mirrored)


def mirrored(
    method: Callable[Concatenate[AnyMirrored, Params], Result],
) -> Callable[Concatenate[AnyMirrored, Params], Result]:
    """A method that changes the policy: called on rank 0, every rank makes the call."""

    @functools.wraps(method)
    def call(policy: AnyMirrored, /, *args: Params.args, **kwargs: Params.kwargs) -> Result:
        return policy.ranks.mirror(policy, method, args, kwargs)

    return call


# --- processes ----------------------------------------------------------------------------------


def is_launched() -> bool:
    """Whether torchrun or `followers` has started this process."""
    return {"RANK", "WORLD_SIZE"} <= os.environ.keys()


def dismiss_followers() -> None:
    """On rank 0: let every follower's `obey` return False."""
    _send(None)


def _send(call: tuple[Any, ...] | None) -> None:
    """Send a call to every follower's `obey`."""
    dist.broadcast_object_list([call], src=0)
