"""The manifests of servers: valid, confined, and with the flags and ports that `serve` has."""

from __future__ import annotations

from pathlib import Path

import kubernetes_validate
import pytest
from absl import flags

from din_dist import __version__
from din_dist.cli.flags import define_settings, settings_from_flags
from din_dist.serving.http.probes import PATHS
from din_dist.serving.http.settings import ServeConfig
from tests.support.overlays import KUBERNETES_VERSIONS, Object, one, render

NAME = {"app.kubernetes.io/name": "din-dist-serve"}


@pytest.fixture
def objects() -> list[Object]:
    return render("serve")


@pytest.fixture
def pod(objects: list[Object]) -> Object:
    return one(objects, "Deployment")["spec"]["template"]


@pytest.fixture
def config(objects: list[Object], tmp_path: Path) -> ServeConfig:
    """The settings of the server's flags."""
    (tmp_path / "serve.flags").write_text(one(objects, "ConfigMap")["data"]["serve.flags"])
    values = flags.FlagValues()
    define_settings(ServeConfig, values)
    assert values(["serve", f"--flagfile={tmp_path / 'serve.flags'}"]) == ["serve"]
    return ServeConfig(**settings_from_flags(ServeConfig, values))


@pytest.mark.parametrize("version", KUBERNETES_VERSIONS)
def test_every_object_is_valid(objects: list[Object], pod: Object, version: str) -> None:
    for each in [*objects, {"apiVersion": "v1", "kind": "Pod", **pod}]:
        if each["kind"] != "PodMonitor":
            assert kubernetes_validate.validate(each, version, strict=True) == version


def test_all_that_belongs_to_a_server_is_there_and_apart_from_jobs(objects: list[Object], pod: Object) -> None:
    kinds = "ServiceAccount ConfigMap Service Deployment PodDisruptionBudget HorizontalPodAutoscaler PodMonitor"
    assert sorted(each["kind"] for each in objects) == sorted([*kinds.split(), "NetworkPolicy"])
    for each in objects:
        assert each["metadata"]["labels"] == NAME, "which no selector of a job meets"
    assert pod["metadata"]["labels"] == NAME
    for kind in ("Deployment", "PodDisruptionBudget", "PodMonitor"):
        assert one(objects, kind)["spec"]["selector"] == {"matchLabels": NAME}
    assert one(objects, "Service")["spec"]["selector"] == NAME
    assert one(objects, "NetworkPolicy")["spec"]["podSelector"] == {"matchLabels": NAME}
    deployment, scaling = one(objects, "Deployment"), one(objects, "HorizontalPodAutoscaler")
    name = deployment["metadata"]["name"]
    assert scaling["spec"]["scaleTargetRef"] == {"apiVersion": "apps/v1", "kind": "Deployment", "name": name}
    assert "replicas" not in deployment["spec"], "else each change would undo the scaling"


def test_pods_pass_the_restricted_pod_security_standard(pod: Object) -> None:
    user = pod["spec"]["securityContext"]
    assert (user["runAsNonRoot"], user["runAsUser"], user["seccompProfile"]) == (True, 1000, {"type": "RuntimeDefault"})
    assert pod["spec"]["automountServiceAccountToken"] is False
    (container,) = pod["spec"]["containers"]
    assert container["image"] == f"din-dist:{__version__}"
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
        "readOnlyRootFilesystem": True,
    }


def test_what_the_pod_refers_to_is_there(objects: list[Object], pod: Object, config: ServeConfig) -> None:
    """The exports are on the claim of the jobs, which have made them."""
    volumes = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
    assert volumes["flags"]["configMap"]["name"] == one(objects, "ConfigMap")["metadata"]["name"]
    assert pod["spec"]["serviceAccountName"] == one(objects, "ServiceAccount")["metadata"]["name"]
    claims = [each["metadata"]["name"] for each in render("gpu") if each["kind"] == "PersistentVolumeClaim"]
    assert volumes["runs"]["persistentVolumeClaim"] == {"claimName": "din-dist-runs", "readOnly": True}
    assert "din-dist-runs" in claims
    (container,) = pod["spec"]["containers"]
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    assert mounts == {"/tmp": "tmp", "/etc/din_dist": "flags", "/runs": "runs"}
    assert config.export_dir.startswith("/runs/")
    assert container["args"] == [".venv/bin/python", "-m", "din_dist.cli.serve", "--flagfile=/etc/din_dist/serve.flags"]


def test_ports_and_probes_are_the_servers(objects: list[Object], pod: Object, config: ServeConfig) -> None:
    (container,) = pod["spec"]["containers"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {"http": config.port, "health": config.health_port}
    assert config.host == "0.0.0.0"
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        get = container[probe]["httpGet"]
        assert get["port"] == "health"
        assert get["path"] in PATHS.split(", ")
    (port,) = one(objects, "Service")["spec"]["ports"]
    assert (port["port"], port["targetPort"]) == (config.port, "http")
    (endpoint,) = one(objects, "PodMonitor")["spec"]["podMetricsEndpoints"]
    assert (endpoint["port"], endpoint["path"]) == ("health", "/metrics")
    clients, prometheus = one(objects, "NetworkPolicy")["spec"]["ingress"]
    assert clients == {"from": [{"podSelector": {}}], "ports": [{"protocol": "TCP", "port": config.port}]}
    assert prometheus["ports"] == [{"protocol": "TCP", "port": config.health_port}]


def test_a_pod_has_time_to_answer_what_it_accepted(pod: Object, config: ServeConfig) -> None:
    (container,) = pod["spec"]["containers"]
    pause = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert pod["spec"]["terminationGracePeriodSeconds"] > pause + config.shutdown_timeout_seconds
