#!/usr/bin/env bash
# Builds the Horovod wheel for the TensorFlow that $PYTHON has (default: the checkout's .venv), and prints the wheel's path.
#
#   launch/horovod/build_horovod.sh [--gpu] [--check | --print_env | --take=DIR]
#
# The wheel is kept in ${DIN_DIST_CACHE:-~/.cache/din_dist}/wheels/KEY and built only when it is not there: 2 to 3 minutes on
# 2 cores. --gpu builds the NCCL operations, for which it takes nvcc. --check only tells whether the tools for a build are
# there (if one is due), --print_env only shows its settings. --take builds nothing: it keeps the wheel that lies in DIR. What is changed in Horovod, and why: launch/horovod/.
set -euo pipefail

horovod_version=0.28.1

# shellcheck source=launch/common.sh
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../common.sh"
python=${PYTHON:-$venv/bin/python}

device=cpu
action=build
take=
for flag; do
  case $flag in
    --gpu) device=gpu ;;
    --check | --print_env) action=${flag#--} ;;
    --take=?*) take=${flag#*=} ;;
    *) die "unknown flag $flag. Usage: launch/horovod/build_horovod.sh [--gpu] [--check | --print_env | --take=DIR]" ;;
  esac
done
command -v "$python" >/dev/null || die "there is no Python at $python. Run launch/setup.sh first, or set PYTHON."

find_cuda() {
  local home=${HOROVOD_CUDA_HOME:-${CUDA_HOME:-/usr/local/cuda}} nvcc
  if [[ ! -x $home/bin/nvcc ]]; then
    nvcc=$(command -v nvcc) ||
      die "--gpu takes nvcc, which is neither in $home/bin nor on PATH. Install the CUDA toolkit, or set HOROVOD_CUDA_HOME to it."
    home=$(dirname "$(dirname "$(readlink -f "$nvcc")")")
  fi
  echo "$home"
}

find_nccl() { # the one that pip installs with tensorflow[and-cuda], unless the user names another
  local home=${HOROVOD_NCCL_HOME:-$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/nvidia/nccl}
  [[ -f $home/include/nccl.h ]] ||
    die "NCCL is not in $home: no include/nccl.h there. Run launch/setup.sh --gpu, or set HOROVOD_NCCL_HOME to a folder with include/ and lib/."
  echo "$home"
}

# Named by the pinned TensorFlow, so that --check knows the wheel before TensorFlow is installed.
tensorflow_version=$(pinned_version tensorflow)
machine=$("$python" -c 'import platform, sys; print(f"cp{sys.version_info[0]}{sys.version_info[1]}-{platform.machine()}")')
# To be raised with every change to what is built, another TensorFlow among them; setup.cfg asks for these versions.
declare -A revision=([cpu]=13 [gpu]=14)
key=horovod$horovod_version+${revision[$device]}-tensorflow$tensorflow_version-$machine-$device
folder=$cache/wheels/$key

exit_if_built() {
  local wheel
  for wheel in "$folder"/horovod-*.whl; do
    [[ -f $wheel ]] || continue
    [[ $action == check ]] || echo "$wheel"
    exit 0
  done
}
if [[ $action != print_env ]]; then
  exit_if_built
  if [[ $take ]]; then
    tag=${machine%%-*}
    wheel=horovod-$horovod_version+din.${revision[$device]}-$tag-$tag-linux_${machine#*-}.whl
    [[ -f $take/$wheel ]] ||
      die "$take must hold the Horovod wheel of this checkout and Python. Received: no $wheel. Run launch/build_wheels.sh anew, or set up without --wheels."
    mkdir -p "$folder"
    cp "$take/$wheel" "$folder/$wheel.part"
    mv "$folder/$wheel.part" "$folder/$wheel" # whole or not at all
    exit_if_built
  fi
  require_command 'building Horovod' g++ g++
  require_command 'building Horovod' make make
  require_command 'building Horovod' patch patch
fi
# Of the headers named here Horovod includes none where it should. Until g++ 13 others brought them along.
settings=(
  "CXXFLAGS=${CXXFLAGS:-} -include cstdint -include stdexcept -include string"
  HOROVOD_WITH_TENSORFLOW=1 HOROVOD_WITHOUT_PYTORCH=1 HOROVOD_WITHOUT_MXNET=1 HOROVOD_WITH_GLOO=1 HOROVOD_WITHOUT_MPI=1
  "MAKEFLAGS=-j$(nproc)"
)
if [[ $device == gpu ]]; then
  cuda=$(find_cuda)
  settings+=(HOROVOD_GPU=CUDA HOROVOD_GPU_OPERATIONS=NCCL "HOROVOD_CUDA_HOME=$cuda")
fi
[[ $action != check ]] || exit 0
if [[ $device == gpu ]]; then
  nccl=$(find_nccl)
  settings+=("HOROVOD_NCCL_HOME=$nccl" HOROVOD_NCCL_LINK=SHARED)
fi
if [[ $action == print_env ]]; then
  printf '%s\n' "${settings[@]}"
  exit 0
fi

installed=$("$python" - <<'PYTHON'
import importlib.metadata

names = {"tensorflow", "tensorflow-cpu"}
print(*{d.version for d in importlib.metadata.distributions() if d.name.lower().replace("_", "-") in names})
PYTHON
)
[[ $installed == "$tensorflow_version" ]] ||
  die "$python must have the TensorFlow that launch/constraints.txt pins, $tensorflow_version. Found: ${installed:-none}. Run launch/setup.sh."

mkdir -p "$folder"
exec {lock}>"$folder/lock"
flock "$lock" # of two builds at once the second waits,
exit_if_built # and has the wheel of the first

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
log=$folder/build.log
echo "Building Horovod $horovod_version for $device: once, 2 to 3 minutes on 2 cores (log: $log)" >&2

# The tools stay out of the environment that is built for.
run_pip "$python" "$log" install --require-hashes --no-deps --target "$work/tools" \
  -r <(pinned cmake setuptools wheel cloudpickle packaging psutil pyyaml)
# Horovod's CMake files break on a space in TensorFlow's path: give them a path without.
ln -s "$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" "$work/site-packages"
export PYTHONPATH=$work/tools:$work/site-packages
# Checked before anything is unpacked: pip runs a source's setup.py to read its metadata.
run_pip "$python" "$log" download --dest "$work" --require-hashes --no-deps --no-build-isolation --no-binary horovod \
  -r <(pinned horovod)
sdist=$work/horovod-$horovod_version.tar.gz
tar -xzf "$sdist" -C "$work"
source_tree=$work/horovod-$horovod_version

# Ranks of different builds do not understand each other: told apart by their version, so that the preflight sees it.
[[ $(cat "$source_tree/horovod/__init__.py") == *"__version__ = '$horovod_version'"* ]] ||
  die "horovod/__init__.py must give the version, $horovod_version. Adapt launch/horovod/build_horovod.sh to this Horovod."
sed -i "s/^__version__ = .*/__version__ = '$horovod_version+din.${revision[$device]}'/" "$source_tree/horovod/__init__.py"

# What is ours in it: files, and changes to its own, each with its reason at its head.
cp -R "$root/launch/horovod/files/." "$source_tree"
cp "$root/din_dist/bounded_server.py" "$source_tree/horovod/runner/http" # which serves metrics here, and the store there
for patch in "$root"/launch/horovod/*.patch; do
  patch --directory="$source_tree" -p1 --fuzz=0 --batch --forward --no-backup-if-mismatch --input="$patch" >>"$log" 2>&1 ||
    die "launch/horovod/$(basename "$patch") must apply to Horovod $horovod_version as it is. Adapt it. Log: $log"
done

if [[ $device == gpu && ! ${HOROVOD_NCCL_HOME:-} ]]; then
  # pip's package has only libnccl.so.2, but linkers look for libnccl.so. At run time the wheel finds it relative to itself:
  # $ORIGIN is horovod/tensorflow in site-packages. Left alone, CMake would write this build's temporary folder there.
  mkdir "$work/nccl"
  ln -s "$nccl/lib/libnccl.so.2" "$work/nccl/libnccl.so"
  # shellcheck disable=SC2016
  settings+=("HOROVOD_NCCL_LIB=$work/nccl" "LDFLAGS=${LDFLAGS:-} "'-Wl,-rpath,$ORIGIN/../../nvidia/nccl/lib')
  sed -i '/^project(/a set(CMAKE_SKIP_RPATH ON)' "$source_tree/CMakeLists.txt"
fi

env "${settings[@]}" HOROVOD_CMAKE="$work/tools/cmake/data/bin/cmake" \
  "$python" -m pip wheel --no-cache-dir --no-build-isolation --no-deps --wheel-dir "$work" "$source_tree" >"$log" 2>&1 ||
  die "Horovod did not build: $(grep -m 1 -E ': (fatal )?error:|CMake Error' "$log"). Log: $log"
wheel=$(basename "$work"/horovod-*.whl)
mv "$work/$wheel" "$folder/$wheel.part"
mv "$folder/$wheel.part" "$folder/$wheel" # whole or not at all
exit_if_built
