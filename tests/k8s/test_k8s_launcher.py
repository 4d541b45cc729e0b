"""launch/k8s.sh with a kubectl that renders as the real one does and otherwise says what a test wants."""

from __future__ import annotations

import functools
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml

from din_dist import __version__
from tests.support.fake_checkout import path_without, write_script
from tests.support.overlays import OVERLAYS, Object, kubectl, one, render
from tests.support.patience import PATIENCE
from tests.support.programs import program
from tests.support.repository import ROOT

# Of several answers to calls that begin alike, each call takes the next, and the last one stays.
KUBECTL = """#!{python}
import json, os, pathlib, sys
words = [word for word in sys.argv[1:] if not word.startswith("--namespace=")]
if words[0] == "kustomize":
    os.execv({kubectl!r}, [{kubectl!r}, *words])
with open("calls", "a") as calls:
    calls.write(json.dumps(sys.argv[1:]) + "\\n")
if "--filename=-" in words:
    pathlib.Path("manifests").write_text(sys.stdin.read())
for word in words:
    if word.startswith("--from-file="):
        name, path = word.removeprefix("--from-file=").split("=")
        pathlib.Path(name).write_text(pathlib.Path(path).read_text())
answers = json.loads(pathlib.Path("answers").read_text())
for beginning, left in answers.items():
    if " ".join(words).startswith(beginning):
        print(left[0] if len(left) == 1 else left.pop(0))
        pathlib.Path("answers").write_text(json.dumps(answers))
        break
"""
NAMESPACE = "--namespace=ml"
MPIJOB = "mpijobs.kubeflow.org/din-dist"
SERVER = "deployments.apps/din-dist-serve"
LAUNCHER = "jobs.batch/din-dist-launcher"


class Cluster:
    """A folder with the fakes, in which launch/k8s.sh runs."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.bin, self.tmp = folder, folder / "bin", folder / "tmp"
        self.bin.mkdir()
        self.tmp.mkdir()
        write_script(self.bin / "kubectl", KUBECTL.format(python=sys.executable, kubectl=kubectl()))
        write_script(self.bin / "sleep", "#!/bin/sh\n")
        self.answers: dict[str, list[str]] = {}

    def run(self, *arguments: str, path: str = "") -> subprocess.CompletedProcess[str]:
        (self.folder / "answers").write_text(json.dumps(self.answers))
        return subprocess.run(
            [ROOT / "launch" / "k8s.sh", *arguments],
            cwd=self.folder,
            env={**os.environ, "PATH": path or f"{self.bin}:{os.environ['PATH']}", "TMPDIR": str(self.tmp)},
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )

    def error(self, *arguments: str, path: str = "") -> str:
        """The one line of an error with exit code 2."""
        done = self.run(*arguments, path=path)
        assert (done.returncode, done.stdout) == (2, ""), done
        (line,) = done.stderr.splitlines()
        return line

    def calls(self, *beginning: str) -> list[list[str]]:
        """Those in the namespace, without it."""
        file = self.folder / "calls"
        calls = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        assert all(call[0] == NAMESPACE for call in calls)
        return [call[1:] for call in calls if call[1 : len(beginning) + 1] == list(beginning)]


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    return Cluster(tmp_path)


def folder_of(overlay: str) -> str:
    return f"--kustomize={ROOT}/k8s/overlays/{overlay}"


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_render_prints_the_manifests(cluster: Cluster, overlay: str) -> None:
    done = cluster.run("render", overlay)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("\nkind: ") == len(render(overlay))


def test_submit(cluster: Cluster) -> None:
    done = cluster.run("submit", "smoke-cpu", NAMESPACE)
    assert (done.returncode, done.stderr) == (0, "")
    assert cluster.calls() == [
        ["get", MPIJOB, "--ignore-not-found", "--output=name"],
        ["apply", folder_of("smoke-cpu")],
    ]


def test_a_server_that_is_there_is_changed(cluster: Cluster) -> None:
    cluster.answers = {f"get {SERVER}": [SERVER]}
    assert cluster.run("submit", "serve", NAMESPACE).returncode == 0
    assert cluster.calls() == [["apply", folder_of("serve")]]


@pytest.mark.parametrize("code", [0, 1])
def test_a_server_is_followed_until_it_serves(cluster: Cluster, code: int) -> None:
    write_script(
        cluster.bin / "kubectl",
        f'#!/bin/sh\n[ "$1" != kustomize ] || exec {kubectl()} "$@"\necho "$*"\nexit {code}\n',
    )
    done = cluster.run("follow", "serve", NAMESPACE)
    assert (done.returncode, done.stdout) == (code, f"{NAMESPACE} rollout status {SERVER}\n")


def test_deleting_a_server_leaves_jobs_alone(cluster: Cluster) -> None:
    assert cluster.run("delete", "serve", NAMESPACE).returncode == 0
    assert cluster.calls() == [
        [
            "delete",
            folder_of("serve"),
            "--ignore-not-found",
            "--cascade=foreground",
            "--selector=app.kubernetes.io/component!=storage",
        ],
        ["delete", "configmaps", "--selector=app.kubernetes.io/name=din-dist-serve"],
    ]


@pytest.mark.parametrize(("overlay", "job"), [("smoke-cpu", MPIJOB), ("no-operator", "jobs.batch/din-dist")])
def test_a_job_that_is_there_is_not_submitted(cluster: Cluster, overlay: str, job: str) -> None:
    cluster.answers = {f"get {job}": [job]}
    assert cluster.error("submit", overlay, NAMESPACE) == (
        f"k8s.sh: {job}: must be new. Received: one that is there already. Delete it: launch/k8s.sh delete {overlay}"
    )
    assert not cluster.calls("apply")


def test_the_job_without_operator_gets_ssh_keys(cluster: Cluster) -> None:
    program("ssh-keygen")
    done = cluster.run("submit", "no-operator", NAMESPACE)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", ""), "keys are not shown"
    (create,) = cluster.calls("create")
    assert create[:4] == ["create", "secret", "generic", "din-dist-ssh"]
    assert cluster.calls()[-2:] == [create, ["apply", folder_of("no-operator")]]
    private, public = ((cluster.folder / name).read_text() for name in ("id_ed25519", "authorized_keys"))
    assert private.startswith("-----BEGIN OPENSSH PRIVATE KEY-----\n")
    assert public.startswith("ssh-ed25519 ")
    assert list(cluster.tmp.iterdir()) == [], "keys are not left behind"


def test_keys_that_are_there_stay(cluster: Cluster) -> None:
    cluster.answers = {"get secrets/din-dist-ssh": ["secret/din-dist-ssh"]}
    assert cluster.run("submit", "no-operator", NAMESPACE).returncode == 0
    assert not cluster.calls("create")
    assert cluster.calls("apply")


def test_keys_that_the_cluster_refuses_are_not_left_behind(cluster: Cluster) -> None:
    program("ssh-keygen")
    write_script(
        cluster.bin / "kubectl", f'#!/bin/sh\n[ "$1" != create ] || exit 1\n[ "$1" = get ] || exec {kubectl()} "$@"\n'
    )
    done = cluster.run("submit", "no-operator")
    assert (done.returncode, done.stdout) == (1, "")
    assert list(cluster.tmp.iterdir()) == []


def logs_of(pod: str) -> list[str]:
    return ["logs", pod, "--follow", "--all-containers", "--ignore-errors"]


@pytest.mark.parametrize(
    ("overlay", "job", "launcher", "selector"),
    [
        ("gpu", MPIJOB, LAUNCHER, "batch.kubernetes.io/job-name=din-dist-launcher"),
        (
            "no-operator",
            "jobs.batch/din-dist",
            "jobs.batch/din-dist",
            "batch.kubernetes.io/job-name=din-dist,batch.kubernetes.io/job-completion-index=0",
        ),
        (
            "trainjob",
            "trainjobs.trainer.kubeflow.org/din-dist",
            "trainjobs.trainer.kubeflow.org/din-dist",
            "jobset.sigs.k8s.io/jobset-name=din-dist,jobset.sigs.k8s.io/replicatedjob-name=launcher",
        ),
    ],
)
def test_follow_streams_the_launchers_log_to_the_end(
    cluster: Cluster, overlay: str, job: str, launcher: str, selector: str
) -> None:
    cluster.answers = {
        f"get {launcher} --ignore-not-found --output=jsonpath": ["", "", "SuccessCriteriaMet: \nComplete: "],
        f"get {job}": [job],
        f"get pods --selector={selector} --sort-by=.metadata.creationTimestamp --output=name": ["", "pod/a"],
        "get pod/a": ["Pending", "Running", "Succeeded"],
        "logs pod/a": ["the log"],
    }
    done = cluster.run("follow", overlay, NAMESPACE)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "the log\n"
    assert done.stderr == (
        f"k8s.sh: waiting for the launcher of {job}; if it does not come: kubectl --namespace=ml get events\n"
    )
    assert cluster.calls("logs") == [logs_of("pod/a")]


def test_follow_shows_every_start_and_how_the_job_failed(cluster: Cluster) -> None:
    cluster.answers = {
        f"get {LAUNCHER}": ["", "FailureTarget: all failed\nFailed: all failed"],
        f"get {MPIJOB}": [MPIJOB],
        "get pods": ["pod/a", "pod/a\npod/b"],  # the newest comes last
        "get pod/": ["Failed"],
        "logs pod/a": ["first"],
        "logs pod/b": ["second"],
    }
    done = cluster.run("follow", "smoke-cpu", NAMESPACE)
    assert (done.returncode, done.stdout) == (1, "first\nsecond\n")
    assert done.stderr.endswith(f"k8s.sh: {MPIJOB} failed: all failed\n")


def test_follow_goes_on_with_a_log_that_broke_off(cluster: Cluster) -> None:
    cluster.answers = {
        f"get {LAUNCHER}": ["", "", "Complete: "],
        f"get {MPIJOB}": [MPIJOB],
        "get pods": ["pod/a"],
        "get pod/a": ["Running", "Running", "Succeeded"],
    }
    assert cluster.run("follow", "smoke-cpu", NAMESPACE).returncode == 0
    first, second = cluster.calls("logs")
    assert first == logs_of("pod/a")
    assert second[:-1] == logs_of("pod/a")
    assert second[-1].startswith("--since-time=20")


@pytest.mark.parametrize("answers", [{}, {f"get {MPIJOB}": [MPIJOB, ""]}])
def test_there_is_no_job_to_follow(cluster: Cluster, answers: dict[str, list[str]]) -> None:
    cluster.answers = answers
    done = cluster.run("follow", "gpu", NAMESPACE)
    assert done.returncode == 2
    assert done.stderr.splitlines()[1:] == [
        f"k8s.sh: {MPIJOB}: must have been submitted. Received: none there. Submit it: launch/k8s.sh submit gpu"
    ]


@pytest.mark.parametrize(
    ("flags", "kept"), [([], ["--selector=app.kubernetes.io/component!=storage"]), (["--with_data"], [])]
)
def test_delete_keeps_the_data_unless_told(cluster: Cluster, flags: list[str], kept: list[str]) -> None:
    assert cluster.run("delete", "no-operator", NAMESPACE, *flags).returncode == 0
    assert cluster.calls() == [
        ["delete", folder_of("no-operator"), "--ignore-not-found", "--cascade=foreground", *kept],
        ["delete", "configmaps", "--selector=app.kubernetes.io/name=din-dist"],
        ["delete", "secrets/din-dist-ssh", "--ignore-not-found"],
    ]


def test_the_secret_that_the_operator_made_is_the_operators(cluster: Cluster) -> None:
    assert cluster.run("delete", "gpu", NAMESPACE).returncode == 0
    assert [call[:2] for call in cluster.calls()] == [["delete", folder_of("gpu")], ["delete", "configmaps"]]


def without_claims(manifests: str) -> list[Object]:
    return [each for each in yaml.safe_load_all(manifests) if each["kind"] != "PersistentVolumeClaim"]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_a_named_job_has_its_own_objects_and_the_claims_of_all(cluster: Cluster, overlay: str) -> None:
    """Two in one namespace do not meet: no name of theirs, and no label that a selector asks for, is the same."""
    done = cluster.run("render", overlay, "--name=clicks-2")
    assert (done.returncode, done.stderr) == (0, "")
    before, after = render(overlay), list(yaml.safe_load_all(done.stdout))
    assert [each["kind"] for each in after] == [each["kind"] for each in before]
    base = "din-dist-serve" if overlay == "serve" else "din-dist"
    for old, new in zip(before, after, strict=True):
        name = old["metadata"]["name"]
        is_claim = new["kind"] == "PersistentVolumeClaim"
        assert new["metadata"]["name"] == (name if is_claim else name.replace(base, "clicks-2"))
    text = json.dumps(without_claims(done.stdout))
    shared = {"din-dist-data", "din-dist-runs", f"din-dist:{__version__}", f"din-dist:{__version__}-gpu"}
    assert set(re.findall(r"din-dist[-a-z0-9:.]*", text)) <= shared
    assert json.loads(text.replace("clicks-2", base)) == without_claims(yaml.safe_dump_all(before))


@pytest.mark.parametrize(
    ("overlay", "kind", "place"),
    [
        ("gpu", "MPIJob", ["spec", "runPolicy"]),
        ("no-operator", "Job", ["spec"]),
        ("trainjob", "TrainJob", ["spec"]),
    ],
)
def test_a_job_waits_in_a_queue_of_kueue(cluster: Cluster, overlay: str, kind: str, place: list[str]) -> None:
    """The label and `suspend` are all that is new."""
    done = cluster.run("render", overlay, "--queue=ranking")
    found = list(yaml.safe_load_all(done.stdout))
    job = one(found, kind)
    assert job["metadata"]["labels"].pop("kueue.x-k8s.io/queue-name") == "ranking"
    assert functools.reduce(lambda value, key: value[key], place, job).pop("suspend") is True
    assert found == render(overlay)


def test_what_named_jobs_are_called(cluster: Cluster) -> None:
    program("ssh-keygen")
    named = ("--name=clicks", NAMESPACE)
    assert cluster.run("submit", "no-operator", "--queue=ranking", *named).returncode == 0
    first, secret, create, apply = cluster.calls()
    assert first == ["get", "jobs.batch/clicks", "--ignore-not-found", "--output=name"]
    assert secret[:2] == ["get", "secrets/clicks-ssh"]
    assert create[:4] == ["create", "secret", "generic", "clicks-ssh"]
    assert apply == ["apply", "--filename=-"]
    applied = list(yaml.safe_load_all((cluster.folder / "manifests").read_text()))
    job = one(applied, "Job")
    assert (job["metadata"]["name"], job["spec"]["suspend"]) == ("clicks", True)
    (cluster.folder / "calls").unlink()
    assert cluster.run("delete", "no-operator", *named).returncode == 0
    assert [call[:3] for call in cluster.calls()] == [
        ["delete", "--filename=-", "--ignore-not-found"],
        ["delete", "configmaps", "--selector=app.kubernetes.io/name=clicks"],
        ["delete", "secrets/clicks-ssh", "--ignore-not-found"],
    ]
    cluster.answers = {"get mpijobs.kubeflow.org/clicks": ["mpijobs.kubeflow.org/clicks"]}
    assert cluster.error("submit", "gpu", *named).endswith("Delete it: launch/k8s.sh delete gpu --name=clicks")


def test_a_named_job_is_followed(cluster: Cluster) -> None:
    cluster.answers = {
        "get jobs.batch/clicks-launcher --ignore-not-found --output=jsonpath": ["Complete: "],
        "get mpijobs.kubeflow.org/clicks": ["mpijobs.kubeflow.org/clicks"],
        "get pods --selector=batch.kubernetes.io/job-name=clicks-launcher": ["pod/a"],
        "get pod/a": ["Succeeded"],
        "logs pod/a": ["the log"],
    }
    done = cluster.run("follow", "smoke-cpu", "--name=clicks", NAMESPACE)
    assert (done.returncode, done.stdout) == (0, "the log\n")


def test_a_dry_run_of_a_named_job_can_be_copied(cluster: Cluster) -> None:
    script = "\n".join(dry_run(cluster, "submit", "smoke-cpu", "--name=clicks"))
    env = {**os.environ, "PATH": f"{cluster.bin}:{os.environ['PATH']}"}
    subprocess.run(["bash", "-euc", script], cwd=cluster.folder, env=env, check=True)
    assert cluster.calls() == [["apply", "--filename=-"]]
    copied = list(yaml.safe_load_all((cluster.folder / "manifests").read_text()))
    assert copied == list(yaml.safe_load_all(cluster.run("render", "smoke-cpu", "--name=clicks").stdout))


def dry_run(cluster: Cluster, *arguments: str) -> list[str]:
    done = cluster.run(*arguments, NAMESPACE, "--dry_run")
    assert (done.returncode, done.stderr) == (0, "")
    assert cluster.calls() == []
    return done.stdout.splitlines()


@pytest.mark.parametrize("action", ["submit", "delete"])
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_a_dry_run_prints_what_would_be_run(cluster: Cluster, action: str, overlay: str) -> None:
    """Copied to a shell, the lines do what the launcher would."""
    program("ssh-keygen")
    script = "\n".join(dry_run(cluster, action, overlay))
    env = {**os.environ, "PATH": f"{cluster.bin}:{os.environ['PATH']}"}
    subprocess.run(["bash", "-euc", script], cwd=cluster.folder, env=env, check=True)
    copied = cluster.calls()
    (cluster.folder / "calls").unlink()
    assert cluster.run(action, overlay, NAMESPACE).returncode == 0
    keys = "--from-file="
    assert [[word.split(keys)[0] for word in call] for call in copied] == [
        [word.split(keys)[0] for word in call] for call in cluster.calls() if call[0] != "get"
    ]
    assert list(cluster.tmp.iterdir()) == []


def test_a_job_for_each_day_is_not_followed(cluster: Cluster) -> None:
    assert cluster.error("follow", "daily", NAMESPACE) == (
        "k8s.sh: follow: is for an overlay with one job. Received: 'daily', with a job for each day. Look at one: "
        "kubectl logs --selector=app.kubernetes.io/name=din-dist"
    )
    cluster.answers = {"get cronjobs.batch/din-dist": ["cronjobs.batch/din-dist"]}
    assert "cronjobs.batch/din-dist: must be new." in cluster.error("submit", "daily", NAMESPACE)


def test_a_dry_run_of_render_and_follow(cluster: Cluster) -> None:
    assert dry_run(cluster, "render", "gpu") == [f"kubectl {NAMESPACE} kustomize {ROOT}/k8s/overlays/gpu"]
    logs, result = dry_run(cluster, "follow", "gpu")
    cluster.answers = {"get pods": ["pod/a\npod/b"], "logs": ["the log"], f"get {LAUNCHER}": ["Complete: "]}
    (cluster.folder / "answers").write_text(json.dumps(cluster.answers))
    env = {**os.environ, "PATH": f"{cluster.bin}:{os.environ['PATH']}"}
    said = [subprocess.check_output(["bash", "-c", line], cwd=cluster.folder, env=env) for line in (logs, result)]
    assert said == [b"the log\n", b"Complete: \n"]
    assert cluster.calls("logs") == [logs_of("pod/b")]
    assert shlex.split(result)[-1].startswith("--output=jsonpath={range .status.conditions")


OVERLAY_ERROR = f"overlay: must be a folder of {ROOT}/k8s/overlays. Received: %s. Choose one of: {' '.join(OVERLAYS)}."


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "action: must be render, submit, follow or delete. Received: ''. Give one of them first."),
        (["run", "gpu"], "action: must be render, submit, follow or delete. Received: 'run'. Give one of them first."),
        (["render"], OVERLAY_ERROR % "''"),
        (["render", "small"], OVERLAY_ERROR % "'small'"),
        (
            ["render", "gpu", "elastic"],
            "arguments: must be an action and an overlay. Received: 'render gpu elastic'. Drop the rest.",
        ),
        (
            ["render", "gpu", "--namespace="],
            "flags: must be --name=NAME, --queue=QUEUE, --namespace=NAME, --dry_run or --with_data. "
            "Received: '--namespace='. Correct it.",
        ),
        (
            ["render", "gpu", "--name=My_job"],
            "--name: must be of a-z, 0-9 and -, begin with a letter and have at most 40. Received: 'My_job'. "
            "For example clicks-2.",
        ),
        (
            ["render", "gpu", f"--queue={'a' * 41}"],
            "--queue: must be of a-z, 0-9 and -, begin with a letter and have at most 40. "
            f"Received: '{'a' * 41}'. For example clicks-2.",
        ),
        (
            ["render", "serve", "--queue=ranking"],
            "--queue: is for overlays with one job. Received: --queue=ranking, with serve. Drop it.",
        ),
        (
            ["delete", "gpu", "--name=clicks", "--with_data"],
            "--with_data: deletes what all jobs of the namespace share. Received: it, with --name=clicks. "
            "Drop one of the two.",
        ),
        (["submit", "gpu", "--with_data"], "--with_data: belongs to delete. Received: it, with submit. Drop it."),
    ],
)
def test_wrong_arguments_get_one_line(cluster: Cluster, arguments: Sequence[str], line: str) -> None:
    assert cluster.error(*arguments) == f"k8s.sh: {line}"
    assert cluster.calls() == []


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_is_the_comment_at_the_top(cluster: Cluster, flag: str) -> None:
    done = cluster.run("submit", flag)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("A job or a server in Kubernetes: ")
    assert "\n  launch/k8s.sh render|submit|follow|delete OVERLAY " in done.stdout
    assert done.stdout.endswith("--dry_run prints the commands.\n")
    assert cluster.calls() == []


def test_without_kubectl(cluster: Cluster, tmp_path: Path) -> None:
    assert cluster.error("render", "gpu", path=path_without(tmp_path / "path", "kubectl")) == (
        "k8s.sh: kubectl: must be on PATH. Received: none there. Install it: https://kubernetes.io/docs/tasks/tools/"
    )


def test_without_ssh_keygen(cluster: Cluster, tmp_path: Path) -> None:
    path = f"{cluster.bin}:{path_without(tmp_path / 'path', 'ssh-keygen')}"
    assert cluster.error("submit", "no-operator", NAMESPACE, path=path) == (
        "k8s.sh: ssh-keygen: must be on PATH. Received: none there. "
        "Install it (Debian, Ubuntu: apt-get install openssh-client)."
    )
