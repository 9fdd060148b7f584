"""Admit, lease, retire: on a fake engine that notes what is loaded."""

from __future__ import annotations

import asyncio
import hashlib
from contextlib import AbstractContextManager, AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from services.rollout.policies import Admission, Lease, PolicyStore, VerifiedAdapter
from shared.adapters import ADAPTER_WEIGHTS
from shared.errors import InvalidAdapter, NoFreeSlot, RunConflict, StaleVersion, UnknownPolicy
from shared.schemas import BASE_POLICY, AdapterManifest, BaseIdentity, PolicyId, SamplingParams
from tests.fake_engine import FakeEngine

pytestmark = pytest.mark.anyio

BASE = BaseIdentity(weights="0" * 64, recipe=None, tokenizer="1" * 64, chat_template=None)


class Store:
    """A PolicyStore with two live policies, hence three slots, and adapters to admit."""

    def __init__(self, root: Path, *, wait_s: float = 5.0) -> None:
        self.engine = FakeEngine()
        self.store = PolicyStore(self.engine, max_live_policies=2, wait_s=wait_s)
        self.root = root
        self._num_folders = 0

    def adapter(self, policy: PolicyId, content: str = "") -> VerifiedAdapter:
        self._num_folders += 1
        path = self.root / f"{self._num_folders}"
        path.mkdir()
        manifest = AdapterManifest(
            policy=policy, base=BASE, rank=1, scaling=1.0, target_modules=("q_proj",)
        )
        digest = hashlib.sha256(f"{policy}{content}".encode()).hexdigest()
        return VerifiedAdapter(manifest, digest, path, num_bytes=10)

    async def admit(self, policy: PolicyId, **options: Any) -> Admission:
        return await self.store.admit(self.adapter(policy), **options)

    @property
    def resident(self) -> list[PolicyId]:
        return [item.policy for item in self.store.resident()]

    @property
    def num_loaded(self) -> int:
        return len(self.engine.loaded)


def v(version: int, *, run: str = "run", incarnation: int = 1) -> PolicyId:
    return PolicyId(run_id=run, incarnation=incarnation, version=version)


@pytest.fixture
def fakes(tmp_path: Path) -> Store:
    return Store(tmp_path)


async def settle() -> None:
    """Let every task that can run now run."""
    for _ in range(20):
        await asyncio.sleep(0)


async def test_a_fresh_replica_serves_the_base_which_needs_no_slot(fakes: Store) -> None:
    assert fakes.store.newest == BASE_POLICY
    for policy in (None, BASE_POLICY, v(0, run="any")):
        with fakes.store.lease(policy, "r", interruptible=True) as lease:
            assert lease.adapter is None


async def test_an_admitted_version_becomes_the_newest(fakes: Store) -> None:
    admission = await fakes.admit(v(1))
    assert (admission.outcome, admission.retired) == ("loaded", ())
    with fakes.store.lease(None, "r", interruptible=True) as lease:
        assert (lease.policy, lease.adapter) == (v(1), fakes.engine.loaded[0])


async def test_every_version_has_a_name_and_id_of_its_own_even_when_it_comes_back(
    fakes: Store,
) -> None:
    seen = []
    for policy in (v(1), v(1, run="other"), v(1), v(1, incarnation=2)):
        await fakes.admit(policy, replace_run=True)
        seen.append(fakes.engine.loaded[-1])
    assert len({adapter.slot_id for adapter in seen}) == 4
    assert len({adapter.name for adapter in seen}) == 4


async def test_two_versions_live_and_the_oldest_retires(fakes: Store) -> None:
    await fakes.admit(v(1))
    await fakes.admit(v(2))
    admission = await fakes.admit(v(3))
    assert admission.retired == (v(1),)
    assert fakes.resident == [v(2), v(3)]
    assert fakes.num_loaded == 2
    assert sorted(path.name for path in fakes.root.iterdir()) == ["2", "3"]


async def test_a_leased_version_outlives_newer_ones_and_retires_on_a_later_admit(
    fakes: Store,
) -> None:
    await fakes.admit(v(1))
    with fakes.store.lease(v(1), "r", interruptible=True):
        await fakes.admit(v(2))
        assert (await fakes.admit(v(3))).retired == (v(2),)
        assert fakes.resident == [v(1), v(3)]
    assert (await fakes.admit(v(4))).retired == (v(1),)


async def test_a_lease_is_counted_per_request(fakes: Store) -> None:
    await fakes.admit(v(1))
    async with AsyncExitStack() as stack:
        for name in ("a", "b", "c"):
            stack.enter_context(fakes.store.lease(None, name, interruptible=True))
        assert [item.num_leases for item in fakes.store.resident()] == [3]
    assert [item.num_leases for item in fakes.store.resident()] == [0]


async def test_an_unknown_version_names_the_resident_ones(fakes: Store) -> None:
    await fakes.admit(v(1))
    with (
        pytest.raises(UnknownPolicy) as refused,
        fakes.store.lease(v(2), "r", interruptible=True),
    ):
        pass
    assert refused.value.extra == {"resident": [str(v(1))]}


async def test_when_every_slot_is_leased_the_wait_is_bounded(tmp_path: Path) -> None:
    fakes = Store(tmp_path, wait_s=0.05)
    async with AsyncExitStack() as stack:
        for version in (1, 2, 3):
            await fakes.admit(v(version))
            stack.enter_context(fakes.store.lease(None, "r", interruptible=True))
        with pytest.raises(
            NoFreeSlot, match=r"all 3 adapter slots are in use after 0\.05 s"
        ) as error:
            await fakes.admit(v(4))
        assert error.value.retry_after_s == 1.0
        assert (fakes.store.newest, fakes.num_loaded) == (v(3), 3)
    assert (await fakes.admit(v(4))).retired == (v(1), v(2))


async def test_a_sync_that_waits_for_a_slot_goes_on_when_a_lease_ends(fakes: Store) -> None:
    async with AsyncExitStack() as others:
        async with AsyncExitStack() as first:
            for version, stack in ((1, first), (2, others), (3, others)):
                await fakes.admit(v(version))
                stack.enter_context(fakes.store.lease(None, "r", interruptible=True))
            waiting = asyncio.ensure_future(fakes.admit(v(4)))
            await settle()
            assert not waiting.done()
        admission = await waiting
    assert (admission.outcome, admission.retired) == ("loaded", (v(1),))
    assert admission.wait_s > 0


async def test_the_newest_version_never_makes_room(tmp_path: Path) -> None:
    """Should the next one fail to load, it still serves."""
    fakes = Store(tmp_path, wait_s=0.05)
    async with AsyncExitStack() as stack:
        for version in (1, 2):
            await fakes.admit(v(version))
            stack.enter_context(fakes.store.lease(None, "r", interruptible=True))
        await fakes.admit(v(3))
        with pytest.raises(NoFreeSlot):
            await fakes.admit(v(4))
        assert fakes.store.newest == v(3)


async def test_the_same_version_and_digest_again_changes_nothing(fakes: Store) -> None:
    await fakes.admit(v(1))
    assert (await fakes.admit(v(1))).outcome == "already_resident"
    assert fakes.num_loaded == 1


async def test_the_same_version_with_another_digest_is_stale(fakes: Store) -> None:
    await fakes.admit(v(1))
    with pytest.raises(StaleVersion, match="a version never changes"):
        await fakes.store.admit(fakes.adapter(v(1), "other"))
    assert fakes.num_loaded == 1


async def test_an_older_version_is_stale(fakes: Store) -> None:
    await fakes.admit(v(5))
    with pytest.raises(StaleVersion, match=r"run\.1@4 is older than run\.1@5"):
        await fakes.admit(v(4))


async def test_activate_false_installs_an_older_version_beside_the_newest(fakes: Store) -> None:
    await fakes.admit(v(5))
    admission = await fakes.admit(v(4), activate=False)
    assert (admission.outcome, fakes.store.newest) == ("loaded", v(5))
    assert fakes.resident == [v(5), v(4)]


async def test_activate_false_never_retires_what_it_just_installed(fakes: Store) -> None:
    await fakes.admit(v(4))
    await fakes.admit(v(5))
    assert (await fakes.admit(v(3), activate=False)).retired == (v(4),)
    assert fakes.resident == [v(5), v(3)]


async def test_a_newer_version_installed_inactive_is_activated_by_sending_it_again(
    fakes: Store,
) -> None:
    await fakes.admit(v(1))
    await fakes.admit(v(2), activate=False)
    assert fakes.store.newest == v(1)
    assert (await fakes.admit(v(2))).outcome == "already_resident"
    assert fakes.store.newest == v(2)


async def test_another_run_is_refused_and_names_the_current_one(fakes: Store) -> None:
    await fakes.admit(v(3))
    with pytest.raises(RunConflict, match="this replica serves run 'run'") as refused:
        await fakes.admit(v(9, run="other"))
    assert refused.value.extra == {"current": v(3).model_dump()}
    assert fakes.resident == [v(3)]


async def test_replace_run_closes_the_old_run_and_retires_it_as_its_leases_end(
    fakes: Store,
) -> None:
    await fakes.admit(v(8))
    await fakes.admit(v(9))
    with fakes.store.lease(v(8), "r", interruptible=True):
        admission = await fakes.admit(v(1, run="other"), replace_run=True)
        assert admission.retired == (v(9),)
        old, new = fakes.store.resident()
        assert (old.policy, old.accepts_requests) == (v(8), False)
        assert (new.policy, new.accepts_requests) == (v(1, run="other"), True)
        with (
            pytest.raises(UnknownPolicy),
            fakes.store.lease(v(8), "late", interruptible=True),
        ):
            pass
    await settle()
    assert fakes.resident == [v(1, run="other")]


async def test_a_higher_incarnation_supersedes_and_the_lower_one_stays_out(fakes: Store) -> None:
    await fakes.admit(v(47))
    admission = await fakes.admit(v(41, incarnation=2))
    assert admission.retired == (v(47),)
    assert fakes.store.newest == v(41, incarnation=2)
    for options in ({}, {"activate": False}, {"replace_run": True}):
        with pytest.raises(StaleVersion):
            await fakes.admit(v(48), **options)


async def test_two_admits_at_once_load_one_after_the_other(fakes: Store) -> None:
    fakes.engine.hold_loads()
    first = asyncio.ensure_future(fakes.admit(v(1)))
    second = asyncio.ensure_future(fakes.admit(v(2)))
    await settle()
    assert fakes.num_loaded == 0
    fakes.engine.release_loads()
    assert [(await task).outcome for task in (first, second)] == ["loaded", "loaded"]
    assert fakes.store.newest == v(2)
    assert [adapter.slot_id for adapter in fakes.engine.loaded] == [1, 2]


async def test_requests_are_served_by_the_old_version_while_the_next_one_loads(
    fakes: Store,
) -> None:
    await fakes.admit(v(1))
    fakes.engine.hold_loads()
    loading = asyncio.ensure_future(fakes.admit(v(2)))
    await settle()
    with fakes.store.lease(None, "r", interruptible=True) as lease:
        assert lease.policy == v(1)
    fakes.engine.release_loads()
    await loading


@pytest.mark.parametrize("policy", [v(2), v(1, incarnation=2), v(1, run="other")], ids=str)
async def test_an_adapter_that_the_engine_refuses_changes_nothing(
    policy: PolicyId, fakes: Store
) -> None:
    await fakes.admit(v(1))
    fakes.engine.refuse_adapters = True
    with pytest.raises(InvalidAdapter):
        await fakes.admit(policy, replace_run=True)
    (resident,) = fakes.store.resident()
    assert (resident.policy, resident.accepts_requests) == (v(1), True)
    assert (fakes.store.newest, fakes.num_loaded) == (v(1), 1)


async def test_continue_interrupts_the_requests_of_older_versions_only(fakes: Store) -> None:
    fakes.engine.hold()
    await fakes.admit(v(1))
    running = [asyncio.ensure_future(run(fakes, name, v(1))) for name in ("a", "b")]
    scoring = asyncio.ensure_future(run(fakes, "score", v(1), interruptible=False))
    on_base = asyncio.ensure_future(run(fakes, "base", v(0)))
    await settle()
    await fakes.admit(v(2), activate=False)
    assert fakes.engine.interrupted == []
    newer = asyncio.ensure_future(run(fakes, "newer", v(2)))
    await settle()
    await fakes.admit(v(2), in_flight="continue")
    await asyncio.gather(*running)
    assert sorted(fakes.engine.interrupted) == ["a", "b"]
    assert not any(task.done() for task in (scoring, on_base, newer))
    fakes.engine.release()
    await asyncio.gather(scoring, on_base, newer)


async def test_continue_does_not_wait_for_what_has_ended_under_a_lease(fakes: Store) -> None:
    """A stream holds its lease until its client has read the end."""
    await fakes.admit(v(1))
    with fakes.store.lease(v(1), "a", interruptible=True):
        fakes.store.ended("a")
        async with asyncio.timeout(0.2):
            await fakes.admit(v(2), in_flight="continue")
    assert fakes.engine.interrupted == []


async def test_finish_interrupts_nothing(fakes: Store) -> None:
    fakes.engine.hold()
    await fakes.admit(v(1))
    running = asyncio.ensure_future(run(fakes, "a", v(1)))
    await settle()
    await fakes.admit(v(2), in_flight="finish")
    assert fakes.engine.interrupted == []
    fakes.engine.release()
    await running


async def run(fakes: Store, name: str, policy: PolicyId, *, interruptible: bool = True) -> None:
    with fakes.store.lease(policy, name, interruptible=interruptible) as lease:
        sampling = SamplingParams(max_tokens=1)
        async for _ in fakes.engine.generate(name, [1], sampling, lease.adapter, stream=False):
            pass


async def test_the_adapter_file_is_found_by_version_while_it_is_resident(fakes: Store) -> None:
    await fakes.admit(v(1))
    assert fakes.store.adapter_file(1) == fakes.root / "1" / ADAPTER_WEIGHTS
    assert fakes.store.holds(fakes.root / "1")
    for version in (0, 2):
        with pytest.raises(UnknownPolicy):
            fakes.store.adapter_file(version)


# --- probes -------------------------------------------------------------------------------------

PROBE = PolicyId(run_id="probe", version=1)


def score_lease(fakes: Store, policy: PolicyId) -> AbstractContextManager[Lease]:
    return fakes.store.lease(policy, "score", interruptible=False)


async def test_a_probe_of_another_run_changes_nothing_that_serves(fakes: Store) -> None:
    await fakes.admit(v(1))
    await fakes.admit(v(2))
    admission = await fakes.admit(PROBE, probe=True)
    assert (admission.outcome, admission.retired) == ("loaded", ())
    assert fakes.store.newest == v(2)
    assert [(i.policy, i.accepts_requests) for i in fakes.store.resident()] == [
        (v(1), True),
        (v(2), True),
        (PROBE, False),
    ]


async def test_a_probe_is_scored_under_and_nothing_else(fakes: Store) -> None:
    await fakes.admit(PROBE, probe=True)
    with (
        pytest.raises(UnknownPolicy),
        fakes.store.lease(PROBE, "generate", interruptible=True),
    ):
        pass
    with score_lease(fakes, PROBE) as lease:
        assert lease.adapter == fakes.engine.loaded[0]


async def test_a_probe_leaves_with_its_first_score(fakes: Store) -> None:
    await fakes.admit(PROBE, probe=True)
    with score_lease(fakes, PROBE), score_lease(fakes, PROBE):
        pass
    with pytest.raises(UnknownPolicy), score_lease(fakes, PROBE):
        pass
    await settle()
    assert (fakes.resident, fakes.num_loaded) == ([], 0)
    assert list(fakes.root.iterdir()) == []


async def test_a_probe_makes_room_before_any_version_does(fakes: Store) -> None:
    await fakes.admit(v(1))
    await fakes.admit(v(2))
    await fakes.admit(PROBE, probe=True)
    assert (await fakes.admit(v(3))).retired == (PROBE, v(1))
    assert fakes.resident == [v(2), v(3)]


async def test_a_probe_that_is_scored_stays_while_another_run_takes_the_replica(
    fakes: Store,
) -> None:
    await fakes.admit(v(1))
    await fakes.admit(PROBE, probe=True)
    with score_lease(fakes, PROBE):
        await fakes.admit(v(1, run="other"), replace_run=True)
        assert fakes.resident == [PROBE, v(1, run="other")]
        with score_lease(fakes, PROBE):
            pass
    await settle()
    assert fakes.resident == [v(1, run="other")]


async def test_the_same_probe_again_is_already_resident_and_never_the_newest(fakes: Store) -> None:
    await fakes.admit(PROBE, probe=True)
    assert (await fakes.admit(PROBE, probe=True)).outcome == "already_resident"
    assert fakes.store.newest == BASE_POLICY


@pytest.mark.parametrize("probe_first", [True, False])
async def test_a_version_and_a_probe_never_share_an_id(fakes: Store, probe_first: bool) -> None:
    await fakes.admit(v(1), probe=probe_first)
    with pytest.raises(StaleVersion, match="a probe needs a run_id of its own"):
        await fakes.admit(v(1), probe=not probe_first)


async def test_a_run_that_comes_back_while_its_old_version_is_leased_is_loaded_beside_it(
    fakes: Store,
) -> None:
    await fakes.admit(v(1))
    with fakes.store.lease(v(1), "r", interruptible=True) as old:
        await fakes.admit(v(1, run="other"), replace_run=True)
        await fakes.admit(v(1), replace_run=True)
        with fakes.store.lease(v(1), "s", interruptible=True) as new:
            assert new.adapter != old.adapter
    await settle()
    assert [(i.policy, i.accepts_requests) for i in fakes.store.resident()] == [(v(1), True)]
    assert fakes.engine.loaded == [new.adapter]
