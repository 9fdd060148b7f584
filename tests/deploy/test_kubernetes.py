"""The manifests of deploy/k8s, as kubectl renders them, are valid and consistent.

No cluster runs here; deploy/README.md lists what only a running cluster can show.
"""

from __future__ import annotations

import copy
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import kubernetes_validate  # type: ignore[import-untyped]
import pytest
import yaml
from pydantic_settings import BaseSettings

from services.rollout.settings import RolloutSettings
from services.trainer.settings import TrainerSettings
from tests.deploy.stack import VERSION

pytestmark = pytest.mark.compose

K8S = Path(__file__).parents[2] / "deploy" / "k8s"
KUBERNETES_VERSIONS = ("1.27", "1.32", "1.37")  # the oldest with every field, and newer ones
SETTINGS: Mapping[str, type[BaseSettings]] = {
    "rollout": RolloutSettings,
    "trainer": TrainerSettings,
}
OF_LIBRARIES = {"HF_TOKEN", "OMP_NUM_THREADS", "PYTHONPATH"}  # read by no settings class

Document = dict[str, Any]


def kustomize(folder: Path) -> str:
    if shutil.which("kubectl") is None:
        pytest.fail("kubectl is not on the PATH: install it, it renders deploy/k8s")
    result = subprocess.run(
        ["kubectl", "kustomize", folder], capture_output=True, text=True, timeout=30, check=False
    )
    assert result.returncode == 0, f"{folder} does not render: {result.stderr}"
    assert not result.stderr, f"{folder} renders with warnings: {result.stderr}"
    return result.stdout


def edited_gpu_overlay(folder: Path, edits: Mapping[str, str]) -> str:
    """The rendered GPU overlay after a user has replaced these texts in it."""
    shutil.copytree(K8S, folder / "k8s")
    file = folder / "k8s" / "overlays" / "gpu" / "kustomization.yaml"
    text = file.read_text()
    for old, new in edits.items():
        assert text.count(old) == 1, f"{file} has {old!r} {text.count(old)} times"
        text = text.replace(old, new)
    file.write_text(text)
    return kustomize(file.parent)


def with_all_components(folder: Path) -> str:
    edits = {
        "replicas:  # number of rollout replicas; remove this with the component autoscale\n"
        "  - name: rollout\n"
        "    count: 2\n": "",
        "# components:": "components:",
        "#   - ../../components/autoscale": "  - ../../components/autoscale",
        "#   - ../../components/shared-cache": "  - ../../components/shared-cache",
    }
    return edited_gpu_overlay(folder, edits)


class Manifests:
    """The documents to which one kustomization renders."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.documents: list[Document] = list(yaml.safe_load_all(text))

    def of(self, kind: str) -> list[Document]:
        return [document for document in self.documents if document["kind"] == kind]

    def one(self, kind: str, name: str) -> Document:
        (found,) = (item for item in self.of(kind) if item["metadata"]["name"] == name)
        return found

    @property
    def workloads(self) -> dict[str, Document]:
        return {"rollout": self.one("Deployment", "rollout")} | {
            "trainer": self.one("StatefulSet", "trainer")
        }

    @property
    def pods(self) -> dict[str, Document]:
        return {name: item["spec"]["template"]["spec"] for name, item in self.workloads.items()}

    @property
    def services(self) -> dict[str, Document]:
        """The container of each service."""
        return {name: pod["containers"][0] for name, pod in self.pods.items()}

    @property
    def containers(self) -> list[Document]:
        """All containers, including init containers."""
        pods = self.pods.values()
        return [c for pod in pods for c in [*pod["containers"], *pod.get("initContainers", ())]]

    def selected(self, labels: Mapping[str, str]) -> list[str]:
        """The workloads whose pods have all these labels."""
        return [
            name
            for name, workload in self.workloads.items()
            if labels.items() <= workload["spec"]["template"]["metadata"]["labels"].items()
        ]

    def environment(self, name: str) -> dict[str, str]:
        """The environment of a service's container, with a placeholder for each secret."""
        container = self.services[name]
        environment: dict[str, str] = {}
        for source in container["envFrom"]:
            environment |= self.one("ConfigMap", source["configMapRef"]["name"])["data"]
        for variable in container["env"]:
            match variable:
                case {"value": value}:
                    pass
                case {"valueFrom": {"configMapKeyRef": {"name": config_map, "key": key}}}:
                    value = self.one("ConfigMap", config_map)["data"][key]
                case {"valueFrom": {"secretKeyRef": {"name": "tandem", "key": key}}}:
                    value = f"secret-{key}"
                case {"valueFrom": {"resourceFieldRef": {"resource": "limits.cpu"}}}:
                    value = container["resources"]["limits"]["cpu"]
                case _:
                    pytest.fail(f"{variable} is of a kind that this test does not know")
            environment[variable["name"]] = value
        return environment


@pytest.fixture(scope="module", params=["base", "gpu", "gpu with all components", "cpu"])
def manifests(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Manifests:
    match request.param:
        case "base":
            return Manifests(kustomize(K8S / "base"))
        case "gpu with all components":
            return Manifests(with_all_components(tmp_path_factory.mktemp("components")))
        case overlay:
            return Manifests(kustomize(K8S / "overlays" / overlay))


@pytest.fixture(scope="module")
def gpu() -> Manifests:
    return Manifests(kustomize(K8S / "overlays" / "gpu"))


@pytest.fixture(scope="module")
def cpu() -> Manifests:
    return Manifests(kustomize(K8S / "overlays" / "cpu"))


# --- the schemas --------------------------------------------------------------------------------


def refusals(document: Document) -> list[str]:
    """The errors of a document in the strict schema of each Kubernetes version."""
    found = []
    for version in KUBERNETES_VERSIONS:
        try:
            kubernetes_validate.validate(document, version, strict=True)
        except kubernetes_validate.ValidationError as error:
            found.append(f"{version}: {error.message}")
    return found


def test_the_schemas_accept_every_document(manifests: Manifests) -> None:
    assert len(manifests.documents) >= 10
    for document in manifests.documents:
        assert refusals(document) == [], f"{document['kind']} {document['metadata']['name']}"


def test_the_schemas_accept_the_namespace_which_is_that_of_every_document(
    manifests: Manifests,
) -> None:
    namespace = yaml.safe_load((K8S / "namespace.yaml").read_text())
    assert refusals(namespace) == []
    names = {document["metadata"]["namespace"] for document in manifests.documents}
    assert names == {namespace["metadata"]["name"]}


def misspelt_probe(container: Document) -> None:
    container["readynessProbe"] = container.pop("readinessProbe")


def limit_that_is_a_list(container: Document) -> None:
    container["resources"]["limits"]["memory"] = ["4Gi"]


def value_that_yaml_reads_as_a_boolean(container: Document) -> None:
    container["env"].append(yaml.safe_load("{name: ROLLOUT_ENFORCE_EAGER, value: yes}"))


def probe_without_a_port(container: Document) -> None:
    del container["livenessProbe"]["httpGet"]["port"]


@pytest.mark.parametrize(
    "damage",
    [
        misspelt_probe,
        limit_that_is_a_list,
        value_that_yaml_reads_as_a_boolean,
        probe_without_a_port,
    ],
)
def test_the_schemas_refuse_a_damaged_deployment(
    gpu: Manifests, damage: Callable[[Document], None]
) -> None:
    deployment = copy.deepcopy(gpu.one("Deployment", "rollout"))
    damage(deployment["spec"]["template"]["spec"]["containers"][0])
    assert len(refusals(deployment)) == len(KUBERNETES_VERSIONS)


# --- pods ---------------------------------------------------------------------------------------


def test_no_container_may_be_root_or_write_to_its_image(manifests: Manifests) -> None:
    for pod in manifests.pods.values():
        security = pod["securityContext"]
        assert security["runAsNonRoot"] is True
        ids = {security["runAsUser"], security["runAsGroup"], security["fsGroup"]}
        assert ids == {10001}
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["automountServiceAccountToken"] is False
        assert manifests.one("ServiceAccount", pod["serviceAccountName"])
    for container in manifests.containers:
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }


def test_every_container_has_limits_and_an_image_of_this_version(manifests: Manifests) -> None:
    for container in manifests.containers:
        for amounts in (container["resources"]["requests"], container["resources"]["limits"]):
            assert {"cpu", "memory"} <= amounts.keys()
        image = rf"tandem-(rollout|trainer):{re.escape(VERSION)}-(cpu|cuda)"
        assert re.fullmatch(image, container["image"])


def test_every_service_has_probes_on_the_port_that_it_listens_on(manifests: Manifests) -> None:
    for name, container in manifests.services.items():
        port = SETTINGS[name].model_fields["port"].default
        assert container["ports"] == [{"name": "http", "containerPort": port}]
        ready = ["python", "-m", "shared.probe", f"http://127.0.0.1:{port}/readyz"]
        for probe in (container["startupProbe"], container["readinessProbe"]):
            assert probe["exec"]["command"] == ready
        assert container["livenessProbe"]["httpGet"] == {"path": "/healthz", "port": "http"}


def test_every_mount_has_a_volume_and_what_is_written_has_a_mount(manifests: Manifests) -> None:
    for name, workload in manifests.workloads.items():
        claims = workload["spec"].get("volumeClaimTemplates", ())
        volumes = {claim["metadata"]["name"] for claim in claims}
        for volume in manifests.pods[name]["volumes"]:
            volumes.add(volume["name"])
            if claim := volume.get("persistentVolumeClaim"):
                assert manifests.one("PersistentVolumeClaim", claim["claimName"])
        mounts = manifests.services[name]["volumeMounts"]
        assert {mount["name"] for mount in mounts} <= volumes
        written = {"/tmp", "/dev/shm", "/cache"} | ({"/runs"} if name == "trainer" else set())
        assert written <= {m["mountPath"] for m in mounts if not m.get("readOnly")}


def test_checkpoints_outlive_the_pod_and_the_deployment(manifests: Manifests) -> None:
    trainer = manifests.one("StatefulSet", "trainer")["spec"]
    assert "runs" in {claim["metadata"]["name"] for claim in trainer["volumeClaimTemplates"]}
    assert set(trainer["persistentVolumeClaimRetentionPolicy"].values()) == {"Retain"}
    assert not manifests.of("Namespace")  # kubectl delete -k would take the claims with it
    assert trainer["replicas"] == 1


def test_a_replica_is_given_the_time_that_a_drain_takes(manifests: Manifests) -> None:
    fields = RolloutSettings.model_fields
    drain_s = fields["drain_delay_s"].default + fields["drain_timeout_s"].default
    assert manifests.pods["rollout"]["terminationGracePeriodSeconds"] >= drain_s + 20


def test_a_rollout_and_the_trainer_wait_as_long_as_a_replica_may_start(
    manifests: Manifests,
) -> None:
    startup = manifests.services["rollout"]["startupProbe"]
    budget_s = startup["periodSeconds"] * startup["failureThreshold"]
    assert manifests.one("Deployment", "rollout")["spec"]["progressDeadlineSeconds"] > budget_s
    assert float(manifests.environment("trainer")["TRAINER_READY_TIMEOUT_S"]) >= budget_s


# --- settings -----------------------------------------------------------------------------------


def variables(settings: type[BaseSettings]) -> Iterator[str]:
    prefix = settings.model_config["env_prefix"]
    for name, field in settings.model_fields.items():
        yield str(field.validation_alias or f"{prefix}{name}".upper())


@pytest.mark.parametrize("name", SETTINGS)
def test_every_variable_is_a_setting_that_the_service_accepts(
    manifests: Manifests, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = manifests.environment(name)
    assert environment.keys() - OF_LIBRARIES <= set(variables(SETTINGS[name]))
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    settings = SETTINGS[name]()
    assert settings.model_dump()["api_key"] == "secret-api-key"


def test_no_service_link_can_be_read_as_a_setting(manifests: Manifests) -> None:
    """Otherwise the Service `trainer` would set TRAINER_PORT=tcp://... in every pod."""
    for pod in manifests.pods.values():
        assert pod["enableServiceLinks"] is False


def test_both_services_get_one_model(manifests: Manifests) -> None:
    models = [
        variable["valueFrom"]["configMapKeyRef"]
        for container in manifests.services.values()
        for variable in container["env"]
        if variable["name"].endswith("_MODEL")
    ]
    assert len(models) == 2
    assert models[0] == models[1]


def test_no_manifest_holds_a_secret(manifests: Manifests) -> None:
    assert not manifests.of("Secret")
    assert not re.search(r"[0-9a-fA-F]{32}|hf_\w{20}", manifests.text)
    for container in manifests.services.values():
        secret = {v["name"] for v in container["env"] if "secretKeyRef" in v.get("valueFrom", {})}
        assert secret == {"TANDEM_API_KEY", "HF_TOKEN"}


# --- between pods -------------------------------------------------------------------------------


def test_selectors_select_the_pods_of_their_own_workload(manifests: Manifests) -> None:
    for name, workload in manifests.workloads.items():
        assert manifests.selected(workload["spec"]["selector"]["matchLabels"]) == [name]
        assert manifests.selected(manifests.one("Service", name)["spec"]["selector"]) == [name]
        policy = manifests.one("NetworkPolicy", name)["spec"]
        assert manifests.selected(policy["podSelector"]["matchLabels"]) == [name]
    budget = manifests.one("PodDisruptionBudget", "rollout")["spec"]
    assert manifests.selected(budget["selector"]["matchLabels"]) == ["rollout"]
    assert "minAvailable" not in budget
    (spread,) = manifests.pods["rollout"]["topologySpreadConstraints"]
    assert manifests.selected(spread["labelSelector"]["matchLabels"]) == ["rollout"]


def test_a_service_leads_to_a_named_port_of_its_container(manifests: Manifests) -> None:
    for name, container in manifests.services.items():
        (port,) = manifests.one("Service", name)["spec"]["ports"]
        (target,) = container["ports"]
        assert (port["port"], port["targetPort"]) == (target["containerPort"], target["name"])
    assert manifests.one("StatefulSet", "trainer")["spec"]["serviceName"] == "trainer"


def test_the_trainer_looks_up_the_name_of_all_replicas(manifests: Manifests) -> None:
    service = manifests.one("Service", "rollout")["spec"]
    assert service["clusterIP"] == "None"
    assert service["publishNotReadyAddresses"] is True
    urls = manifests.environment("trainer")["TRAINER_ROLLOUT_URLS"]
    assert urls == f"rollout:{service['ports'][0]['port']}"


def test_only_the_trainer_and_prometheus_reach_a_replica(manifests: Manifests) -> None:
    (ingress,) = manifests.one("NetworkPolicy", "rollout")["spec"]["ingress"]
    trainer, prometheus = ingress["from"]
    assert manifests.selected(trainer["podSelector"]["matchLabels"]) == ["trainer"]
    assert prometheus["namespaceSelector"]["matchLabels"] == {
        "kubernetes.io/metadata.name": "monitoring"
    }
    assert [port["port"] for port in ingress["ports"]] == [8000]


def test_only_labelled_pods_and_prometheus_reach_the_trainer(manifests: Manifests) -> None:
    (ingress,) = manifests.one("NetworkPolicy", "trainer")["spec"]["ingress"]
    client, prometheus = ingress["from"]
    assert client == {"podSelector": {"matchLabels": {"tandem-client": "true"}}}
    assert manifests.selected(client["podSelector"]["matchLabels"]) == []
    assert prometheus.keys() == {"namespaceSelector"}
    assert [port["port"] for port in ingress["ports"]] == [8080]


def test_pods_reach_replicas_names_and_the_hub_and_nothing_else(manifests: Manifests) -> None:
    names_and_hub = [{53}, {443}]
    for name, ports in {"rollout": names_and_hub, "trainer": [{8000}, *names_and_hub]}.items():
        policy = manifests.one("NetworkPolicy", name)["spec"]
        assert policy["policyTypes"] == ["Ingress", "Egress"]
        assert [{port["port"] for port in rule["ports"]} for rule in policy["egress"]] == ports
    to_replicas, *_ = manifests.one("NetworkPolicy", "trainer")["spec"]["egress"]
    (peer,) = to_replicas["to"]
    assert manifests.selected(peer["podSelector"]["matchLabels"]) == ["rollout"]


# --- the overlays -------------------------------------------------------------------------------


def num_gpus(manifests: Manifests, name: str) -> int:
    return int(manifests.services[name]["resources"]["limits"]["nvidia.com/gpu"])


def test_one_line_sets_the_gpus_of_a_replica_and_one_those_of_the_trainer(
    gpu: Manifests, tmp_path: Path
) -> None:
    assert num_gpus(gpu, "rollout") == num_gpus(gpu, "trainer") == 1
    edits = {
        "- ROLLOUT_TENSOR_PARALLEL_SIZE=1": "- ROLLOUT_TENSOR_PARALLEL_SIZE=4",
        "- TRAINER_DATA_PARALLEL_SIZE=1": "- TRAINER_DATA_PARALLEL_SIZE=2",
    }
    more = Manifests(edited_gpu_overlay(tmp_path, edits))
    assert num_gpus(more, "rollout") == 4
    assert more.environment("rollout")["ROLLOUT_TENSOR_PARALLEL_SIZE"] == "4"
    assert num_gpus(more, "trainer") == 2
    assert more.environment("trainer")["TRAINER_DATA_PARALLEL_SIZE"] == "2"


def test_a_setting_of_replicas_does_not_restart_the_trainer(gpu: Manifests, tmp_path: Path) -> None:
    edit = {"- ROLLOUT_DEVICE=cuda": "- ROLLOUT_DEVICE=cuda\n      - ROLLOUT_MAX_MODEL_LEN=8192"}
    edited = Manifests(edited_gpu_overlay(tmp_path, edit))
    assert edited.pods["trainer"] == gpu.pods["trainer"]
    assert edited.pods["rollout"] != gpu.pods["rollout"]


def test_the_gpu_overlay_replaces_a_replica_without_a_spare_gpu(gpu: Manifests) -> None:
    strategy = gpu.one("Deployment", "rollout")["spec"]["strategy"]
    assert strategy["rollingUpdate"] == {"maxSurge": 0, "maxUnavailable": 1}
    for pod in gpu.pods.values():
        (toleration,) = pod["tolerations"]
        assert toleration["key"] == "nvidia.com/gpu"


def test_autoscaling_leaves_the_number_of_replicas_to_the_autoscaler(tmp_path: Path) -> None:
    manifests = Manifests(with_all_components(tmp_path))
    (autoscaler,) = manifests.of("HorizontalPodAutoscaler")
    target = autoscaler["spec"]["scaleTargetRef"]
    deployment = manifests.one(target["kind"], target["name"])
    assert deployment["apiVersion"] == target["apiVersion"]
    assert "replicas" not in deployment["spec"]
    (metric,) = autoscaler["spec"]["metrics"]
    assert metric["pods"]["metric"]["name"] == "vllm_num_requests_waiting"


def test_replicas_with_a_shared_cache_mount_one_claim(tmp_path: Path) -> None:
    manifests = Manifests(with_all_components(tmp_path))
    volumes = {volume["name"]: volume for volume in manifests.pods["rollout"]["volumes"]}
    claim = volumes["cache"]["persistentVolumeClaim"]["claimName"]
    assert manifests.one("PersistentVolumeClaim", claim)["spec"]["accessModes"] == ["ReadWriteMany"]


def test_the_cpu_overlay_wants_no_gpu(cpu: Manifests) -> None:
    assert "nvidia" not in cpu.text
    assert "cuda" not in cpu.text


def test_the_demo_model_is_made_once_on_one_node_for_both_services(cpu: Manifests) -> None:
    """Pods on different processors would make different models and refuse each other's."""
    trainer, rollout = cpu.pods["trainer"], cpu.pods["rollout"]
    assert trainer["initContainers"] == rollout["initContainers"]
    assert trainer["affinity"] == rollout["affinity"]
    (maker,) = trainer["initContainers"]
    assert maker["command"][:2] == ["flock", "/models/.lock"]
    assert maker["command"][-1] == cpu.environment("trainer")["TRAINER_MODEL"]
    for pod in (trainer, rollout):
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        assert volumes["demo-model"]["persistentVolumeClaim"]["claimName"] == "demo-model"
    terms = trainer["affinity"]["podAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    assert [term["topologyKey"] for term in terms] == ["kubernetes.io/hostname"]
    assert cpu.selected(terms[0]["labelSelector"]["matchLabels"]) == ["rollout", "trainer"]
