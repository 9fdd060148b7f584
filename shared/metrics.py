"""Prometheus metrics of both services, each in a separate registry.

vLLM registers its metrics in prometheus_client's default registry; `exposition` renders both. The
counters that deploy/prometheus/alerts.yml watches exist from the start with the value 0: a series
that begins at 1 shows no increase.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import get_args

from prometheus_client import (
    REGISTRY,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)

from shared.errors import EngineDead
from shared.schemas import (
    EvalRecord,
    ReplicaState,
    RolloutStatus,
    RunState,
    StepRecord,
    SyncReceipt,
)

_SYNC_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 120.0)


def exposition(registry: CollectorRegistry) -> bytes:
    """`registry` and the process-wide registry in Prometheus' text format."""
    return generate_latest(registry) + generate_latest(REGISTRY)


def _show_state(gauge: Gauge, states: Iterable[str], current: Callable[[], str | None]) -> None:
    """Set the gauge to 1 for the state that `current` returns at a scrape, and to 0 for others."""

    def is_in(state: str) -> Callable[[], float]:
        return lambda: float(current() == state)

    for state in states:
        gauge.labels(state).set_function(is_in(state))


class RolloutMetrics:
    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._state = Gauge(
            "tandem_rollout_state", "1 for the current state", ["state"], registry=self.registry
        )
        self.policy_version = Gauge(
            "tandem_rollout_policy_version", "Newest resident version", registry=self.registry
        )
        self.outstanding_completions = Gauge(
            "tandem_rollout_outstanding_completions",
            "Completions queued or running",
            registry=self.registry,
        )
        self.open_streams = Gauge(
            "tandem_rollout_open_streams",
            "Running streams of /generate and /v1",
            registry=self.registry,
        )
        self.completions = Counter(
            "tandem_rollout_completions",
            "Completions by finish reason",
            ["finish_reason"],
            registry=self.registry,
        )
        self.errors = Counter(
            "tandem_rollout_errors", "Refused or failed requests", ["type"], registry=self.registry
        )
        self.failures = Counter(
            "tandem_rollout_background_failures",
            "Failures of the replica's own tasks, which the log explains",
            ["task"],
            registry=self.registry,
        )
        self.syncs = Counter(
            "tandem_rollout_syncs", "Accepted adapters", ["outcome"], registry=self.registry
        )
        self.sync_seconds = Histogram(
            "tandem_rollout_sync_seconds",
            "Time from the first byte of an adapter until it is resident",
            buckets=_SYNC_BUCKETS_S,
            registry=self.registry,
        )

    def watch(self, state: Callable[[], str]) -> None:
        """Report the replica's state at every scrape."""
        _show_state(self._state, get_args(RolloutStatus.model_fields["state"].annotation), state)

    def record_sync(self, receipt: SyncReceipt) -> None:
        self.syncs.labels(receipt.outcome).inc()
        self.sync_seconds.observe(
            receipt.receive_s + receipt.verify_s + receipt.wait_s + receipt.load_s
        )
        self.policy_version.set(receipt.newest.version)


class TrainerMetrics:
    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._gauges: dict[str, Gauge] = {}
        self.updates = Counter("tandem_trainer_updates", "Policy updates", registry=self.registry)
        self.refused_updates = Counter(
            "tandem_trainer_refused_updates",
            "Updates that the guards refused",
            registry=self.registry,
        )
        self.checkpoints = Counter(
            "tandem_trainer_checkpoints",
            "Checkpoints by outcome: saved or failed",
            ["outcome"],
            registry=self.registry,
        )
        for outcome in ("saved", "failed"):
            self.checkpoints.labels(outcome)
        self.log_failures = Counter(
            "tandem_trainer_log_failures",
            "Writes of metrics.jsonl, groups.jsonl, TensorBoard or a tracker that failed",
            registry=self.registry,
        )
        self.failures = Counter(
            "tandem_trainer_background_failures",
            "Failures of the trainer's own tasks, which the log explains",
            ["task"],
            registry=self.registry,
        )
        self.syncs = Histogram(
            "tandem_trainer_sync_seconds",
            "Time to upload, load and prove one version on one replica",
            buckets=_SYNC_BUCKETS_S,
            registry=self.registry,
        )
        self._replicas = Gauge(
            "tandem_trainer_replicas", "Replicas by state", ["state"], registry=self.registry
        )
        self._replica_transitions = Counter(
            "tandem_trainer_replica_transitions",
            "Changes of a replica's state, by new state",
            ["state"],
            registry=self.registry,
        )
        self.request_errors = Counter(
            "tandem_trainer_request_errors",
            "Errors that ended streams of replicas early, by type",
            ["type"],
            registry=self.registry,
        )
        self.request_errors.labels(EngineDead.__name__)
        self._replica_states: dict[str, str] = {}
        for state in get_args(ReplicaState):
            self._replicas.labels(state)
            self._replica_transitions.labels(state)
        self._replicas_in_sync = Gauge(
            "tandem_trainer_replicas_in_sync",
            "Serving replicas that hold the newest version",
            registry=self.registry,
        )
        self._run_state = Gauge(
            "tandem_trainer_run_state",
            "1 for the state of the current run",
            ["state"],
            registry=self.registry,
        )
        self._max_staleness = Gauge(
            "tandem_trainer_run_max_staleness",
            "Upper bound of the run on staleness_max, in versions",
            registry=self.registry,
        )
        self._min_ready_replicas = Gauge(
            "tandem_trainer_run_min_ready_replicas",
            "Replicas that must hold a version before the run continues",
            registry=self.registry,
        )
        self._version_timestamp = Gauge(
            "tandem_trainer_version_timestamp_seconds",
            "Unix time of the newest version, or of the run's start if it has none yet",
            registry=self.registry,
        )
        self._steps_without_gradient = Gauge(
            "tandem_trainer_steps_without_gradient",
            "Consecutive latest steps without any gradient",
            registry=self.registry,
        )
        self._reward_outage = Gauge(
            "tandem_trainer_reward_outage_timestamp_seconds",
            "Unix time at which a reward service became unavailable; 0 while none is",
            registry=self.registry,
        )
        self._waits_for_rewards = False

    def watch(self, *, run_state: Callable[[], str | None], num_in_sync: Callable[[], int]) -> None:
        """Report the current run's state and the replicas that serve its newest version, at every
        scrape. `run_state` returns None without a run."""
        _show_state(self._run_state, get_args(RunState), run_state)
        self._replicas_in_sync.set_function(num_in_sync)

    def begin_run(self, *, max_staleness: int, min_ready_replicas: int) -> None:
        """Report the bounds of a run that begins or resumes, and drop the last run's numbers."""
        for gauge in self._gauges.values():
            self.registry.unregister(gauge)
        self._gauges.clear()
        self._max_staleness.set(max_staleness)
        self._min_ready_replicas.set(min_ready_replicas)
        self._version_timestamp.set_to_current_time()
        self._steps_without_gradient.set(0)
        self.record_reward_outage(False)

    def record_reward_outage(self, is_away: bool) -> None:
        """Record whether a reward service is unavailable."""
        if not is_away:
            self._reward_outage.set(0)
        elif not self._waits_for_rewards:
            self._reward_outage.set_to_current_time()
        self._waits_for_rewards = is_away

    def record_replica(self, id: str, old_state: str, new_state: str) -> None:
        """Count a change of a replica's state. Its first state counts as a change too."""
        self._replica_transitions.labels(new_state).inc()
        self._replica_states[id] = new_state
        if new_state == "gone":
            del self._replica_states[id]
        for state in (old_state, new_state):
            self._replicas.labels(state).set(list(self._replica_states.values()).count(state))

    def record(self, record: StepRecord | EvalRecord) -> None:
        """Set one gauge per number of the record, such as `tandem_trainer_reward_mean`."""
        if isinstance(record, StepRecord):
            self.updates.inc()
            self._version_timestamp.set_to_current_time()
            if record.grad_norm == 0:
                self._steps_without_gradient.inc()
            else:
                self._steps_without_gradient.set(0)
        for name, value in {**scalars(record), "policy_version": record.policy.version}.items():
            if name not in self._gauges:
                field = type(record).model_fields.get(name)
                meaning = field.description if field else "Version of the latest record."
                self._gauges[name] = Gauge(
                    f"tandem_trainer_{name}", meaning or name, registry=self.registry
                )
            self._gauges[name].set(value)


def scalars(record: StepRecord | EvalRecord) -> dict[str, float]:
    """The numbers that a record has, by field name."""
    return {
        name: value for name, value in record if isinstance(value, int | float) and name != "step"
    }
