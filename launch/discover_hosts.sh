#!/usr/bin/env bash
# Prints the hosts that an elastic job may use now, a line HOST, HOST:SLOTS or HOST slots=SLOTS each; the launcher asks
# every second, and tells Horovod of those that answer.
#
# From the file $DIN_DIST_HOSTS_FILE, which may change at any time (# begins a comment); else, in Kubernetes, from the script
# that the MPI operator mounts.
set -euo pipefail

if [[ ${DIN_DIST_HOSTS_FILE:-} ]]; then
  sed 's/#.*//' "$DIN_DIST_HOSTS_FILE"
elif [[ -x /etc/mpi/discover_hosts.sh ]]; then
  exec /etc/mpi/discover_hosts.sh
else
  echo "discover_hosts.sh: DIN_DIST_HOSTS_FILE must name a file of hosts outside Kubernetes. Received: nothing. Set it." >&2
  exit 2
fi
