"""The manifests for Kubernetes: what KubeRay's own schema and code refuse, and what is exposed."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import yaml
from kuberay_rules import operator_errors, schema_errors, strict_schema

from rayalign.placement import Node, even_share
from rayalign.runtime.session import Session

REPOSITORY = Path(__file__).parents[3]
FOLDER = REPOSITORY / "cluster" / "kuberay"
CRDS = {"RayJob": "ray.io_rayjobs.yaml.gz", "RayCluster": "ray.io_rayclusters.yaml.gz"}
MANIFESTS = {"RayJob": "rayjob.yaml", "RayCluster": "raycluster.yaml"}
ALL = sorted(path for path in FOLDER.rglob("*.yaml") if path.name != "kustomization.yaml")


def manifest(kind: str) -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load((FOLDER / MANIFESTS[kind]).read_text())
    assert document["kind"] == kind
    return document


def cluster_spec(kind: str) -> dict[str, Any]:
    spec = manifest(kind)["spec"]
    found: dict[str, Any] = spec["rayClusterSpec"] if kind == "RayJob" else spec
    return found


def with_redis() -> dict[str, Any]:
    """raycluster.yaml with the patch of gcs-fault-tolerance/, which sets one field."""
    document = manifest("RayCluster")
    patch = yaml.safe_load((FOLDER / "gcs-fault-tolerance" / "patch.yaml").read_text())
    assert patch["metadata"] == document["metadata"]
    assert list(patch["spec"]) == ["gcsFaultToleranceOptions"]
    return document | {"spec": document["spec"] | patch["spec"]}


def pod_specs(value: Any) -> Iterator[dict[str, Any]]:
    """Every pod of a manifest: whatever has containers."""
    if isinstance(value, dict):
        if "containers" in value:
            yield value
        for item in value.values():
            yield from pod_specs(item)
    elif isinstance(value, list):
        for item in value:
            yield from pod_specs(item)


@pytest.fixture(scope="module")
def schemas() -> dict[str, dict[str, Any]]:
    folder = Path(os.environ.get("RAYALIGN_TEST_DATA", REPOSITORY.parent / "shared" / "data")) / "kuberay"
    if not all((folder / name).exists() for name in CRDS.values()):
        pytest.skip(f"no KubeRay CRDs in {folder}: set RAYALIGN_TEST_DATA to the folder that holds kuberay/")
    return {kind: strict_schema(folder / name) for kind, name in CRDS.items()}


@pytest.mark.parametrize("kind", MANIFESTS)
def test_the_schema_accepts(kind: str, schemas: dict[str, dict[str, Any]]) -> None:
    assert schema_errors(manifest(kind), schemas[kind]) == []


def test_the_schema_accepts_fault_tolerance(schemas: dict[str, dict[str, Any]]) -> None:
    assert schema_errors(with_redis(), schemas["RayCluster"]) == []
    assert operator_errors(with_redis()) == []


def test_the_schema_refuses(schemas: dict[str, dict[str, Any]]) -> None:
    document = manifest("RayJob")
    document["spec"]["shutdownAfterJobFinish"] = True
    document["spec"]["rayClusterSpec"]["autoscalerOptions"]["version"] = "v3"
    worker = document["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
    worker["maxReplicas"] = "many"
    worker["template"]["spec"]["containers"][0]["shm"] = {}
    found = schema_errors(document, schemas["RayJob"])
    assert {error.partition(":")[0] for error in found} == {
        "spec",
        "spec.rayClusterSpec.autoscalerOptions.version",
        "spec.rayClusterSpec.workerGroupSpecs.0.maxReplicas",
        "spec.rayClusterSpec.workerGroupSpecs.0.template.spec.containers.0",
    }
    assert len(found) == 4


@pytest.mark.parametrize("kind", MANIFESTS)
def test_the_operator_accepts(kind: str) -> None:
    assert operator_errors(manifest(kind)) == []


@pytest.mark.parametrize(
    ("path", "value", "reason"),
    [
        ("metadata.name", "Ray_Align", "no DNS-1035 label"),
        ("metadata.name", "a" * 48, "longer than 47"),
        ("spec.shutdownAfterJobFinishes", False, "ttlSecondsAfterFinished needs"),
        ("spec.submissionMode", "InteractiveMode", "backoffLimit goes neither"),
        ("spec.clusterSelector", {"ray.io/cluster": "other"}, "backoffLimit goes neither"),
        ("spec.submissionMode", "SidecarMode", "no submitter"),
        ("spec.activeDeadlineSeconds", 0, "must be positive"),
        ("spec.deletionStrategy", {"deletionRules": []}, "deletionStrategy does not go"),
        ("spec.rayClusterSpec.rayVersion", "2.51.0", "needs rayVersion"),
        ("spec.rayClusterSpec.rayVersion", "nightly", "needs rayVersion"),
        ("spec.rayClusterSpec.authOptions.enableK8sTokenAuth", True, "does not go with a RayJob"),
        ("spec.rayClusterSpec.headGroupSpec.template.spec.restartPolicy", "Always", "head: autoscaler v2 needs"),
        ("spec.rayClusterSpec.workerGroupSpecs.1.template.spec.restartPolicy", "Always", "rollout: autoscaler v2"),
        ("spec.rayClusterSpec.workerGroupSpecs.1.minReplicas", 9, "rollout: not minReplicas"),
        ("spec.rayClusterSpec.workerGroupSpecs.1.groupName", "trainer", "the same name"),
        ("spec.rayClusterSpec.workerGroupSpecs.0.suspend", True, "trainer: suspend does not go"),
        ("spec.rayClusterSpec.workerGroupSpecs.0.rayStartParams.labels", "a=b", "trainer: labels are a field"),
        ("spec.rayClusterSpec.headGroupSpec.resources", {"CPU": "1"}, "head: resources in rayStartParams and"),
    ],
)  # fmt: skip
def test_the_operator_refuses(path: str, value: object, reason: str) -> None:
    document = copy.deepcopy(manifest("RayJob"))
    *parents, last = path.split(".")
    place: Any = document
    for part in parents:
        place = place[int(part) if isinstance(place, list) else part]
    place[last] = value
    assert any(reason in error for error in operator_errors(document)), operator_errors(document)


def test_both_manifests_have_one_cluster() -> None:
    assert cluster_spec("RayJob") == cluster_spec("RayCluster")


def test_versions_are_those_that_are_tested() -> None:
    assert cluster_spec("RayCluster")["rayVersion"] == metadata.version("ray")


def test_the_groups() -> None:
    spec = cluster_spec("RayCluster")
    trainer, rollout = spec["workerGroupSpecs"]
    assert trainer["minReplicas"] == trainer["replicas"] == trainer["maxReplicas"]
    assert (rollout["minReplicas"], rollout["replicas"]) == (0, 0) and rollout["maxReplicas"] > 0
    spot = {"cloud.google.com/gke-spot", "karpenter.sh/capacity-type", "kubernetes.azure.com/scalesetpriority"}
    tolerated = [{entry["key"] for entry in group["template"]["spec"]["tolerations"]} for group in (trainer, rollout)]
    assert tolerated[0] & spot == set() and tolerated[1] >= spot
    assert spec["headGroupSpec"]["rayStartParams"] == {"num-cpus": "0", "num-gpus": "0"}
    assert manifest("RayJob")["spec"]["shutdownAfterJobFinishes"] is True


def test_an_actor_fits_a_rollout_pod() -> None:
    """It reserves what a trainer's process does: a GPU, and its node's CPUs per GPU."""
    spec = cluster_spec("RayCluster")
    trainer, rollout = (
        Node(id=name, name=name, cpus=float(limits["cpu"]), gpus=float(limits["nvidia.com/gpu"]))
        for name, limits in (
            (group["groupName"], group["template"]["spec"]["containers"][0]["resources"]["limits"])
            for group in spec["workerGroupSpecs"]
        )
    )
    head = Node(id="head", name="head", cpus=0, gpus=0)
    each = even_share(Session(started_here=False, nodes=(head, trainer, trainer)), 2, workers=2)
    assert (each.cpus, each.gpus) == (trainer.cpus, 1.0)
    assert rollout.cpus >= each.cpus and rollout.gpus >= each.gpus


@pytest.mark.parametrize("kind", MANIFESTS)
def test_every_pod_of_ray_has_storage_and_shared_memory(kind: str) -> None:
    spec = cluster_spec(kind)
    claim = yaml.safe_load((FOLDER / "storage.yaml").read_text())
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        (container,) = pod["containers"]
        mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
        environment = {entry["name"]: entry["value"] for entry in container["env"]}
        storage = mounts[environment["RAYALIGN_STORAGE"]]
        assert storage["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
        assert mounts["/dev/shm"]["emptyDir"]["medium"] == "Memory"
        shared = int(re.fullmatch(r"(\d+)Gi", mounts["/dev/shm"]["emptyDir"]["sizeLimit"])[1])  # type: ignore[index]
        assert shared < int(container["resources"]["limits"]["memory"].removesuffix("Gi"))


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.name)
def test_pods_are_unprivileged_and_pinned(path: Path) -> None:
    for pod in pod_specs(list(yaml.safe_load_all(path.read_text()))):
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)
        for container in pod["containers"]:
            assert re.search(r":\d+\.\d+\.\d+", container["image"]), container["image"]
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"]},
            }
            assert {"cpu", "memory"} <= set(container["resources"]["limits"])


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.name)
def test_nothing_is_open_to_the_world(path: Path) -> None:
    text = path.read_text()
    for document in yaml.safe_load_all(text):
        assert document["kind"] != "Ingress"
        if document["kind"] == "Service":
            assert document["spec"].get("type", "ClusterIP") == "ClusterIP"
        assert "hostPort" not in json.dumps(document) and "serviceType" not in json.dumps(document)
    if path.name in MANIFESTS.values():
        assert cluster_spec(next(kind for kind, name in MANIFESTS.items() if name == path.name))["authOptions"] == {
            "mode": "token"
        }


def test_the_network_policy_selects_pods_only() -> None:
    policy = yaml.safe_load((FOLDER / "network-policy.yaml").read_text())["spec"]
    assert policy["podSelector"] == {"matchLabels": {"ray.io/is-ray-node": "yes"}}
    sources = [source for rule in policy["ingress"] for source in rule["from"]]
    assert all(source["podSelector"] for source in sources) and not any("ipBlock" in source for source in sources)
    (submitter,) = (s for s in sources if "batch.kubernetes.io/job-name" in s["podSelector"].get("matchLabels", {}))
    name = submitter["podSelector"]["matchLabels"]["batch.kubernetes.io/job-name"]
    assert name == manifest("RayJob")["metadata"]["name"]


def test_no_secret_is_written_down() -> None:
    for path in ALL:
        for pod in pod_specs(list(yaml.safe_load_all(path.read_text()))):
            for container in pod["containers"]:
                for entry in container.get("env", ()):
                    assert "value" not in entry or not re.search("TOKEN|KEY|PASSWORD|SECRET", entry["name"]), entry


def test_kustomize_builds_what_is_tested() -> None:
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("kubectl is not installed")
    command = [kubectl, "kustomize", str(FOLDER / "gcs-fault-tolerance"), "--load-restrictor", "LoadRestrictionsNone"]
    built = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    (cluster,) = (document for document in yaml.safe_load_all(built) if document["kind"] == "RayCluster")
    assert cluster == with_redis()
