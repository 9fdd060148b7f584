"""What docs/ says is so: its run configs parse, and its metrics are those of the records.

A ```yaml block is a run config when its first line is `# run config`, and a part of one when it is
`# in a run config`: it then takes the place of the same settings in the demo's.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel

from services.trainer.run_config import parse_run_config
from shared.schemas import EvalRecord, StepRecord

ROOT = Path(__file__).parents[2]
DEMO_RUN = (ROOT / "examples/demo/run.yaml").read_text()
BLOCKS = [
    pytest.param(block, id=f"{path.stem}-{number}")
    for path in sorted((ROOT / "docs").glob("*.md"))
    for number, block in enumerate(re.findall(r"```yaml\n(.*?)```", path.read_text(), re.DOTALL))
]


@pytest.mark.parametrize("block", BLOCKS)
def test_a_yaml_block_is_a_run_config_or_fits_into_the_demos(block: str) -> None:
    kind = block.partition("\n")[0]
    assert kind in ("# run config", "# in a run config")
    if kind == "# in a run config":
        block = yaml.safe_dump(yaml.safe_load(DEMO_RUN) | yaml.safe_load(block))
    parse_run_config(block)


@pytest.mark.parametrize(("record", "heading"), [(StepRecord, "Step"), (EvalRecord, "Evaluation")])
def test_docs_metrics_names_every_field_of_a_record_once(
    record: type[BaseModel], heading: str
) -> None:
    text = (ROOT / "docs/metrics.md").read_text()
    (section,) = re.findall(rf"^## {heading}\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE)
    assert re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE) == list(record.model_fields)
