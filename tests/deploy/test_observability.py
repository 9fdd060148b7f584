"""Prometheus and Grafana query metrics that exist, and alerts tell faults from healthy runs."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import REGISTRY
from prometheus_client.metrics_core import Metric

from services.rollout.settings import RolloutSettings
from services.trainer.settings import TrainerSettings
from shared.metrics import RolloutMetrics, TrainerMetrics
from shared.schemas import EvalRecord, PolicyId, SyncReceipt
from tests.shared.test_metrics import step

DEPLOY = Path(__file__).parents[2] / "deploy"
PROMETHEUS = DEPLOY / "prometheus"
GRAFANA = DEPLOY / "grafana"
DASHBOARD = GRAFANA / "dashboards" / "tandem.json"
POLICY = PolicyId(run_id="r", version=1)
OF_PROMETHEUS = {"up", "ALERTS"}  # series that Prometheus itself creates


def read_yaml(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def rules() -> list[dict[str, Any]]:
    groups = read_yaml(PROMETHEUS / "alerts.yml")["groups"]
    return [rule for group in groups for rule in group["rules"]]


def panels() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(DASHBOARD.read_text())["panels"]
    return found


def dashboard_expressions() -> list[str]:
    targets = (target for panel in panels() for target in panel.get("targets", []))
    return [target["expr"].replace("$__rate_interval", "1m") for target in targets]


def expressions() -> list[str]:
    return [*(rule["expr"] for rule in rules()), *dashboard_expressions()]


# --- what the services expose -------------------------------------------------------------------


def trainer_families() -> list[Metric]:
    metrics = TrainerMetrics()
    metrics.watch(run_state=lambda: "running", num_in_sync=lambda: 1)
    metrics.begin_run(max_staleness=0, min_ready_replicas=1)
    bare = step(grad_norm=1.0)
    absent = [name for name, value in bare if value is None]
    metrics.record(bare.model_copy(update=dict.fromkeys(absent, 1)))  # with all optional numbers
    evaluation = EvalRecord(
        step=1, policy=POLICY, num_prompts=1, sampled_reward=0.5, greedy_reward=0.5, eval_s=1.0
    )
    metrics.record(evaluation)
    return list(metrics.registry.collect())


def rollout_families() -> list[Metric]:
    metrics = RolloutMetrics()
    metrics.watch(lambda: "ready")
    receipt = SyncReceipt(
        policy=POLICY,
        digest="0" * 64,
        outcome="loaded",
        newest=POLICY,
        num_bytes=1,
        boot_id="b",
    )
    metrics.record_sync(receipt)
    metrics.completions.labels("stop")
    metrics.errors.labels("Overloaded")
    return list(metrics.registry.collect())


def service_samples() -> list[tuple[str, dict[str, str]]]:
    """(name, labels) of all metrics of both services, except vLLM's."""
    families = [*trainer_families(), *rollout_families(), *REGISTRY.collect()]
    return [(sample.name, sample.labels) for family in families for sample in family.samples]


def vllm_names() -> set[str]:
    """Metric names from the source of vLLM's Prometheus logger, whose import takes seconds."""
    spec = importlib.util.find_spec("vllm")
    assert spec
    assert spec.submodule_search_locations
    source = Path(spec.submodule_search_locations[0]) / "v1" / "metrics" / "loggers.py"
    calls = (node for node in ast.walk(ast.parse(source.read_text())) if isinstance(node, ast.Call))
    names = set()
    for call in calls:
        name = next((k.value for k in call.keywords if k.arg == "name"), None)
        if isinstance(name, ast.Constant) and isinstance(name.value, str):
            is_counter = "counter" in ast.unparse(call.func)
            names.add(f"{name.value}_total" if is_counter else name.value)
    return names


# --- what is asked for --------------------------------------------------------------------------

_STRING = re.compile(r'"[^"]*"')
_LABELS = re.compile(r"\b(by|without|on|ignoring|group_left|group_right)\s*\([^)]*\)")
_NUMBER = re.compile(r"\b\d[\w.]*")
_WORD = re.compile(r"[a-zA-Z_:][\w:]*(?!\w|:|\s*\()")  # a function's name is followed by "("
_KEYWORDS = {"and", "or", "unless", "bool", "offset"}


def metric_names(expression: str) -> set[str]:
    """All words that are not labels, numbers, functions or keywords."""
    for noise in (_STRING, re.compile(r"\{[^}]*\}|\[[^\]]*\]"), _LABELS, _NUMBER):
        expression = noise.sub(" ", expression)
    return set(_WORD.findall(expression)) - _KEYWORDS


def matchers(expression: str) -> Iterator[tuple[str, str, str]]:
    """(metric, label, value) for each label matcher and each of its alternatives."""
    for name, labels in re.findall(r"([\w:]+)\{([^}]*)\}", expression):
        for label, values in re.findall(r'(\w+)=~?"([^"]*)"', labels):
            for value in values.split("|"):
                yield name, label, value


def test_metric_names_are_told_from_functions_labels_and_numbers() -> None:
    expression = (
        'sum by (le, job) (rate(a_bucket{x="y"}[5m:15s])) > 2e3 and on (job) b:c offset 5m or typo'
    )
    assert metric_names(expression) == {"a_bucket", "b:c", "typo"}
    assert list(matchers('a{x="1",y=~"2|3"} > b{z="4"}')) == [
        ("a", "x", "1"),
        ("a", "y", "2"),
        ("a", "y", "3"),
        ("b", "z", "4"),
    ]


def test_every_metric_of_alerts_and_dashboard_is_exposed() -> None:
    exposed = {name for name, _ in service_samples()} | vllm_names() | OF_PROMETHEUS
    for expression in expressions():
        names = metric_names(expression)
        assert names, expression
        assert names <= exposed, (names - exposed, expression)


def test_every_label_value_of_an_alert_is_there_before_anything_happens() -> None:
    """A counter that begins at 1 shows no increase, and an absent gauge cannot be 0."""
    samples = service_samples()
    for rule in rules():
        for name, label, value in matchers(rule["expr"]):
            if label != "job":
                assert any(
                    name == known and labels.get(label) == value for known, labels in samples
                ), (name, label, value)


def test_every_job_that_is_matched_is_scraped() -> None:
    jobs = {c["job_name"] for c in read_yaml(PROMETHEUS / "prometheus.yml")["scrape_configs"]}
    asked = {v for e in expressions() for _, label, v in matchers(e) if label == "job"}
    assert asked == jobs == {"trainer", "rollout"}


# --- alerts -------------------------------------------------------------------------------------


def test_every_alert_says_what_where_and_how_grave() -> None:
    for rule in rules():
        assert rule["labels"]["severity"] in ("critical", "warning"), rule
        summary, description = rule["annotations"]["summary"], rule["annotations"]["description"]
        assert summary[-1].isalnum(), rule["alert"]
        assert description.endswith("."), rule["alert"]
        if rule["alert"] != "NoReplica":  # no replica exists to be named
            assert "{{ $labels." in description, rule["alert"]


def test_every_setting_that_an_alert_names_exists() -> None:
    fields = {"ROLLOUT": RolloutSettings.model_fields, "TRAINER": TrainerSettings.model_fields}
    text = (PROMETHEUS / "alerts.yml").read_text()
    named = re.findall(r"\b(ROLLOUT|TRAINER)_([A-Z_]+)", text)
    assert named
    for service, name in named:
        assert name.lower() in fields[service], f"{service}_{name}"


def test_every_alert_is_seen_to_fire_and_a_healthy_run_to_fire_none() -> None:
    healthy, *faults = read_yaml(PROMETHEUS / "alerts_test.yml")["tests"]
    assert [case["exp_samples"] for case in healthy["promql_expr_test"]] == [[]] * 3
    firing = {
        name
        for fault in faults
        for case in fault["promql_expr_test"]
        for sample in case["exp_samples"]
        for name in re.findall('alertname="([^"]*)"', sample["labels"])
    }
    assert firing == {rule["alert"] for rule in rules()}


def test_the_healthy_run_of_the_alert_tests_has_every_series_that_an_alert_asks_for() -> None:
    healthy = read_yaml(PROMETHEUS / "alerts_test.yml")["tests"][0]["input_series"]
    names = {series["series"].partition("{")[0] for series in healthy}
    assert names == {name for rule in rules() for name in metric_names(rule["expr"])}


# --- Grafana ------------------------------------------------------------------------------------


def test_the_dashboard_has_its_rows_and_unique_panels_that_do_not_overlap() -> None:
    rows = [panel["title"] for panel in panels() if panel["type"] == "row"]
    assert rows == ["Learning", "Fleet", "Trainer"]
    identities = [panel["id"] for panel in panels()]
    assert len(set(identities)) == len(identities)
    places = [panel["gridPos"] for panel in panels()]
    cells = [
        (x, y)
        for place in places
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) == 23


def test_every_panel_has_a_title_a_description_and_expressions_of_the_provisioned_source() -> None:
    (source,) = read_yaml(GRAFANA / "provisioning/datasources/prometheus.yml")["datasources"]
    expected = {"type": source["type"], "uid": source["uid"]}
    for panel in panels():
        assert panel["title"]
        if panel["type"] == "row":
            continue
        assert panel["type"] in ("timeseries", "stat", "table"), "others may need a plugin"
        assert panel["description"]
        assert panel["datasource"] == expected
        assert panel["targets"]
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
        for target in panel["targets"]:
            assert target["expr"]
            assert target["datasource"] == expected


def test_grafana_asks_as_often_as_prometheus_scrapes() -> None:
    (source,) = read_yaml(GRAFANA / "provisioning/datasources/prometheus.yml")["datasources"]
    interval = read_yaml(PROMETHEUS / "prometheus.yml")["global"]["scrape_interval"]
    assert source["jsonData"]["timeInterval"] == interval


# --- promtool -----------------------------------------------------------------------------------


def promtool(*arguments: str) -> str:
    """Output of `promtool`, which must exit with 0."""
    program = shutil.which("promtool")
    if program is None:
        pytest.fail("promtool is not installed: install Prometheus (Debian package prometheus)")
    done = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.compose
def test_promtool_accepts_the_configuration(tmp_path: Path) -> None:
    """The files as mounted in the container, except for the path of the key."""
    key = tmp_path / "key"
    key.write_text("a-key")
    config = (PROMETHEUS / "prometheus.yml").read_text()
    assert config.count("/run/secrets/tandem_api_key\n") == 1
    (tmp_path / "prometheus.yml").write_text(
        config.replace("/run/secrets/tandem_api_key", str(key))
    )
    shutil.copy(PROMETHEUS / "alerts.yml", tmp_path)
    assert f"{len(rules())} rules found" in promtool(
        "check", "config", str(tmp_path / "prometheus.yml")
    )


@pytest.mark.compose
def test_each_fault_fires_its_alert_and_a_healthy_run_none() -> None:
    promtool("check", "rules", str(PROMETHEUS / "alerts.yml"))
    assert "SUCCESS" in promtool("test", "rules", str(PROMETHEUS / "alerts_test.yml"))


@pytest.mark.compose
def test_every_expression_of_the_dashboard_parses(tmp_path: Path) -> None:
    recorded = [
        {"record": f"dashboard:{index}", "expr": expression}
        for index, expression in enumerate(dashboard_expressions())
    ]
    path = tmp_path / "rules.yml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": recorded}]}))
    assert f"{len(recorded)} rules found" in promtool("check", "rules", str(path))
