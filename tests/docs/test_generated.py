"""The generated pages say what the code says now, and say something of every field."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import BaseModel

from docs.generate import meanings, pages, reachable
from services.rollout.settings import RolloutSettings
from services.trainer.run_config import RunConfig
from services.trainer.settings import TrainerSettings

MODELS = [RolloutSettings, TrainerSettings, *reachable(RunConfig)]


@pytest.mark.parametrize(("path", "text"), pages().items(), ids=lambda item: Path(item).name)
def test_a_generated_page_is_what_the_code_makes_of_it(path: Path, text: str) -> None:
    assert path.read_text() == text, "python -m docs.generate writes it again"


@pytest.mark.parametrize("model", MODELS)
def test_every_setting_has_a_meaning(model: type[BaseModel]) -> None:
    chooses_the_model = {"name", "type"}
    assert model.model_fields.keys() - meanings(model).keys() - chooses_the_model == set()
