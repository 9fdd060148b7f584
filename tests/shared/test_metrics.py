"""The fleet and the run as Prometheus sees them."""

from __future__ import annotations

import pytest

from shared.metrics import TrainerMetrics
from shared.schemas import PolicyId, StepRecord


def step(*, grad_norm: float, num_fresh_tokens: int = 1) -> StepRecord:
    """A step record whose other required fields are 1."""
    required = (name for name, field in StepRecord.model_fields.items() if field.is_required())
    return StepRecord.model_validate(
        {
            **dict.fromkeys(required, 1),
            "policy": PolicyId(run_id="r", version=1),
            "grad_norm": grad_norm,
            "num_fresh_tokens": num_fresh_tokens,
        }
    )


def test_replicas_are_counted_by_state_and_their_changes_by_new_state() -> None:
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


def test_counters_are_0_before_the_first_event() -> None:
    """A series that begins at 1 shows Prometheus no increase."""
    value = TrainerMetrics().registry.get_sample_value
    for state in ("discovered", "admitting", "serving", "draining", "quarantined", "gone"):
        assert value("tandem_trainer_replicas", {"state": state}) == 0
        assert value("tandem_trainer_replica_transitions_total", {"state": state}) == 0
    for outcome in ("saved", "failed"):
        assert value("tandem_trainer_checkpoints_total", {"outcome": outcome}) == 0
    assert value("tandem_trainer_request_errors_total", {"type": "EngineDead"}) == 0


def test_steps_without_a_gradient_are_counted_in_a_row() -> None:
    metrics = TrainerMetrics()
    counts = []
    for grad_norm in (0.5, 0.0, 0.0, 2.0, 0.0):
        metrics.record(step(grad_norm=grad_norm))
        counts.append(
            metrics.registry.get_sample_value("tandem_trainer_steps_without_gradient", {})
        )
    assert counts == [0, 1, 2, 0, 1]
    metrics.begin_run(max_staleness=0, min_ready_replicas=1)
    assert metrics.registry.get_sample_value("tandem_trainer_steps_without_gradient") == 0


def test_the_outage_of_a_reward_service_has_its_start_time(monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = TrainerMetrics()
    seen = []
    for now, is_away in ((100, False), (200, True), (300, True), (400, False), (500, True)):
        monkeypatch.setattr("time.time", lambda now=now: now)
        metrics.record_reward_outage(is_away)
        name = "tandem_trainer_reward_outage_timestamp_seconds"
        seen.append(metrics.registry.get_sample_value(name))
    assert seen == [0, 200, 200, 0, 500]
    metrics.begin_run(max_staleness=0, min_ready_replicas=1)
    assert metrics.registry.get_sample_value(name) == 0


def test_a_new_run_drops_the_numbers_of_the_last_one() -> None:
    metrics = TrainerMetrics()
    for _ in range(2):
        metrics.record(step(grad_norm=1.0))
        assert metrics.registry.get_sample_value("tandem_trainer_num_groups") == 1
        metrics.begin_run(max_staleness=0, min_ready_replicas=1)
        assert metrics.registry.get_sample_value("tandem_trainer_num_groups") is None
    assert metrics.registry.get_sample_value("tandem_trainer_updates_total") == 2


def test_a_number_that_a_step_lacks_has_no_gauge() -> None:
    metrics = TrainerMetrics()
    metrics.record(step(grad_norm=1.0))
    assert metrics.registry.get_sample_value("tandem_trainer_sampler_kl") is None
    assert metrics.registry.get_sample_value("tandem_trainer_num_groups") == 1


def test_a_gauge_is_explained_as_the_number_is_declared() -> None:
    metrics = TrainerMetrics()
    metrics.record(step(grad_norm=1.0))
    said = {family.name: family.documentation for family in metrics.registry.collect()}
    assert said["tandem_trainer_num_samples"] == "Completions in those groups."
