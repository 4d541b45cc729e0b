"""Checks that a job can run on these hosts: `python -m din_dist.cli.check_cluster -H host:slots,host:slots [FLAGS]`.

It takes every flag of the trainer and uses those that say where data and results lie, and --metrics_port. It prints a
line for each host that is fine, and a table of problems and remedies for the others. Exit code 0: a job will start,
perhaps with warnings; 2: it will not.
"""

from __future__ import annotations

import signal
import sys

from absl import flags

from din_dist.cli import entry
from din_dist.cli import flags as settings
from din_dist.cli.help import theme
from din_dist.cluster.hosts import parse_hosts, read_hosts_file
from din_dist.cluster.preflight import check_hosts, render
from din_dist.config import require
from din_dist.errors import InputError

with theme("hosts"):
    HOSTS = flags.DEFINE_string(
        "hosts",
        "",
        "Hosts to check: HOST or HOST:SLOTS, comma-separated. Default: those in --hosts_file.",
        short_name="H",
    )
    HOSTS_FILE = settings.define_path(
        "hosts_file", "", "File with a line HOST or HOST:SLOTS for each host. Default: none, see --hosts."
    )
    SSH_PORT = flags.DEFINE_integer("ssh_port", None, "Port of sshd on the hosts. Default: the one that ssh takes.")
    CARD = flags.DEFINE_string(
        "network_interface",
        "",
        "Network card by which the workers reach each other. Default: on each host the one towards this machine.",
    )
    ELASTIC = flags.DEFINE_boolean("elastic", False, "The job will be elastic: all hosts must share --output_dir.")
settings.define_flags()


def main() -> None:
    """Checks the hosts and prints the result."""
    port = SSH_PORT.value
    require(port is None or 1 <= port <= 65535, "must be a port", "ssh_port", port, "For example 22.")
    require(
        bool(HOSTS.value) != bool(HOSTS_FILE.value),
        "name the hosts here or in --hosts_file",
        "hosts",
        HOSTS.value,
        "Give one of the two, for example -H gpu1:8,gpu2:8.",
    )
    config = settings.config_from_flags()
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # an exception, so that files are removed
    hosts = parse_hosts(HOSTS.value) if HOSTS.value else read_hosts_file(HOSTS_FILE.value)
    findings = check_hosts(hosts, config, port, elastic=ELASTIC.value, card=CARD.value)
    print(render(hosts, findings), flush=True)
    if wrong := {finding.host: None for finding in findings if finding.fatal}:
        raise InputError(
            f"A job needs hosts that pass each check. Received: {', '.join(wrong)}, which did not. Do what the table "
            "says."
        )


if __name__ == "__main__":
    entry.run(main)
