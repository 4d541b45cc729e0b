#!/usr/bin/env bash
# Sets up with the test dependencies, then runs the tests, lint and types among them.
#
#   launch/test.sh [pytest arguments]
#
# `launch/test.sh -m fast` takes two minutes and covers every room (tests/conftest.py says which tests). `--thorough` runs
# more combinations and longer jobs too. Tests go to two processes, unless the arguments say otherwise: `-n 0` (or --pdb)
# runs them in one.
set -euo pipefail

# shellcheck source=launch/common.sh
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/common.sh"

setup_flags=(--test)
num_gpus=$(count_gpus)
((num_gpus == 0)) || setup_flags+=(--gpu)
"$root/launch/setup.sh" "${setup_flags[@]}"

cd "$root"
# A file at a time, because tests of a file share fixtures. Much of what tests do is to wait for processes that start.
processes=(--numprocesses=2 --dist=loadfile --no-loadscope-reorder)
for argument; do
  case $argument in
    -n* | --numprocesses* | *no:xdist | --pdb | --trace) processes=() ;;
  esac
done
# What takes longest is named at the end, because the whole should stay under half an hour.
exec "$venv/bin/python" -m pytest "${processes[@]}" --durations=40 --durations-min=15 "$@"
