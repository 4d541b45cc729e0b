#!/usr/bin/env bash
# One trainer process, started by launch/train.sh or by its horovodrun. Leaves in $DIN_DIST_RUN_DIR the process id, by which
# train.sh stops it, and a failure's exit code, which horovodrun does not tell.
set -euo pipefail

# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

rank=${HOROVOD_RANK:-0}
if [[ ! -d $DIN_DIST_RUN_DIR ]]; then # on another host than train.sh, which learns the exit code from horovodrun then
  DIN_DIST_RUN_DIR=$(mktemp -d)
  trap 'rm -rf "$DIN_DIST_RUN_DIR"' EXIT
fi
[[ $rank == 0 || ${HOROVOD_ELASTIC-} ]] || exec >&2 # stdout is for the summary
exec {stderr}>&2 2>/dev/null # bash's own remark on a killed process is of no use to anyone
"$venv/bin/python" -m din_dist.cli.train "$@" 2>&"$stderr" {stderr}>&- &
child=$!
trap 'interrupted=1; kill -TERM "$child"' TERM # by horovodrun, when another worker failed
echo "$child" >"$DIN_DIST_RUN_DIR/$rank.$$.pid" # in an elastic job another worker may have this rank later
[[ ! -e $DIN_DIST_RUN_DIR/stop ]] || kill -TERM "$child" # train.sh looked for the process id before it was there

code=0
await "$child" || code=$?
((code == 0)) || echo "$rank $code" >>"$DIN_DIST_RUN_DIR/failures"
exit "$code"
