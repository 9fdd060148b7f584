"""Prometheus metrics of both services, each in a registry of its own.

vLLM registers its metrics in prometheus_client's default registry; `exposition` prints both.
"""

from __future__ import annotations

from prometheus_client import (
    REGISTRY,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)

from shared.schemas import EvalRecord, StepRecord, SyncReceipt

_SYNC_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


def exposition(registry: CollectorRegistry) -> bytes:
    """The text format of `registry` and of the process-wide one."""
    return generate_latest(registry) + generate_latest(REGISTRY)


class RolloutMetrics:
    def __init__(self) -> None:
        self.registry = CollectorRegistry()
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
            "Streamed /generate requests that run",
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
        self.syncs = Counter(
            "tandem_rollout_syncs", "Accepted adapters", ["outcome"], registry=self.registry
        )
        self.sync_seconds = Histogram(
            "tandem_rollout_sync_seconds",
            "From the first byte of an adapter to its residency",
            buckets=_SYNC_BUCKETS_S,
            registry=self.registry,
        )

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
        self.checkpoints = Counter(
            "tandem_trainer_checkpoints",
            "Checkpoints by outcome: saved or failed",
            ["outcome"],
            registry=self.registry,
        )
        self.log_failures = Counter(
            "tandem_trainer_log_failures",
            "Writes of metrics.jsonl, groups.jsonl or TensorBoard that failed",
            registry=self.registry,
        )
        self.syncs = Histogram(
            "tandem_trainer_sync_seconds",
            "Upload, load and proof of one version on one replica",
            buckets=_SYNC_BUCKETS_S,
            registry=self.registry,
        )
        self._replicas = Gauge(
            "tandem_trainer_replicas", "Replicas by state", ["state"], registry=self.registry
        )
        self._replica_transitions = Counter(
            "tandem_trainer_replica_transitions",
            "Changes of a replica's state, by the new one",
            ["state"],
            registry=self.registry,
        )
        self.request_errors = Counter(
            "tandem_trainer_request_errors",
            "What ended streams of replicas early, by type of error",
            ["type"],
            registry=self.registry,
        )
        self._replica_states: dict[str, str] = {}

    def record_replica(self, id: str, old_state: str, new_state: str) -> None:
        """A replica changed its state. The first of its states counts as a change, too."""
        self._replica_transitions.labels(new_state).inc()
        self._replica_states[id] = new_state
        if new_state == "gone":
            del self._replica_states[id]
        for state in (old_state, new_state):
            self._replicas.labels(state).set(list(self._replica_states.values()).count(state))

    def record(self, record: StepRecord | EvalRecord) -> None:
        """Set one gauge per number of the record: `tandem_trainer_reward_mean` and so on."""
        if isinstance(record, StepRecord):
            self.updates.inc()
        for name, value in {**scalars(record), "policy_version": record.policy.version}.items():
            if name not in self._gauges:
                self._gauges[name] = Gauge(
                    f"tandem_trainer_{name}", f"Latest {name}", registry=self.registry
                )
            self._gauges[name].set(value)


def scalars(record: StepRecord | EvalRecord) -> dict[str, float]:
    """The numbers of a record, by field name."""
    return {
        name: value for name, value in record if isinstance(value, int | float) and name != "step"
    }
