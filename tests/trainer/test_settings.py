"""Settings that cannot be used are refused by name, before anything starts."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from services.rollout.settings import RolloutSettings
from services.trainer.settings import TrainerSettings


@pytest.mark.parametrize(
    "settings",
    [
        {"log_level": "loud"},
        {"port": 70000},
        {"rollout_urls": "ftp://host:8000"},
        {"rollout_urls": "http://host:8000/v1"},
        {"rollout_urls": "two hosts"},
        {"rollout_urls": "http://"},
        {"rollout_urls": "http://host:port"},
    ],
    ids=str,
)
def test_a_setting_that_cannot_be_used_is_named(settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as raised:
        TrainerSettings.model_validate({"model": "m", **settings})
    assert raised.value.errors()[0]["loc"] == tuple(settings)


def test_a_log_level_may_be_written_small() -> None:
    assert TrainerSettings.model_validate({"model": "m", "log_level": "debug"}).log_level == "DEBUG"
    assert RolloutSettings.model_validate({"model": "m", "log_level": "info"}).log_level == "INFO"


def test_replicas_are_separated_by_commas() -> None:
    urls = TrainerSettings.model_validate({"model": "m", "rollout_urls": "http://a:1, http://b/"})
    assert urls.rollout_urls == ("http://a:1", "http://b/")


def test_a_replica_may_be_named_without_scheme_and_port() -> None:
    """As a service of a compose file or a cluster is."""
    settings = TrainerSettings.model_validate(
        {"model": "m", "rollout_urls": "rollout,gpu-box:8001,10.0.0.7,[::1]:8002"}
    )
    assert settings.rollout_urls == (
        "http://rollout:8000",
        "http://gpu-box:8001",
        "http://10.0.0.7:8000",
        "http://[::1]:8002",
    )
