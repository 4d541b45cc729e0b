#!/usr/bin/env bash
# Sets up, and trains on each new day of a log: the command that a scheduler calls.
#
#   launch/daily.sh --log=DIR --from=DATE [--work_dir=DIR] [flags of launch/train.sh]     (all else: launch/daily.sh --help)
#
# What happens after set-up is din_dist/cli/daily.py.
set -euo pipefail

# shellcheck source=launch/common.sh
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/common.sh"

set_up_and_run din_dist.cli.daily "$@"
