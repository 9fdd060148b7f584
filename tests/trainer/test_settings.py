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
        {"rollout_urls": "127.0.0.1:8000"},
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
