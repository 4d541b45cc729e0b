"""Prepares the data and starts the workers; `launch/train.sh` runs it after set-up."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from absl import flags

from din_dist import environment, place, streams
from din_dist.cli import flags as settings
from din_dist.cli import help
from din_dist.cli.help import theme
from din_dist.cluster.addresses import card_towards, loopback_card, own_address
from din_dist.cluster.hosts import HostList, HostSlots, is_local, parse_hosts, read_hosts_file, wait_for_ssh
from din_dist.cluster.processes import die_with_parent, exit_code
from din_dist.cluster.supervisor import Supervisor
from din_dist.config import require
from din_dist.environment import SEVERAL_ON_A_GPU
from din_dist.errors import EXIT_INPUT_ERROR, EXIT_RETRY, InputError
from din_dist.machine import require_threads
from din_dist.text import printable
from din_dist.versions import require_horovod

_DISCOVER = str(settings.LAUNCH / "discover_hosts.sh")
_OPERATORS_SCRIPT = Path("/etc/mpi/discover_hosts.sh")  # mounted by Kubernetes' MPI operator
_SLURM = "slurm"
_TELL_HOSTS = "tell_hosts"
_WORKERS_WITHOUT_GPU = 2
_ENDING_SECONDS = 10.0  # for a command that was asked to end
_LONGEST_COOLDOWN = 30  # times --host_cooldown_seconds

_USAGE = """\
launch/train.sh [--num_workers N] [trainer flags]
launch/train.sh --hosts HOST:SLOTS,... [--num_workers N] [trainer flags]
launch/train.sh --elastic --hosts_file FILE [--num_workers N] [--min_workers N] [trainer flags]
launch/horovodrun.sh [--hosts HOST:SLOTS,... | --hosts_file FILE] [--num_workers N] [trainer flags]

Without trainer flags it trains with launch/flags/quick.flags. The last line on stdout is the summary as JSON,
everything else goes to stderr. SIGTERM, SIGINT and SIGHUP let the workers finish their step and write a checkpoint. On
several hosts, the checkout, the prepared data and --output_dir must be the same for all.

Exit codes: 0 done, 2 wrong input, 75 stopped by a signal (run it again to go on), 80 a worker hung or its disk did not
answer, otherwise what the first failed worker gave.
Environment: that of launch/setup.sh; DIN_DIST_DEVICE=cpu or gpu overrides the search for GPUs.
"""

_FLAGS = flags.FlagValues()  # the launcher's; all others are the trainer's
_SHORTEST_STALL_TIMEOUT = 5.0
_ELASTIC_ONLY = ("min_workers", "max_workers", "host_cooldown_seconds")


def _define(name: str, default: str, help_text: str, short_name: str | None = None) -> None:
    # Text, because absl's own error for a value that is no number does not have our form.
    flags.DEFINE_string(name, default, help_text, short_name=short_name, flag_values=_FLAGS)


with theme("workers and hosts", _FLAGS):
    _define(
        "num_workers",
        "",
        "Processes to train with. Default: the sum of the hosts' slots; here one per GPU, otherwise 2.",
    )
    _define(
        "num_gpus",
        "0",
        "GPUs of this machine, as launch/train.sh counts them. Hosts without SLOTS get the same number.",
    )
    _define(
        "hosts",
        "",
        "Hosts to train on, HOST or HOST:SLOTS comma-separated, or slurm: those of the SLURM job. Default: this one.",
        short_name="H",
    )
    settings.define_path(
        "hosts_file",
        "",
        "File with a line HOST, HOST:SLOTS or HOST slots=SLOTS for each host; # begins a comment. With --elastic it "
        "may change at any time. Default: none. --elastic then asks the script that Kubernetes' MPI operator mounts.",
        _FLAGS,
    )
    _define("wait_for_hosts_seconds", "0", "How long to wait until the ssh servers of all hosts answer, in seconds.")
    _define("ssh_port", "22", "Port of the hosts' ssh servers.")
    _define(
        "network_interface",
        "",
        "Network card by which the workers reach each other, of that name on every host. Default: on each host the "
        "card towards the launcher, whatever its name.",
    )
    _define(
        "pass_environment",
        "",
        "Further environment variables for workers on other hosts, comma-separated. Default: only those that such a "
        "job needs (see launch/README.md).",
    )
with theme("elastic", _FLAGS):
    flags.DEFINE_boolean(
        "elastic",
        False,
        "Go on when workers are lost or added. The start waits for --num_workers.",
        flag_values=_FLAGS,
    )
    _define("min_workers", "1", "With --elastic: fewest workers to train with. Fewer wait for others.")
    _define("max_workers", "", "With --elastic: most workers to train with. Default: no limit.")
    _define(
        "host_cooldown_seconds",
        "10",
        "With --elastic: how long a host is left out whose worker failed, in seconds. Each failure doubles it, up to "
        "30 times.",
    )
    _define(
        "stall_timeout_seconds",
        "60",
        "After how many seconds a worker counts as lost that gives no sign of life or waits for a disk. The others "
        "wait as long for a new one to start.",
    )
with theme("start and logs", _FLAGS):
    settings.define_path("log_dir", "", "Folder for a file rank-N.log of each worker's output. Default: none.", _FLAGS)
    flags.DEFINE_boolean("prepare", True, "Prepare the data, unless it is prepared already.", flag_values=_FLAGS)
    flags.DEFINE_boolean("preflight", True, "Check all hosts before a start on more than one.", flag_values=_FLAGS)
    flags.DEFINE_boolean(
        "dry_run",
        False,
        "Print the command that would start the workers, and start nothing. The command is only for reading, because "
        "each worker is an agent that needs a launcher.",
        flag_values=_FLAGS,
    )


def parse_launcher_flags(arguments: Sequence[str]) -> list[str]:
    """Parses the flags of the launcher, and returns the others, which are the trainer's.

    Raises:
        flags.Error: a flag of the launcher has no value that it can take.
    """
    return _FLAGS(["train.sh", *settings.with_our_flagfiles(arguments)], known_only=True)[1:]


def main(arguments: Sequence[str]) -> int:
    """Runs the job; returns its exit code, 2 for wrong input or 75 when a signal stopped it.

    Raises:
        InputError: a flag of the launcher is wrong.
    """
    try:
        trainer_flags = parse_launcher_flags(arguments)
    except flags.Error as error:
        raise InputError(settings.problem_of(error, list(_FLAGS))) from error
    _refuse_unknown(trainer_flags)
    default_slots = _default_slots()
    hosts = _hosts(default_slots)
    numbers = _numbers(hosts)
    if not trainer_flags:
        trainer_flags = [f"--flagfile={settings.FLAGFILES / 'quick.flags'}"]
    if sys.stderr.isatty():
        # For the progress bar, because the workers' stderr is a pipe.
        os.environ["DIN_DIST_PROGRESS_TTY"] = os.ttyname(sys.stderr.fileno())
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    only_here = all(is_local(host.name) for host in hosts) and bool(hosts or not _FLAGS.elastic)
    _pass_environment()
    card, address = _card(hosts, only_here)
    agent = [sys.executable, "-m", "din_dist.cluster.agent", *trainer_flags]
    alone = numbers["num_workers"] == 1 and only_here and not _FLAGS.elastic and not _FLAGS.log_dir
    if not alone:
        require_horovod()
    if _FLAGS.dry_run:
        words = agent if alone else [*_horovodrun(numbers, hosts, only_here, card, Path("HOSTS", "hosts")), *agent]
        print(shlex.join(words))
        return 0
    # This also checks every flag, so that a wrong one gives one line here and not one from each worker.
    code = run_first("prepare_data", trainer_flags) if _FLAGS.prepare else 0
    if code == 0 and hosts and not only_here:
        code = _wait_for_hosts([host.name for host in hosts], numbers)
    if code == 0 and hosts and not only_here and _FLAGS.preflight:
        where = [f"--hosts={','.join(map(str, hosts))}", f"--ssh_port={_FLAGS.ssh_port}"]
        where += ["--elastic"] if _FLAGS.elastic else []
        where += [f"--network_interface={_FLAGS.network_interface}"] if _FLAGS.network_interface else []
        code = run_first("check_cluster", [*where, *trainer_flags])
    if code:
        return code
    with tempfile.TemporaryDirectory() as folder:
        current_hosts = Path(folder, "hosts")
        stall_timeout = numbers["stall_timeout_seconds"]
        discovered = HostList([_DISCOVER], current_hosts, int(_FLAGS.ssh_port), stall_timeout, default_slots)
        if _FLAGS.elastic:
            _write_discovery(current_hosts)
        return Supervisor(
            agent if alone else [*_horovodrun(numbers, hosts, only_here, card, current_hosts), *agent],
            horovod=not alone,
            address=address,
            stall_timeout_seconds=stall_timeout,
            hosts=discovered if _FLAGS.elastic else None,
            log_dir=_log_dir(),
        ).run()


def _refuse_unknown(trainer_flags: Sequence[str]) -> None:
    """Refuses a flag that neither the launcher nor the trainer has. All else that is wrong `prepare_data` names.

    Raises:
        InputError: there is such a flag.
    """
    values = flags.FlagValues()
    settings.define_flags(values)
    try:
        values(["train", *trainer_flags])
    except flags.UnrecognizedFlagError as error:
        if error.flagname not in flags.FLAGS:  # absl has some of its own
            raise InputError(settings.problem_of(error, [*_FLAGS, *values])) from error
    except flags.Error:
        return


def _default_slots() -> int:
    """Returns the slots of a host that is named without: the MPI operator's, or the number of GPUs here."""
    return place.slots_of_mpi_operator() or int(_FLAGS.num_gpus) or 1


def _wait_for_hosts(names: Sequence[str], numbers: Mapping[str, float]) -> int:
    """Waits for the hosts' ssh servers; returns 0, or the exit code when some do not answer in time."""
    seconds = numbers["wait_for_hosts_seconds"]
    if not seconds:
        return 0
    silent = asyncio.run(wait_for_ssh(names, int(_FLAGS.ssh_port), seconds))
    if silent:
        print(
            f"{place.program()}: ssh must answer on port {_FLAGS.ssh_port} of every host. Received: nothing from "
            f"{', '.join(silent)} within {seconds:g} s. Start them, or wait longer with --wait_for_hosts_seconds.",
            file=sys.stderr,
        )
        return EXIT_RETRY
    return 0


def _log_dir() -> Path | None:
    """Makes the folder of --log_dir and returns it; None without that flag."""
    if not _FLAGS.log_dir:
        return None
    try:
        Path(_FLAGS.log_dir).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"--log_dir: must be a folder that can be written. Received: {_FLAGS.log_dir!r}: {error.strerror}. Give "
            "another."
        ) from error
    return Path(_FLAGS.log_dir)


def _numbers(hosts: Sequence[HostSlots]) -> dict[str, float]:
    """Checks the numeric flags; returns their values by name, without those that have none."""
    numbers: dict[str, float] = {}
    if not _FLAGS["num_workers"].present:
        default = sum(host.slots for host in hosts) or int(_FLAGS.num_gpus) or _WORKERS_WITHOUT_GPU
        _FLAGS["num_workers"].value = str(default)
    for name in ("num_workers", "min_workers", "max_workers", "ssh_port", "host_cooldown_seconds"):
        value = str(_FLAGS[name].value)
        if value == "" and name == "max_workers":
            continue
        require(
            value.isdecimal() and 0 < int(value) < 100_000,
            "must be a whole number from 1",
            name,
            value,
            "Give the number of processes to train with."
            if name.endswith("workers")
            else f"For example {_FLAGS[name].default}.",
        )
        numbers[name] = int(value)
    for name, least in (("stall_timeout_seconds", _SHORTEST_STALL_TIMEOUT), ("wait_for_hosts_seconds", 0.0)):
        try:
            numbers[name] = float(str(_FLAGS[name].value))
        except ValueError:
            numbers[name] = math.nan
        require(
            least <= numbers[name] < math.inf,
            f"must be a number of seconds from {least:g}",
            name,
            _FLAGS[name].value,
            "For example 60.",
        )
    for name in _ELASTIC_ONLY:
        flag = _FLAGS[name]
        require(
            _FLAGS.elastic or not flag.present, "belongs to --elastic", name, flag.value, "Add --elastic, or drop it."
        )
    start, low, high = numbers["num_workers"], numbers["min_workers"], numbers.get("max_workers")
    require(
        not _FLAGS.elastic or (low <= start and (high is None or start <= high)),
        "(default: the sum of the slots) must be from --min_workers to --max_workers",
        "num_workers",
        f"{start}, with {low} and {high or 'no limit'}",
        "Correct one of them.",
    )
    if not _FLAGS.elastic:
        _require_room(int(start), hosts)
    return numbers


def _require_room(num_workers: int, hosts: Sequence[HostSlots]) -> None:
    """Checks that the hosts, or this machine, have room for all workers.

    Raises:
        InputError: there are more workers than slots.
    """
    if hosts:
        slots = sum(host.slots for host in hosts)
        require(
            num_workers <= slots,
            "must be at most the sum of the hosts' slots",
            "num_workers",
            f"{num_workers}, and {slots} slot(s) on {', '.join(map(str, hosts))}",
            "Start fewer, or name hosts as HOST:SLOTS with more slots.",
        )
        return
    num_gpus = int(_FLAGS.num_gpus)
    if num_gpus and os.environ.get(SEVERAL_ON_A_GPU) != "1":
        require(
            num_workers <= num_gpus,
            "must be at most the GPUs of this machine",
            "num_workers",
            f"{num_workers}, and {num_gpus} GPU(s)",
            f"Start fewer, or set {SEVERAL_ON_A_GPU}=1 to let several share one.",
        )
    require_threads(num_workers)


def _hosts(default_slots: int) -> list[HostSlots]:
    """Returns the hosts named at the start; none means this machine, or the hosts of Kubernetes' operator."""
    if _FLAGS.hosts == _SLURM and _FLAGS.hosts_file:
        _FLAGS["hosts"].value = ""  # launch/horovodrun.sh gives it as a default
    require(
        not (_FLAGS.hosts and _FLAGS.hosts_file),
        "is one way to name the hosts, --hosts_file another",
        "hosts",
        _FLAGS.hosts,
        "Drop one of them.",
    )
    require(
        not (_FLAGS.hosts and _FLAGS.elastic), "cannot change", "hosts", _FLAGS.hosts, "Give --elastic a --hosts_file."
    )
    if _FLAGS.hosts_file:
        os.environ["DIN_DIST_HOSTS_FILE"] = str(Path(_FLAGS.hosts_file).absolute())
        return read_hosts_file(_FLAGS.hosts_file, default_slots)
    require(
        not _FLAGS.elastic or _OPERATORS_SCRIPT.exists(),
        "needs --hosts_file outside Kubernetes",
        "elastic",
        "none",
        "Give a file with a line HOST:SLOTS for each host.",
    )
    return parse_hosts(_FLAGS.hosts, default_slots) if _FLAGS.hosts else []


def _pass_environment() -> None:
    """Passes Horovod the names of the variables that the user wants on other hosts.

    Raises:
        InputError: one of the variables is not set.
    """
    names = [name.strip() for name in str(_FLAGS.pass_environment).split(",") if name.strip()]
    for name in names:
        require(
            name in os.environ,
            "must name variables that are set, comma-separated",
            "pass_environment",
            name,
            "Set it, or leave it out.",
        )
    os.environ["HOROVOD_PASS_ENVIRONMENT"] = ",".join(names)  # our build of Horovod reads it


def _card(hosts: Sequence[HostSlots], only_here: bool) -> tuple[str, str]:
    """Returns the network card by which workers reach this machine, and its address.

    Raises:
        InputError: there is no such card, or it has no address.
    """
    if card := str(_FLAGS.network_interface):
        pass
    elif only_here:
        card = loopback_card()
    else:
        card = card_towards(host.name for host in hosts if not is_local(host.name))
        place.let_agents_find_card()  # on other hosts it may have another name
    return card, own_address(card)


def _horovodrun(
    numbers: Mapping[str, float], hosts: Sequence[HostSlots], only_here: bool, card: str, current_hosts: Path
) -> list[str]:
    """Returns the command of Horovod's launcher, to which the worker's command is added.

    Args:
        numbers: the values of the numeric flags.
        hosts: the hosts of the job; none for this machine, or for an elastic job.
        only_here: all workers run on this machine.
        card: the network card by which workers reach this machine.
        current_hosts: the file from which an elastic job gets its hosts.
    """
    timeout = str(round(numbers["stall_timeout_seconds"]))
    venv = Path(os.environ.get("DIN_DIST_VENV", sys.prefix))
    words = [str(venv / "bin" / "horovodrun"), "--gloo", "--gloo-timeout-seconds", timeout]
    words += ["-np", str(int(numbers["num_workers"]))]
    if not only_here:
        words += ["-p", _FLAGS.ssh_port, "--disable-cache"]  # the cache would remember hosts that were reached once
    words += ["--network-interface", card]
    if _FLAGS.elastic:
        cooldown = int(numbers["host_cooldown_seconds"])
        script = str(current_hosts.with_name(_TELL_HOSTS))
        words += ["--min-np", _FLAGS.min_workers, "--host-discovery-script", script, "--elastic-timeout", "86400"]
        words += ["--blacklist-cooldown-range", str(cooldown), str(cooldown * _LONGEST_COOLDOWN)]
        words += ["--max-np", _FLAGS.max_workers] if _FLAGS.max_workers else []
    elif hosts:
        words += ["-H", ",".join(map(str, hosts))]
    return words


def _write_discovery(current_hosts: Path) -> None:
    """Writes the script from which Horovod gets the hosts."""
    script = current_hosts.with_name(_TELL_HOSTS)
    script.write_text(f"#!/bin/sh\nexec cat {shlex.quote(str(current_hosts))}\n", encoding="utf-8")
    script.chmod(0o755)


def run_first(name: str, arguments: Sequence[str], ending_seconds: float = _ENDING_SECONDS) -> int:
    """Runs another of our commands, with its report on stderr; returns its exit code, 75 when a signal stopped it.

    A command whose disk does not answer may not end after a signal. Then it is killed and not waited for. If this
    process is killed, the kernel kills the command.

    Args:
        name: of the command's module.
        arguments: its flags.
        ending_seconds: how long it may take to end after a signal.
    """
    stopped: list[float] = []

    def stop(number: int, frame: object) -> None:
        stopped.append(time.monotonic())
        process.terminate()

    process = subprocess.Popen(
        [sys.executable, "-m", f"din_dist.cli.{name}", *arguments],
        stdout=sys.stderr,
        start_new_session=True,
        preexec_fn=die_with_parent,
    )
    before = {number: signal.signal(number, stop) for number in environment.ending_signals()}
    code = None
    while code is None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = process.wait(timeout=1)
        if code is None and stopped and time.monotonic() - stopped[0] > ending_seconds:
            print(f"{place.program()}: {name} did not end within {ending_seconds:g} s: it is killed", file=sys.stderr)
            process.kill()
            code = EXIT_RETRY
    for number, handler in before.items():
        signal.signal(number, handler)
    return EXIT_RETRY if stopped else exit_code(code)


def _print_help() -> None:
    """Prints the launcher's flags, then the trainer's."""
    settings.define_flags()
    usage = _USAGE.replace("launch/train.sh", place.program()) if place.program() != place.TRAIN_SH else _USAGE
    print(help.page(f"{__doc__}\n\n{usage}", _FLAGS, flags.FLAGS))


if __name__ == "__main__":
    streams.open_standard_streams()
    place.forget()
    if {"--help", "-help", "-h"} & set(sys.argv[1:]):
        _print_help()
        sys.exit()
    try:
        sys.exit(main(sys.argv[1:]))
    except InputError as error:
        print(printable(f"{place.program()}: {error}"), file=sys.stderr)
        sys.exit(EXIT_INPUT_ERROR)
