"""Whatever happens to the replicas, in whatever order: what design §5 says of completions holds."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any, Literal

from hypothesis import given, settings
from hypothesis import strategies as st

from services.trainer.fleet.fleet import Fleet
from services.trainer.fleet.member import Requirements
from shared.errors import ConformanceFailed, Unavailable
from shared.schemas import CompletionGroup, GenerateRequest, ReplicaRegistration, SamplingParams
from tests import virtual_clock
from tests.fake_replica import (
    BASE,
    RUN,
    FakeProver,
    FakeReplica,
    adapter_of,
    check_groups,
    policy_at,
)

NUM_REPLICAS, N, MAX_TOKENS = 3, 2, 30
EVENTS = (
    "crash",
    "boot",
    "hang",
    "wake_up",
    "drain",
    "lie",
    "fill",  # the next requests are answered with 429
    "register",
    "remove",
    "sync",
    "generate",
)
Event = tuple[str, int, float]  # what, to which replica, seconds until the next one


class World:
    """A run of a fleet of three, to which events happen."""

    def __init__(self, in_flight: Literal["finish", "continue"]) -> None:
        self.replicas = [FakeReplica(f"http://10.0.0.{i}:8000") for i in range(NUM_REPLICAS)]
        self.fleet = Fleet([], connect=lambda url: self.by_url[url].client())
        self.by_url = {replica.url: replica for replica in self.replicas}
        self.requirements = Requirements(
            run=RUN,
            base=BASE,
            lora_rank=16,
            num_context_tokens=64,
            may_replace_run=lambda _: False,
            prover=FakeProver(self.replicas),
            in_flight=in_flight,
        )
        self.version = 0
        self.generating: list[asyncio.Future[list[CompletionGroup]]] = []

    async def live(self, events: list[Event]) -> None:
        self.fleet.start()
        for index in range(NUM_REPLICAS):
            self.register(index)
        await self.fleet.begin(self.requirements, timeout_s=10)
        for name, index, pause_s in events:
            await self.happen(name, index)
            await asyncio.sleep(pause_s)
        await self.heal()
        groups = [group for groups in await asyncio.gather(*self.generating) for group in groups]
        check_groups(groups, n=N, max_tokens=MAX_TOKENS)
        await asyncio.sleep(60)
        self.check_rest()
        await self.fleet.aclose()

    async def happen(self, name: str, index: int) -> None:
        replica = self.replicas[index]
        match name:
            case "lie":
                replica.lies = True
            case "fill":
                replica.num_busy_answers = 2
            case "register":
                self.register(index)
            case "remove":
                self.fleet.remove(f"10.0.0.{index}:8000")
            case "sync":
                self.version += 1
                # It may fail now: the goal stays, and replicas get it when they can.
                with contextlib.suppress(Unavailable, ConformanceFailed):
                    await self.fleet.sync(adapter_of(policy_at(self.version)), timeout_s=5)
            case "generate":
                self.generate()
            case _:
                getattr(replica, name)()

    def register(self, index: int) -> None:
        self.fleet.register(ReplicaRegistration(url=self.replicas[index].url))

    def generate(self) -> None:
        sampling = SamplingParams(n=N, max_tokens=MAX_TOKENS, seed=1)
        requests = [
            GenerateRequest(prompts=((3 + i,),), sampling=sampling, policy=policy_at(self.version))
            for i in range(4)
        ]
        self.generating.append(
            asyncio.ensure_future(self.fleet.generate(requests, timeout_s=10_000))
        )

    async def heal(self) -> None:
        """In the end every replica is there again, and honest."""
        for index, replica in enumerate(self.replicas):
            replica.lies = False
            replica.boot()
            self.register(index)
        await asyncio.sleep(60)

    def check_rest(self) -> None:
        """Nothing runs any more: nothing is counted as outstanding, and all have the newest."""
        for status in self.fleet.status():
            assert status.state == "serving", status
            assert status.num_outstanding_completions == status.num_outstanding_tokens == 0
            assert status.policy == policy_at(self.version)
        for replica in self.replicas:
            assert replica.num_streams == 0
            assert replica.served == replica.newest


event = st.tuples(
    st.sampled_from(EVENTS), st.integers(0, NUM_REPLICAS - 1), st.sampled_from([0.0, 0.1, 1.0, 8.0])
)


@given(events=st.lists(event, max_size=25), in_flight=st.sampled_from(["finish", "continue"]))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_no_completion_is_lost_doubled_or_attributed_to_the_wrong_policy(
    events: list[Event], in_flight: Any
) -> None:
    """Design §5.1-4. Fakes refuse what was not proven to them since their boot, and their tokens
    say which weights made them: trl#7176, NeMo-RL#3589, ms-swift#9855, miles#2075, trl#7017."""

    async def live() -> None:
        await World(in_flight).live(events)

    virtual_clock.run(live())
