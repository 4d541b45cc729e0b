#!/bin/bash
# In the stages that build images: launch/setup.sh for the user of the image, without what only a build needs.
set -euo pipefail

DIN_DIST_CACHE=$(mktemp -d)
export DIN_DIST_CACHE
launch/setup.sh "$@"
rm -rf "$DIN_DIST_CACHE" .venv/din_dist_setup.log
cd .venv/lib/python3.*/site-packages
rm -rf tensorflow/include clang # headers for those who compile operations, and a parser of C: 350 MB
