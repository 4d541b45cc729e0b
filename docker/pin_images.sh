#!/usr/bin/env bash
# Pins the images that docker/ builds on or runs to the digests that their tags have in the registry. Pulls none.
#
#   docker/pin_images.sh [--check]
#
# --check changes nothing, and fails where an image has no digest, or another than its tag has.
set -euo pipefail

die() {
  echo "pin_images.sh: $*" >&2
  exit 2
}

check=
case $* in
  '') ;;
  --check) check=1 ;;
  *) die "flags: must be --check or none. Received: '$*'. Usage: docker/pin_images.sh [--check]" ;;
esac
command -v docker >/dev/null || die "docker must be on PATH, to ask the registry. Received: none there. Install it."

cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")"
files=(Dockerfile docker-compose.yml)
images=$(grep -hoE 'docker\.io/[^ @"]+:[^ @"]+(@sha256:[0-9a-f]{64})?' "${files[@]}" | sort -u)
for image in $images; do
  tag=${image%@*}
  digest=$(docker buildx imagetools inspect "$tag" --format '{{.Manifest.Digest}}' 2>&1) || true
  [[ $digest =~ ^sha256:[0-9a-f]{64}$ ]] ||
    die "the registry must give the digest of $tag. Received: ${digest##*$'\n'}. Connect to it, or name another image in docker/."
  [[ $image != "$tag@$digest" ]] || continue
  pinned=${image#"$tag"}
  pinned=${pinned#@}
  [[ ! $check ]] ||
    die "$tag must be pinned to the digest that it has now, $digest. Received: ${pinned:-none}. Run docker/pin_images.sh, then python -m tests.docker.smoke."
  sed -Ei "s|${tag//./\\.}(@sha256:[0-9a-f]+)?([\" ]\|\$)|$tag@$digest\2|" "${files[@]}"
  echo "$tag: $digest"
done
