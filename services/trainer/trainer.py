"""The trainer from boot to exit: the policy, the fleet, and at most one run at a time.

A managed run executes loop.py; an external one is stepped by POST /train. A run that this process
does not finish is taken up by the next one, from its last checkpoint.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Literal

from services.background import Background
from services.boot import report
from services.trainer.fleet.conformance import Conformance, Probe
from services.trainer.fleet.fleet import Fleet
from services.trainer.fleet.member import Requirements
from services.trainer.learner.learner import Learner, load_learner
from services.trainer.policy.policy import Policy
from services.trainer.preflight import check_start
from services.trainer.run.external_updates import ExternalUpdates
from services.trainer.run.folder import RunFolder, is_unattended, newest_unfinished, read_config
from services.trainer.run.loop import run_steps, unless_stopped
from services.trainer.run.prepare import prepare, save_adapter
from services.trainer.run.recent import in_words
from services.trainer.run.run import Run
from services.trainer.run.stalls import stalls
from services.trainer.run_config import RunConfig
from services.trainer.settings import TrainerSettings
from shared.errors import NotFound, NotReady, RunConflict, ServiceError, UnsuitableForTraining
from shared.metrics import TrainerMetrics
from shared.rollout_client import RolloutClient
from shared.schemas import (
    CompletionsResponse,
    PolicyId,
    PolicyStatus,
    RunEvent,
    RunState,
    RunStatus,
    StateRecord,
    TrainerStatus,
    TrainRequest,
    TrainResponse,
)

log = logging.getLogger(__name__)
_STOP_TIMEOUT_S = 60.0


@dataclass(slots=True)
class _CurrentRun:
    run: Run
    folder: RunFolder
    probe: Probe
    state_if_stopped: RunState = "stopped"
    # Set once a replica serves the run.
    ready: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[None] | None = None
    # Set when the run has ended, because the policy then belongs to the next run.
    last_policy: PolicyId | None = None
    updates: ExternalUpdates = field(init=False)

    def __post_init__(self) -> None:
        self.updates = ExternalUpdates(self.run)

    @property
    def policy(self) -> PolicyId:
        return self.last_policy or self.run.policy.id

    @property
    def state_if_failed(self) -> RunState:
        """When all services are told to exit, replicas may be gone before the trainer is."""
        return "suspended" if self.state_if_stopped == "suspended" else "failed"

    def close(self) -> None:
        try:
            self.run.scorer.close()
            self.run.log.close()
        finally:
            self.folder.close()


class Trainer:
    def __init__(
        self,
        settings: TrainerSettings,
        *,
        on_exit: Callable[[int], None] = lambda _: None,
        on_stuck: Callable[[], None] = lambda: None,
        abandon_boot: Callable[[], None] = lambda: None,
    ) -> None:
        """`on_exit` starts the exit of the process; `on_stuck` ends it while a step still runs,
        `abandon_boot` while the trainer still boots."""
        self.settings = settings
        self.metrics = TrainerMetrics()
        self._on_exit = on_exit
        self._on_stuck = on_stuck
        self._abandon_boot = abandon_boot
        self._fleet = Fleet(
            settings.rollout_urls,
            connect=lambda url: RolloutClient(url, api_key=settings.api_key),
            probe_interval_s=settings.probe_interval_s,
            probe_timeout_s=settings.probe_timeout_s,
            metrics=self.metrics,
        )
        self._learner: Learner | None = None
        self._state: Literal["starting", "ready", "dead"] = "starting"
        self._detail = "loading the model"
        self._current: _CurrentRun | None = None
        self._starting_run = asyncio.Lock()
        self._background = Background(lambda task: self.metrics.failures.labels(task).inc())
        self._boot_task: asyncio.Task[None] | None = None
        self.metrics.watch(
            run_state=lambda: self._current.run.log.state if self._current else None,
            num_in_sync=lambda: (
                self._fleet.num_serving(self._current.policy) if self._current else 0
            ),
        )

    # --- life -----------------------------------------------------------------------------------

    def start(self) -> None:
        """Load the policy and look for replicas in the background. Call from the event loop."""
        self._fleet.start()
        self._boot_task = self._background.run(
            "the start", self.boot(), on_error=self._cannot_start
        )

    async def boot(self) -> None:
        started, what = time.perf_counter(), "boot failed"
        try:
            await asyncio.to_thread(check_start, self.settings)
            what = f"TRAINER_MODEL {self.settings.model} cannot be loaded"
            learner = await asyncio.to_thread(load_learner, self.settings)
        except Exception as error:  # The process cannot work, whatever failed: say why and exit.
            self._cannot_start(error, what)
            return
        async with self._starting_run:  # A run that is posted now waits for the unfinished one.
            self._learner = learner
            await self._take_up_unfinished()
            self._state, self._detail = "ready", ""
            log.info(
                "ready after %.1f s on http://%s:%d: %s",
                time.perf_counter() - started,
                self.settings.host,
                self.settings.port,
                self.settings.model,
            )

    def _cannot_start(self, error: Exception, what: str = "boot failed") -> None:
        self._detail, exit_code = report(log, what, error)
        self._state = "dead"
        self._on_exit(exit_code)

    async def _take_up_unfinished(self) -> None:
        """Resume the run that the last process with this runs_dir was in, if any."""
        try:
            path = await asyncio.to_thread(newest_unfinished, self.settings.runs_dir)
            if path is None:
                return
            log.info("run %s in %s is unfinished: it is taken up", path.name, path)
            await self._start(read_config(path))
        except Exception as error:  # The trainer can serve another run, whatever failed.
            trace = None if isinstance(error, ServiceError | OSError) else error
            log.error(
                "the unfinished run is not taken up: %s",
                error.detail if isinstance(error, ServiceError) else error,
                exc_info=trace,
            )

    def shut_down(self) -> None:
        """SIGTERM: finish the current step, then exit 0. The run continues in the next process,
        unless its config says never."""
        log.info("stopping")
        if current := self._current:
            if current.run.config.resume == "auto" and not current.run.stop.is_set():
                current.state_if_stopped = "suspended"
            current.run.stop.set()
        self._on_exit(0)

    async def stop(self) -> None:
        is_booting = self._boot_task is not None and not self._boot_task.done()
        if self._boot_task:
            self._boot_task.cancel()
        is_stuck = False
        if (current := self._current) and current.task and not current.task.done():
            current.run.stop.set()
            _, running = await asyncio.wait({current.task}, timeout=_STOP_TIMEOUT_S)
            if is_stuck := bool(running):
                log.error(
                    "the step did not end within %g s: the trainer exits without it",
                    _STOP_TIMEOUT_S,
                )
                current.task.cancel()
                await asyncio.wait({current.task})
        await self._fleet.aclose()
        if is_stuck:  # A computing thread cannot be cancelled, and exit would wait for it.
            self._on_stuck()
        if is_booting:  # Nor can a downloading one.
            self._abandon_boot()

    @property
    def policy(self) -> Policy:
        return self.learner.policy

    @property
    def learner(self) -> Learner:
        if self._learner is None:
            raise self._not_ready()
        return self._learner

    def check_ready(self) -> None:
        """Raises NotReady until the policy is loaded and an unfinished run is resumed."""
        if self._state != "ready":
            raise self._not_ready()

    def _not_ready(self) -> NotReady:
        return NotReady(f"the trainer is {self._state}: {self._detail}", retry_after_s=1.0)

    # --- runs -----------------------------------------------------------------------------------

    async def start_run(self, config: RunConfig) -> RunStatus:
        """Begin a run, or resume the one with that id.

        Raises InvalidRequest for a config that cannot run, RunConflict when one is running, and
        Conflict for a run with that id that cannot be resumed.
        """
        _ = self.learner
        async with self._starting_run:
            return await self._start(config)

    async def _start(self, config: RunConfig) -> RunStatus:
        if current := self._current:
            if not current.run.log.has_ended:
                state = current.run.log.state
                todo = "stop it with POST /runs/current/stop first"
                if state == "stopping":
                    todo = "try again when its step is done"
                raise RunConflict(f"run {current.run.config.run_id!r} is {state}: {todo}")
            assert current.task
            await asyncio.wait({current.task})  # Wait until it has released its folder.
        run_id = config.run_id or time.strftime("run-%Y%m%d-%H%M%S-") + secrets.token_hex(2)
        config = config.model_copy(update={"run_id": run_id})
        prepared = await prepare(
            config, self.learner, self._fleet, runs_dir=self.settings.runs_dir, metrics=self.metrics
        )
        current = _CurrentRun(prepared.run, prepared.folder, prepared.probe)
        run = current.run
        detail = "waiting for a replica"
        if config.needs_replicas and self._knows_no_replica:
            detail = self._fleet.details()
        if current.folder.life.incarnation > 1:
            detail = f"resumed after step {run.first_step}; {detail}"
        try:
            await run.log.emit(StateRecord(state="running", detail=detail))
        except BaseException:
            current.close()
            raise
        current.task = self._background.run("a run", self._execute(current))
        self._current = current
        return self.run_status()

    async def _execute(self, current: _CurrentRun) -> None:
        """The task of a run, whose last event says how it ended."""
        run = current.run
        try:
            log.info("run %s continues from %s", run.log.run_dir, run.policy.id)
            requirements = self._requirements(current)
            self.metrics.begin_run(
                max_staleness=run.config.max_staleness,
                min_ready_replicas=requirements.min_ready_replicas,
            )
            adapter = None
            if not run.policy.id.is_base:  # Replicas may hold versions of an earlier incarnation.
                adapter = await asyncio.to_thread(run.policy.publish)
            await unless_stopped(
                run,
                self._fleet.begin(
                    requirements, adapter=adapter, timeout_s=self.settings.ready_timeout_s
                ),
            )
            current.ready.set()
            if not run.stop.is_set():
                if run.config.managed:
                    await run.log.emit(StateRecord(state="running"))
                    await run_steps(run)
                else:
                    await run.log.emit(
                        StateRecord(state="external", detail="waiting for POST /train")
                    )
                    await run.stop.wait()
            async with current.updates.lock:  # Let a running update finish and answer.
                pass
            await run.save(run.policy.id.version)
            num_steps = run.config.num_steps
            is_complete = num_steps is not None and run.policy.id.version >= num_steps
            state = "completed" if is_complete else current.state_if_stopped
            await self._end(run, StateRecord(state=state))
        except ServiceError as error:
            log.error("run %s failed: %s", run.config.run_id, error.detail)
            if isinstance(error, UnsuitableForTraining):  # The refused update left nothing behind.
                await run.save(run.policy.id.version)
            await self._end(run, StateRecord(state=current.state_if_failed, detail=error.detail))
        except asyncio.CancelledError:
            detail = "the trainer was stopped within a step"
            await run.log.emit(StateRecord(state=current.state_if_failed, detail=detail))
            raise
        except Exception as error:  # The run ends, but the trainer keeps serving.
            log.error("run %s failed", run.config.run_id, exc_info=error)
            detail = (
                f"{type(error).__name__}: {error}; see the trainer's log, then post the run again: "
                "it resumes from its last checkpoint."
            )
            await self._end(run, StateRecord(state="failed", detail=detail))
        finally:
            current.last_policy = run.policy.id
            current.ready.set()
            try:
                await asyncio.to_thread(run.log.finish_trackers)
            finally:
                current.close()

    async def _end(self, run: Run, last: StateRecord) -> None:
        """Save the adapter, however the run ended, and emit its last event."""
        try:
            await asyncio.to_thread(save_adapter, run)
        except Exception as error:  # The run ends anyway, even with a broken device or a full disk.
            log.error("the adapter of run %s is not saved", run.config.run_id, exc_info=error)
            detail = (
                f"{last.detail} The adapter could not be saved in {run.log.run_dir}: {error}; see "
                "the trainer's log, then post the run again."
            )
            # The next incarnation saves it.
            state = last.state if last.state == "suspended" else "failed"
            last = StateRecord(state=state, detail=detail.strip())
        finally:
            log.info("run %s ended at policy %s: %s", run.config.run_id, run.policy.id, last.state)
            await run.log.emit(last)

    def _requirements(self, current: _CurrentRun) -> Requirements:
        run, config = current.run, current.run.config
        num_context_tokens = current.probe.longest + 1
        if config.needs_replicas:  # An external loop chooses its own lengths.
            longest = max(len(p.token_ids) for p in (*run.prompts.rows, *run.held_out))
            num_context_tokens = max(
                num_context_tokens, longest + (config.sampling.max_tokens or 1)
            )
        # Offline DPO samples nothing; a loop of the user's own may also sample elsewhere, and fetch
        # adapters from here.
        needs_none = not config.needs_replicas and (config.managed or self._knows_no_replica)
        return Requirements(
            run=run.policy.id.model_copy(update={"version": 0}),
            base=run.policy.identity,
            lora_rank=config.lora.rank,
            num_context_tokens=num_context_tokens,
            may_replace_run=lambda run_id: (
                config.replace_run or is_unattended(self.settings.runs_dir / run_id)
            ),
            prover=Conformance(current.probe, config.conformance),
            min_ready_replicas=0 if needs_none else config.min_ready_replicas,
            in_flight=config.in_flight,
            sync_timeout_s=config.sync_timeout_s,
        )

    @property
    def _knows_no_replica(self) -> bool:
        return not self.settings.rollout_urls and not len(self._fleet)

    def _run(self) -> _CurrentRun:
        if self._current is None:
            raise NotFound("there is no run: start one with POST /runs")
        return self._current

    def run_status(self) -> RunStatus:
        current = self._run()
        run, last_step = current.run, current.run.log.last_step
        return RunStatus(
            run_id=current.policy.run_id,
            state=run.log.state,
            detail=run.log.detail,
            stalls=stalls(run),
            step=last_step.step if last_step else run.first_step,
            num_steps=run.config.num_steps,
            policy=current.policy,
            last_step=last_step,
            last_eval=run.log.last_eval,
            run_dir=str(run.log.run_dir),
        )

    async def stop_run(self) -> RunStatus:
        """Ask the current run to end after its step. Posting its config again resumes it."""
        current = self._run()
        run, current.state_if_stopped = current.run, "stopped"
        if not run.log.has_ended and not run.stop.is_set():
            run.stop.set()
            await run.log.emit(StateRecord(state="stopping", detail="after the current step"))
        return self.run_status()

    def run_config(self) -> RunConfig:
        return self._run().run.config

    async def completions(self, num_groups: int) -> CompletionsResponse:
        """The newest groups of the latest run, as text."""
        run = self._run().run
        assert run.config.run_id
        groups = run.recent.newest(num_groups)
        return CompletionsResponse(
            run_id=run.config.run_id,
            reward_names=run.config.reward_names,
            groups=await asyncio.to_thread(in_words, groups, run.policy.encoder),
        )

    def events(self, start: int) -> AsyncIterator[tuple[int, RunEvent]]:
        return self._run().run.log.events(start)

    async def train(self, request: TrainRequest) -> TrainResponse:
        """POST /train: one update of an external run."""
        current = self._run()
        # The client may disconnect; the update still completes, and its answer is kept.
        return await asyncio.shield(current.updates.train(request, current.ready))

    # --- views ----------------------------------------------------------------------------------

    @property
    def fleet(self) -> Fleet:
        return self._fleet

    def policy_status(self) -> PolicyStatus:
        policy = self.policy
        if not policy.has_run:
            raise NotFound("there is no policy yet: start a run with POST /runs")
        return PolicyStatus(
            policy=policy.id,
            base=policy.identity,
            rank=policy.lora.rank,
            scaling=policy.lora.scaling,
            target_modules=policy.lora.target_modules,
            kept_adapters=policy.kept_versions,
        )

    def status(self) -> TrainerStatus:
        return TrainerStatus(
            state=self._state,
            detail=self._detail,
            model=self.settings.model,
            base=self._learner.policy.identity if self._learner else None,
            run=self.run_status() if self._current else None,
        )
