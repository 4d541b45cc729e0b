"""launch/train.sh with the real horovodrun, and fakes in place of set-up, preparation and trainer; launch/daily.sh."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from din_dist.cluster.addresses import card_towards
from tests.support.fake_checkout import finished, write_commands, write_script
from tests.support.patience import PATIENCE
from tests.support.repository import ROOT

SETUP = '#!/usr/bin/env bash\necho "set up with: $*"\n[[ ! ${FAKE_SETUP:-} ]] || exit "$FAKE_SETUP"\n'
PREPARE = """
import os, sys, time
print("prepare got", sys.argv[1:], flush=True)
time.sleep(float(os.environ.get("FAKE_PREPARE_SECONDS", "0")))
sys.exit(int(os.environ.get("FAKE_PREPARE", "0")))
"""
CHECK = """
import os, sys
print("check got", sys.argv[1:], flush=True)
sys.exit(int(os.environ.get("FAKE_CHECK", "0")))
"""
TRAIN = """
import json, os, pathlib, signal, sys, time
rank = os.environ.get("HOROVOD_RANK", "0")
size = os.environ.get("HOROVOD_SIZE", "1")
stop = []
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda *_: stop.append(1))
os.write(int(os.environ["DIN_DIST_BEATS_FD"]), b".")
def say(stream, text):  # at once: horovodrun turns buffers off, and print would write the line's end by itself
    os.write(stream, f"{text}\\n".encode())
say(2, f"log of rank {rank}")
say(2, json.dumps({"rank": int(rank)}))
say(1, f"train got {sys.argv[1:]}")
codes = dict(pair.split("=") for pair in os.environ.get("FAKE_TRAIN", "").split())
if rank in codes:
    time.sleep(1.5 if codes[rank] == "2" else 0.5)
    if codes[rank] == "SIGKILL":
        os.kill(os.getpid(), signal.SIGKILL)
    sys.exit(int(codes[rank]))
pathlib.Path(f"started.{rank}").touch()
if "until_stopped" in codes:
    while not stop:
        time.sleep(0.1)
    time.sleep(float(codes["until_stopped"]))
    pathlib.Path(f"checkpoint.{rank}").touch()
    sys.exit(75)
while codes:  # another rank fails: this one hangs, as in a collective, deaf to SIGTERM
    time.sleep(0.1)
print(json.dumps({"world_size": int(size), "long": "x" * 5000}), flush=True)
"""
DAILY = """
import os, sys
print("daily got", sys.argv[1:], "in", os.environ["DIN_DIST_VENV"], flush=True)
sys.exit(int(os.environ.get("FAKE_DAILY", "0")))
"""
_NOT_OURS = ("DIN_DIST_", "HOROVOD_", "SLURM_", "CUDA_")
OUTER_CARD = card_towards(["203.0.113.7"])  # nobody's address, by RFC 5737


class Launcher:
    """A checkout whose launch/ is the real one but for setup.sh, and whose .venv runs the fakes above."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "check out"  # paths with a space must do
        shutil.copytree(ROOT / "launch", self.root / "launch")
        write_commands(self.root / "fakes", prepare_data=PREPARE, check_cluster=CHECK, train=TRAIN, daily=DAILY)
        executables = self.root / ".venv" / "bin"
        executables.mkdir(parents=True)
        write_script(self.root / "launch" / "setup.sh", SETUP)
        write_script(executables / "python", f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
        write_script(executables / "horovodrun", f'#!/bin/sh\nexec "{sys.executable}" -m horovod.runner.launch "$@"\n')
        self.script = "train.sh"
        self.processes: list[subprocess.Popen[str]] = []
        self.work = folder / "work"
        self.work.mkdir()

    def start(self, *flags: str, stderr: int = subprocess.PIPE, **env: str) -> subprocess.Popen[str]:
        clean = {name: value for name, value in os.environ.items() if not name.startswith(_NOT_OURS)}
        process = subprocess.Popen(
            [self.root / "launch" / self.script, *flags],
            cwd=self.work,
            env={**clean, "PYTHONPATH": str(self.root / "fakes"), "DIN_DIST_DEVICE": "cpu", **env},
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            start_new_session=True,
        )
        self.processes.append(process)
        return process

    def run(self, *flags: str, **env: str) -> subprocess.CompletedProcess[str]:
        return finished(self.start(*flags, **env))

    def stop_when_training(
        self, process: subprocess.Popen[str], ranks: int, stop: Callable[[int, int], None], number: int
    ) -> None:
        wait_until(lambda: all((self.work / f"started.{rank}").exists() for rank in range(ranks)))
        stop(process.pid, number)


def wait_until(condition: Callable[[], bool], seconds: float = PATIENCE) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


@pytest.fixture
def launcher(tmp_path: Path) -> Iterator[Launcher]:
    launcher = Launcher(tmp_path)
    yield launcher
    for process in launcher.processes:  # of a test that failed: what they started ends with them
        process.kill()


def test_two_workers_by_default_and_the_summary_is_the_last_line(launcher: Launcher) -> None:
    done = launcher.run()
    assert done.returncode == 0, done.stderr
    quick = [f"--flagfile={ROOT}/launch/flags/quick.flags"]
    lines = done.stdout.splitlines()
    assert lines[0] == f"train got {quick}"
    assert json.loads(lines[-1])["world_size"] == 2
    assert len(lines) == 2, "rank 0 alone speaks on stdout"
    assert f"prepare got {quick}" in done.stderr
    assert "\nlog of rank 0\n" in done.stderr
    assert "\n[1] log of rank 1\n" in done.stderr
    assert '\n{"rank": 0}\n' in done.stderr
    assert '\n{"rank": 1}\n' in done.stderr  # of --log_format=json: nothing before it
    assert f"\n[1] train got {quick}\n" in done.stderr


def test_daily_training_begins_with_set_up_too(launcher: Launcher, tmp_path: Path) -> None:
    launcher.script = "daily.sh"
    done = launcher.run("--log=with space", "--from=2026-11-01", FAKE_DAILY="81")
    flags = ["--num_gpus=0", "--log=with space", "--from=2026-11-01"]
    assert (done.returncode, done.stderr) == (81, "set up with: \n")
    assert done.stdout == f"daily got {flags} in {launcher.root}/.venv\n"
    gpus = {"PATH": nvidia_smi(tmp_path, 3), "DIN_DIST_DEVICE": ""}
    done = launcher.run(**gpus)
    assert (done.stderr, "--num_gpus=3" in done.stdout) == ("set up with: --gpu\n", True)
    assert launcher.run(FAKE_SETUP="2").returncode == 2


@pytest.mark.parametrize("spelling", [["--num_workers=1"], ["--num_workers", "1"], ["-num_workers=1"]])
def test_num_workers_is_the_launchers_own(launcher: Launcher, spelling: list[str]) -> None:
    done = launcher.run("--epochs=2", *spelling, "--data_path=with space")
    assert done.returncode == 0, done.stderr
    assert "prepare got ['--epochs=2', '--data_path=with space']" in done.stderr
    assert done.stdout.startswith("train got ['--epochs=2', '--data_path=with space']\n")
    assert json.loads(done.stdout.splitlines()[-1])["world_size"] == 1


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (
            ["--wait_for_hosts_seconds=-1"],
            "--wait_for_hosts_seconds: must be a number of seconds from 0. Received: '-1'. ",
        ),
        (
            ["--wait_for_hosts_seconds=inf"],
            "--wait_for_hosts_seconds: must be a number of seconds from 0. Received: 'inf'. ",
        ),
        (["--stall_timeout_seconds=1"], "--stall_timeout_seconds: must be a number of seconds from 5. Received: '1'. "),
    ],
)
def test_wrong_seconds(launcher: Launcher, flags: list[str], line: str) -> None:
    done = launcher.run(*flags)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines()[1:] == [f"train.sh: {line}For example 60."]


@pytest.mark.parametrize(
    "flags", [["--num_workers=0"], ["--num_workers=two"], ["--num_workers=-1"], ["--num_workers="]]
)
def test_wrong_num_workers(launcher: Launcher, flags: list[str]) -> None:
    done = launcher.run(*flags)
    received = flags[0].partition("=")[2]
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines()[1:] == [
        f"train.sh: --num_workers: must be a whole number from 1. Received: '{received}'. "
        "Give the number of processes to train with."
    ]


def test_more_workers_than_slots(launcher: Launcher) -> None:
    done = launcher.run("--hosts=localhost:2,127.0.0.1:1", "--num_workers=4")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines()[1:] == [
        "train.sh: --num_workers: must be at most the sum of the hosts' slots. Received: '4, and 3 slot(s) on "
        "localhost:2, 127.0.0.1:1'. Start fewer, or name hosts as HOST:SLOTS with more slots."
    ]


def test_more_workers_than_gpus(launcher: Launcher, tmp_path: Path) -> None:
    gpus = {"PATH": nvidia_smi(tmp_path, 2), "DIN_DIST_DEVICE": ""}
    done = launcher.run("--num_workers=3", **gpus)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines()[1:] == [
        "train.sh: --num_workers: must be at most the GPUs of this machine. Received: '3, and 2 GPU(s)'. Start fewer, "
        "or set NCCL_MULTI_RANK_GPU_ENABLE=1 to let several share one."
    ]
    shared = launcher.run("--num_workers=3", "--dry_run", NCCL_MULTI_RANK_GPU_ENABLE="1", **gpus)
    assert " -np 3 " in shared.stdout


def test_a_wrong_device_is_named(launcher: Launcher) -> None:
    done = launcher.run(DIN_DIST_DEVICE="tpu")
    assert (done.returncode, done.stderr) == (2, "train.sh: DIN_DIST_DEVICE must be cpu or gpu. Received: 'tpu'.\n")


def nvidia_smi(folder: Path, num_gpus: int) -> str:
    """A PATH on which nvidia-smi lists so many GPUs."""
    listing = "".join(f"GPU {i}: Some GPU (UUID: GPU-{i})\\n" for i in range(num_gpus))
    (folder / "smi").mkdir()
    write_script(folder / "smi" / "nvidia-smi", f"#!/bin/sh\nprintf '{listing}'\n")
    return f"{folder}/smi:{os.environ['PATH']}"


def test_one_worker_a_gpu(launcher: Launcher, tmp_path: Path) -> None:
    done = launcher.run("--epochs=1", PATH=nvidia_smi(tmp_path, 1), DIN_DIST_DEVICE="")
    assert "set up with: --gpu\n" in done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["world_size"] == 1


@pytest.mark.parametrize(
    ("visible", "world_size"),
    [("1", 1), ("0,1,2", 3), ("GPU-5a,MIG-7b", 2), ("0,-1,2", 1), ("0,1,2,3,4,5", 4), ("", 2)],
)
def test_hidden_gpus_are_not_counted(launcher: Launcher, tmp_path: Path, visible: str, world_size: int) -> None:
    path = nvidia_smi(tmp_path, 4)
    done = launcher.run("--dry_run", PATH=path, DIN_DIST_DEVICE="", CUDA_VISIBLE_DEVICES=visible)
    assert ("set up with: --gpu\n" in done.stderr) == (visible != "")
    words = shlex.split(done.stdout)
    assert (words[words.index("-np") + 1] if "-np" in words else "1") == str(world_size)


def test_the_cpu_can_be_asked_for(launcher: Launcher, tmp_path: Path) -> None:
    done = launcher.run("--num_workers=1", PATH=nvidia_smi(tmp_path, 1), DIN_DIST_DEVICE="cpu")
    assert "set up with: \n" in done.stderr


def test_a_gpu_can_be_insisted_on(launcher: Launcher, tmp_path: Path) -> None:
    done = launcher.run(PATH=nvidia_smi(tmp_path, 0), DIN_DIST_DEVICE="gpu")
    assert done.returncode == 2
    assert done.stderr == (
        "train.sh: DIN_DIST_DEVICE is gpu, but nvidia-smi -L lists none. "
        "Install the NVIDIA driver, or set DIN_DIST_DEVICE=cpu.\n"
    )


def test_a_failed_set_up_ends_it(launcher: Launcher) -> None:
    done = launcher.run(FAKE_SETUP="2")
    assert done.returncode == 2
    assert "prepare got" not in done.stderr


def test_flags_that_preparation_refuses_start_no_worker(launcher: Launcher) -> None:
    done = launcher.run(FAKE_PREPARE="2")
    assert (done.returncode, done.stdout) == (2, "")
    assert "train got" not in done.stderr


def test_the_exit_code_of_one_worker(launcher: Launcher) -> None:
    assert launcher.run("--num_workers=1", FAKE_TRAIN="0=75").returncode == 75


def test_horovodrun_does_not_swallow_the_exit_code(launcher: Launcher) -> None:
    done = launcher.run(FAKE_TRAIN="1=2")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr, "of horovodrun: the trainer has said what is wrong"


def test_wrong_input_is_the_reason_even_if_another_worker_ends_first(launcher: Launcher) -> None:
    assert launcher.run(FAKE_TRAIN="0=1 1=2").returncode == 2


def test_a_killed_worker_is_reported(launcher: Launcher) -> None:
    done = launcher.run(FAKE_TRAIN="1=SIGKILL")
    assert done.returncode == 137
    assert done.stderr.endswith(
        "train.sh: worker 1 was killed (SIGKILL). Often memory ran out: use fewer workers or a smaller batch.\n"
    )


def test_what_horovodrun_says_is_shown_when_no_worker_failed(launcher: Launcher) -> None:
    write_script(launcher.root / ".venv" / "bin" / "horovodrun", "#!/bin/sh\necho no route to host >&2\nexit 3\n")
    done = launcher.run()
    assert done.returncode == 3
    assert done.stderr.endswith("no route to host\n")


def horovodruns_words(launcher: Launcher, *flags: str) -> list[str]:
    """What it is called with, up to the worker's command."""
    write_script(
        launcher.root / ".venv" / "bin" / "horovodrun", '#!/bin/sh\nfor word; do echo "$word"; done >&2\nexit 3\n'
    )
    done = launcher.run(*flags, "--epochs=1")
    assert done.returncode == 3, done.stderr
    words = done.stderr.splitlines()
    words = words[words.index("--gloo") :]
    assert words[-3:] == ["-m", "din_dist.cluster.agent", "--epochs=1"]
    return words[: words.index("-m") - 1]


def test_workers_on_named_hosts(launcher: Launcher) -> None:
    assert horovodruns_words(launcher, "--hosts=localhost:2,127.0.0.1:2", "--num_workers=4") == [
        *("--gloo", "--gloo-timeout-seconds", "60", "-np", "4", "--network-interface", "lo"),
        *("-H", "localhost:2,127.0.0.1:2"),
    ]


def test_workers_on_hosts_elsewhere(launcher: Launcher) -> None:
    flags = ("--hosts=203.0.113.7:2", "--num_workers=2", "--nopreflight", "--ssh_port=2222", "--network_interface=lo")
    assert horovodruns_words(launcher, *flags) == [
        *("--gloo", "--gloo-timeout-seconds", "60", "-np", "2", "-p", "2222", "--disable-cache"),
        *("--network-interface", "lo", "-H", "203.0.113.7:2"),
    ]


def test_workers_fill_the_slots_of_the_hosts(launcher: Launcher) -> None:
    words = horovodruns_words(launcher, "--hosts=203.0.113.7:2,203.0.113.8:3", "--nopreflight")
    assert words[words.index("-np") + 1] == "5"
    assert words[-2:] == ["-H", "203.0.113.7:2,203.0.113.8:3"]


def test_hosts_without_slots_are_taken_to_have_the_gpus_of_this_one(launcher: Launcher, tmp_path: Path) -> None:
    flags = ("--hosts=203.0.113.7,203.0.113.8:1", "--dry_run")
    done = launcher.run(*flags, PATH=nvidia_smi(tmp_path, 4), DIN_DIST_DEVICE="")
    assert "-np 5 " in done.stdout
    assert "-H 203.0.113.7:4,203.0.113.8:1 " in done.stdout


def test_a_dry_run_prints_the_command_and_starts_nothing(launcher: Launcher) -> None:
    flags = ("--hosts=203.0.113.7:2", "--ssh_port=2222", "--data_path=with space")
    done = launcher.run("--dry_run", *flags)
    assert done.returncode == 0, done.stderr
    horovodrun = ["--gloo", "--gloo-timeout-seconds", "60", "-np", "2", "-p", "2222", "--disable-cache"]
    (line,) = done.stdout.splitlines()
    words = shlex.split(line)
    assert words[0] == f"{launcher.root}/.venv/bin/horovodrun"
    assert words[1:-4] == [*horovodrun, "--network-interface", OUTER_CARD, "-H", "203.0.113.7:2"]
    assert words[-3:] == ["-m", "din_dist.cluster.agent", "--data_path=with space"]
    assert "prepare got" not in done.stderr
    assert list(launcher.work.iterdir()) == []


def test_hosts_that_never_answer_are_not_waited_for_any_longer(launcher: Launcher) -> None:
    hosts = "--hosts=localhost:1,no.such.host.invalid:1"
    done = launcher.run(hosts, "--wait_for_hosts_seconds=0.1", "--ssh_port=2222")
    assert done.returncode == 75
    assert done.stderr.splitlines()[-1] == (
        "train.sh: ssh must answer on port 2222 of every host. Received: nothing from no.such.host.invalid within "
        "0.1 s. Start them, or wait longer with --wait_for_hosts_seconds."
    )
    assert "check got" not in done.stderr


def test_a_log_file_for_each_rank(launcher: Launcher) -> None:
    done = launcher.run("--log_dir=logs/first", "--epochs=1")
    assert done.returncode == 0, done.stderr
    logs = {path.name: path.read_text() for path in (launcher.work / "logs" / "first").iterdir()}
    assert sorted(logs) == ["rank-0.log", "rank-1.log"]
    for rank, log in enumerate(logs[name] for name in sorted(logs)):
        assert f"log of rank {rank}\n" in log
        assert "train got" in log, "of stdout too"
        assert not any(line.startswith("[") for line in log.splitlines()), "its rank is in the file's name"
    one = launcher.run("--log_dir=logs/second", "--num_workers=1")
    assert one.returncode == 0, one.stderr
    assert "log of rank 0\n" in (launcher.work / "logs" / "second" / "rank-0.log").read_text()


def test_a_log_dir_that_cannot_be(launcher: Launcher) -> None:
    (launcher.work / "file").touch()
    done = launcher.run("--log_dir=file/logs")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == (
        "train.sh: --log_dir: must be a folder that can be written. Received: 'file/logs': Not a directory. "
        "Give another."
    )
    assert "train got" not in done.stdout


def on_a_gpu_node(launcher: Launcher, *flags: str, **env: str) -> str:
    """What launch/horovodrun.sh would start."""
    launcher.script = "horovodrun.sh"
    done = launcher.run("--dry_run", *flags, **env)
    assert done.returncode == 0, done.stderr
    return done.stdout


SLURM = {"SLURM_JOB_NODELIST": "gpu[203-204].invalid", "SLURM_GPUS_ON_NODE": "8"}


def test_gpu_nodes_of_slurm(launcher: Launcher) -> None:
    started = on_a_gpu_node(launcher, "--epochs=1", **SLURM)
    assert " -np 16 " in started
    assert " -H gpu203.invalid:8,gpu204.invalid:8 " in started
    assert started.endswith(" -m din_dist.cluster.agent --epochs=1\n")


def test_a_gpu_node_alone(launcher: Launcher, tmp_path: Path) -> None:
    started = on_a_gpu_node(launcher, PATH=nvidia_smi(tmp_path, 8), DIN_DIST_DEVICE="")
    assert " -np 8 " in started
    assert " -H " not in started


@pytest.mark.parametrize("flags", [["--hosts=203.0.113.7:2"], ["-H", "203.0.113.7:2"], ["--hosts_file=hosts"]])
def test_gpu_nodes_that_are_named_come_before_those_of_slurm(launcher: Launcher, flags: list[str]) -> None:
    (launcher.work / "hosts").write_text("203.0.113.7 slots=2\n")
    assert " -H 203.0.113.7:2 " in on_a_gpu_node(launcher, *flags, **SLURM)


def test_gpu_nodes_log_by_rank(launcher: Launcher) -> None:
    launcher.script = "horovodrun.sh"
    assert launcher.run("--epochs=1").returncode == 0
    (folder,) = (launcher.work / "runs" / "logs").iterdir()
    assert sorted(path.name for path in folder.iterdir()) == ["rank-0.log", "rank-1.log"]


def test_slurm_outside_of_slurm(launcher: Launcher) -> None:
    done = launcher.run("--hosts=slurm")
    assert done.returncode == 2
    assert "train.sh: --hosts: slurm is for jobs of SLURM. Received: no SLURM_JOB_NODELIST." in done.stderr


def test_elastic_settings(launcher: Launcher) -> None:
    hosts = launcher.work / "hosts"
    hosts.write_text("localhost:2\n127.0.0.1:2\n")
    flags = ("--min_workers=2", "--max_workers=4", "--host_cooldown_seconds=5", "--stall_timeout_seconds=45")
    words = horovodruns_words(launcher, "--elastic", f"--hosts_file={hosts}", "--num_workers=3", *flags)
    script = words.pop(words.index("--host-discovery-script") + 1)
    assert not Path(script).exists(), "gone with the job"
    assert words == [
        *("--gloo", "--gloo-timeout-seconds", "45", "-np", "3", "--network-interface", "lo"),
        *(
            "--min-np",
            "2",
            "--host-discovery-script",
            "--elastic-timeout",
            "86400",
            "--blacklist-cooldown-range",
            "5",
            "150",
            "--max-np",
            "4",
        ),
    ]


def test_an_elastic_job_whose_chief_is_done_is_done(launcher: Launcher) -> None:
    """Another worker may fail in the last moment, as by the chief's connections that close."""
    hosts = launcher.work / "hosts"
    hosts.write_text("localhost:1\n127.0.0.1:1\n")
    done = launcher.run("--elastic", f"--hosts_file={hosts}", FAKE_TRAIN="0=0 1=1")
    assert done.returncode == 0, done.stderr


def test_the_card_is_that_by_which_the_hosts_are_reached(launcher: Launcher) -> None:
    hosts = launcher.work / "hosts"
    hosts.write_text("localhost:1\n203.0.113.7:2\n")
    words = horovodruns_words(launcher, "--elastic", f"--hosts_file={hosts}", "--nopreflight")
    assert words[words.index("--network-interface") + 1] == OUTER_CARD


def test_a_card_that_is_not_there(launcher: Launcher) -> None:
    done = launcher.run("--network_interface=eth7")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == (
        "train.sh: --network_interface: must be a network card of this machine that has an IPv4 address. Received: "
        "'eth7'. See `ip -brief address`."
    )
    assert "prepare got" not in done.stderr


def test_a_variable_that_is_to_be_passed_and_is_not_set(launcher: Launcher) -> None:
    done = launcher.run("--pass_environment=PATH,NO_SUCH_VARIABLE")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == (
        "train.sh: --pass_environment: must name variables that are set, comma-separated. Received: "
        "'NO_SUCH_VARIABLE'. Set it, or leave it out."
    )


def test_elastic_on_this_machine_alone(launcher: Launcher) -> None:
    """Horovod takes the loopback card then, and no other."""
    hosts = launcher.work / "hosts"
    hosts.write_text("localhost:2\n")
    done = launcher.run("--elastic", f"--hosts_file={hosts}")
    assert done.returncode == 0, done.stderr


def test_hosts_that_do_not_answer_are_named_before_the_start(launcher: Launcher) -> None:
    done = launcher.run("--hosts=203.0.113.7:2", "--num_workers=2", FAKE_CHECK="2")
    assert done.returncode == 2
    assert "check got ['--hosts=203.0.113.7:2', '--ssh_port=22'" in done.stderr
    assert "train got" not in done.stdout


@pytest.mark.thorough(unless=lambda case: case["number"] != signal.SIGINT)
@pytest.mark.parametrize(
    ("stop", "number"),
    [(os.kill, signal.SIGTERM), (os.killpg, signal.SIGINT), (os.killpg, signal.SIGHUP)],
    ids=["SIGTERM", "Ctrl-C", "closed terminal"],
)
def test_workers_get_all_the_time_they_need_to_stop(
    launcher: Launcher, stop: Callable[[int, int], None], number: int
) -> None:
    process = launcher.start(FAKE_TRAIN="until_stopped=7")  # horovodrun itself would kill them after 5 seconds
    launcher.stop_when_training(process, 2, stop, number)
    done = finished(process)
    assert done.returncode == 75, done.stderr
    assert sorted(path.name for path in launcher.work.glob("checkpoint.*")) == ["checkpoint.0", "checkpoint.1"]


def test_one_worker_stops_too(launcher: Launcher) -> None:
    process = launcher.start("--num_workers=1", FAKE_TRAIN="until_stopped=0")
    launcher.stop_when_training(process, 1, os.kill, signal.SIGTERM)
    assert finished(process).returncode == 75
    assert (launcher.work / "checkpoint.0").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_stopped_while_preparing(launcher: Launcher, number: signal.Signals) -> None:
    process = launcher.start(FAKE_PREPARE_SECONDS="60")
    assert process.stderr is not None
    while "prepare got" not in process.stderr.readline():
        pass
    process.send_signal(number)
    told = time.monotonic()
    done = finished(process)
    assert time.monotonic() - told < 30
    assert (done.returncode, done.stdout) == (75, "")
    assert "train got" not in done.stderr


def test_stopped_while_horovodrun_starts(launcher: Launcher) -> None:
    slow = f'#!/bin/sh\ntouch starting\nsleep 2\nexec "{sys.executable}" -m horovod.runner.launch "$@"\n'
    write_script(launcher.root / ".venv" / "bin" / "horovodrun", slow)
    process = launcher.start(FAKE_TRAIN="until_stopped=0")
    wait_until((launcher.work / "starting").exists)
    process.terminate()
    done = finished(process)
    assert done.returncode == 75
    assert "train got" not in done.stdout + done.stderr


def test_the_progress_bar_is_told_the_terminal(launcher: Launcher) -> None:
    controller, terminal = os.openpty()
    name = os.ttyname(terminal)
    (launcher.root / "fakes" / "din_dist" / "cli" / "train.py").write_text(
        "import os; print(os.environ.get('DIN_DIST_PROGRESS_TTY'))"
    )
    assert launcher.run("--num_workers=1").stdout == "None\n"
    process = launcher.start("--num_workers=1", stderr=terminal)
    os.close(terminal)
    assert process.communicate(timeout=PATIENCE)[0] == f"{name}\n"
    os.close(controller)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_nothing_survives_a_killed_launcher(launcher: Launcher, num_workers: int) -> None:
    process = launcher.start(f"--num_workers={num_workers}", FAKE_TRAIN="until_stopped=0")
    launcher.stop_when_training(process, num_workers, os.kill, signal.SIGKILL)
    wait_until(lambda: len(list(launcher.work.glob("checkpoint.*"))) == num_workers)
    process.communicate(timeout=PATIENCE)  # ends when the last process has closed its output
