"""One replica from boot to exit: starting -> ready -> draining | dead.

`boot` prepares the base and the engine while the app already answers /healthz; `watch` notices an
engine that died or hangs; `drain` lets clients leave. Whatever ends the replica calls `on_exit`.
A replica with a `registration` says to its trainer that it is ready, and that it leaves.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from services.background import Background
from services.boot import report, settle_memory
from services.rollout.base import Base, prepare_base
from services.rollout.engine import Engine
from services.rollout.policies import PolicyStore
from services.rollout.preflight import check_start, warn_of_small_adapter_dir
from services.rollout.registration import Registration
from services.rollout.sampler import Sampler
from services.rollout.settings import RolloutSettings
from services.rollout.sync import AdapterReceiver
from services.tokens import PromptEncoder
from shared.errors import EngineDead, NotReady
from shared.metrics import RolloutMetrics
from shared.schemas import (
    BASE_POLICY,
    PoliciesResponse,
    RolloutLimits,
    RolloutStatus,
    SamplingParams,
)

log = logging.getLogger(__name__)
_WATCH_INTERVAL_S = 0.25
_LONGEST_LOOK_S = 1.0  # What counts of a pause of the event loop, which says little of the engine.
_LOOKS_PER_STALL = 20
_INTERRUPT_TIMEOUT_S = 2.0


@dataclass(frozen=True, slots=True)
class Serving:
    """What exists once the engine runs."""

    base: Base
    engine: Engine
    policies: PolicyStore
    encoder: PromptEncoder
    sampler: Sampler
    receiver: AdapterReceiver
    limits: RolloutLimits
    engine_version: str


@dataclass(frozen=True, slots=True)
class BootedEngine:
    engine: Engine
    version: str


def boot_vllm(settings: RolloutSettings, model_dir: Path) -> BootedEngine:
    from services.rollout.vllm_engine import VLLM_VERSION, VllmEngine

    engine = VllmEngine.boot(settings, model_dir)
    settle_memory()
    return BootedEngine(engine, VLLM_VERSION)


class Replica:
    def __init__(
        self,
        settings: RolloutSettings,
        *,
        registration: Registration | None = None,
        on_exit: Callable[[int], None] = lambda _: None,
        abandon_boot: Callable[[], None] = lambda: None,
        boot_engine: Callable[[RolloutSettings, Path], BootedEngine] = boot_vllm,
    ) -> None:
        self.settings = settings
        self.boot_id = secrets.token_hex(8)
        self.metrics = RolloutMetrics()
        self._registration = registration
        self._on_exit = on_exit
        self._abandon_boot = abandon_boot
        self._boot_engine = boot_engine
        self._is_booting = False
        self._serving: Serving | None = None
        self._state: Literal["starting", "ready", "draining", "dead"] = "starting"
        self._detail = "preparing the base"
        self.metrics.watch(lambda: self._state)
        self._refusing = False  # Set in the second half of draining.
        self._background = Background(lambda name: self.metrics.failures.labels(name).inc())
        self._renewing: asyncio.Task[None] | None = None

    # --- life -----------------------------------------------------------------------------------

    def start(self) -> None:
        """Boot in the background. Call from the event loop."""
        self._background.run(
            "the watchdog",
            self._boot_and_watch(),
            on_error=lambda error: self._die(f"the watchdog failed: {error!r}"),
        )

    async def stop(self) -> None:
        """End at once. A boot cannot be: threads load, so the process has to be abandoned."""
        await self._background.aclose()
        if self._is_booting:
            self._abandon_boot()
        if serving := self._serving:
            self._serving = None
            serving.engine.shutdown()  # In a thread, vLLM's reader would report a dead engine.
            serving.receiver.close()

    async def _boot_and_watch(self) -> None:
        self._is_booting = True
        try:
            await self._boot()
            self._is_booting = False
        except Exception as error:  # The process cannot work, whatever failed: say why and exit.
            self._is_booting = False
            self._end(*report(log, "boot failed", error))
            return
        if self._registration:
            registration = self._registration
            self._renewing = self._background.repeat(
                "registration",
                lambda: registration.renew(self.boot_id),
                pause_s=registration.interval_s,
            )
        await self._watch()

    async def _boot(self) -> None:
        settings, started = self.settings, time.perf_counter()
        if settings.kv_cache_dtype not in ("default", settings.resolved_kv_cache_dtype):
            log.warning(
                "ROLLOUT_KV_CACHE_DTYPE=%s needs a CPU with AVX-512 or AMX: using %s",
                settings.kv_cache_dtype,
                settings.resolved_kv_cache_dtype,
            )
        settings, source = await asyncio.to_thread(check_start, settings)
        self.settings = settings
        base = await asyncio.to_thread(
            prepare_base,
            str(source),
            exact=settings.base == "nf4-exact",
            cache_dir=settings.cache_dir,
            device=settings.resolved_device,
        )
        warn_of_small_adapter_dir(settings, base.linear_shapes)
        self._detail = "loading the engine"
        encoder = await asyncio.to_thread(PromptEncoder.load, base.path)
        booted = await asyncio.to_thread(self._boot_engine, settings, base.path)
        engine = booted.engine
        self._detail = "trying the engine"
        await _try_out(engine, settings.stall_timeout_s)
        limits = settings.limits(engine.max_model_len)
        policies = PolicyStore(
            engine,
            max_live_policies=settings.num_live_policies,
            wait_s=settings.sync_wait_s,
            merges=settings.serving_mode == "merged",
            background=self._background,
        )
        sampler = Sampler(
            engine=engine,
            policies=policies,
            encoder=encoder,
            limits=limits,
            timeout_s=settings.request_timeout_s,
            in_fleet=self._registration is not None,
            boot_id=self.boot_id,
            metrics=self.metrics,
        )
        receiver = AdapterReceiver(
            policies=policies,
            base=base,
            limits=limits,
            adapter_dir=settings.resolved_adapter_dir,
            boot_id=self.boot_id,
            metrics=self.metrics,
        )
        self._serving = Serving(
            base, engine, policies, encoder, sampler, receiver, limits, booted.version
        )
        self._state, self._detail = "ready", ""
        log.info(
            "ready after %.1f s on http://%s:%d: %s, base %s, KV cache %s, "
            "attention %s, context %d, vLLM %s",
            time.perf_counter() - started,
            settings.host,
            settings.port,
            settings.model,
            settings.base,
            settings.resolved_kv_cache_dtype,
            settings.attention_backend or "of vLLM's choice",
            limits.max_model_len,
            booted.version,
        )

    async def _watch(self) -> None:
        """Until the engine dies or hangs: it has work and makes no token for `stall_timeout_s`, or
        it takes longer than that to load, merge or remove an adapter.

        Work that clients abandon counts as well. An engine whose work they always abandon is asked
        for a token of its own before it is taken to hang.
        """
        assert self._serving
        engine, sampler = self._serving.engine, self._serving.sampler
        policies = self._serving.policies
        stall_timeout_s = self.settings.stall_timeout_s
        unproductive_s = looked_at_s = 0.0  # Time with work since the last token.
        last, last_count = time.monotonic(), -1
        proving: asyncio.Task[None] | None = None
        while True:
            if reason := engine.death():
                self._die(reason)
                return
            if (call := policies.engine_call) and call.age_s > stall_timeout_s:
                self._die(f"the engine has not {call.what} within {stall_timeout_s:g} s")
                return
            elapsed_s = time.monotonic() - last
            last += elapsed_s
            if engine.num_unfinished():
                unproductive_s += min(elapsed_s, _LONGEST_LOOK_S)
            # Reading the count is not free.
            if unproductive_s - looked_at_s > stall_timeout_s / _LOOKS_PER_STALL:
                looked_at_s, count = unproductive_s, engine.num_tokens_processed()
                if count != last_count:
                    unproductive_s, looked_at_s, last_count = 0.0, 0.0, count
                elif unproductive_s > stall_timeout_s:
                    self._die(
                        f"the engine made no token for {stall_timeout_s:g} s with "
                        f"{sampler.num_outstanding} completions outstanding"
                    )
                    return
                elif unproductive_s > stall_timeout_s / 2 and (not proving or proving.done()):
                    proving = self._background.run("a try of the engine", sampler.try_engine())
            await asyncio.sleep(_WATCH_INTERVAL_S)

    def _die(self, reason: str) -> None:
        log.error("%s; exiting for the supervisor to restart", reason)
        self._end(reason, 1)

    def _end(self, reason: str, exit_code: int) -> None:
        self._state, self._detail = "dead", reason
        self._on_exit(exit_code)

    def drain(self) -> RolloutStatus:
        """Go not-ready, keep serving a moment, finish what runs, then exit 0."""
        if self._state in ("starting", "ready"):
            self._state, self._detail = "draining", "finishing what runs"
            self._background.run("draining", self._drain(), on_error=lambda _: self._on_exit(1))
        return self.status()

    async def _drain(self) -> None:
        log.info("draining: serving %.1f s more, then finishing", self.settings.drain_delay_s)
        if self._renewing and self._registration:
            self._renewing.cancel()
            await asyncio.gather(self._renewing, return_exceptions=True)
            await self._registration.end()
        if self._serving:
            await asyncio.sleep(self.settings.drain_delay_s)
            self._refusing = True
            await self._finish(self._serving.sampler)
        self._on_exit(0)

    async def _finish(self, sampler: Sampler) -> None:
        """Wait for what runs; interrupt what does not end in time."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.settings.drain_timeout_s):
                await sampler.idle.wait()
        if not sampler.num_outstanding:
            return
        log.warning(
            "%d completions did not finish within ROLLOUT_DRAIN_TIMEOUT_S=%g and are interrupted",
            sampler.num_outstanding,
            self.settings.drain_timeout_s,
        )
        try:
            async with asyncio.timeout(_INTERRUPT_TIMEOUT_S):
                await sampler.interrupt()
                await sampler.idle.wait()
        except TimeoutError:
            log.warning("%d completions are cut", sampler.num_outstanding)

    # --- views ----------------------------------------------------------------------------------

    @property
    def serving(self) -> Serving:
        """Raises NotReady or EngineDead when requests cannot be served."""
        if self._state == "dead":
            raise EngineDead(f"{self._detail}; this replica exits, use another one")
        if self._serving is None or self._refusing:
            raise NotReady(f"this replica is {self._state}: {self._detail}", retry_after_s=1.0)
        return self._serving

    def check_ready(self) -> None:
        """Raise unless new traffic is welcome."""
        if self._state == "draining":
            raise NotReady("this replica is draining: use another one")
        _ = self.serving

    def policies(self) -> PoliciesResponse:
        policies = self.serving.policies
        return PoliciesResponse(
            newest=policies.newest, resident=policies.resident(), boot_id=self.boot_id
        )

    def status(self) -> RolloutStatus:
        serving = self._serving
        return RolloutStatus(
            state=self._state,
            detail=self._detail,
            boot_id=self.boot_id,
            model=self.settings.model,
            vllm_version=serving.engine_version if serving else "",
            kv_cache_dtype=self.settings.resolved_kv_cache_dtype,
            serving_mode=self.settings.serving_mode,
            base=serving.base.identity if serving else None,
            limits=serving.limits if serving else self.settings.limits(0),
            newest=serving.policies.newest if serving else BASE_POLICY,
            resident=serving.policies.resident() if serving else (),
            num_outstanding_completions=serving.sampler.num_outstanding if serving else 0,
        )


async def _try_out(engine: Engine, timeout_s: float) -> None:
    """Generate and score once: kernels that are compiled on the spot do not wait for a client."""
    ids, sampling = (0, 1), SamplingParams(max_tokens=1, ignore_eos=True, detokenize=False)
    deltas = engine.generate("try-out", ids, sampling, None, stream=False)
    try:
        async with asyncio.timeout(timeout_s), contextlib.aclosing(deltas):
            _ = [delta async for delta in deltas]
            await engine.score("try-out-score", ids, None)
    except TimeoutError:
        raise TimeoutError(
            f"the engine answered no request within ROLLOUT_STALL_TIMEOUT_S={timeout_s:g} s of its "
            "start: raise it, or see above what the engine printed"
        ) from None
