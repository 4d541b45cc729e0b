#!/usr/bin/env bash
# Sets up, prepares the data and trains: one command on a fresh machine.
#
#   launch/train.sh [--num_workers N] [trainer flags]
#   launch/train.sh --elastic --hosts_file FILE [--num_workers N] [--min_workers N] [--max_workers N] [trainer flags]
#
# N workers (default: one a GPU, else 2) run under horovodrun; a single one runs without. With no trainer flags it trains with
# launch/flags/quick.flags. The last line on stdout is the summary as JSON, everything else goes to stderr. SIGTERM and SIGINT
# let the workers finish their step and write a checkpoint.
#
# --elastic goes on when workers are lost or added: FILE has a line HOST:SLOTS for each host and may change at any time. It
# starts with N workers (default: 2), goes on with as few as --min_workers (1) and grows to --max_workers (no limit). A host
# whose worker failed is left out for 10 seconds, longer each time. With fewer than --min_workers for --rejoin_timeout_seconds
# it writes a checkpoint and ends with code 75. Prepared data and --output_dir must be the same on all.
#
# Exit codes: 0 done, 2 wrong input, 75 stopped by a signal (run it again to go on), else what the first failed worker gave.
# Environment: that of launch/setup.sh; DIN_DIST_DEVICE=cpu or gpu overrides the search for GPUs.
set -euo pipefail

# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

num_gpus=$(count_gpus)
num_workers=$((num_gpus > 0 ? num_gpus : 2))
trainer_flags=()
elastic=
hosts_file=
min_workers=1
max_workers=
while (($#)); do
  case $1 in
    --help | -help | -h)
      sed -n '2,/^set/{/^set/d; s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"
      "$root/launch/setup.sh" >&2
      "$venv/bin/python" -m din_dist.cli.train --help | sed '1,/^flags:/d' || true
      exit 0
      ;;
    --num_workers=* | -num_workers=*) num_workers=${1#*=} ;;
    --num_workers | -num_workers)
      num_workers=${2-}
      shift $(($# > 1))
      ;;
    --elastic) elastic=1 ;;
    --hosts_file=*) hosts_file=${1#*=} ;;
    --min_workers=*) min_workers=${1#*=} ;;
    --max_workers=*) max_workers=${1#*=} ;;
    --hosts_file | --min_workers | --max_workers)
      declare "${1#--}=${2-}"
      shift $(($# > 1))
      ;;
    *) trainer_flags+=("$1") ;;
  esac
  shift
done
[[ $num_workers =~ ^[1-9][0-9]{0,3}$ ]] ||
  die "--num_workers must be a whole number from 1. Received: '$num_workers'. Give the number of processes to train with."
if [[ $elastic ]]; then
  for setting in min_workers max_workers; do
    [[ ${!setting} =~ ^([1-9][0-9]{0,3}|)$ ]] ||
      die "--$setting must be a whole number from 1. Received: '${!setting}'. Give a number of workers."
  done
  ((min_workers <= num_workers && num_workers <= ${max_workers:-9999})) ||
    die "--num_workers (default: one a GPU, else 2) must be from --min_workers to --max_workers. Received: $num_workers, with $min_workers and ${max_workers:-no limit}. Correct one of them."
  [[ ! $hosts_file || -r $hosts_file ]] ||
    die "--hosts_file must be a file with a line HOST:SLOTS for each host. Received: '$hosts_file', which cannot be read. Correct the path."
  if [[ $hosts_file ]]; then
    wrong=$(grep -nvE '^[[:space:]]*([A-Za-z0-9._-]+(:[1-9][0-9]*)?)?[[:space:]]*(#.*)?$' "$hosts_file" | head -n 1 || true)
    [[ ! $wrong ]] ||
      die "--hosts_file must have a line HOST or HOST:SLOTS for each host. Received: $hosts_file, line ${wrong/:/: }. Correct it."
    grep -qE '^[[:space:]]*[A-Za-z0-9]' "$hosts_file" ||
      die "--hosts_file must have a line HOST or HOST:SLOTS for each host. Received: $hosts_file, which names none. Add one."
  fi
  [[ $hosts_file || -x /etc/mpi/discover_hosts.sh ]] ||
    die "--elastic needs --hosts_file outside Kubernetes. Received: none. Give a file with a line HOST:SLOTS for each host."
elif [[ $hosts_file || $max_workers || $min_workers != 1 ]]; then
  die "--hosts_file, --min_workers and --max_workers belong to --elastic. Received: no --elastic. Add it, or drop them."
fi
((${#trainer_flags[@]})) || trainer_flags=("--flagfile=$root/launch/flags/quick.flags")

run_dir=$(mktemp -d)
trap 'rm -rf "$run_dir"' EXIT
export DIN_DIST_RUN_DIR=$run_dir DIN_DIST_VENV=$venv TF_CPP_MIN_LOG_LEVEL=${TF_CPP_MIN_LOG_LEVEL:-2}
if [[ -t 2 ]]; then
  DIN_DIST_PROGRESS_TTY=$(tty <&2) # for the progress bar: the workers' own stderr is a pipe
  export DIN_DIST_PROGRESS_TTY
fi

stage=setup
stopped=
child=
# shellcheck disable=SC2329 # the traps call it
stop() {
  local signal=TERM
  [[ ! $elastic ]] || signal=INT # TERM would ask each worker to leave, and the others to go on
  [[ ! $stopped || $1 != INT ]] || signal=INT # a second Ctrl-C: the trainer then ends without its checkpoint
  stopped=1
  interrupted=1
  if [[ $stage == train ]]; then
    # Not by horovodrun, which kills the workers 5 seconds after it is told to stop, checkpoint or no checkpoint.
    touch "$run_dir/stop" # for workers that are yet to start
    cat "$run_dir"/*.pid 2>/dev/null | xargs -r kill -s "$signal" 2>/dev/null || true
    # Without workers, horovodrun waits for hosts and hears nothing.
    [[ ! $elastic ]] || compgen -G "$run_dir/*.pid" >/dev/null || kill -KILL -- "-$child" 2>/dev/null || true
  else
    kill -TERM -- "-$child" "$child" 2>/dev/null || true
  fi
}
trap 'stop TERM' TERM
trap 'stop INT' INT

# run COMMAND...: in a session of its own, where Ctrl-C does not reach it ahead of stop. It ends when this script is killed.
run() {
  [[ ! $stopped ]] || return 75
  setsid setpriv --pdeathsig TERM "$@" &
  child=$!
  echo "$child" >"$run_dir/child"
  await "$child"
}

finish() {
  if [[ $stopped && $1 == 143 ]]; then exit 75; fi # SIGTERM came before anything was there to catch it
  exit "$1"
}

setup_flags=()
((num_gpus == 0)) || setup_flags+=(--gpu)
run "$root/launch/setup.sh" "${setup_flags[@]}" >&2 || finish $?

# Also checks every flag: a wrong one gives its one line here, not one from each worker.
stage=prepare
run "$venv/bin/python" -m din_dist.cli.prepare_data "${trainer_flags[@]}" >&2 || finish $?

stage=train
code=0
if [[ $elastic ]]; then
  horovodrun=(-np "$num_workers" --min-np "$min_workers" --host-discovery-script "$root/launch/discover_hosts.sh")
  horovodrun+=(--elastic-timeout 86400 --blacklist-cooldown-range 10 300)
  [[ ! $max_workers ]] || horovodrun+=(--max-np "$max_workers")
  [[ ! $hosts_file ]] || DIN_DIST_HOSTS_FILE=$(realpath "$hosts_file")
  export DIN_DIST_HOSTS_FILE
else
  horovodrun=(-np "$num_workers")
fi
if ((num_workers == 1)) && [[ ! $elastic ]]; then
  run "$root/launch/worker.sh" "${trainer_flags[@]}" || code=$?
else
  # horovodrun puts "[RANK]<stdout>:" before each line. Rank 0 speaks for the job and loses that, the others keep their rank.
  # On stdout only the chief speaks, which in an elastic job may be another than at the start.
  # What horovodrun says itself, that a worker failed, is shown only when no worker did.
  mkfifo "$run_dir/stdout" "$run_dir/stderr"
  sed -u -n -E "
    s/^\[[0-9]+\]<stdout>://p; t
    w $run_dir/horovodrun.stdout" <"$run_dir/stdout" &
  sed -u -n -E "
    s/^\[0\]<stderr>://p; t
    s/^\[[0-9]+\]<stderr>:\{/{/p; t # of --log_format=json, which has the rank in it
    s/^\[([0-9]+)\]<stderr>:/[\1] /p; t
    w $run_dir/horovodrun.stderr" <"$run_dir/stderr" >&2 &
  if [[ $elastic ]]; then
    # A worker gave up for want of others, after a checkpoint. Horovod would wait for them on and on.
    (
      until grep -qs ' 79$' "$run_dir/failures" || grep -qs 'status code 79\.' "$run_dir/horovodrun.stdout"; do
        [[ -d $run_dir ]] || exit 0
        sleep 1
      done
      touch "$run_dir/gave_up"
      sleep 5                               # the other workers give up too
      kill -KILL -- "-$(<"$run_dir/child")" # it does not hear TERM while it waits for hosts
    ) 2>/dev/null &
    watcher=$!
  fi
  run "$venv/bin/horovodrun" --gloo "${horovodrun[@]}" "$root/launch/worker.sh" "${trainer_flags[@]}" \
    >"$run_dir/stdout" 2>"$run_dir/stderr" || code=$?
  [[ ! $elastic ]] || kill "$watcher" 2>/dev/null || true
  wait # for the last lines
fi

if [[ -e $run_dir/gave_up || ($elastic && $stopped && $code == 137 && ! -s $run_dir/failures) ]]; then
  code=75
elif [[ $elastic && $code == 0 ]]; then
  : # whoever failed was not needed
elif [[ -s $run_dir/failures ]]; then
  # The first to fail takes the others down; in an elastic job they went on, until the last. One that knows the wrong input
  # knows best.
  [[ $elastic ]] && which="tail" || which="head"
  read -r rank code < <(grep -m 1 ' 2$' "$run_dir/failures" || "$which" -n 1 "$run_dir/failures")
  case $code in
    2 | 75) ;; # the trainer gave the reason
    137) echo "train.sh: worker $rank was killed (SIGKILL). Often memory ran out: use fewer workers or a smaller batch." >&2 ;;
    *) [[ $stopped ]] || echo "train.sh: worker $rank ended with exit code $code, see above." >&2 ;;
  esac
elif ((code != 0)); then
  cat "$run_dir"/horovodrun.* >&2
fi
finish "$code"
