"""What README and docs/ say is so: links lead somewhere, blocks are what they say, metrics exist.

A ```yaml block is a run config when its first line is `# run config`, and a part of one when it is
`# in a run config`: it then takes the place of the same settings in the demo's.
"""

from __future__ import annotations

import ast
import json
import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from services.trainer.run_config import parse_run_config
from shared.schemas import EvalRecord, StepRecord
from tests.docs.blocks import ALL_BLOCKS, PAGES, ROOT, Block

DEMO_RUN = (ROOT / "examples/demo/run.yaml").read_text()
LINKED_PAGES = [
    *PAGES,
    ROOT / "deploy/README.md",
    ROOT / "benchmarks/README.md",
    ROOT / "CHANGELOG.md",
    ROOT / "CONTRIBUTING.md",
]

# `Fleet.generate`, `_make_advantages`, `RewardConfig`: words that only code has.
IDENTIFIER = re.compile(r"(?:\w*_\w+|[A-Z]\w+)(?:\.\w+)*")


def in_language(name: str) -> pytest.MarkDecorator:
    found = [block for block in ALL_BLOCKS if block.language == name]
    return pytest.mark.parametrize("block", found, ids=str)


@in_language("yaml")
def test_a_yaml_block_is_a_run_config_or_fits_into_the_demos_or_the_stack(block: Block) -> None:
    kind, text = block.text.partition("\n")[0], block.text
    if kind == "# on top of docker-compose.yml":
        return check_compose_file(yaml.safe_load(text))
    assert kind in ("# run config", "# in a run config")
    if kind == "# in a run config":
        text = yaml.safe_dump(yaml.safe_load(DEMO_RUN) | yaml.safe_load(text))
    parse_run_config(text)


def check_compose_file(added: dict[str, Any]) -> None:
    """Each service is one of the stack or whole, and each network is declared."""
    stack = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    networks = {"default", *added.get("networks", {})}
    for name, service in added["services"].items():
        assert name in stack["services"] or "image" in service
        assert set(service.get("networks", ())) <= networks


@in_language("python")
def test_a_python_block_compiles(block: Block) -> None:
    compile(block.text, str(block), "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)


@in_language("json")
def test_a_json_block_parses(block: Block) -> None:
    json.loads(block.text)


@pytest.mark.parametrize("page", LINKED_PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relative_link_leads_to_a_file_and_a_heading(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text())):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        if anchor:
            assert anchor in anchors(file.read_text()), target


def without_code(text: str) -> str:
    return re.sub(r"^ *```.*?^ *```$|`[^`\n]*`", "", text, flags=re.DOTALL | re.MULTILINE)


def anchors(text: str) -> set[str]:
    """Of the headings, as GitHub makes them; a second one of a name has -1."""
    found: set[str] = set()
    fenced = re.sub(r"^ *```.*?^ *```$", "", text, flags=re.DOTALL | re.MULTILINE)
    for heading in re.findall(r"^#+ (.+)$", fenced, re.MULTILINE):
        words = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
        number = sum(name == slug or name.startswith(f"{slug}-") for name in found)
        found.add(f"{slug}-{number}" if slug in found else slug)
    return found


@pytest.mark.parametrize(("record", "heading"), [(StepRecord, "Step"), (EvalRecord, "Evaluation")])
def test_docs_metrics_says_unit_and_meaning_of_every_field_of_a_record_once(
    record: type[BaseModel], heading: str
) -> None:
    text = (ROOT / "docs/metrics.md").read_text()
    (section,) = re.findall(rf"^## {heading}\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE)
    rows = re.findall(r"^\| `(\w+)` \| (\S.*?) \| (\S.*?) \|$", section, re.MULTILINE)
    assert sorted(name for name, _, _ in rows) == sorted(record.model_fields)


def test_the_readme_is_read_in_a_few_minutes() -> None:
    assert len((ROOT / "README.md").read_text().split()) <= 1000


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "docs/architecture.md"])
def test_a_page_on_the_code_names_files_and_identifiers_that_exist(page: str) -> None:
    text = re.sub(r"^```.*?^```$", "", (ROOT / page).read_text(), flags=re.DOTALL | re.MULTILINE)
    words = re.findall(r"`([^`\n]+)`", text)
    paths = {word for word in words if re.fullmatch(r"[a-z_]+/[\w./]*", word)}
    assert [path for path in paths if not (ROOT / path).exists()] == []
    names = {name for word in words if IDENTIFIER.fullmatch(word) for name in word.split(".")}
    assert sorted(names - identifiers()) == []


def identifiers() -> set[str]:
    """Every word of the Python and JavaScript sources."""
    folders = ("services", "shared", "tandem", "tests", "benchmarks")
    files = [file for folder in folders for file in (ROOT / folder).rglob("*.*")]
    sources = [file.read_text() for file in files if file.suffix in (".py", ".js")]
    return {word for source in sources for word in re.findall(r"\w+", source)}


def test_every_image_has_the_version_of_the_newest_release() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    releases = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert releases[:2] == ["Unreleased", version]
    manifests = [ROOT / "docker-compose.yml", *(ROOT / "deploy/compose").glob("*.yml")]
    manifests += (ROOT / "deploy/k8s").rglob("*.yaml")
    assert image_versions(manifests) == {version}
    examples = [
        ROOT / "deploy" / name for name in ("README.md", "Dockerfile", "scripts/swap-replica.sh")
    ]
    major, minor, _ = version.split(".")  # An example may swap in a later patch.
    assert {tag.rpartition(".")[0] for tag in image_versions(examples)} == {f"{major}.{minor}"}


def image_versions(files: Sequence[Path]) -> set[str]:
    tags = r"(?:tandem-\w+:|newTag: )(\d[\w.]*)-(?:cpu|cuda)"
    return {tag for file in files for tag in re.findall(tags, file.read_text())}


def test_issue_templates_have_a_name_and_say_what_they_are_for() -> None:
    templates = list((ROOT / ".github/ISSUE_TEMPLATE").glob("*.md"))
    assert sorted(file.name for file in templates) == ["bug.md", "feature.md"]
    for file in templates:
        _, head, body = file.read_text().split("---\n", 2)
        assert yaml.safe_load(head).keys() == {"name", "about"}
        assert body.strip()


def test_hosted_ci_calls_targets_that_exist() -> None:
    steps = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]["test"]["steps"]
    called = {step["run"].split()[1] for step in steps if step.get("run", "").startswith("make ")}
    assert called == {"setup", "check", "test", "demo"}
    assert called <= set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def test_pre_commit_has_the_ruff_of_make_check() -> None:
    (repo,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    pinned = (ROOT / "deploy/requirements/cpu.txt").read_text()
    assert f"ruff=={repo['rev'].removeprefix('v')}\n" in pinned
