#!/usr/bin/env bash
# Builds two wheels, so that others install without a compiler: ours, with the kernels and flagfiles, and our Horovod.
#
#   launch/build_wheels.sh [--gpu] [--to=DIR]
#
# They go to DIR (dist/ of the checkout). launch/setup.sh runs first. If PYTHON is set, the wheels are built for that
# interpreter as it is; it must have the pinned TensorFlow. The Horovod wheel fits its Python version, ours fits any.
set -euo pipefail

# shellcheck source=launch/common.sh
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/common.sh"

build_flags=()
to=$root/dist
for flag; do
  case $flag in
    --gpu) build_flags+=(--gpu) ;;
    --to=?*) to=$(realpath -m "${flag#*=}") ;;
    *) die "unknown flag $flag. Usage: launch/build_wheels.sh [--gpu] [--to=DIR]" ;;
  esac
done
if [[ ! ${PYTHON:-} ]]; then
  "$root/launch/setup.sh" "${build_flags[@]}"
  export PYTHON=$venv/bin/python
fi

horovod=$("$root/launch/horovod/build_horovod.sh" "${build_flags[@]}")
# From a copy, because setuptools would take along what an earlier build left in the checkout.
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir "$work/source"
cp -R "$root"/{LICENSE,README.md,din_dist,launch,pyproject.toml,setup.cfg,setup.py} "$work/source"
mkdir -p "$cache" "$to"
log=$cache/build_wheels.log
run_pip "$PYTHON" "$log" wheel --no-deps --no-build-isolation --no-index --wheel-dir "$work/wheels" "$work/source"
for wheel in "$work"/wheels/din_dist-*.whl "$horovod"; do
  name=$(basename "$wheel")
  cp "$wheel" "$to/$name.part"
  mv "$to/$name.part" "$to/$name" # whole or not at all
  echo "$to/$name"
done
