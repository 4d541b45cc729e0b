# shellcheck shell=bash disable=SC2034
# Shared by the launchers, which source it.

# A mistake of the user: one line, exit code 2.
die() {
  echo "${0##*/}: $*" >&2
  exit 2
}

# Where no process can be started, bash retries for 15 s and says no more. This looks beforehand, and starts none.
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
constraints=$root/launch/constraints.txt # each version that is installed, with the SHA-256 of each of its files

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
  local python=$1 log=$2 error file digest
  shift 2
  # With no retries pip would not say that it could not connect.
  "$python" -m pip --disable-pip-version-check --no-input --retries 4 "$@" >"$log" 2>&1 && return
  if grep -qE '(NewConnection|ConnectTimeout|ReadTimeout|Proxy|SSL|ConnectionReset|NameResolution|Protocol)Error' "$log"; then
    die "the Python package index cannot be reached. Connect to it, or set PIP_INDEX_URL to one that can be reached. Log: $log"
  fi
  if grep -q 'DO NOT MATCH THE HASHES' "$log"; then
    file=$(sed -nE '/DO NOT MATCH/,$ s/^    ([^ ]+ from [^ ]*[^ :]).*:$/\1/p' "$log") # NAME==VERSION from ADDRESS
    digest=$(sed -nE 's/^ +Got +//p' "$log")
    die "${file%% *} must have a SHA-256 of launch/constraints.txt. Received: $digest ${file#* }. Have the package index serve the file that was pinned, or set PIP_INDEX_URL to one that does. Log: $log"
  fi
  if grep -q 'must have their versions pinned with ==\|Hashes are required in --require-hashes mode' "$log"; then
    file=$(sed -nE '/(pinned with ==|Hashes are required)/,$ s/^    ([A-Za-z0-9_.-]+).*/\1/p' "$log" | head -n 1)
    die "launch/constraints.txt must pin all that setup.cfg asks for. Received: no pin of $file. Run launch/pin.sh. Log: $log"
  fi
  error=$(grep 'ERROR: ' "$log" || tail -n 1 "$log")
  die "pip failed: ${error##*$'\n'}. Correct this and run again. Log: $log"
}

# pinned NAMES...: their lines of constraints.txt, as requirements whose digests every version of pip checks.
pinned() {
  awk -v names=" $* " '/^[^ #]/ { split($1, pin, "=="); wanted = index(names, " " pin[1] " ") } wanted' "$constraints"
}

pinned_version() { # of one package
  pinned "$1" | sed -n '1s/^[^=]*==\([^ ]*\).*/\1/p'
}

# requirements_of PYTHON EXTRAS...: what setup.cfg asks for. The index has only the source of Horovod, without our version.
requirements_of() {
  "$1" - "$root/setup.cfg" "${@:2}" <<'PYTHON'
import configparser
import re
import sys

config = configparser.ConfigParser()
config.read(sys.argv[1])
extras = config["options.extras_require"]
asked = [config["options"]["install_requires"], *(extras[name] for name in sys.argv[2:])]
print(re.sub(r"\+din\.\d+", "", "\n".join(asked)))
PYTHON
}

# renew_pip PYTHON LOG: the pip that Python brings along may not check files by digests of constraints. Ours does.
renew_pip() {
  run_pip "$1" "$2" install --require-hashes --no-deps -r <(pinned pip)
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

# set_up_and_run MODULE ARGUMENTS...: sets up for this machine's GPUs, and goes on as the module, which gets their number.
set_up_and_run() {
  local module=$1 num_gpus code=0 setup_flags=()
  shift
  num_gpus=$(count_gpus)
  ((num_gpus == 0)) || setup_flags+=(--gpu)
  # In a session of its own, where Ctrl-C does not reach it ahead of the trap.
  setsid setpriv --pdeathsig TERM "$root/launch/setup.sh" "${setup_flags[@]}" >&2 &
  child=$!
  trap 'stopped=1 interrupted=1; kill -TERM -- "-$child" "$child" 2>/dev/null || true' TERM INT
  await "$child" || code=$?
  [[ ! ${stopped:-} ]] || exit 75
  ((code == 0)) || exit "$code"
  export DIN_DIST_VENV=$venv
  exec "$venv/bin/python" -m "$module" --num_gpus="$num_gpus" "$@"
}

# make_tools FOLDER NAMES...: an environment in FOLDER with these tools of those who release, as pinned.
make_tools() {
  local folder=$1 log=$cache/tools.log python=${PYTHON:-python3}
  shift
  mkdir -p "$cache"
  "$python" -m venv "$folder" >"$log" 2>&1 || die "no virtual environment could be made with $python: $(tail -n 1 "$log"). Log: $log"
  renew_pip "$folder/bin/python" "$log"
  run_pip "$folder/bin/python" "$log" install --require-hashes -c "$constraints" --only-binary :all: "$@"
}

# resolve UV REQUIREMENTS OUTPUT FLAGS...: all that the requirements need on any Python that we support, with its
# digests. Versions that are in OUTPUT already are preferred. Nothing of what is asked for is run: only Horovod,
# promise and pyspark may lack a wheel, and pyproject.toml says what they need. colorama: some packages want it on Windows.
resolve() {
  # What tells pip where the index is tells uv too.
  [[ ! ${PIP_INDEX_URL:-} ]] || local -x UV_DEFAULT_INDEX=${UV_DEFAULT_INDEX:-$PIP_INDEX_URL}
  [[ ! ${PIP_CERT:-} ]] || local -x SSL_CERT_FILE=${SSL_CERT_FILE:-$PIP_CERT}
  # One version for every Python, where there is one.
  "$1" --quiet --project "$root" pip compile "$2" --output-file "$3" --universal --python-version 3.11 \
    --fork-strategy fewest --generate-hashes --no-emit-package colorama \
    --only-binary :all: --no-binary horovod --no-binary promise --no-binary pyspark --no-header --no-annotate "${@:4}" >/dev/null ||
    die "uv must find versions that fit setup.cfg and its own flags. Received: the answer above. Correct one of them."
}
