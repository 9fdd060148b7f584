"""Numbers of a run to Weights & Biases and Trackio: RunLog -> a queue and thread each -> tracker.

A tracker never holds up a step and never ends a run. What it cannot take is said once, by
`on_failure`; metrics.jsonl has all numbers whatever a tracker does.
"""

from __future__ import annotations

import importlib.util
import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from services.boot import one_line
from services.trainer.run_config import TrackingConfig, TrackioTracking, WandbTracking

log = logging.getLogger(__name__)
FINISH_TIMEOUT_S = 20.0  # How long a tracker may take to send the rest when the run ends.
_INIT_TIMEOUT_S = 30.0
_Numbers: TypeAlias = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class TrackedRun:
    """What trackers need to know about a run."""

    trackers: Sequence[TrackingConfig]
    run_id: str
    is_new: bool  # False continues the run in the tracker.
    folder: Path
    settings: Mapping[str, Any]  # The resolved config without secrets.


class Tracker(Protocol):
    def log(self, numbers: _Numbers, step: int) -> None: ...

    def finish(self, *, failed: bool) -> None: ...


def check_tracking(trackers: Sequence[TrackingConfig]) -> None:
    """Raises ValueError, in one sentence, for a tracker that cannot be used here."""
    for config in trackers:
        if importlib.util.find_spec(config.type) is None:
            raise ValueError(
                f"tracking type {config.type} needs the package {config.type}, which is not where "
                f"the trainer runs: pip install {config.type} there, or leave the tracker out"
            )
        if isinstance(config, WandbTracking) and config.mode == "online":
            import wandb

            if not wandb.login(prompt=False, verify=False):
                raise ValueError(
                    "tracking type wandb has no login: set WANDB_API_KEY where the trainer runs, "
                    "or mode to offline"
                )
        if isinstance(config, TrackioTracking) and config.space_id:
            from huggingface_hub import get_token

            if not get_token():
                raise ValueError(
                    "tracking type trackio has no login for its space: set HF_TOKEN where the "
                    "trainer runs, or leave space_id out to store the numbers locally"
                )


class Trackers:
    """The trackers of one run, each fed by its own thread."""

    def __init__(self, run: TrackedRun, *, on_failure: Callable[[str], None]) -> None:
        self._feeds = [_Feed(config, run, on_failure) for config in run.trackers]

    def log(self, numbers: _Numbers, step: int) -> None:
        for feed in self._feeds:
            feed.put(numbers, step)

    def finish(self, *, failed: bool) -> None:
        """Let them send what they have and end; blocks at most FINISH_TIMEOUT_S."""
        deadline = time.monotonic() + FINISH_TIMEOUT_S
        for feed in self._feeds:
            feed.end(failed=failed)
        for feed in self._feeds:
            feed.join(deadline)


class _Feed:
    def __init__(
        self, config: TrackingConfig, run: TrackedRun, on_failure: Callable[[str], None]
    ) -> None:
        self._config = config
        self._run = run
        self._on_failure = on_failure
        self._is_over = False
        self._failed = False
        self._queue: queue.SimpleQueue[tuple[_Numbers, int] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(
            target=self._feed, name=f"tracking-{config.type}", daemon=True
        )
        self._thread.start()

    def put(self, numbers: _Numbers, step: int) -> None:
        if not self._is_over:
            self._queue.put((numbers, step))

    def end(self, *, failed: bool) -> None:
        self._failed = failed
        self._queue.put(None)

    def join(self, deadline: float) -> None:
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            self._give_up(f"it did not take its last numbers within {FINISH_TIMEOUT_S:g} s")

    def _feed(self) -> None:
        try:
            tracker = _open(self._config, self._run)
            try:
                while (item := self._queue.get()) is not None:
                    tracker.log(*item)
            finally:
                tracker.finish(failed=self._failed)
        except Exception as error:  # The run continues, whatever a tracker does.
            log.debug("the whole trace", exc_info=error)
            self._give_up(one_line(error))

    def _give_up(self, problem: str) -> None:
        if not self._is_over:
            self._is_over = True
            self._on_failure(f"tracking type {self._config.type} takes no more: {problem}")


def _open(config: TrackingConfig, run: TrackedRun) -> Tracker:
    match config:
        case WandbTracking():
            return _Wandb(config, run)
        case TrackioTracking():
            return _Trackio(config, run)


class _Wandb:
    """The run with that id. It gets numbers and the config, nothing of the machine or the code."""

    def __init__(self, config: WandbTracking, run: TrackedRun) -> None:
        import wandb

        logging.getLogger("wandb").propagate = False  # W&B writes its own debug.log.
        self._run = wandb.init(
            project=config.project,
            entity=config.entity,
            id=run.run_id,
            name=run.run_id,
            resume="never" if run.is_new else "allow",
            mode=config.mode,
            dir=str(run.folder),
            config=dict(run.settings),
            settings=wandb.Settings(
                console="off",
                silent=True,
                disable_code=True,
                disable_git=True,
                x_disable_machine_info=True,
                x_disable_meta=True,
                x_disable_stats=True,
                x_save_requirements=False,
                reinit="create_new",
                init_timeout=_INIT_TIMEOUT_S,
                finish_timeout=FINISH_TIMEOUT_S,
                finish_timeout_raises=True,
            ),
        )
        # W&B's own step cannot decrease, but a resumed run returns to its checkpoint.
        self._run.define_metric("*", step_metric="step")

    def log(self, numbers: _Numbers, step: int) -> None:
        self._run.log({"step": step, **numbers})

    def finish(self, *, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class _Trackio:
    """The run with that name, in TRACKIO_DIR or in a Space."""

    def __init__(self, config: TrackioTracking, run: TrackedRun) -> None:
        import trackio

        self._config = config
        self._run = trackio.init(
            project=config.project,
            name=run.run_id,
            space_id=config.space_id,
            resume="never" if run.is_new else "allow",
            config=dict(run.settings),
            embed=False,
            auto_log_cpu=False,
            auto_log_gpu=False,
        )

    def log(self, numbers: _Numbers, step: int) -> None:
        self._run.log(dict(numbers), step=step)
        self._check()

    def finish(self, *, failed: bool) -> None:
        from trackio.sqlite_storage import SQLiteStorage

        self._run.finish()
        self._check()
        if self._config.space_id and SQLiteStorage.has_pending_data(self._config.project):
            raise OSError(
                f"{self._config.space_id} does not have its last numbers; they are kept on this "
                "machine and sent with the next run of the project"
            )

    def _check(self) -> None:
        """Trackio only warns about what its threads could not do."""
        if failures := self._run._warned_failures:
            raise OSError(f"{', '.join(sorted(failures))} failed, its warning has the reason")
