#!/usr/bin/env bash
# Checks style, types, shell scripts and the Dockerfile, in seconds. tests/test_lint.py runs it too.
#
#   launch/lint.sh [--fix]
#
# --fix lets ruff correct and format the Python files first. The exit code is 1 if a tool complains. launch/setup.sh --test
# installs the tools.
set -euo pipefail

# shellcheck source=launch/common.sh
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/common.sh"

fix=
case $* in
  '') ;;
  --fix) fix=yes ;;
  *) die "flags: must be --fix or none. Received: '$*'." ;;
esac
for tool in ruff mypy shellcheck hadolint; do
  [[ -x $venv/bin/$tool ]] || die "there must be $tool in $venv/bin. Run launch/setup.sh --test."
done

cd "$root"
failed=
check() { # a tool, its arguments: all tools run, whichever complains
  "$venv/bin/$1" "${@:2}" || failed=yes
}

mapfile -t scripts < <(find .ci docker launch -name '*.sh' -o -path .ci/run | LC_ALL=C sort)
if [[ $fix ]]; then
  check ruff check --fix
  check ruff format
else
  check ruff check
  check ruff format --check
fi
check mypy
check shellcheck --external-sources "${scripts[@]}"
check hadolint docker/Dockerfile
[[ ! $failed ]]
