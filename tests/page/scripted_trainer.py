"""A trainer that does what a test says, behind the real app: for the page alone.

No model, no replica, no run: events, replicas and answers are set from the test's thread.
"""

from __future__ import annotations

import asyncio
import math
import random
import threading
from collections.abc import AsyncIterator
from typing import Any, cast

import uvicorn

from services.trainer.app import create_app
from services.trainer.fleet.fleet import Fleet
from services.trainer.run_config import RunConfig
from services.trainer.settings import TrainerSettings
from services.trainer.trainer import Trainer
from shared.errors import NotFound, ServiceError
from shared.schemas import (
    CompletionsResponse,
    EvalRecord,
    PolicyId,
    RecentCompletion,
    RecentGroup,
    ReplicaStatus,
    RunEvent,
    RunStatus,
    Segment,
    StateRecord,
    StepRecord,
    TrainerStatus,
)
from tests.replica_process import eventually, free_port

RUN = PolicyId(run_id="sort-digits", version=0)
NUM_STEPS = 120


class _Replicas:
    """What of a fleet the page is shown."""

    def __init__(self) -> None:
        self.all: tuple[ReplicaStatus, ...] = ()

    def status(self) -> tuple[ReplicaStatus, ...]:
        return self.all


class ScriptedTrainer(Trainer):
    """`fail_start` is what POST /runs answers; `cut` ends the streams that are open."""

    def __init__(self, api_key: str | None = None) -> None:
        super().__init__(TrainerSettings(model="demo/sort-digits", TANDEM_API_KEY=api_key))
        self.state: Any = "ready"
        self.detail = ""
        self.run: RunStatus | None = None
        self.log: list[RunEvent] = []
        self._replicas = _Replicas()
        self.groups: tuple[RecentGroup, ...] = ()
        self.fail_start: ServiceError | None = None
        self.started: list[RunConfig] = []
        self.resumed_at: list[int] = []  # of each stream, the event it began with
        self._num_cuts = 0

    # --- what a test does -----------------------------------------------------------------------

    def begin(self, run: PolicyId = RUN, **changes: Any) -> None:
        self.log = []
        self.run = RunStatus(
            run_id=run.run_id,
            state="running",
            detail="",
            step=0,
            num_steps=NUM_STEPS,
            policy=run,
            last_step=None,
            last_eval=None,
            run_dir="runs/sort-digits",
        )
        self.change(**changes)

    def change(self, **changes: Any) -> None:
        assert self.run
        self.run = self.run.model_copy(update=changes)

    def emit(self, event: RunEvent) -> None:
        if isinstance(event, StepRecord):
            self.change(step=event.step, policy=event.policy, last_step=event)
        if isinstance(event, StateRecord):
            self.change(state=event.state, detail=event.detail)
        self.log.append(event)

    def cut(self) -> None:
        self._num_cuts += 1

    def list_replicas(self, *replicas: ReplicaStatus) -> None:
        self._replicas.all = replicas

    # --- what the app asks ----------------------------------------------------------------------

    def start(self) -> None:
        """Nothing boots."""

    async def stop(self) -> None:
        self.cut()

    @property
    def fleet(self) -> Fleet:
        return cast(Fleet, self._replicas)

    def status(self) -> TrainerStatus:
        return TrainerStatus(
            state=self.state, detail=self.detail, model="demo/sort-digits", base=None, run=self.run
        )

    async def start_run(self, config: RunConfig) -> RunStatus:
        if self.fail_start:
            raise self.fail_start
        self.started.append(config)
        self.begin(num_steps=config.num_steps)
        return self.run_status()

    async def stop_run(self) -> RunStatus:
        self.emit(StateRecord(state="stopped"))
        return self.run_status()

    def run_status(self) -> RunStatus:
        if self.run is None:
            raise NotFound("there is no run: start one with POST /runs")
        return self.run

    def run_config(self) -> RunConfig:
        return self.started[-1]

    async def completions(self, num_groups: int) -> CompletionsResponse:
        return CompletionsResponse(
            run_id=self.run_status().run_id,
            reward_names=("exact_match", "brevity"),
            groups=self.groups[:num_groups],
        )

    async def events(self, start: int) -> AsyncIterator[tuple[int, RunEvent]]:
        self.resumed_at.append(start)
        log, num_cuts, index = self.log, self._num_cuts, start
        while self._num_cuts == num_cuts and log is self.log:
            while index < len(log):
                yield index, log[index]
                index += 1
            if self.run_status().state in ("stopped", "completed", "failed"):
                return
            await asyncio.sleep(0.02)


class Served:
    """The app of a trainer on a loopback port, in a thread. `stop` is what a crash looks like."""

    def __init__(self, trainer: ScriptedTrainer, port: int | None = None) -> None:
        self._trainer = trainer
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        config = uvicorn.Config(
            create_app(trainer),
            port=self.port,
            log_level="warning",
            timeout_graceful_shutdown=1,
            timeout_keep_alive=1,
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run)
        self._thread.start()
        assert eventually(lambda: self._server.started, timeout_s=10)

    def stop(self) -> None:
        self._trainer.cut()  # else the server waits for the streams
        self._server.should_exit = True
        self._thread.join(10)
        assert not self._thread.is_alive()


# --- what happens in a run ----------------------------------------------------------------------


def step_record(step: int, run: PolicyId = RUN, **changes: Any) -> StepRecord:
    """A run that learns, with the noise of one."""
    noise = random.Random(step)
    learned = 1 - math.exp(-step / 45)
    gap = 0.008 * math.exp(0.2 * noise.gauss(0, 1))
    numbers = {
        "num_groups": 32,
        "num_constant_groups": round(20 * learned**3 + 3 * noise.random()),
        "num_samples": 256,
        "num_tokens": 1536,
        "reward_mean": 0.12 + 0.8 * learned + 0.02 * noise.gauss(0, 1),
        "reward_std": 0.42 * (1 - 0.6 * learned),
        "completion_tokens_mean": 6 + 0.4 * noise.random(),
        "truncated_fraction": 0.2 * (1 - learned),
        "staleness_mean": 0.4 + 0.2 * noise.random(),
        "staleness_max": 1,
        "num_continued": 0,
        "num_ready_groups": 32,
        "num_in_flight_groups": 4,
        "loss": 0.03 * noise.gauss(0, 1),
        "grad_norm": 0.5 + 0.3 * noise.random(),
        "learning_rate": 1e-3,
        "entropy": 1.5 * (1 - 0.8 * learned) + 0.03 * noise.random(),
        "clip_fraction": 0.01,
        "importance_weight_mean": 1.0,
        "importance_truncated_fraction": 0.0,
        "logprob_gap": gap,
        "logprob_gap_p99": 7 * gap,
        "logprob_gap_max": 22 * gap * (1 + noise.random()),
        "sampler_kl": gap**2 * (1 + noise.random()),
        "token_ess": 0.99 - 0.02 * noise.random(),
        "sequence_ess": 0.93 - 0.05 * noise.random(),
        "num_fresh_tokens": 1024,
        "wait_s": 0.6 + 0.2 * noise.random(),
        "update_s": 1.5 + 0.1 * noise.random(),
        "sync_s": 0.2 + 0.05 * noise.random(),
        "step_s": 2.4 + 0.3 * noise.random(),
        "tokens_per_s": 590 + 60 * noise.random(),
        "trainer_idle_fraction": 0.25 + 0.05 * noise.random(),
        "rollout_idle_fraction": 0.55 - 0.2 * learned + 0.05 * noise.random(),
        "num_serving_replicas": 2,
    }
    policy = run.model_copy(update={"version": step})
    return StepRecord.model_validate({"step": step, "policy": policy, **numbers, **changes})


def eval_record(step: int, run: PolicyId = RUN) -> EvalRecord:
    learned = 1 - math.exp(-step / 45)
    return EvalRecord(
        step=step,
        policy=run.model_copy(update={"version": step}),
        num_prompts=256,
        sampled_reward=0.13 + 0.78 * learned,
        greedy_reward=0.2 + 0.76 * learned,
        eval_s=1.2,
    )


def replica(port: int, *, version: int | None = None, **changes: Any) -> ReplicaStatus:
    status = {
        "id": f"10.0.0.7:{port}",
        "url": f"http://10.0.0.7:{port}",
        "source": "configured",
        "state": "serving",
        "detail": "",
        "boot_id": "b",
        "policy": None if version is None else RUN.model_copy(update={"version": version}),
        "num_outstanding_completions": 96,
        "num_outstanding_tokens": 640,
        "logprob_gap": 0.0094,
        "last_sync_s": 0.21,
        "num_failures": 0,
    }
    return ReplicaStatus.model_validate({**status, **changes})


def group(step: int, index: int, prompt: str, *answers: tuple[str, float]) -> RecentGroup:
    policy = RUN.model_copy(update={"version": step - 1})
    return RecentGroup(
        step=step,
        group=index,
        prompt=prompt,
        num_prompt_tokens=len(prompt),
        completions=tuple(
            RecentCompletion(
                text=text,
                reward=reward,
                rewards=(reward - 0.05, 0.05),
                segments=(Segment(policy=policy, num_tokens=max(1, len(text))),),
                finish_reason="stop" if len(text) < 900 else "length",
                num_tokens=max(1, len(text)),
            )
            for text, reward in answers
        ),
    )
