#!/usr/bin/env bash
# Sets up with the test dependencies, then runs the tests, lint and types among them.
#
#   launch/test.sh [pytest arguments]
set -euo pipefail

# shellcheck source=launch/common.sh
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/common.sh"

setup_flags=(--test)
num_gpus=$(count_gpus)
((num_gpus == 0)) || setup_flags+=(--gpu)
"$root/launch/setup.sh" "${setup_flags[@]}"

cd "$root"
# All of them go to two processes, a file at a time: much of what they do is to wait for processes that start.
(($#)) || set -- --numprocesses=2 --dist=loadfile --no-loadscope-reorder
exec "$venv/bin/python" -m pytest "$@"
