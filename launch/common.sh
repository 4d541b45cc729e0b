# shellcheck shell=bash disable=SC2034
# Shared by the launchers, which source it.

# A mistake of the user: one line, exit code 2.
die() {
  echo "${0##*/}: $*" >&2
  exit 2
}

# Where no process can be started, bash retries for 15 s and says no more than that. This looks beforehand, and starts none.
require_processes() {
  local needed=32 limit='' used=0 line process threads controllers folder
  [[ -r /proc/self/limits && -r /proc/self/cgroup ]] || return 0
  while read -r line; do
    [[ ! $line =~ ^Max\ processes\ +([0-9]+) ]] || limit=${BASH_REMATCH[1]}
  done </proc/self/limits
  if [[ $limit ]] && ((EUID != 0 && limit < 4096)); then # the usual tens of thousands need no counting
    for process in /proc/[0-9]*; do
      [[ -O $process ]] || continue
      threads=("$process"/task/*)
      used=$((used + ${#threads[@]}))
    done
    ((limit - used >= needed)) ||
      die "this user must be allowed $needed more processes. Received: a limit of $limit (ulimit -u), $used in use. Raise it."
  fi
  while IFS=: read -r _ controllers folder; do
    case $controllers in
      '') folder=/sys/fs/cgroup$folder ;;
      pids) folder=/sys/fs/cgroup/pids$folder ;;
      *) continue ;;
    esac
    while [[ $folder == /sys/fs/cgroup* ]]; do # a group limits those within it too
      folder=${folder%/}
      if { read -r limit <"$folder/pids.max" && read -r used <"$folder/pids.current"; } 2>/dev/null; then
        [[ $limit == max ]] || ((limit - used >= needed)) ||
          die "this container or service must be allowed $needed more processes. Received: a limit of $limit ($folder/pids.max), $used in use. Raise it."
      fi
      folder=${folder%/*}
    done
  done </proc/self/cgroup
}
require_processes

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$(realpath -m "${DIN_DIST_VENV:-$root/.venv}")
cache=${DIN_DIST_CACHE:-${XDG_CACHE_HOME:-~/.cache}/din_dist} # of what was built; ~ is known without HOME too

require_command() { # what takes it, the command, its Debian package
  command -v "$2" >/dev/null || die "$1 takes $2, which is not on PATH. Install it (Debian, Ubuntu: apt-get install $3)."
}

# The GPUs to train on. DIN_DIST_DEVICE=cpu leaves them alone; DIN_DIST_DEVICE=gpu insists on one.
count_gpus() {
  local device=${DIN_DIST_DEVICE:-} count=0
  [[ $device =~ ^(cpu|gpu|)$ ]] || die "DIN_DIST_DEVICE must be cpu or gpu. Received: '$device'."
  if [[ $device != cpu ]]; then
    count=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU ' || true)
    # nvidia-smi lists those too that this variable hides: what comes after a name that is none, as -1.
    if [[ ${CUDA_VISIBLE_DEVICES+set} && $count != 0 ]]; then
      local name names visible=0
      IFS=, read -ra names <<<"$CUDA_VISIBLE_DEVICES"
      for name in "${names[@]}"; do
        [[ $name =~ ^[0-9GM] ]] || break
        visible=$((visible + 1))
      done
      ((visible >= count)) || count=$visible
    fi
    [[ $device != gpu || $count != 0 ]] ||
      die "DIN_DIST_DEVICE is gpu, but nvidia-smi -L lists none. Install the NVIDIA driver, or set DIN_DIST_DEVICE=cpu."
  fi
  echo "$count"
}

# run_pip PYTHON LOG ARGUMENTS...: what pip says becomes LOG; its failure becomes one line.
run_pip() {
  local python=$1 log=$2 error
  shift 2
  # With no retries pip would not say that it could not connect.
  "$python" -m pip --disable-pip-version-check --no-input --retries 4 "$@" >"$log" 2>&1 && return
  if grep -qE '(NewConnection|ConnectTimeout|ReadTimeout|Proxy|SSL|ConnectionReset|NameResolution|Protocol)Error' "$log"; then
    die "the Python package index cannot be reached. Connect to it, or set PIP_INDEX_URL to one that can be reached. Log: $log"
  fi
  error=$(grep 'ERROR: ' "$log" || tail -n 1 "$log")
  die "pip failed: ${error##*$'\n'}. Correct this and run again. Log: $log"
}

# await PROCESS: its exit code. A trapped signal ends bash's wait too, and says so by setting interrupted.
await() {
  local code
  while
    interrupted=
    code=0
    wait "$1" || code=$?
    [[ $interrupted ]]
  do :; done
  return "$code"
}
