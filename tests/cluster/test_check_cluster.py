"""The preflight, on hosts that really are cut off, walled in or set up differently; other hardware is made up."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from din_dist.cluster import preflight
from din_dist.cluster.hosts import HostSlots
from din_dist.cluster.preflight import Answer, Finding, check_hosts, compare, compare_links, render
from din_dist.cluster.probe import Facts, Question, find_facts
from din_dist.config import Config
from din_dist.data.prepared import prepare
from din_dist.errors import InputError
from tests.support import host_lab
from tests.support.commands import assert_one_line
from tests.support.host_lab import Host
from tests.support.patience import PATIENCE
from tests.support.programs import missing
from tests.support.repository import ROOT
from tests.support.small_log import small_config

OWN_NAME = socket.gethostname()
FIRST, SECOND = "10.77.0.1", "10.77.0.2"  # the lab's addresses


@pytest.fixture(scope="module")
def lab() -> Iterator[list[Host]]:
    try:
        with host_lab.hosts(2) as hosts:
            yield hosts
    except host_lab.LabError as error:
        missing(str(error))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Config:
    config = small_config(tmp_path_factory.mktemp("cluster"))
    prepare(config.data)
    return config


def check(config: Config, *words: str, on: Host | None = None, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    flags = [f"--{name}={getattr(config.data, name)}" for name in ("dataset", "data_path", "data_dir")]
    command = [sys.executable, "-m", "din_dist.cli.check_cluster", f"--output_dir={config.job.output_dir}"]
    command += [*flags, "--metrics_port=-1", *words]
    return subprocess.run(
        on.command(command) if on else command, cwd=cwd, capture_output=True, text=True, timeout=PATIENCE, check=False
    )


def check_lab(lab: list[Host], config: Config, *words: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """From the first host, as `launch/train.sh` would be."""
    return check(config, f"-H={FIRST}:1,{SECOND}:1", *words, on=lab[0], cwd=cwd)


def rows(done: subprocess.CompletedProcess[str]) -> list[list[str]]:
    """The table's cells."""
    lines = [line for line in done.stdout.splitlines() if not line.endswith(": fine")]
    assert lines, done.stdout + done.stderr
    assert lines[0].split() == ["host", "check", "found", "what", "to", "do"]
    return [re.split("  +", line) for line in lines[1:]]


def only_row(done: subprocess.CompletedProcess[str], host: str, code: int = 2) -> list[str]:
    """Check, what was found and what to do, where nothing else is wrong in the lab."""
    (row,) = rows(done)
    assert row[0] == host, done.stdout
    assert done.returncode == code
    for other in {FIRST, SECOND} - {host}:
        assert f"{other}: fine\n" in done.stdout
    if code:
        assert_one_line(done, f"A job needs hosts that pass each check. Received: {host}, which did not.")
    return row[1:]


@contextlib.contextmanager
def mounted(host: Host, target: Path, *source: str) -> Iterator[None]:
    """Gives the ssh sessions of a host another `target`: an empty folder, or `source`."""
    pids = subprocess.run(["ip", "netns", "pids", host.namespace], capture_output=True, text=True, check=True)
    inside = ["nsenter", "--mount", "--target", pids.stdout.split()[0]]
    source = ("--bind", *source) if source else ("-t", "tmpfs", "none")
    subprocess.run([*inside, "mount", *source, str(target)], check=True)
    try:
        yield
    finally:
        subprocess.run([*inside, "umount", str(target)], check=True)


@contextlib.contextmanager
def only_ssh_gets_through(host: Host) -> Iterator[None]:
    """A firewall: what the host sends to ports from 1024 up is lost, answers included, except for sshd's."""
    rules = ("pref 100 ipproto tcp sport 22 lookup main", "pref 200 ipproto tcp dport 1024-65534 blackhole")
    for rule in rules:
        subprocess.run(["ip", "-n", host.namespace, "rule", "add", *rule.split()], check=True)
    try:
        yield
    finally:
        for rule in rules:
            subprocess.run(["ip", "-n", host.namespace, "rule", "del", *rule.split()], check=True)


def test_a_clean_pair_passes(lab: list[Host], prepared: Config) -> None:
    done = check_lab(lab, prepared, "--metrics_port=9400")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{FIRST}: fine\n{SECOND}: fine\n", "")
    assert not Path(prepared.job.output_dir).exists()  # as before


def test_a_hosts_file_and_a_launcher_that_is_no_host(lab: list[Host], prepared: Config, tmp_path: Path) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("host1:1  # by name\n")
    done = check(prepared, f"--hosts_file={hosts}", "--ssh_port=22", on=lab[0])
    assert (done.returncode, done.stdout, done.stderr) == (0, "host1: fine\n", "")
    with only_ssh_gets_through(lab[1]):
        done = check(prepared, f"--hosts_file={hosts}", on=lab[0])
    ((host, what, found, _),) = rows(done)
    assert (host, what) == ("this machine", "network")
    assert found.startswith(f"not reached at {FIRST} by host1 (")
    assert done.returncode == 2


def test_the_card_that_was_named_is_on_one_host_only(lab: list[Host], prepared: Config) -> None:
    lab[1].rename_card("eth0", "other0")
    try:
        assert check_lab(lab, prepared).returncode == 0, "by default each host takes its own"
        what, found, _ = only_row(check_lab(lab, prepared, "--network_interface=eth0"), SECOND)
    finally:
        lab[1].rename_card("other0", "eth0")
    assert (what, found) == ("network card", "no card of that name with an IPv4 address, or no route here")


def test_the_own_name_is_of_no_account(lab: list[Host], prepared: Config) -> None:
    etc_hosts = host_lab.NETNS_ETC / lab[1].namespace / "hosts"
    before = etc_hosts.read_text()
    for name_line in (f"127.0.0.1 {OWN_NAME}", ""):
        etc_hosts.write_text(before.replace(f"{SECOND} {OWN_NAME}", name_line))
        try:
            assert check_lab(lab, prepared).returncode == 0
        finally:
            etc_hosts.write_text(before)


def test_probes_listen_to_the_job_alone_and_say_nothing_of_it(lab: list[Host], prepared: Config) -> None:
    """At one address each, while they ask; their variables are in no command line."""
    secret = "/planted/in/the/path"
    environment = {**os.environ, "PATH": f"{os.environ['PATH']}:{secret}"}
    command = [sys.executable, "-m", "din_dist.cli.check_cluster", f"--output_dir={prepared.job.output_dir}"]
    command += [f"--{name}={getattr(prepared.data, name)}" for name in ("dataset", "data_path", "data_dir")]
    command = lab[0].command([*command, "--metrics_port=-1", f"-H={FIRST}:1,{SECOND}:1"])
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE) as job:
        listened: set[str] = set()
        while job.poll() is None:
            found = subprocess.run(lab[1].command(["ss", "-Hltn"]), capture_output=True, text=True, check=True).stdout
            listened |= {line.split()[3] for line in found.splitlines()}
            for words in Path("/proc").glob("[0-9]*/cmdline"):
                with contextlib.suppress(OSError):  # it has ended
                    assert secret.encode() not in words.read_bytes()
    assert job.returncode == 0
    assert {address.rpartition(":")[0] for address in listened} == {SECOND}
    assert len(listened) > 1, "sshd's and the probe's"


def test_unplugged(lab: list[Host], prepared: Config) -> None:
    lab[1].unplug()
    try:
        done, elastic = check_lab(lab, prepared), check_lab(lab, prepared, "--elastic")
    finally:
        lab[1].plug_in()
    what, found, remedy = only_row(done, SECOND)
    assert what == "ssh"
    assert f"connect to host {SECOND} port 22" in found
    assert f"Make this work from here: ssh -o BatchMode=yes {SECOND} true." in remedy
    what, _, remedy = only_row(elastic, SECOND, code=0)
    assert what == "ssh (warning)"
    assert remedy.endswith("An elastic job begins without it and takes it in once it answers.")


def test_a_metrics_port_is_taken(lab: list[Host], prepared: Config) -> None:
    script = "import socket; server = socket.create_server(('127.0.0.1', 9401)); print(flush=True); input()"
    with subprocess.Popen(
        lab[1].command([sys.executable, "-c", script]), stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as server:
        assert server.stdout
        server.stdout.readline()
        done = check(prepared, f"-H={FIRST}:2,{SECOND}:2", "--metrics_port=9400", on=lab[0])
        server.kill()
    what, found, _ = only_row(done, SECOND)
    assert (what, found) == ("metrics ports", "cannot be had on 127.0.0.1: 9401 (address already in use)")


def test_a_firewall_that_lets_only_ssh_through(lab: list[Host], prepared: Config) -> None:
    with only_ssh_gets_through(lab[1]):
        done = check_lab(lab, prepared)
    inward, outward = rows(done)
    assert inward[:2] == [FIRST, "network"]
    assert f"not reached at {FIRST} by {SECOND} (" in inward[2]
    assert outward[:3] == [SECOND, "network", f"not reached at {SECOND} by {FIRST} (timed out)"]
    assert done.returncode == 2


def test_data_is_prepared_on_one_host_only(lab: list[Host], prepared: Config) -> None:
    with mounted(lab[1], Path(prepared.data.data_dir)):
        what, found, remedy = only_row(check_lab(lab, prepared), SECOND)
        assert (what, found.split(":")[0]) == ("data", "not prepared")
        command = remedy.removeprefix("Run there: ")
        subprocess.run(lab[0].command(["ssh", SECOND, command]), capture_output=True, timeout=PATIENCE, check=True)
        assert check_lab(lab, prepared).returncode == 0


def test_output_dir_is_not_shared(lab: list[Host], prepared: Config, tmp_path: Path) -> None:
    words = f"--output_dir={tmp_path}"
    with mounted(lab[1], tmp_path):
        what, found, _ = only_row(check_lab(lab, prepared, words), SECOND, code=0)
        assert (what, found) == ("output_dir (warning)", f"{tmp_path} is not the same folder as here")
        what, *_ = only_row(check_lab(lab, prepared, words, "--elastic"), SECOND)
        assert what == "output_dir"


def test_another_version_of_a_file(lab: list[Host], prepared: Config, tmp_path: Path) -> None:
    original = ROOT / "din_dist" / "schema.py"
    changed = tmp_path / "schema.py"
    changed.write_text(original.read_text() + "\n")
    with mounted(lab[1], original, str(changed)):
        what, found, _ = only_row(check_lab(lab, prepared), SECOND)
    assert what == "sources"
    assert found.startswith("schema.py differ; commit ")


def test_folder_or_python_are_not_there(lab: list[Host], prepared: Config, tmp_path: Path) -> None:
    folder = tmp_path / "checkout"
    folder.mkdir()
    with mounted(lab[1], tmp_path):
        what, found, _ = only_row(check_lab(lab, prepared, cwd=folder), SECOND)
    assert (what, found) == ("folder", f"no {folder}")
    with mounted(lab[1], Path(sys.prefix)):
        what, found, _ = only_row(check_lab(lab, prepared), SECOND)
    assert (what, found) == ("Python", f"no {sys.prefix}/bin/python")


def test_two_names_of_one_machine(prepared: Config) -> None:
    """Its own name may well be loopback then."""
    both = "-H=localhost:1,127.0.0.1:1"
    done = check(prepared, both)
    assert (done.returncode, done.stdout, done.stderr) == (0, "localhost: fine\n127.0.0.1: fine\n", "")
    done = check(prepared, both, "--metrics_port=9400")
    (row,) = rows(done)
    assert row[:2] == ["127.0.0.1", "metrics ports"]
    assert row[2] == "the same machine as localhost: its workers too would take 9400 and up"
    assert done.returncode == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "--hosts: name the hosts here or in --hosts_file. Received: ''."),
        (("-H", "a:1", "--hosts_file=hosts"), "--hosts: name the hosts here or in --hosts_file. Received: 'a:1'."),
        (("-H", "gpu1:none"), "--hosts: must be HOST or HOST:SLOTS, comma-separated, or slurm. Received: 'gpu1:none'."),
        (("-H", "a:1,b:1,a:1"), "--hosts: each host may be named once. Received: 'a' twice. Add up its slots."),
        (("-H", "a", "--ssh_port=0"), "--ssh_port: must be a port. Received: 0."),
        (("-H", "localhost", "--output_dir=/proc/runs"), "--output_dir: must be a folder that can be written."),
    ],
)
def test_wrong_input_is_one_line(prepared: Config, words: tuple[str, ...], message: str) -> None:
    assert_one_line(check(prepared, *words), message)


def test_nothing_imports_tensorflow(prepared: Config) -> None:
    """The launcher calls it before every start."""
    script = (
        "import sys; from din_dist.config import Config; from din_dist.cluster.hosts import HostSlots; "
        "from din_dist.cluster.preflight import check_hosts; check_hosts([HostSlots('localhost')], Config()); "
        "sys.exit('tensorflow' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=PATIENCE)


# --- Answers that take another ssh. ---

ELSEWHERE = "192.0.2.1"  # nobody's, by RFC 5737


@pytest.fixture
def fake_ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What is written to this file is run in place of ssh."""
    path = tmp_path / "bin" / "ssh"
    path.parent.mkdir()
    path.touch(mode=0o755)
    monkeypatch.setenv("PATH", str(path.parent), prepend=":")
    return path


def test_what_a_login_script_says_is_no_answer(prepared: Config, fake_ssh: Path) -> None:
    fake_ssh.write_text('#!/bin/bash\necho Welcome; echo {"beware": 1}; exec bash -c "${@: -1}"\n')
    assert check_hosts([HostSlots(ELSEWHERE)], prepared) == []


def test_stopped_it_leaves_nothing_behind(prepared: Config, fake_ssh: Path, tmp_path: Path) -> None:
    fake_ssh.write_text("#!/bin/sh\nexec sleep 60\n")
    folder = tmp_path / "new" / "run"
    command = [sys.executable, "-m", "din_dist.cli.check_cluster", f"-H={ELSEWHERE}", f"--output_dir={folder}"]
    with subprocess.Popen(command, cwd=ROOT) as process:
        until = time.monotonic() + 30
        while not folder.exists() or not list(folder.iterdir()):
            assert time.monotonic() < until
            time.sleep(0.05)
        process.terminate()
    assert process.returncode == 143
    assert not folder.parent.exists()


@pytest.mark.parametrize(
    ("script", "what", "found"),
    [
        ("echo Permission denied >&2; exit 255", "ssh", "Permission denied"),
        ("exec sleep 60", "ssh", "no answer within 0.5 s"),
        ("echo No module named din_dist.cluster >&2; exit 1", "probe", "No module named din_dist.cluster"),
        ("exit 7", "probe", "exit code 7"),
        ('while read line; do echo \'{"answer": {"time": 1}}\'; done', "sources", "another version of din_dist"),
    ],
)
def test_ssh_or_the_probe_fail(
    prepared: Config, fake_ssh: Path, monkeypatch: pytest.MonkeyPatch, script: str, what: str, found: str
) -> None:
    monkeypatch.setattr(preflight, "FACTS_SECONDS", 0.5)
    fake_ssh.write_text(f"#!/bin/sh\n{script}\n")
    (finding,) = check_hosts([HostSlots(ELSEWHERE)], prepared)
    assert (finding.host, finding.check, finding.found, finding.fatal) == (ELSEWHERE, what, found, True)


def test_the_probe_ends_with_its_stdin_and_keeps_to_itself_what_others_print() -> None:
    script = "from din_dist.cluster import probe; probe.unreached = lambda peers: print('noise') or {}; probe.main()"
    question = '{"ask": "reach", "peers": {}}\n{"ask": "time"}\n'
    done = subprocess.run(
        [sys.executable, "-c", script], input=question, capture_output=True, text=True, timeout=PATIENCE, check=True
    )
    reach, now = (json.loads(line)["answer"] for line in done.stdout.splitlines())
    assert reach == {}
    assert now["time"] > 0
    assert done.stderr == "noise\n"


def test_a_port_is_free_although_a_connection_has_just_ended_there() -> None:
    """A trainer that is started again gets it too."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)) as client:
            server.accept()[0].close()  # first, so that the connection lingers on this side
            assert client.recv(1) == b""
        assert port_problems(port) == {str(port): "address already in use"}
    assert port_problems(port) == {}


def port_problems(port: int) -> Mapping[str, str]:
    return find_facts(Question("/nowhere", "/nowhere", "token", "127.0.0.1", "", "127.0.0.1", [port])).taken_ports


# --- The comparison, on answers made by hand. ---

HOSTS = [HostSlots(FIRST, 2), HostSlots(SECOND, 2)]
FACTS = Facts(
    machine="one",
    address=FIRST,
    commit="1234",
    versions={"python": "3.11.7", "keras": "3.15.1"},
    sources={"config.py": "aa"},
    num_gpus=0,
    num_cores=2,
    fingerprint="f",
    data_problem="",
    taken_ports={},
    output_shared=True,
    output_problem="",
)


def findings(elastic: bool = False, skew: float = 0.0, margin: float = 0.0, **changes: object) -> list[Finding]:
    """What is wrong when only the second host, on a machine of its own, is made different."""
    changes = {"machine": "two", "address": SECOND, **changes}
    other = Answer(dataclasses.replace(FACTS, **changes), skew_seconds=skew, margin_seconds=margin)  # type: ignore[arg-type]
    found = compare(HOSTS, FACTS, {FIRST: Answer(FACTS), SECOND: other}, Config(), elastic=elastic)
    return [finding for finding in found if finding.host == SECOND or finding.fatal]


def test_equal_hosts_are_fine() -> None:
    assert findings() == []


@pytest.mark.parametrize(("skew", "margin", "found"), [(2.1, 0, "2.1 s ahead of here"), (-7, 4.9, "7.0 s behind here")])
def test_the_clock(skew: float, margin: float, found: str) -> None:
    (finding,) = findings(skew=skew, margin=margin)
    assert (finding.check, finding.found, finding.fatal) == ("clock", found, False)


@pytest.mark.parametrize(("skew", "margin"), [(1.9, 0), (-7, 5.1)])
def test_a_clock_that_may_be_right(skew: float, margin: float) -> None:
    assert findings(skew=skew, margin=margin) == []


def test_gpus() -> None:
    """One host has two, the other none, or one."""
    both = dataclasses.replace(FACTS, num_gpus=2)
    for number in (0, 1):
        answers = {FIRST: Answer(dataclasses.replace(FACTS, num_gpus=number)), SECOND: Answer(both)}
        (finding,) = compare(HOSTS, FACTS, answers, Config())
        assert (finding.host, finding.check, finding.fatal) == (FIRST, "GPUs", True)
        assert finding.found == f"{number} GPU(s) for 2 slot(s)"
    assert compare(HOSTS, FACTS, {FIRST: Answer(both), SECOND: Answer(both)}, Config()) == []


def test_fewer_cores_than_slots_are_slow() -> None:
    (finding,) = findings(num_cores=1)
    assert (finding.check, finding.found, finding.fatal) == ("cores", "1 core(s) for 2 slot(s)", False)


def test_versions_and_sources() -> None:
    versions, sources = findings(
        versions={"python": "3.11.7", "keras": "3.14.0", "numpy": "2.4"},
        sources={"a.py": "", "b.py": "", "c.py": "", "config.py": "bb"},
        commit="5678",
    )
    assert versions.found == "keras 3.14.0, here 3.15.1; numpy 2.4, here missing"
    assert sources.found == "a.py, b.py, c.py and 1 more differ; commit 5678, here 1234"


def test_other_events() -> None:
    (finding,) = findings(fingerprint="g")
    assert (finding.check, finding.found) == ("data", "prepared from other events than elsewhere")
    assert finding.remedy.endswith("--overwrite_prepared")


def test_a_card_that_is_not_there() -> None:
    (finding,) = findings(address=None)
    assert (finding.check, finding.fatal) == ("network card", True)
    assert finding.found == "no card of that name with an IPv4 address, or no route here"


def test_output_dir_that_cannot_be_written() -> None:
    """Only the chief writes, which is on the first host and in an elastic job may move."""
    for elastic in (False, True):
        (finding,) = findings(elastic, output_problem="permission denied", output_shared=False)
        assert (finding.check, finding.fatal) == ("output_dir", elastic)


def test_who_is_not_reached_is_told_once() -> None:
    peers = {name: (f"{name}.example", 1) for name in "abcde"}
    missed = {name: {"e": "timed out"} for name in "abcd"}
    (finding,) = compare_links(peers, {**missed, "e": {}})
    assert (finding.host, finding.check) == ("e", "network")
    assert finding.found == ("not reached at e.example by a (timed out), b (timed out), c (timed out) and 1 more")


def test_the_table() -> None:
    found = [Finding("b", "clock", "3.0 s behind here", "Set it.", fatal=False), Finding("b", "data", "none", "Do.")]
    assert render([HostSlots("a"), HostSlots("b")], found).splitlines() == [
        "a: fine",
        "host  check            found              what to do",
        "b     clock (warning)  3.0 s behind here  Set it.",
        "b     data             none               Do.",
    ]
    with pytest.raises(InputError, match="Received: 'b' twice"):
        check_hosts([HostSlots("b"), HostSlots("b", 2)], Config())


def test_a_terminal_does_not_obey_what_a_host_found() -> None:
    *_, row = render([HostSlots("a")], [Finding("a", "probe", "\x1b[2Jone\ntwo\r", "Correct that.")]).splitlines()
    assert row == r"a     probe  \x1b[2Jone two\r  Correct that."
