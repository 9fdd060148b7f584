"""What Prometheus sees of the fleet."""

from __future__ import annotations

from shared.metrics import TrainerMetrics


def test_replicas_are_counted_by_state_and_their_changes_by_the_new_one() -> None:
    metrics = TrainerMetrics()

    def replicas(state: str) -> float | None:
        return metrics.registry.get_sample_value("tandem_trainer_replicas", {"state": state})

    def transitions(state: str) -> float | None:
        return metrics.registry.get_sample_value(
            "tandem_trainer_replica_transitions_total", {"state": state}
        )

    for name in ("a", "b"):
        metrics.record_replica(name, "discovered", "admitting")
        metrics.record_replica(name, "admitting", "serving")
    assert (replicas("admitting"), replicas("serving"), transitions("serving")) == (0, 2, 2)
    metrics.record_replica("a", "serving", "quarantined")
    assert (replicas("serving"), replicas("quarantined")) == (1, 1)
    metrics.record_replica("b", "serving", "gone")
    assert (replicas("serving"), replicas("gone"), transitions("gone")) == (0, 0, 1)
