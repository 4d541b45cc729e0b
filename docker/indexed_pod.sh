#!/bin/bash
# A pod of a Kubernetes Indexed Job: the first runs the launcher, the others serve it as hosts.
#
#   docker/indexed_pod.sh [launch/train.sh flags]
set -euo pipefail

if [[ ${JOB_COMPLETION_INDEX:?must be set, as Kubernetes does for an Indexed Job} == 0 ]]; then
  exec launch/train.sh "$@"
fi
exec docker/sshd.sh
