#!/usr/bin/env bash
# Pins what setup.cfg asks for, and all that it needs in turn: writes launch/constraints.txt, with the SHA-256 of each
# file that the package index has of each version. Nothing of what is pinned is run.
#
#   launch/pin.sh [uv flags]        as --upgrade-package=NAME, or --upgrade for all
#
# A version stays as it is until setup.cfg or a flag asks for another. Only releases at least a week old are taken: most
# that are tampered with are found by then. One that mends a vulnerability may come sooner:
# --exclude-newer-package=NAME=0d.
set -euo pipefail

# shellcheck source=launch/common.sh
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/common.sh"

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
make_tools "$work/tools" uv

requirements_of "$work/tools/bin/python" cpu gpu distributed plots index spark tune mlflow wandb onnx test build release >"$work/requirements.in"
cp "$constraints" "$work/constraints.txt"
resolve "$work/tools/bin/uv" "$work/requirements.in" "$work/constraints.txt" --exclude-newer '1 week' "$@"
{
  sed '/^#/!d' "$constraints"
  echo
  cat "$work/constraints.txt"
} >"$work/new"
cp "$work/new" "$constraints"
