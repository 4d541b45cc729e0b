#!/usr/bin/env bash
# Sets up, prepares the data and trains: one command on a fresh machine.
#
#   launch/train.sh [--num_workers N] [trainer flags]          (all else: launch/train.sh --help)
#
# What happens after set-up is din_dist/cli/launch.py.
set -euo pipefail

# shellcheck source=launch/common.sh
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/common.sh"

num_gpus=$(count_gpus)
setup_flags=()
((num_gpus == 0)) || setup_flags+=(--gpu)

# In a session of its own, where Ctrl-C does not reach it ahead of the trap.
setsid setpriv --pdeathsig TERM "$root/launch/setup.sh" "${setup_flags[@]}" >&2 &
child=$!
trap 'stopped=1 interrupted=1; kill -TERM -- "-$child" "$child" 2>/dev/null || true' TERM INT
code=0
await "$child" || code=$?
[[ ! ${stopped:-} ]] || exit 75
((code == 0)) || exit "$code"

export DIN_DIST_VENV=$venv
exec "$venv/bin/python" -m din_dist.cli.launch --num_gpus="$num_gpus" "$@"
