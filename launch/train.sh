#!/usr/bin/env bash
# Sets up, prepares the data and trains: one command on a fresh machine.
#
#   launch/train.sh [--num_workers N] [trainer flags]          (all else: launch/train.sh --help)
#
# What happens after set-up is din_dist/cli/launch.py.
set -euo pipefail

# shellcheck source=launch/common.sh
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/common.sh"

set_up_and_run din_dist.cli.launch "$@"
