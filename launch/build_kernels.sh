#!/usr/bin/env bash
# Compiles din_dist/kernels, our own operations for CPUs, and puts them into the environment whose bin/python is $PYTHON
# (default: the checkout's .venv).
#
#   launch/build_kernels.sh [--check | --to=FOLDER | --take=DIR]
#
# What was compiled is kept in ${DIN_DIST_CACHE:-~/.cache/din_dist}/kernels/KEY, and compiled only when it is not there: some
# seconds. --check only tells whether the compiler is there (if it is needed). --to puts the library into FOLDER instead, and
# beside it the KEY of what it was made from. --take compiles nothing: it keeps the library of our wheel in DIR.
set -euo pipefail

# shellcheck source=launch/common.sh
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/common.sh"
python=${PYTHON:-$venv/bin/python}
usage='Usage: launch/build_kernels.sh [--check | --to=FOLDER | --take=DIR]'
check='' take=''
folder=$(dirname "$(dirname "$python")")/lib/din_dist
(($# <= 1)) || die "one flag at most. $usage"
case ${1:-} in
  '') ;;
  --check) check=1 ;;
  --to=?*) folder=${1#*=} ;;
  --take=?*) take=${1#*=} ;;
  *) die "unknown flag $1. $usage" ;;
esac
command -v "$python" >/dev/null || die "there is no Python at $python. Run launch/setup.sh first, or set PYTHON."

# variables.cc keeps to the C++ interface of one TensorFlow, the others to its C interface, the same in all its versions.
sources=$root/din_dist/kernels
version=$("$python" -c 'from importlib import metadata
versions = {found.name.replace("_", "-"): found.version for found in metadata.distributions()}
print(versions.get("tensorflow") or versions.get("tensorflow-cpu", ""))')
if [[ ! $version ]]; then # --check comes before it is installed
  version=$(pinned_version tensorflow)
fi
key=$(cd "$root" && { sha256sum din_dist/kernels/*.{cc,h} launch/build_kernels.sh && echo "$version"; } | sha256sum | cut -c -16)-$(uname -m)
compiled=$cache/kernels/$key
if [[ $take ]]; then
  [[ ! -f $compiled/kernels.so ]] || exit 0
  mkdir -p "$cache/kernels"
  work=$(mktemp -d "$cache/kernels/.new.XXXXXX")
  trap 'rm -rf "$work"' EXIT
  "$python" - "$take" "$key" "$work/kernels.so" <<'PYTHON' ||
import pathlib, sys, zipfile
folder, key, target = sys.argv[1:]
for path in sorted(pathlib.Path(folder).glob("din_dist-*.whl")):
    with zipfile.ZipFile(path) as wheel:
        if "din_dist/kernels/kernels.key" in wheel.namelist() and wheel.read("din_dist/kernels/kernels.key").decode().strip() == key:
            pathlib.Path(target).write_bytes(wheel.read("din_dist/kernels/kernels.so"))
            sys.exit()
sys.exit(1)
PYTHON
    die "$take must hold a wheel of din_dist with the kernels of this checkout, $key. Received: none. Run launch/build_wheels.sh anew, or set up without --wheels."
  chmod 755 "$work" "$work/kernels.so"
  mv -T "$work" "$compiled" 2>/dev/null || [[ -f $compiled/kernels.so ]]
  exit 0
fi
[[ -f $compiled/kernels.so ]] || require_command 'compiling the kernels' g++ g++
[[ ! $check ]] || exit 0

if [[ ! -f $compiled/kernels.so ]]; then
  mkdir -p "$cache/kernels"
  work=$(mktemp -d "$cache/kernels/.new.XXXXXX")
  trap 'rm -rf "$work"' EXIT
  # Not imported, which takes as long as to compile.
  tensorflow=$("$python" -c 'import importlib.util; print(*importlib.util.find_spec("tensorflow").submodule_search_locations)')
  # Weights must come out of an update with the same bits on every processor, so products and sums are contracted only where
  # gradients are summed over all ranks afterwards.
  flags=(-std=c++17 -O3 -fPIC -ffp-contract=off -fno-math-errno -fvisibility=hidden -Wall -Wextra -Wno-psabi)
  of_tensorflow=(-isystem "$tensorflow/include" -D_GLIBCXX_USE_CXX11_ABI=1 -DEIGEN_MAX_ALIGN_BYTES=64 # as it was compiled
    "-DDIN_TENSORFLOW=\"$version\"")
  # One of the passes for each instruction set; which to use is found out when they are loaded.
  compile_passes() { # name, floats in a register, flags
    g++ "${flags[@]}" -ffp-contract=fast "${@:3}" "-DDIN_ISA=$1" "-DDIN_LANES=$2" -c "$sources/attention.cc" -o "$work/$1.o"
  }
  avx512=(-mavx512f -mavx512dq -mavx512vl -mavx512bw -mfma -mbmi2 -mprefer-vector-width=512)
  bfloat16=() # g++ knows it from version 10 on
  [[ $(uname -m) != x86_64 ]] || ! g++ -mavx512bf16 -x c++ -E /dev/null &>/dev/null || bfloat16=(-DDIN_BFLOAT16)
  amx=() # from version 11 on
  [[ ! ${bfloat16[*]} ]] || ! g++ -mamx-bf16 -x c++ -E /dev/null &>/dev/null || amx=(-DDIN_AMX)
  compile_all() { # steps joined by &&, for bash does not stop at a failure in what is followed by ||
    compile_passes plain 4 &&
      if [[ $(uname -m) == x86_64 ]]; then
        compile_passes avx2 8 -mavx2 -mfma -mbmi2 &&
          compile_passes avx512 16 "${avx512[@]}"
      fi &&
      if [[ ${bfloat16[*]} ]]; then
        compile_passes avx512_bf16 16 "${avx512[@]}" "${bfloat16[@]}" -mavx512bf16
      fi &&
      if [[ ${amx[*]} ]]; then
        compile_passes amx 16 "${avx512[@]}" "${bfloat16[@]}" -mavx512bf16 -mamx-tile -mamx-bf16 -DDIN_TILES
      fi &&
      for name in attention_ops batches mapped_files messages neighbours rows updates variables vectors; do
        g++ "${flags[@]}" "${bfloat16[@]}" "${amx[@]}" "${of_tensorflow[@]}" -c "$sources/$name.cc" -o "$work/$name.o" || return
      done &&
      # Under the name by which TensorFlow itself has loaded it.
      g++ -shared "$work"/*.o "-L$tensorflow" -l:libtensorflow_framework.so.2 -pthread -o "$work/kernels.so"
  }
  compile_all 2>"$work/log" || die "g++ failed: $(grep -m 1 -E 'error: |cannot |undefined reference' "$work/log" || tail -n 1 "$work/log")"
  rm "$work"/*.o "$work/log"
  chmod 755 "$work"
  mv -T "$work" "$compiled" 2>/dev/null || [[ -f $compiled/kernels.so ]] # another set-up may have been first
fi
mkdir -p "$folder"
[[ ${1:-} != --to=* ]] || echo "$key" >"$folder/kernels.key"
cp "$compiled/kernels.so" "$folder/kernels.so.new"
mv "$folder/kernels.so.new" "$folder/kernels.so" # at once: a job that has loaded the old one keeps it
