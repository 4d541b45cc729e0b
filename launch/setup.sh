#!/usr/bin/env bash
# Makes the virtual environment that the other launchers run in, at the versions of launch/constraints.txt.
#
#   launch/setup.sh [--gpu] [--test] [--wheels=DIR]
#
# --gpu installs tensorflow[and-cuda] and Horovod with NCCL; --test adds what the tests need. Run again, it does nothing unless
# something changed. --wheels takes Horovod and the kernels from the wheels that launch/build_wheels.sh made, so that nothing is
# built here. PYTHON is the interpreter to start from (python3), DIN_DIST_VENV the environment's place (.venv in the
# checkout), DIN_DIST_CACHE where what was built is kept (~/.cache/din_dist).
set -euo pipefail

# shellcheck source=launch/common.sh
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/common.sh"

device=cpu
tests=
wheels=
for flag; do
  case $flag in
    --gpu) device=gpu ;;
    --test) tests=+test ;;
    --wheels=?*) wheels=${flag#*=} ;;
    *) die "unknown flag $flag. Usage: launch/setup.sh [--gpu] [--test] [--wheels=DIR]" ;;
  esac
done

base_python=${PYTHON:-$venv/bin/python}
[[ ${PYTHON:-} || -x $base_python ]] || base_python=python3
command -v "$base_python" >/dev/null ||
  die "din_dist needs Python 3.11 or newer. Found: no $base_python. Install it (Debian, Ubuntu: apt-get install python3 python3-venv), or set PYTHON."
version=$("$base_python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')

# The stamp says what a finished set-up was made from; while one is under way it says "unfinished".
stamp=$venv/din_dist_setup
digest=$(
  cd "$root"
  {
    sha256sum setup.cfg pyproject.toml launch/{common.sh,constraints.txt,build_kernels.sh,setup.sh} din_dist/{__init__.py,bounded_server.py,kernels/*.{cc,h}}
    find launch/horovod -type f -print0 | LC_ALL=C sort -z | xargs -0 sha256sum
  } | sha256sum | cut -c -16
)
made_from="$venv from $root python$version $digest $device"
exit_if_done() {
  local found=
  [[ ! -f $stamp ]] || found=$(<"$stamp")
  # One for GPUs serves where none is found too, as for a launcher in a cluster; but not one who wants none.
  if [[ $device == cpu && ${DIN_DIST_DEVICE:-} != cpu ]]; then
    found=${found/% gpu/ cpu}
    found=${found/% gpu+test/ cpu+test}
  fi
  if [[ $found == "$made_from+test" || $found == "$made_from$tests" ]]; then exit 0; fi
}
exit_if_done

[[ $(printf '%s\n' 3.11 "$version" | sort -V | head -n 1) == 3.11 ]] ||
  die "din_dist needs Python 3.11 or newer. Found: $version ($base_python). Install a newer one and name it: PYTHON=python3.11 $0"
"$base_python" -c 'import ensurepip, venv' 2>/dev/null ||
  die "$base_python lacks the venv module. Install it (Debian, Ubuntu: apt-get install python3-venv), or set PYTHON to another Python."
for present in "$venv"/lib/python3.*; do
  [[ ! -d $present || $present == "$venv/lib/python$version" ]] ||
    die "$venv was made with $(basename "$present"), not Python $version. Remove that folder, or set DIN_DIST_VENV to another place."
done
build_flags=()
[[ $device == cpu ]] || build_flags+=(--gpu)
if [[ $wheels ]]; then
  PYTHON=$base_python "$root/launch/horovod/build_horovod.sh" "${build_flags[@]}" --take="$wheels" >/dev/null
  PYTHON=$base_python "$root/launch/build_kernels.sh" --take="$wheels"
fi
PYTHON=$base_python "$root/launch/horovod/build_horovod.sh" "${build_flags[@]}" --check
PYTHON=$base_python "$root/launch/build_kernels.sh" --check

mkdir -p "$venv"
exec {lock}>"$venv/din_dist_setup.lock"
flock "$lock" # of two set-ups at once the second waits,
exit_if_done  # and has nothing left to do

# Every file is checked before anything in it is used. Nothing is built with tools that pip would fetch unchecked.
pip_flags=(--require-hashes -c "$constraints" --no-build-isolation)
# An environment that was moved, or whose set-up was cut off, cannot be trusted to hold what pip finds in it.
if [[ -f $stamp && $(<"$stamp") != "$venv from "* ]]; then
  pip_flags+=(--ignore-installed)
  rm -rf "$venv"/lib/python3.*/site-packages/pip{,-*} # which venv then brings anew
fi
echo unfinished >"$stamp"

log=$venv/din_dist_setup.log
echo "Setting up $venv for $device: one or two minutes (log: $log)" >&2
"$base_python" -m venv "$venv" >"$log" 2>&1 || die "no virtual environment could be made at $venv: $(tail -n 1 "$log"). Log: $log"
python=$venv/bin/python
renew_pip "$python" "$log"

tensorflow='tensorflow-cpu'
other='tensorflow'
if [[ $device == gpu ]]; then
  tensorflow='tensorflow[and-cuda]'
  other='tensorflow-cpu'
fi
# The two TensorFlow packages own the same files, so one has to go before the other comes.
if "$python" -m pip show "$other" >/dev/null 2>&1; then
  run_pip "$python" "$log" uninstall --yes tensorflow tensorflow-cpu horovod
fi
run_pip "$python" "$log" install "${pip_flags[@]}" "$tensorflow" setuptools
wheel=$(PYTHON=$python "$root/launch/horovod/build_horovod.sh" "${build_flags[@]}")
# Its version says nothing of the TensorFlow that it was built for, so pip must not take the installed one for the same.
run_pip "$python" "$log" install --force-reinstall --no-deps --no-build-isolation "$wheel" --editable "$root"
# All that setup.cfg asks for, with this Horovod, which is no requirement of one worker.
requirements=$(requirements_of "$python" "$device" ${tests:+test})
digest_of_wheel=$(sha256sum <"$wheel" | cut -c -64)
run_pip "$python" "$log" install "${pip_flags[@]}" -r <(printf '%s\n' "$requirements" "$wheel --hash=sha256:$digest_of_wheel")
PYTHON=$python "$root/launch/build_kernels.sh"

echo "$made_from$tests" >"$stamp"
