# shellcheck shell=bash disable=SC2034
# Shared by the launchers, which source it.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$(realpath -m "${DIN_DIST_VENV:-$root/.venv}")
cache=${DIN_DIST_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/din_dist} # of what was built

# A mistake of the user: one line, exit code 2.
die() {
  echo "$(basename "$0"): $*" >&2
  exit 2
}

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
