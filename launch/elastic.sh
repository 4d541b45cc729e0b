#!/usr/bin/env bash
# Trains, and continues when workers are lost or added: launch/train.sh --elastic.
#
#   launch/elastic.sh --hosts_file FILE [--num_workers N] [--min_workers N] [--max_workers N] [trainer flags]
set -euo pipefail

exec "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/train.sh" --elastic "$@"
