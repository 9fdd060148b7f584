"""The trainer from boot to exit: the policy, the fleet, and at most one run at a time.

A managed run executes loop.py; an external one is stepped by POST /train.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import secrets
import shutil
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from services.trainer.data import Prompt, PromptStream, load_prompts
from services.trainer.external_updates import ExternalUpdates
from services.trainer.fleet import Fleet, Requirements
from services.trainer.loop import Run, train, unless_stopped
from services.trainer.policy import Policy
from services.trainer.rewards import Scorer
from services.trainer.run_config import RunConfig
from services.trainer.run_log import RunLog, run_has_ended
from services.trainer.settings import TrainerSettings
from shared.adapters import peft_config
from shared.errors import (
    Conflict,
    InvalidRequest,
    NotFound,
    NotReady,
    RunConflict,
    ServiceError,
)
from shared.metrics import TrainerMetrics
from shared.rollout_client import RolloutClient
from shared.schemas import (
    PolicyId,
    PolicyStatus,
    RunEvent,
    RunStatus,
    StateRecord,
    TrainerStatus,
    TrainRequest,
    TrainResponse,
)

log = logging.getLogger(__name__)
_KEPT_ANSWERS = 64
_STOP_TIMEOUT_S = 60.0


@dataclass(slots=True)
class _CurrentRun:
    run: Run
    ready: asyncio.Event = field(default_factory=asyncio.Event)  # a replica serves it
    task: asyncio.Task[None] | None = None
    updates: ExternalUpdates = field(init=False)

    def __post_init__(self) -> None:
        self.updates = ExternalUpdates(self.run)


class Trainer:
    def __init__(
        self, settings: TrainerSettings, *, on_exit: Callable[[int], None] = lambda _: None
    ) -> None:
        self.settings = settings
        self.metrics = TrainerMetrics()
        self._on_exit = on_exit
        self._fleet = Fleet(
            [RolloutClient(url, api_key=settings.api_key) for url in settings.rollout_urls]
        )
        self._policy: Policy | None = None
        self._state: Literal["starting", "ready", "dead"] = "starting"
        self._detail = "loading the model"
        self._current: _CurrentRun | None = None
        self._starting_run = asyncio.Lock()
        self._boot_task: asyncio.Task[None] | None = None

    # --- life -----------------------------------------------------------------------------------

    def start(self) -> None:
        """Load the policy in the background. Call from the event loop."""
        self._boot_task = asyncio.create_task(self.boot())

    async def boot(self) -> None:
        started = time.perf_counter()
        try:
            self._policy = await asyncio.to_thread(self._load_policy)
        except Exception as error:  # whatever it is, the process is of no use: say it and exit
            trace = None if isinstance(error, ValueError) else error  # else the operator's to mend
            log.error("loading %s failed: %s", self.settings.model, error, exc_info=trace)
            self._state, self._detail = "dead", f"loading {self.settings.model} failed: {error}"
            self._on_exit(1)
            return
        self._state, self._detail = "ready", ""
        log.info(
            "ready after %.1f s on http://%s:%d: %s",
            time.perf_counter() - started,
            self.settings.host,
            self.settings.port,
            self.settings.model,
        )

    def _load_policy(self) -> Policy:
        device = self.settings.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        return Policy.load(
            self.settings.model,
            device=device,
            load_in_4bit=self.settings.load_in_4bit,
            gradient_checkpointing=self.settings.gradient_checkpointing,
            kept_adapters=self.settings.kept_adapters,
        )

    def shut_down(self) -> None:
        """SIGTERM: finish the step that runs, then exit 0."""
        log.info("stopping")
        if current := self._current:
            current.run.stop.set()
        self._on_exit(0)

    async def stop(self) -> None:
        if self._boot_task:
            self._boot_task.cancel()
        if (current := self._current) and current.task and not current.task.done():
            current.run.stop.set()
            await asyncio.wait({current.task}, timeout=_STOP_TIMEOUT_S)
            current.task.cancel()
        await self._fleet.aclose()

    @property
    def policy(self) -> Policy:
        if self._policy is None:
            raise NotReady(f"the trainer is {self._state}: {self._detail}", retry_after_s=1.0)
        return self._policy

    # --- runs -----------------------------------------------------------------------------------

    async def start_run(self, config: RunConfig) -> RunStatus:
        """Begin a run. Raises InvalidRequest for a config that cannot run, RunConflict when one is
        running."""
        async with self._starting_run:
            policy = self.policy
            if (current := self._current) and not current.run.log.has_ended:
                raise RunConflict(
                    f"run {current.run.policy.id.run_id!r} is {current.run.log.state}: stop it "
                    "with POST /runs/current/stop first"
                )
            if config.managed and not len(self._fleet):
                raise InvalidRequest("no replica is configured: set TRAINER_ROLLOUT_URLS")
            run = await self._prepare(config, policy)
            await run.log.emit(StateRecord(state="running", detail="waiting for a replica"))
            self._current = current = _CurrentRun(run)
            current.task = asyncio.create_task(self._execute(current))
            return self.run_status()

    async def _prepare(self, config: RunConfig, policy: Policy) -> Run:
        run_id = config.run_id or time.strftime("run-%Y%m%d-%H%M%S-") + secrets.token_hex(2)
        config = config.model_copy(update={"run_id": run_id})
        run_dir = self.settings.runs_dir / run_id
        if run_dir.exists():
            raise Conflict(f"run {run_id!r} exists in {run_dir}: choose another run_id")
        try:
            prompts, held_out = await asyncio.to_thread(_load_data, config, policy)
            scorer = Scorer(config.rewards, policy.encoder)
            await asyncio.to_thread(
                policy.start,
                PolicyId(run_id=run_id, version=0),
                config.lora,
                config.optimizer,
                seed=config.seed,
            )
        except ValueError as error:
            raise InvalidRequest(str(error)) from error
        run_dir.mkdir(parents=True)
        (run_dir / "config.json").write_text(config.model_dump_json(indent=2) + "\n")
        return Run(
            config=config,
            policy=policy,
            fleet=self._fleet,
            log=RunLog(run_dir, self.metrics),
            prompts=PromptStream(prompts, seed=config.seed),
            scorer=scorer,
            held_out=held_out,
            stop=asyncio.Event(),
        )

    async def _execute(self, current: _CurrentRun) -> None:
        """The task of a run: whatever ends it is its last event."""
        run = current.run
        try:
            log.info("run %s begins in %s", run.policy.id.run_id, run.log.run_dir)
            requirements = self._requirements(run)
            await unless_stopped(
                run, self._fleet.begin(requirements, timeout_s=self.settings.ready_timeout_s)
            )
            current.ready.set()
            if not run.config.managed:
                await run.log.emit(StateRecord(state="external", detail="waiting for POST /train"))
                await run.stop.wait()
                async with current.updates.lock:  # an update that runs is finished and answered
                    pass
            elif not run.stop.is_set():
                await run.log.emit(StateRecord(state="running"))
                await train(run)
            last = StateRecord(state="stopped" if run.stop.is_set() else "completed")
            await self._end(run, last)
        except ServiceError as error:
            log.error("run %s failed: %s", run.policy.id.run_id, error.detail)
            await self._end(run, StateRecord(state="failed", detail=error.detail))
        except asyncio.CancelledError:
            await run.log.emit(StateRecord(state="failed", detail="the trainer was stopped"))
            raise
        except Exception as error:  # the run ends; the trainer and what it knows stay
            log.error("run %s failed", run.policy.id.run_id, exc_info=error)
            detail = f"{type(error).__name__}: {error}"
            await self._end(run, StateRecord(state="failed", detail=detail))
        finally:
            current.ready.set()
            run.log.close()

    async def _end(self, run: Run, last: StateRecord) -> None:
        """Save what was learned, however the run ended, and emit its last event."""
        try:
            await asyncio.to_thread(save_adapter, run)
        except OSError as error:
            detail = f"{last.detail} The adapter could not be saved: {error}".strip()
            last = StateRecord(state="failed", detail=detail)
        log.info("run %s ended at policy %s: %s", run.policy.id.run_id, run.policy.id, last.state)
        await run.log.emit(last)

    def _requirements(self, run: Run) -> Requirements:
        num_context_tokens = 1  # a loop of the user's own samples as it likes
        if run.config.managed:
            prompts = run.prompts.longest, *(len(prompt.token_ids) for prompt in run.held_out)
            num_context_tokens = max(prompts) + (run.config.sampling.max_tokens or 1)
        return Requirements(
            run_id=run.policy.id.run_id,
            base=run.policy.identity,
            lora_rank=run.config.lora.rank,
            num_context_tokens=num_context_tokens,
            may_replace_run=lambda run_id: (
                run.config.replace_run or run_has_ended(self.settings.runs_dir / run_id)
            ),
        )

    def _run(self) -> _CurrentRun:
        if self._current is None:
            raise NotFound("there is no run: start one with POST /runs")
        return self._current

    def run_status(self) -> RunStatus:
        run = self._run().run
        last_step = run.log.last_step
        return RunStatus(
            run_id=run.policy.id.run_id,
            state=run.log.state,
            detail=run.log.detail,
            step=last_step.step if last_step else 0,
            num_steps=run.config.num_steps,
            policy=run.policy.id,
            last_step=last_step,
            last_eval=run.log.last_eval,
            run_dir=str(run.log.run_dir),
        )

    async def stop_run(self) -> RunStatus:
        """Ask the current run to end after its step; idempotent."""
        run = self._run().run
        if not run.log.has_ended and not run.stop.is_set():
            run.stop.set()
            await run.log.emit(StateRecord(state="stopping", detail="after the current step"))
        return self.run_status()

    def events(self, start: int) -> AsyncIterator[tuple[int, RunEvent]]:
        return self._run().run.log.events(start)

    async def train(self, request: TrainRequest) -> TrainResponse:
        """POST /train: one update of an external run."""
        current = self._run()
        # Whoever waits may leave; the update then goes on, alone, and its answer is kept.
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
            base=self._policy.identity if self._policy else None,
            run=self.run_status() if self._current else None,
        )


def _load_data(config: RunConfig, policy: Policy) -> tuple[list[Prompt], list[Prompt]]:
    if config.dataset is None:
        return [], []
    prompts = load_prompts(config.dataset, policy.encoder, seed=config.seed)
    if config.eval is None:
        return prompts, []
    held_out = load_prompts(config.eval.dataset, policy.encoder, seed=config.seed, held_out=True)
    return prompts, held_out[: config.eval.num_prompts]


def save_adapter(run: Run) -> None:
    """Write the current adapter in PEFT's format to `<run_dir>/adapter`; nothing for version 0."""
    if run.policy.id.is_base:
        return
    target = run.log.run_dir / "adapter"
    adapter = run.policy.publish()
    writing = Path(f"{target}.writing")
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(writing)
    writing.mkdir()
    (writing / "adapter_model.safetensors").write_bytes(adapter.content)
    config = peft_config(adapter.manifest, run.policy.source)
    (writing / "adapter_config.json").write_text(json.dumps(config, indent=2))
    writing.rename(target)
