"""The manifests in k8s/ of jobs: each overlay renders to objects that are valid, confined, and fit together."""

from __future__ import annotations

import copy
import functools
import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from absl import flags

from din_dist import __version__
from din_dist.cli import daily, launch
from din_dist.cli.flags import config_from_flags, define_flags
from din_dist.cluster.hosts import read_hosts_file
from din_dist.config import Config
from din_dist.daily.settings import DailyConfig
from din_dist.errors import EXIT_DAY_MISSING, EXIT_INPUT_ERROR, EXIT_QUALITY_FELL, EXIT_RETRY
from tests.support.overlays import JOBS, KUBERNETES_VERSIONS, OVERLAYS, TRAINING, Object, one, render
from tests.support.repository import ROOT

FLAGS_FOLDER = "/etc/din_dist"


@pytest.fixture(params=TRAINING)
def objects(request: pytest.FixtureRequest) -> list[Object]:
    return render(request.param)


@pytest.fixture(scope="session")
def mpijob_schema() -> Object:
    """The schema of the MPI operator's custom resource. It is not in the repository; unknown fields do not fit it."""
    beside = ROOT.parent / "shared" / "schemas" / "mpijob-v2beta1.openapi.json"
    path = Path(os.environ.get("DIN_DIST_MPIJOB_SCHEMA") or beside)
    if not path.is_file():
        pytest.skip(f"no MPIJob schema at {path}: set DIN_DIST_MPIJOB_SCHEMA to its file")
    return closed(json.loads(path.read_text()))


def closed(schema: Any) -> Any:
    """The schema without room for unknown fields: Kubernetes drops those without a word, and so a misspelt one."""
    if isinstance(schema, list):
        return [closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    schema = {name: closed(part) for name, part in schema.items()}
    if isinstance(schema.get("properties"), dict) and not schema.get("x-kubernetes-preserve-unknown-fields"):
        schema.setdefault("additionalProperties", False)
    return schema


def job_of(objects: list[Object]) -> Object:
    if any(each["kind"] == "CronJob" for each in objects):
        return {"kind": "Job", **one(objects, "CronJob")["spec"]["jobTemplate"]}
    (found,) = (each for each in objects if each["kind"] in ("MPIJob", "Job", "TrainJob"))
    return found


def parts_of(objects: list[Object]) -> dict[str, Object]:
    """The Jobs that a TrainJob becomes, by name."""
    parts = one(objects, "TrainingRuntime")["spec"]["template"]["spec"]["replicatedJobs"]
    return {part["name"]: part["template"]["spec"] for part in parts}


def pods_of(objects: list[Object]) -> dict[str, Object]:
    """The job's pods, by role, as they are created; an Indexed Job and a CronJob have but workers."""
    job = job_of(objects)
    if job["kind"] == "Job":
        return {"Worker": {"apiVersion": "v1", "kind": "Pod", **job["spec"]["template"]}}
    if job["kind"] == "TrainJob":
        names = {"Launcher": "launcher", "Worker": "node"}
        parts = parts_of(objects)
        return {role: {"apiVersion": "v1", "kind": "Pod", **parts[name]["template"]} for role, name in names.items()}
    pods = {}
    for role, replicas in job["spec"]["mpiReplicaSpecs"].items():
        spec = {**replicas["template"]["spec"], "restartPolicy": replicas["restartPolicy"]}  # as the operator does
        pods[role] = {"apiVersion": "v1", "kind": "Pod", **replicas["template"], "spec": spec}
    return pods


def containers_of(objects: list[Object]) -> Iterator[Object]:
    for pod in pods_of(objects).values():
        yield from pod["spec"].get("initContainers", [])
        yield from pod["spec"]["containers"]


def trainers_of(objects: list[Object], flags_folder: Path) -> int:
    """Of a worker pod."""
    job = job_of(objects)
    if job["kind"] == "MPIJob":
        return job["spec"]["slotsPerWorker"]
    if job["kind"] == "TrainJob":
        return one(objects, "TrainingRuntime")["spec"]["mlPolicy"]["mpi"]["numProcPerNode"]
    (slots,) = {host.slots for host in read_hosts_file(str(flags_folder / "hosts"))}
    return slots


def launcher_args(objects: list[Object]) -> list[str]:
    pods = pods_of(objects)
    return (pods.get("Launcher") or pods["Worker"])["spec"]["containers"][0]["args"]


def ports_of(pod: Object) -> dict[str, int]:
    return {port["name"]: port["containerPort"] for port in pod["spec"]["containers"][0]["ports"]}


@pytest.fixture
def flags_folder(objects: list[Object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What pods have in /etc/din_dist; the work folder is the checkout, as in the image."""
    monkeypatch.chdir(ROOT)
    for name, text in one(objects, "ConfigMap")["data"].items():
        (tmp_path / name).write_text(text.replace(FLAGS_FOLDER, str(tmp_path)))
    return tmp_path


def parse(*arguments: str) -> Config:
    values = flags.FlagValues()
    define_flags(values)
    assert values(["program", *arguments]) == ["program"]
    return config_from_flags(values)


def test_all_overlays_are_tested() -> None:
    assert [path.name for path in sorted((ROOT / "k8s" / "overlays").iterdir())] == OVERLAYS


@pytest.mark.parametrize("version", KUBERNETES_VERSIONS)
def test_every_object_is_valid(objects: list[Object], version: str) -> None:
    for each in [*objects, *pods_of(objects).values()]:
        if each["kind"] not in ("MPIJob", "PodMonitor", "TrainJob", "TrainingRuntime"):
            assert kubernetes_validate.validate(each, version, strict=True) == version


def test_mpijobs_fit_the_operators_schema(objects: list[Object], mpijob_schema: Object) -> None:
    for each in objects:
        if each["kind"] == "MPIJob":
            jsonschema.validate(each, mpijob_schema)
            assert each["spec"]["launcherCreationPolicy"] in ("AtStartup", "WaitForWorkersReady")  # not in the schema
            assert each["spec"]["runPolicy"]["cleanPodPolicy"] in ("Running", "All")


@pytest.mark.parametrize(
    ("path", "name"),
    [
        (["spec", "runPolicy"], "backofLimit"),
        (["spec", "mpiReplicaSpecs", "Worker", "template", "spec", "containers", 0, "securityContext"], "runAsNonroot"),
    ],
)
def test_a_misspelt_field_of_an_mpijob_is_found(mpijob_schema: Object, path: list[Any], name: str) -> None:
    job = copy.deepcopy(one(render("gpu"), "MPIJob"))
    functools.reduce(lambda value, key: value[key], path, job)[name] = 1
    with pytest.raises(jsonschema.ValidationError, match=f"'{name}' was unexpected"):
        jsonschema.validate(job, mpijob_schema)


def test_pods_pass_the_restricted_pod_security_standard(objects: list[Object]) -> None:
    for pod in pods_of(objects).values():
        user = pod["spec"]["securityContext"]
        assert (user["runAsNonRoot"], user["runAsUser"]) == (True, 1000)
        assert user["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod["spec"])
        kinds = {kind for volume in pod["spec"]["volumes"] for kind in volume if kind != "name"}
        assert kinds <= {"configMap", "emptyDir", "persistentVolumeClaim", "secret"}
    for container in containers_of(objects):
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "readOnlyRootFilesystem": True,
        }


def test_pods_are_nobody_to_the_clusters_api(objects: list[Object]) -> None:
    account = one(objects, "ServiceAccount")
    assert account["automountServiceAccountToken"] is False
    for pod in pods_of(objects).values():
        assert pod["spec"]["serviceAccountName"] == account["metadata"]["name"]
        assert pod["spec"]["automountServiceAccountToken"] is False


def test_every_container_has_requests_and_limits(objects: list[Object]) -> None:
    for container in containers_of(objects):
        resources = container["resources"]
        for kind in ("requests", "limits"):
            assert {"cpu", "memory"} <= set(resources[kind]), container["name"]
        assert resources["requests"]["memory"] == resources["limits"]["memory"]  # else it may be evicted


def test_images_are_of_this_version(objects: list[Object]) -> None:
    is_gpu = any("nvidia.com/gpu" in container["resources"]["limits"] for container in containers_of(objects))
    image = f"din-dist:{__version__}{'-gpu' if is_gpu else ''}"
    assert {container["image"] for container in containers_of(objects)} == {image}


def test_what_pods_refer_to_is_there(objects: list[Object]) -> None:
    names = {(each["kind"], each["metadata"]["name"]) for each in objects}
    assert re.fullmatch(r"din-dist-[a-z0-9]{10}", one(objects, "ConfigMap")["metadata"]["name"])
    for pod in pods_of(objects).values():
        volumes = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
        for volume in volumes.values():
            if "configMap" in volume:
                assert ("ConfigMap", volume["configMap"]["name"]) in names
            if "persistentVolumeClaim" in volume:
                assert ("PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"]) in names
        for container in [*pod["spec"].get("initContainers", []), *pod["spec"]["containers"]]:
            mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
            assert set(mounts.values()) <= set(volumes)
            assert {"/dev/shm", "/tmp", FLAGS_FOLDER, "/data", "/runs"} <= set(mounts)  # trainers take the same flags
            assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory"


def test_secrets_are_only_referred_to(objects: list[Object]) -> None:
    assert all(each["kind"] != "Secret" for each in objects)
    wanted = [v["secret"] for pod in pods_of(objects).values() for v in pod["spec"]["volumes"] if "secret" in v]
    assert wanted in ([], [{"secretName": "din-dist-ssh", "defaultMode": 0o440}])


def test_volumes_are_for_pods_on_several_nodes(objects: list[Object]) -> None:
    claims = [each for each in objects if each["kind"] == "PersistentVolumeClaim"]
    assert {claim["metadata"]["name"] for claim in claims} == {"din-dist-data", "din-dist-runs"}
    for claim in claims:
        assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
        # Which launch/k8s.sh keeps.
        assert claim["metadata"]["labels"]["app.kubernetes.io/component"] == "storage"


def test_every_object_has_the_label_that_selects_the_job(objects: list[Object]) -> None:
    for each in objects:
        assert each["metadata"]["labels"]["app.kubernetes.io/name"] == "din-dist", each["kind"]


def test_selectors_meet_the_pods(objects: list[Object]) -> None:
    pods = pods_of(objects)
    selectors = {"PodDisruptionBudget": list(pods), "NetworkPolicy": list(pods), "Service": list(pods)}
    selectors["PodMonitor"] = ["Worker"]
    for each in objects:
        if roles := selectors.get(each["kind"]):
            selector = each["spec"].get("podSelector") or each["spec"]["selector"]
            wanted = selector.get("matchLabels", selector)
            met = [role for role, pod in pods.items() if wanted.items() <= pod["metadata"]["labels"].items()]
            assert met == roles, each["kind"]
    if any(each["kind"] == "CronJob" for each in objects):
        return  # of one pod
    (spread,) = pods["Worker"]["spec"]["topologySpreadConstraints"]
    assert spread["labelSelector"]["matchLabels"].items() <= pods["Worker"]["metadata"]["labels"].items()
    assert spread["topologyKey"] == "kubernetes.io/hostname"


def test_only_the_job_and_prometheus_may_connect(objects: list[Object]) -> None:
    spec = one(objects, "NetworkPolicy")["spec"]
    assert spec["policyTypes"] == ["Ingress"]
    own, prometheus = spec["ingress"]
    assert own["from"] == [{"podSelector": spec["podSelector"]}]
    assert own["ports"] == [{"protocol": "TCP", "port": 1024, "endPort": 65535}]
    labels = {"kubernetes.io/metadata.name": "monitoring"}
    assert prometheus["from"] == [{"namespaceSelector": {"matchLabels": labels}}]
    (ports,) = prometheus["ports"]
    metrics = [number for name, number in ports_of(pods_of(objects)["Worker"]).items() if name.startswith("metrics")]
    assert ports["port"] == min(metrics)
    assert ports["endPort"] >= max(metrics)


@pytest.mark.parametrize("objects", JOBS, indirect=True)
def test_each_trainer_of_a_pod_has_its_metrics_port(objects: list[Object], flags_folder: Path) -> None:
    first = parse(f"--flagfile={flags_folder}/job.flags").telemetry.metrics_port
    num_trainers = trainers_of(objects, flags_folder)
    worker = pods_of(objects)["Worker"]
    wanted = {f"metrics-{rank}": first + rank for rank in range(num_trainers)}
    assert ports_of(worker) == {"ssh": 2222, **wanted}
    assert f"--ssh_port={ports_of(worker)['ssh']}" in launcher_args(objects)
    annotations = worker["metadata"].get("annotations", {})
    if annotations:
        assert num_trainers == 1  # they name one port
        assert annotations == {
            "prometheus.io/scrape": "true",
            "prometheus.io/port": str(first),
            "prometheus.io/path": "/metrics",
        }
    has_monitor = any(each["kind"] == "PodMonitor" for each in objects)
    assert has_monitor == (not annotations), "Prometheus must find them in one way, not in two"


@pytest.mark.parametrize("overlay", ["elastic", "gpu"])
def test_the_pod_monitor_finds_each_trainer_and_says_whose_it_is(overlay: str) -> None:
    monitor = one(render(overlay), "PodMonitor")
    assert monitor["apiVersion"] == "monitoring.coreos.com/v1"
    assert set(monitor["spec"]) == {"selector", "podMetricsEndpoints"}
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    assert set(endpoint) == {"path", "interval", "relabelings"}  # `port` would be one port
    assert endpoint["path"] == "/metrics"
    keep, *label = endpoint["relabelings"]
    assert keep == {
        "action": "keep",
        "sourceLabels": ["__meta_kubernetes_pod_container_port_name"],
        "regex": keep["regex"],
    }
    for name in ports_of(pods_of(render(overlay))["Worker"]):
        assert bool(re.fullmatch(keep["regex"], name)) == (name != "ssh")
    pod = "__meta_kubernetes_pod_"
    assert label == [
        {"targetLabel": "job", "replacement": "din_dist"},
        {
            "targetLabel": "run",
            "sourceLabels": ["__meta_kubernetes_namespace", f"{pod}label_app_kubernetes_io_name"],
            "separator": "/",
        },
        {"targetLabel": "rank", "sourceLabels": [f"{pod}name", f"{pod}container_port_name"], "separator": "/"},
    ]


@pytest.mark.parametrize("objects", JOBS, indirect=True)
def test_flagfiles_say_where_and_name_what(objects: list[Object], flags_folder: Path) -> None:
    config = parse(f"--flagfile={flags_folder}/job.flags")
    assert config.data.data_dir == "/data/prepared"
    assert config.job.output_dir.startswith("/runs/")
    assert config.telemetry.metrics_host == "0.0.0.0"
    given = re.findall(r"^--(\w+)=(.*)$", "".join(one(objects, "ConfigMap")["data"].values()), re.MULTILINE)
    places = {"data_dir", "data_path", "output_dir", "metrics_host", "metrics_port"}
    assert {name for name, _ in given} <= {"flagfile", *places}
    (named,) = (value for name, value in given if name == "flagfile" and not value.startswith(FLAGS_FOLDER))
    data_path = [f"--data_path={config.data.data_path}"] if config.data.data_path else []
    assert config.model == parse(f"--flagfile={named}", *data_path).model


@pytest.mark.parametrize("objects", JOBS, indirect=True)
def test_commands_exist_and_take_their_flags(objects: list[Object], flags_folder: Path) -> None:
    pods = pods_of(objects)
    script, *given = [arg.replace(FLAGS_FOLDER, str(flags_folder)) for arg in launcher_args(objects)]
    assert os.access(script, os.X_OK)
    if "Launcher" in pods:
        (sshd,) = pods["Worker"]["spec"]["containers"][0]["args"]
        assert os.access(sshd, os.X_OK)
    assert not any("command" in container for container in containers_of(objects)), "tini has to go first"
    trainer_flags = launch.parse_launcher_flags(given)
    assert parse(*trainer_flags) == parse(f"--flagfile={flags_folder}/job.flags")
    prepare = next(container for container in containers_of(objects) if container["name"] == "prepare-data")
    words = " ".join(prepare["args"])
    assert words.endswith(f".venv/bin/python -m din_dist.cli.prepare_data --flagfile={FLAGS_FOLDER}/job.flags")


def test_a_job_has_time_for_its_checkpoint_and_an_end(objects: list[Object]) -> None:
    for pod in pods_of(objects).values():
        assert pod["spec"]["terminationGracePeriodSeconds"] >= 60
    spec = job_of(objects)["spec"]
    policy = spec.get("runPolicy", spec)
    assert policy["activeDeadlineSeconds"] > 0
    if "trainer" not in spec:  # Kubeflow Trainer has no such fields
        assert policy["backoffLimit"] >= 1
        assert policy["ttlSecondsAfterFinished"] > 0
    assert {role: pod["spec"]["restartPolicy"] for role, pod in pods_of(objects).items()} in (
        {"Launcher": "Never", "Worker": "OnFailure"},
        {"Worker": "Never"},  # as a pod failure policy wants it
    )


@pytest.mark.parametrize("overlay", ["smoke-cpu", "gpu"])
def test_static_jobs(overlay: str) -> None:
    objects = render(overlay)
    spec = one(objects, "MPIJob")["spec"]
    assert spec["launcherCreationPolicy"] == "WaitForWorkersReady"
    assert spec["sshAuthMountPath"] == "/home/din/.ssh"
    script, *given = launcher_args(objects)
    assert script == "launch/train.sh"
    assert "--hosts_file=/etc/mpi/hostfile" in given  # the operator's
    worker = pods_of(objects)["Worker"]["spec"]["containers"][0]
    assert worker["readinessProbe"]["tcpSocket"] == {"port": "ssh"}
    num_gpus = worker["resources"]["limits"].get("nvidia.com/gpu", "1")
    assert str(spec["slotsPerWorker"]) == num_gpus
    assert (
        one(objects, "PodDisruptionBudget")["spec"]["minAvailable"] == 1 + spec["mpiReplicaSpecs"]["Worker"]["replicas"]
    )


def test_gpus_go_to_workers_only() -> None:
    objects = render("gpu")
    by_name = {container["name"]: container for container in containers_of(objects)}
    with_gpu = [name for name, container in by_name.items() if "nvidia.com/gpu" in container["resources"]["limits"]]
    assert with_gpu == ["worker"]
    assert {"name": "NVIDIA_VISIBLE_DEVICES", "value": "void"} in by_name["prepare-data"]["env"]
    sizes = {role: pod["spec"]["volumes"][0]["emptyDir"]["sizeLimit"] for role, pod in pods_of(objects).items()}
    assert sizes == {"Launcher": "512Mi", "Worker": "16Gi"}


def test_the_elastic_job() -> None:
    objects = render("elastic")
    spec = one(objects, "MPIJob")["spec"]
    assert spec["launcherCreationPolicy"] == "AtStartup"
    script, *given = launcher_args(objects)
    assert script == "launch/elastic.sh"
    given = dict(flag.removeprefix("--").split("=") for flag in given)
    assert "hosts_file" not in given  # so that the operator's discover_hosts.sh is asked
    low, start, high = (int(given[f"{name}_workers"]) for name in ("min", "num", "max"))
    slots = spec["slotsPerWorker"]
    assert low <= start <= high == spec["mpiReplicaSpecs"]["Worker"]["replicas"] * slots
    assert one(objects, "PodDisruptionBudget")["spec"]["minAvailable"] == 1 + low // slots


def test_the_indexed_job(tmp_path: Path) -> None:
    objects = render("no-operator")
    assert all(each["kind"] != "MPIJob" for each in objects)
    job, service = one(objects, "Job"), one(objects, "Service")
    spec, pod = job["spec"], pods_of(objects)["Worker"]["spec"]
    assert spec["completionMode"] == "Indexed"
    assert spec["completions"] == spec["parallelism"]
    assert spec["successPolicy"] == {"rules": [{"succeededIndexes": "0"}]}
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["publishNotReadyAddresses"] is True
    assert pod["subdomain"] == service["metadata"]["name"]
    (tmp_path / "hosts").write_text(one(objects, "ConfigMap")["data"]["hosts"])
    hosts = read_hosts_file(str(tmp_path / "hosts"))
    name = job["metadata"]["name"]
    assert [host.name for host in hosts] == [f"{name}-{i}.{pod['subdomain']}" for i in range(spec["completions"])]
    script, *given = launcher_args(objects)
    assert script == "docker/indexed_pod.sh"
    assert f"--hosts_file={FLAGS_FOLDER}/hosts" in given
    assert "readinessProbe" not in pod["containers"][0]  # the first pod serves no ssh
    assert {"name": "ssh", "mountPath": "/home/din/.ssh", "readOnly": True} in pod["containers"][0]["volumeMounts"]
    assert one(objects, "PodDisruptionBudget")["spec"]["minAvailable"] == spec["completions"]


def test_the_train_job() -> None:
    """The names are those that Kubeflow Trainer looks for: it mounts keys and the hosts file where they fit."""
    objects = render("trainjob")
    job, runtime = one(objects, "TrainJob"), one(objects, "TrainingRuntime")
    assert all(each["kind"] != "MPIJob" for each in objects)
    assert job["spec"]["runtimeRef"] == {
        "apiGroup": "trainer.kubeflow.org",
        "kind": runtime["kind"],
        "name": runtime["metadata"]["name"],
    }
    policy = runtime["spec"]["mlPolicy"]
    assert policy["numNodes"] == job["spec"]["trainer"]["numNodes"]
    assert policy["mpi"] == {
        "mpiImplementation": "OpenMPI",
        "numProcPerNode": 1,
        "sshAuthMountPath": "/home/din/.ssh",
        "runLauncherAsNode": False,
    }
    assert one(objects, "PodDisruptionBudget")["spec"]["minAvailable"] == 1 + policy["numNodes"]
    set_of_jobs = runtime["spec"]["template"]["spec"]
    assert [part["name"] for part in set_of_jobs["replicatedJobs"]] == ["node", "launcher"]
    assert set_of_jobs["replicatedJobs"][1]["dependsOn"] == [{"name": "node", "status": "Ready"}]
    assert set_of_jobs["successPolicy"] == {"operator": "All", "targetReplicatedJobs": ["launcher"]}
    for pod in pods_of(objects).values():
        assert [container["name"] for container in pod["spec"]["containers"]] == ["node"]
    script, *given = launcher_args(objects)
    assert script == "launch/train.sh"
    assert "--hosts_file=/etc/mpi/hostfile" in given
    assert "readinessProbe" in pods_of(objects)["Worker"]["spec"]["containers"][0]
    rules = parts_of(objects)["launcher"]["podFailurePolicy"]
    assert rules == one(render("no-operator"), "Job")["spec"]["podFailurePolicy"]


@pytest.mark.parametrize("kind", ["TrainJob", "TrainingRuntime"])
def test_train_jobs_fit_the_schemas_of_kubeflow_trainer(kind: str) -> None:
    """The definitions of github.com/kubeflow/trainer (manifests/base/crds), which are not in the repository."""
    folder = os.environ.get("DIN_DIST_TRAINER_CRDS")
    if not folder:
        pytest.skip("DIN_DIST_TRAINER_CRDS does not name a folder with the definitions of Kubeflow Trainer")
    definition = yaml.safe_load((Path(folder) / f"trainer.kubeflow.org_{kind.lower()}s.yaml").read_text())
    schema = closed(definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object"}
    jsonschema.validate(one(render("trainjob"), kind), schema)


@pytest.mark.parametrize("objects", ["daily"], indirect=True)
def test_daily_training(objects: list[Object], flags_folder: Path) -> None:
    assert not {"MPIJob", "PodDisruptionBudget"} & {each["kind"] for each in objects}
    spec = one(objects, "CronJob")["spec"]
    assert spec["concurrencyPolicy"] == "Forbid", "one command works in --work_dir"
    (container,) = pods_of(objects)["Worker"]["spec"]["containers"]
    script, flag = container["args"]
    assert os.access(script, os.X_OK)
    _, trainer_flags = daily.parse_flags([flag.replace(FLAGS_FOLDER, str(flags_folder))])
    config = daily.config_from_flags()
    assert (config.log, config.begins, config.work_dir) == ("/data/events", "2026-11-01", "/runs/daily")
    assert config == DailyConfig(log=config.log, begins=config.begins, work_dir=config.work_dir), "no other setting"
    daily.check_trainer_flags(config, trainer_flags)
    recommended = parse("--flagfile=launch/flags/recommended.flags", "--data_path=/data/events")
    trained = parse(*trainer_flags, "--data_path=/data/events")
    assert trained.model == recommended.model
    assert trained.telemetry.metrics_host == "0.0.0.0"
    (num_workers,) = re.findall(r"^--num_workers=(\d+)$", (flags_folder / "job.flags").read_text(), re.MULTILINE)
    first = trained.telemetry.metrics_port
    assert ports_of(pods_of(objects)["Worker"]) == {f"metrics-{rank}": first + rank for rank in range(int(num_workers))}


@pytest.mark.parametrize(("exit_code", "action"), [(2, "FailJob"), (75, "Ignore"), (81, "FailJob"), (82, "FailJob")])
def test_which_failures_of_a_day_are_tried_again(exit_code: int, action: str) -> None:
    rules = one(render("daily"), "CronJob")["spec"]["jobTemplate"]["spec"]["podFailurePolicy"]["rules"]
    found = [rule["action"] for rule in rules if exit_code in rule.get("onExitCodes", {}).get("values", [])]
    assert found == [action]
    assert {EXIT_INPUT_ERROR, EXIT_RETRY, EXIT_QUALITY_FELL, EXIT_DAY_MISSING} == {2, 75, 81, 82}


@pytest.mark.parametrize(
    ("exit_code", "condition", "action"),
    [
        (2, None, "FailJob"),
        (75, None, "Ignore"),
        (1, None, "count"),
        (137, None, "count"),
        (137, "DisruptionTarget", "Ignore"),
        (75, "DisruptionTarget", "Ignore"),
    ],
)
def test_which_failures_of_the_indexed_job_count(exit_code: int, condition: str | None, action: str) -> None:
    for rule in one(render("no-operator"), "Job")["spec"]["podFailurePolicy"]["rules"]:
        codes = rule.get("onExitCodes")
        conditions = [each["type"] for each in rule.get("onPodConditions", [])]
        if (codes and codes["operator"] == "In" and exit_code in codes["values"]) or condition in conditions:
            assert rule["action"] == action
            return
    assert action == "count"


@pytest.mark.parametrize(("index", "prepares"), [("0", True), ("1", False)])
def test_only_the_first_pod_prepares_the_data(tmp_path: Path, index: str, prepares: bool) -> None:
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\necho "$*"\n')
    python.chmod(0o755)
    (container,) = pods_of(render("no-operator"))["Worker"]["spec"]["initContainers"]
    env = {**os.environ, "JOB_COMPLETION_INDEX": index}
    done = subprocess.run(container["args"], cwd=tmp_path, env=env, capture_output=True, text=True)
    said = f"-m din_dist.cli.prepare_data --flagfile={FLAGS_FOLDER}/job.flags\n" if prepares else ""
    assert (done.returncode, done.stdout) == (0, said), done.stderr
