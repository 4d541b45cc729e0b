#!/usr/bin/env bash
# Prints the hosts that an elastic job may use now, a line HOST or HOST:SLOTS each; the launcher asks every
# second, and tells Horovod of those that answer.
#
# From the file $DIN_DIST_HOSTS_FILE, which may change at any time (# begins a comment); else, in Kubernetes, from the script
# that the MPI operator mounts.
set -euo pipefail

if [[ ${DIN_DIST_HOSTS_FILE:-} ]]; then
  # A line that is being written, or is no host, must not end the job.
  sed -nE 's/#.*//; s/[[:space:]]//g; /^[A-Za-z0-9._-]+$/s/$/:1/; /^[A-Za-z0-9._-]+:[1-9][0-9]*$/p' "$DIN_DIST_HOSTS_FILE"
elif [[ -x /etc/mpi/discover_hosts.sh ]]; then
  exec /etc/mpi/discover_hosts.sh
else
  echo "discover_hosts.sh: DIN_DIST_HOSTS_FILE must name a file of hosts outside Kubernetes. Received: nothing. Set it." >&2
  exit 2
fi
