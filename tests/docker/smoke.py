"""The images, the compose file and the pods of the Indexed Job, for real; and which ports each of them opens.

    python -m tests.docker.smoke [build] [compose] [pods] [gpu]         (default: all)

By hand, as root on Debian 12, for it takes half an hour. Wants binutils, buildah, podman, runc and debootstrap from
Debian, and podman-compose 1.6.0 on PATH. No registry and no Docker engine are needed: Debian's packages make images
with the names of those that the Dockerfile and the compose file ask for. In place of Ubuntu 24.04 with CUDA 12.9 comes
Debian 13 with CUDA 12.4, and the same g++ 13.
"""

from __future__ import annotations

import contextlib
import dataclasses
import ipaddress
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from tests.support.overlays import render
from tests.support.repository import ROOT

COMPOSE_FILE = ROOT / "docker" / "docker-compose.yml"
COMPOSE = yaml.safe_load(COMPOSE_FILE.read_text())
IMAGE = COMPOSE["services"]["launcher"]["image"]
DOCKERFILE = ROOT / "docker" / "Dockerfile"
# By tag: what stands in for an image has another digest.
BASES = dict(re.findall(r"^ARG (\w+_BASE)=([^@\n]+)", DOCKERFILE.read_text(), re.MULTILINE))
PROMETHEUS_IMAGE, *_ = COMPOSE["services"]["prometheus"]["image"].split("@")
SSH_PORT = 2222
METRICS_PORTS = set(range(9400, 9408))
# Of a machine that runs this as root but may not raise limits.
RUN_FLAGS = ["--ulimit", "nofile=1024:1024", "--ulimit", "nproc=4096:4096"]
PODMAN = ["podman", "--cgroup-manager=cgroupfs", "--runtime=/usr/sbin/runc"]
KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
CUDA_PACKAGES = ["nvidia-cuda-toolkit", "nvidia-cuda-dev", "libcudart12", "libcu++-dev"]
CUDA_VARIABLES = {
    "PATH": "/usr/local/nvidia/bin:/usr/local/cuda/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "LD_LIBRARY_PATH": "/usr/local/nvidia/lib:/usr/local/nvidia/lib64",
}
NVCC_PROFILE = """
TOP = $(_HERE_)/..
NVVMIR_LIBRARY_DIR = $(TOP)/nvvm/libdevice
PATH += $(TOP)/nvvm/bin:$(_HERE_):
INCLUDES += "-I$(TOP)/include" $(_SPACE_)
LIBRARIES =+ $(_SPACE_) "-L$(TOP)/lib64/stubs" "-L$(TOP)/lib64"
"""
PROMETHEUS = """
FROM {base}
RUN apt-get update -qq && apt-get install -y -qq --no-install-recommends prometheus wget \\
 && install -d -o 65534 -g 65534 /prometheus
USER 65534:65534
ENTRYPOINT ["prometheus", "--config.file=/etc/prometheus/prometheus.yml", "--storage.tsdb.path=/prometheus"]
"""


def run(*command: str | Path, **options: Any) -> str:
    print("$", *command, flush=True)
    return subprocess.run([*map(str, command)], check=True, stdout=subprocess.PIPE, text=True, **options).stdout


def has_image(name: str) -> bool:
    return subprocess.run(["podman", "image", "exists", name], check=False).returncode == 0


def bootstrap(folder: Path, release: str, *source: str, flags: tuple[str, ...] = ()) -> None:
    """The smallest system of a distribution, as slim as in an image."""
    run("debootstrap", "--variant=minbase", *flags, release, folder, *source)
    for part in ("usr/share/doc", "usr/share/man", "usr/share/locale", "var/cache/apt", "var/lib/apt/lists"):
        run("rm", "-rf", folder / part)
    authorities = Path("/usr/local/share/ca-certificates")  # of a network that sees into connections
    if any(authorities.iterdir()):
        run("cp", "-r", authorities, folder / "usr/local/share/")


def keep_as(image: str, folder: Path, variables: dict[str, str] | None = None) -> None:
    changes = " ".join(f"--change 'ENV {name}={value}'" for name, value in (variables or {}).items())
    run("sh", "-c", f"tar -C '{folder}' -c . | podman import --quiet {changes} - {image}")


def build_target(target: str, image: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        settings = Path(folder, "pip.conf")
        settings.write_text("[global]\ncert = /etc/ssl/certs/ca-certificates.crt\n")
        started = time.monotonic()
        # In the other format an image has no health check.
        flags = ["--isolation=chroot", "--format=docker", "--file", DOCKERFILE, "--target", target]
        arguments = {**BASES, "REVISION": run("git", "-C", ROOT, "rev-parse", "HEAD").strip()}
        flags += [f"--build-arg={name}={value}" for name, value in arguments.items()]
        run("buildah", "bud", *flags, "--secret", f"id=pip_conf,src={settings}", "--tag", image, ROOT)
    print(f"built in {time.monotonic() - started:.0f} s")
    print(run("podman", "images", "--format", "{{.Repository}}:{{.Tag}} {{.Size}}"))


def build() -> None:
    """The CPU image and its bases."""
    base = BASES["CPU_BASE"]
    with tempfile.TemporaryDirectory() as folder:
        if not has_image(base):
            bootstrap(Path(folder), "bookworm")
            keep_as(base, Path(folder))
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "Dockerfile").write_text(PROMETHEUS.format(base=base))
        run("buildah", "bud", "--isolation=chroot", "--tag", PROMETHEUS_IMAGE, folder)
    build_target("cpu", IMAGE)


def unpack_cuda(folder: Path, place: Path) -> None:
    """Debian's CUDA in a folder as NVIDIA's own packages fill it. 1 GB is fetched."""
    apt, packages, system = place / "apt", place / "packages", place / "system"
    for path in (apt / "lists" / "partial", apt / "cache" / "archives" / "partial", apt / "etc", packages):
        path.mkdir(parents=True)
    (apt / "status").touch()
    # From where this machine has its own packages.
    mirror, *_ = run(
        "apt-get", "indextargets", "--format", "$(REPO_URI)", "Origin: Debian", "Codename: bookworm"
    ).split()
    source = f"deb [signed-by={KEYRING}] {mirror} trixie main non-free"
    (apt / "etc" / "sources.list").write_text(source)
    flags = ["-o", f"Dir::State={apt}", "-o", f"Dir::State::status={apt}/status", "-o", f"Dir::Cache={apt}/cache"]
    flags += ["-o", f"Dir::Etc={apt}/etc", "-o", "APT::Sandbox::User=root"]
    run("apt-get", *flags, "update")
    run("apt-get", *flags, "download", *CUDA_PACKAGES, cwd=packages)
    for package in packages.iterdir():
        run("dpkg-deb", "--extract", package, system)
    tools = system / "usr/lib/nvidia-cuda-toolkit"
    (folder / "nvvm" / "bin").mkdir(parents=True)
    run("mv", tools / "bin", system / "usr/include", folder)
    run("mv", folder / "bin/cicc", folder / "nvvm/bin")
    run("mv", tools / "libdevice", folder / "nvvm")
    run("mv", system / "usr/lib/x86_64-linux-gnu", folder / "lib64")
    for path in (system / "usr/bin").iterdir():
        if path.name != "nvcc":  # a script around the real one
            path.rename(folder / "bin" / path.name)
    for path in (*(folder / "lib64").glob("*_static*.a"), folder / "bin/gcc", folder / "bin/g++"):
        if path.name != "libcudart_static.a":  # 2 GB of mathematics, and compilers chosen as Debian does
            path.unlink()
    (folder / "bin/nvcc.profile").unlink()
    (folder / "bin/nvcc.profile").write_text(NVCC_PROFILE)
    # Debian 13's C library has functions of these names too, since 2.41, which throw nothing; Ubuntu 24.04's has not.
    functions = folder / "include/crt/math_functions.h"
    pattern = r"^(extern .* (?:sin|cos)pif?\((?:double|float) x\));$"
    functions.write_text(re.sub(pattern, r"\1 noexcept(true);", functions.read_text(), flags=re.MULTILINE))


def make_gpu_bases() -> None:
    """Debian 13, without and with what compiles for GPUs."""
    if has_image(BASES["GPU_BASE"]) and has_image(BASES["GPU_BUILD_BASE"]):
        return
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place, "base")
        bootstrap(folder, "trixie")
        run("useradd", "--root", folder, "--uid", "1000", "--create-home", "ubuntu")  # as Ubuntu's images have
        keep_as(BASES["GPU_BASE"], folder, CUDA_VARIABLES)
        folder = Path(place, "build_base")
        bootstrap(folder, "trixie", flags=("--include=g++-13",))
        for name, of in {"cc": "gcc", "gcc": "gcc", "c++": "g++", "g++": "g++"}.items():
            (folder / "usr/local/bin" / name).symlink_to(f"/usr/bin/{of}-13")  # found before Debian 13's version 14
        unpack_cuda(folder / "usr/local/cuda", Path(place))
        keep_as(BASES["GPU_BUILD_BASE"], folder, CUDA_VARIABLES)


def gpu() -> None:
    """The GPU image, as far as it goes without a GPU."""
    make_gpu_bases()
    image = f"{IMAGE}-gpu"
    build_target("gpu", image)

    def inside(*words: str, flags: tuple[str, ...] = ()) -> str:
        return run(*PODMAN, "run", "--rm", "--network=none", *RUN_FLAGS, *flags, image, *words)

    assert inside("id", "-u").strip() == "1000"
    found = inside("sh", "-c", "command -v cc gcc g++ c++ cpp clang nvcc make || true")
    assert not found, f"compilers in the last stage: {found}"
    built = inside(".venv/bin/horovodrun", "--check-build")
    print(built)
    for part in ("TensorFlow", "NCCL", "Gloo"):
        assert f"[X] {part}\n" in built
    libraries = "/opt/din_dist/.venv/lib/python3.*/site-packages"
    linked = inside("sh", "-c", f"ldd {libraries}/horovod/tensorflow/mpi_lib.*.so")
    print(linked)
    assert re.search(r"libnccl\.so\.2 => .*/site-packages/.*nvidia/nccl/lib/libnccl\.so\.2 ", linked)
    place = Path(run("podman", "image", "mount", image).strip())
    (library,) = place.glob(f"{libraries[1:]}/horovod/tensorflow/mpi_lib.*.so")
    paths = re.findall(r"\((?:RPATH|RUNPATH)\).*\[(.*)\]", run("readelf", "--dynamic", "--wide", library))
    print(f"search path {paths}")
    run("podman", "image", "unmount", image)
    assert paths == ["$ORIGIN/../../nvidia/nccl/lib"]
    program = (
        "import horovod.tensorflow as hvd; hvd.init(); print(hvd.nccl_built(), hvd.gloo_built(), hvd.cuda_built())"
    )
    nccl_version, *others = inside(".venv/bin/python", "-c", program).split()
    print(f"NCCL {nccl_version}")
    assert int(nccl_version) > 0 and others == ["True", "True"]
    started = time.monotonic()
    words = ["launch/train.sh", "--flagfile=launch/flags/quick.flags", "--max_steps=20", "--output_dir=/runs/smoke"]
    summary = json.loads(inside(*words, "--data_dir=/data/prepared").splitlines()[-1])
    print(f"gpu image on CPUs: {summary}, {time.monotonic() - started:.0f} s")
    assert summary["world_size"] == 2


def wait(what: str, holds: Callable[[], Any], seconds: float = 300) -> Any:
    until = time.monotonic() + seconds
    while not (found := holds()):
        if time.monotonic() > until:
            raise AssertionError(f"waited {seconds:g} s for {what}")
        time.sleep(1)
    return found


def ask_prometheus(query: str) -> list[dict[str, Any]]:
    url = "http://127.0.0.1:9090/api/v1/query?" + urllib.parse.urlencode({"query": query})
    with contextlib.suppress(OSError, ValueError), urllib.request.urlopen(url, timeout=5) as answer:
        return json.load(answer)["data"]["result"]
    return []


def volume(name: str) -> Path:
    return Path(run("podman", "volume", "inspect", "--format", "{{.Mountpoint}}", name).strip())


@contextlib.contextmanager
def composed(*flags: str, trainer_flags: str = "") -> Iterator[subprocess.Popen[str]]:
    """`up` without Grafana, which is not to be had without a registry."""
    words = ["podman-compose", f"--podman-args={' '.join(PODMAN[1:])}", f"--podman-run-args={' '.join(RUN_FLAGS)}"]
    with tempfile.NamedTemporaryFile("w", suffix=".yml") as stand_in:
        stand_in.write(f"services: {{prometheus: {{image: {PROMETHEUS_IMAGE}}}}}\n")
        stand_in.flush()
        words += ["--file", str(COMPOSE_FILE), "--file", stand_in.name]
        up = [*words, "up", "--no-build", *flags, "worker", "launcher", "prometheus"]
        print("$", *up, flush=True)
        process = subprocess.Popen(up, text=True, env={**os.environ, "DIN_DIST_FLAGS": trainer_flags})
        try:
            wait("Prometheus to see both ranks", lambda: len(ask_prometheus('up{job="din_dist"} == 1')) == 2)
            yield process
        finally:
            process.kill()
            subprocess.run([*words, "down", "--timeout", "5"], check=False, stdout=subprocess.DEVNULL)


def container(service: str) -> str:
    """Its name."""
    names = run("podman", "ps", "--all", "--format", "{{.Names}}").split()
    (found,) = (name for name in names if re.search(rf"[-_]{service}[-_]1$", name))
    return found


@dataclasses.dataclass(frozen=True, order=True)
class Listener:
    """A TCP port that something in a container listens on, and at which of its addresses."""

    address: str
    port: int

    @property
    def is_for_others(self) -> bool:
        return not ipaddress.ip_address(self.address).is_loopback


def listeners(name: str) -> list[Listener]:
    """Returns what listens in a container, as its own kernel tells."""
    text = subprocess.run(
        [*PODMAN, "exec", name, "cat", "/proc/net/tcp", "/proc/net/tcp6"], check=True, stdout=subprocess.PIPE, text=True
    ).stdout
    found = set()
    for line in text.splitlines():
        _, local, _, state, *_ = line.split()
        if state != "0A":  # LISTEN
            continue
        packed, _, port = local.partition(":")
        words = [bytes.fromhex(packed[at : at + 8])[::-1] for at in range(0, len(packed), 8)]  # each as the host has it
        address = ipaddress.ip_address(b"".join(words))
        found.add(Listener(str(getattr(address, "ipv4_mapped", None) or address), int(port, 16)))
    return sorted(found)


def check_listeners(name: str, fixed: set[int], admitted: list[tuple[int, int]]) -> None:
    """Holds what listens in a container against what its network lets in, and against launch/README.md.

    Args:
        fixed: the ports that have a number of their own; they may be open at every address. All others must be of the
            system's own range, at the one address of the job's card.
        admitted: the first and last port of each range that others are let in to.
    """
    found = listeners(name)
    print(f"{name} listens on {', '.join(f'{listener.address}:{listener.port}' for listener in found)}")
    low, high = map(int, run(*PODMAN, "exec", name, "cat", "/proc/sys/net/ipv4/ip_local_port_range").split())
    own = set(run(*PODMAN, "exec", name, "hostname", "--all-ip-addresses").split())
    for listener in found:
        if not listener.is_for_others:
            continue
        assert any(first <= listener.port <= last for first, last in admitted), f"nobody is let in to {listener}"
        if listener.port not in fixed:
            assert low <= listener.port <= high and listener.address in own, f"{listener} is not at the job's card"
    assert fixed & {listener.port for listener in found}, f"none of {sorted(fixed)} in {name}"


def newest_summary() -> dict[str, Any]:
    newest = max(volume("din-dist_runs").glob("*/summary.json"), key=lambda path: path.stat().st_mtime)
    return json.loads(newest.read_text())


def compose() -> None:
    """Two runs: one that loses its worker for a while, and one to the end of the command, which finds data prepared."""
    started = time.monotonic()
    # Long enough for a worker to be missed, started and taken in. Not --exit-code-from, by which podman-compose ends
    # all when one container ends.
    with composed(trainer_flags="--epochs=4"):
        print(run("podman", "ps", "--format", "{{.Names}} {{.Status}}"))
        for service in ("launcher", "worker"):
            assert not COMPOSE["services"][service].get("ports"), "a port of the job's is published"
            check_listeners(container(service), {SSH_PORT, *METRICS_PORTS}, [(1024, 65535)])
        run("podman", "kill", container("worker"))
        wait("the job to go on without its worker", lambda: ask_prometheus("din_dist_world_size == 1"))
        run("podman", "start", container("worker"))
        wait("the worker to be taken in again", lambda: ask_prometheus("din_dist_world_size == 2"))
        launcher = container("launcher")
        code = int(run("podman", "wait", launcher))
        said = subprocess.run(
            ["podman", "logs", launcher], check=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
    # Taken in once, and nobody lost whom we did not kill.
    assert re.findall(rb"(\d) worker\(s\) from step", said.stdout) == [b"1", b"2"], said.stdout.decode()
    summary = newest_summary()
    print(f"killed once: test GAUC {summary['test_gauc']:.4f}, exit code {code}, {time.monotonic() - started:.0f} s")
    assert code == 0 and summary["test_gauc"] > 0.85
    started = time.monotonic()
    with composed("--exit-code-from", "launcher") as process:
        (found,) = wait("examples/s", lambda: ask_prometheus("sum(rate(din_dist_examples_total[15s])) > 0"))
        print(f"Prometheus reports {float(found['value'][1]):,.0f} examples/s of both ranks")
        code = process.wait(timeout=600)
    again = newest_summary()
    print(f"to the end: test GAUC {again['test_gauc']:.4f}, exit code {code}, {time.monotonic() - started:.0f} s")
    assert code == 0 and again["test_gauc"] > 0.85 and again != summary
    prepared = list((volume("din-dist_data") / "prepared").rglob("dataset_info.json"))
    assert len(prepared) == 1, "the second run has used what the first has prepared"


def has_metrics(name: str) -> bool:
    """Tells whether a trainer in a container serves its metrics, and so has got as far as training."""
    with contextlib.suppress(subprocess.CalledProcessError):
        return bool({listener.port for listener in listeners(name)} & METRICS_PORTS)
    return False


def pods() -> None:
    """The Indexed Job's pods, as two containers with their manifest's arguments, environment, mounts and rights."""
    objects = render("no-operator")
    (job,) = (found for found in objects if found["kind"] == "Job")
    flags = {found["metadata"]["name"]: found["data"] for found in objects if found["kind"] == "ConfigMap"}
    name, spec = job["metadata"]["name"], job["spec"]["template"]["spec"]
    with tempfile.TemporaryDirectory() as folder:
        keys = Path(folder, "ssh")
        keys.mkdir()
        run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", keys / "id_ed25519")
        (keys / "authorized_keys").write_text((keys / "id_ed25519.pub").read_text())
        for path in keys.iterdir():
            path.chmod(0o440)  # defaultMode, and fsGroup:
            run("chgrp", "1000", path)
        sources = {}
        for described in spec["volumes"]:
            source = Path(folder, "volumes", described["name"])
            source.mkdir(parents=True)
            source.chmod(0o777)
            if "configMap" in described:
                for file, text in flags[described["configMap"]["name"]].items():
                    (source / file).write_text(text)
            sources[described["name"]] = keys if "secret" in described else source

        def start(described: dict[str, Any], index: int, network: str) -> list[str]:
            """`podman run` for a container of the pod with this index."""
            words = [*PODMAN, "run", *RUN_FLAGS, "--network", network, "--user=1000:1000", "--group-add=1000"]
            words += ["--cap-drop=all", "--security-opt=no-new-privileges", "--read-only", "--read-only-tmpfs=false"]
            words += ["--hostname", f"{name}-{index}", "--network-alias", f"{name}-{index}.{spec['subdomain']}"]
            words += ["--env", f"JOB_COMPLETION_INDEX={index}"]
            for variable in described.get("env", []):
                words += ["--env", f"{variable['name']}={variable['value']}"]
            for mount in described["volumeMounts"]:
                if mount["name"] in ("shm", "tmp"):
                    words += ["--tmpfs", f"{mount['mountPath']}:mode=1777"]
                    continue
                access = "ro" if mount.get("readOnly") else "rw"
                words += ["--volume", f"{sources[mount['name']]}:{mount['mountPath']}:{access}"]
            return [*words, "--name", f"{name}-{index}", described["image"], *described["args"]]

        network = f"{name}-smoke"
        run("podman", "network", "create", network)
        (initial,), (main,) = spec["initContainers"], spec["containers"]
        try:
            for index in (0, 1):
                run(*start(initial, index, network))
                run("podman", "rm", f"{name}-{index}")
            with subprocess.Popen(start(main, 1, network)) as worker:
                launcher = subprocess.Popen(start(main, 0, network), stdout=subprocess.PIPE, text=True)
                wait("both ranks to train", lambda: all(has_metrics(f"{name}-{index}") for index in (0, 1)))
                (policy,) = (found["spec"] for found in objects if found["kind"] == "NetworkPolicy")
                each_other, *_ = policy["ingress"]
                admitted = [(ports["port"], ports["endPort"]) for ports in each_other["ports"]]
                for index in (0, 1):
                    check_listeners(f"{name}-{index}", {SSH_PORT, *METRICS_PORTS}, admitted)
                said, _ = launcher.communicate(timeout=1200)
                assert launcher.returncode == 0, f"exit code {launcher.returncode}"
                summary = json.loads(said.splitlines()[-1])
                print(f"pods: test GAUC {summary['test_gauc']:.4f} with {summary['world_size']} workers")
                assert summary["world_size"] == 2 and summary["test_gauc"] > 0.85
                run("podman", "stop", f"{name}-1")  # as Kubernetes does when the first is done
                print(f"pods: the other, stopped, ended with {worker.wait(timeout=60)}")
                assert worker.returncode == 75
        finally:
            subprocess.run(["podman", "rm", "--force", f"{name}-0", f"{name}-1"], check=False)
            subprocess.run(["podman", "network", "rm", network], check=False)


if __name__ == "__main__":
    steps = {"build": build, "compose": compose, "pods": pods, "gpu": gpu}
    for step in sys.argv[1:] or steps:
        steps[step]()
