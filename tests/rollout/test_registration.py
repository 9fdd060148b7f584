"""How a replica joins its trainer's fleet, stays in it, and leaves."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from pydantic import ValidationError

from services.background import Background
from services.rollout.registration import Registration
from services.rollout.settings import RolloutSettings
from services.server import read_settings
from shared.errors import NotReady, Unauthorized
from shared.schemas import (
    BASE_POLICY,
    PolicyId,
    ReplicaRegistration,
    ReplicasResponse,
    ReplicaState,
    ReplicaStatus,
    ScoreRequest,
)
from shared.trainer_client import TrainerClient
from tests.adapters import adapter_file, make_manifest, make_tensors
from tests.rollout.service import Service, request, until

pytestmark = pytest.mark.anyio

KEY = "a-key-of-the-test"


class FakeTrainer:
    """Takes registrations, unless it is `away`."""

    def __init__(self) -> None:
        self.registered: list[ReplicaRegistration] = []
        self.removed: list[str] = []
        self.state: ReplicaState = "discovered"
        self.away = False
        self.hangs = False

    def client(self, api_key: str | None = KEY, url: str = "http://127.0.0.1:9") -> TrainerClient:
        return TrainerClient(url, api_key=api_key, transport=httpx.MockTransport(self._answer))

    def registration(
        self,
        *,
        host: str = "127.0.0.1",
        port: int = 8000,
        advertise_url: str | None = None,
        lease_s: float = 0.15,
        api_key: str | None = KEY,
        url: str = "http://127.0.0.1:9",
    ) -> Registration:
        return Registration(
            self.client(api_key, url),
            host=host,
            port=port,
            advertise_url=advertise_url,
            lease_s=lease_s,
        )

    async def _answer(self, request: httpx.Request) -> httpx.Response:
        if self.hangs:
            await asyncio.Event().wait()
        if self.away:
            raise httpx.ConnectError("nobody listens")
        if request.headers.get("authorization") != f"Bearer {KEY}":
            return httpx.Response(401, json=Unauthorized("send the key").to_problem())
        if request.method == "DELETE":
            self.removed.append(request.url.raw_path.decode())
            return httpx.Response(204)
        assert (request.method, request.url.path) == ("POST", "/replicas")
        self.registered.append(ReplicaRegistration.model_validate_json(request.content))
        return httpx.Response(200, content=self.status().model_dump_json())

    def status(self) -> ReplicaStatus:
        url = self.registered[-1].url
        return ReplicaStatus(
            id=url.removeprefix("http://"),
            url=url,
            source="registered",
            state=self.state,
            detail="as the test wants it",
            boot_id=None,
            policy=None,
            num_outstanding_completions=0,
            num_outstanding_tokens=0,
            logprob_gap=None,
            last_sync_s=None,
            num_failures=0,
        )


@pytest.fixture
def trainer() -> FakeTrainer:
    return FakeTrainer()


def keep(registration: Registration) -> asyncio.Task[None]:
    """Renew it as a replica does."""
    return Background().repeat(
        "registration", lambda: registration.renew("boot"), pause_s=registration.interval_s
    )


async def kept(registration: Registration, until_true: Callable[[], bool]) -> None:
    """Keep the registration until the condition holds."""
    task = keep(registration)
    try:
        await until(until_true)
    finally:
        task.cancel()


# --- joining ------------------------------------------------------------------------------------


async def test_a_replica_registers_and_renews_three_times_per_lease(trainer: FakeTrainer) -> None:
    started = asyncio.get_running_loop().time()
    await kept(trainer.registration(lease_s=0.3), lambda: len(trainer.registered) == 4)
    assert 0.3 <= asyncio.get_running_loop().time() - started < 0.6
    assert set(trainer.registered) == {
        ReplicaRegistration(url="http://127.0.0.1:8000", lease_s=0.3, boot_id="boot")
    }


@pytest.mark.parametrize(
    ("options", "url"),
    [
        ({"host": "10.1.2.3"}, "http://10.1.2.3:8000"),
        ({"host": "localhost", "port": 81}, "http://localhost:81"),
        ({"host": "::1"}, "http://[::1]:8000"),
        ({"host": "0.0.0.0"}, "http://127.0.0.1:8000"),  # as the trainer is there
        ({"host": "0.0.0.0", "url": "http://localhost"}, "http://127.0.0.1:8000"),
        ({"advertise_url": "https://rented.example:444"}, "https://rented.example:444"),
    ],
    ids=str,
)
async def test_it_advertises_the_address_where_the_trainer_reaches_it(
    options: dict[str, Any], url: str, trainer: FakeTrainer
) -> None:
    await kept(trainer.registration(**options), lambda: bool(trainer.registered))
    assert trainer.registered[0].url == url


async def test_a_trainer_that_is_away_is_asked_again_and_logged_once(
    trainer: FakeTrainer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    trainer.away = True
    registration = trainer.registration(lease_s=0.03)
    task = keep(registration)
    await asyncio.sleep(0.2)
    trainer.away = False
    await until(lambda: len(trainer.registered) > 3)
    trainer.away = True
    await asyncio.sleep(0.1)
    task.cancel()
    said = [r.message for r in caplog.records if r.name == "services.rollout.registration"]
    assert [message.split()[0] for message in said] == ["not", "registered", "not"]
    assert "nobody listens" in said[0]


async def test_a_trainer_whose_name_does_not_resolve_is_asked_again(
    trainer: FakeTrainer, caplog: pytest.LogCaptureFixture
) -> None:
    registration = trainer.registration(host="0.0.0.0", url="http://nowhere.invalid:1")
    await kept(registration, lambda: "no route to nowhere.invalid" in caplog.text)


async def test_a_wrong_key_is_said(trainer: FakeTrainer, caplog: pytest.LogCaptureFixture) -> None:
    await kept(trainer.registration(api_key="other"), lambda: "same TANDEM_API_KEY" in caplog.text)


async def test_a_quarantine_is_said(trainer: FakeTrainer, caplog: pytest.LogCaptureFixture) -> None:
    trainer.state = "quarantined"
    await kept(trainer.registration(), lambda: "as the test wants it" in caplog.text)


async def test_the_ids_of_replicas_are_quoted(trainer: FakeTrainer) -> None:
    async with trainer.client() as client:
        await client.remove("[::1]:8000")
    assert trainer.removed == ["/replicas/%5B%3A%3A1%5D%3A8000"]


async def test_the_trainers_replicas_can_be_read() -> None:
    answer = ReplicasResponse(replicas=())
    transport = httpx.MockTransport(lambda _: httpx.Response(200, text=answer.model_dump_json()))
    async with TrainerClient("http://trainer", transport=transport) as client:
        assert await client.replicas() == answer


# --- a replica of a fleet -----------------------------------------------------------------------


async def test_a_replica_registers_once_it_is_ready_and_leaves_before_it_refuses(
    serve: Callable[..., Service], trainer: FakeTrainer
) -> None:
    service = serve(registration=trainer.registration(), drain_delay_s=0.2)
    assert trainer.registered == []
    await service.started()
    await until(lambda: bool(trainer.registered))
    assert trainer.registered[0].boot_id == service.replica.boot_id
    await service.client.drain()
    await until(lambda: bool(trainer.removed))
    assert service.replica.status().state == "draining"
    base = request(policy=BASE_POLICY)
    assert (await service.client.generate(base)).groups
    assert await service.exit_code() == 0
    assert trainer.removed == ["/replicas/127.0.0.1%3A8000"]
    num_registered = len(trainer.registered)
    await asyncio.sleep(0.2)
    assert len(trainer.registered) == num_registered


async def test_a_trainer_that_hangs_delays_the_drain_by_two_seconds_at_most(
    serve: Callable[..., Service], trainer: FakeTrainer
) -> None:
    service = serve(registration=trainer.registration())
    await service.started()
    await until(lambda: bool(trainer.registered))
    trainer.hangs = True
    await service.client.drain()
    async with asyncio.timeout(4):
        assert await service.exit_code() == 0


async def test_unpinned_requests_of_a_fleet_wait_for_a_policy_of_a_run(
    serve: Callable[..., Service], trainer: FakeTrainer
) -> None:
    service = serve(registration=trainer.registration())
    await service.started()
    score = ScoreRequest(sequences=((1, 3),))
    with pytest.raises(NotReady, match="pin version 0 for the base") as refused:
        await service.client.generate(request())
    assert refused.value.retry_after_s == 1.0
    with pytest.raises(NotReady):
        await service.client.score(score)
    assert (await service.client.generate(request(policy=BASE_POLICY))).groups
    status = await service.client.status()
    assert status.base
    manifest = make_manifest(status.base, PolicyId(run_id="run", version=1))
    shapes = service.replica.serving.base.linear_shapes
    await service.client.sync_weights(
        adapter_file(manifest, make_tensors(manifest, shapes, seed=0))
    )
    (group,) = (await service.client.generate(request())).groups
    assert group.completions[0].segments[0].policy == manifest.policy
    assert (await service.client.score(score)).policy == manifest.policy


async def test_an_error_that_nobody_foresaw_does_not_end_the_registration(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Fault S7: its task died without a word."""
    trainer = FakeTrainer()
    registration = trainer.registration(lease_s=0.03)
    renew = registration._renew
    errors = iter([ZeroDivisionError("once")])

    async def renew_but_not_at_first(boot_id: str) -> None:
        for error in errors:
            raise error
        await renew(boot_id)

    registration._renew = renew_but_not_at_first  # type: ignore[method-assign]
    keeping = keep(registration)
    await until(lambda: bool(trainer.registered))
    keeping.cancel()
    assert "registration failed" in caplog.text


# --- settings -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"trainer_url": "trainer:8080"}, "'trainer:8080' is not the URL of a service"),
        ({"trainer_url": "http://trainer/path"}, "write it as http://host:port"),
        ({"trainer_url": "http://trainer:99999"}, "write it as http://host:port"),
        ({"advertise_url": "ftp://me:1"}, "'ftp://me:1' is not the URL of a replica"),
        # Fault S7: without a port the registration would be refused.
        (
            {"advertise_url": "https://gpu-box.example"},
            "'https://gpu-box.example' is not the URL of a replica: write it as http://host:port",
        ),
        ({"trainer_url": "http://trainer", "port": 0}, "ROLLOUT_PORT=0 takes any free port"),
    ],
    ids=str,
)
def test_a_url_that_cannot_work_is_refused(settings: dict[str, object], says: str) -> None:
    with pytest.raises(ValidationError) as refused:
        RolloutSettings.model_validate({"model": "m", **settings})
    (error,) = refused.value.errors()
    assert says in error["msg"]


def test_port_0_with_an_advertised_url_is_fine() -> None:
    fields = {"trainer_url": "http://t", "port": 0, "advertise_url": "http://me:8000"}
    assert RolloutSettings.model_validate({"model": "m", **fields}).port == 0


def test_the_refusal_names_the_variable(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"MODEL": "m", "PORT": "0", "TRAINER_URL": "http://trainer:8080"}.items():
        monkeypatch.setenv(f"ROLLOUT_{name}", value)
    with pytest.raises(SystemExit):
        read_settings(RolloutSettings)
    assert capsys.readouterr().err.startswith("ROLLOUT_ADVERTISE_URL: ROLLOUT_PORT=0 takes any")
