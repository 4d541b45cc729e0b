#!/usr/bin/env bash
# What must hold before a release, beside the tests: no pinned version has a known vulnerability, and every image is
# pinned to the digest that its tag has. Writes what a release is made of (SBOM, CycloneDX JSON) into dist/.
#
#   launch/release_check.sh [--vulnerability-service=pypi|osv]
#
# pip-audit asks the package index, or osv.dev, for known vulnerabilities. Those that this project has an answer to are in
# launch/answered_vulnerabilities.txt.
set -euo pipefail

# shellcheck source=launch/common.sh
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/common.sh"

service=pypi
case $* in
  '') ;;
  --vulnerability-service=pypi | --vulnerability-service=osv) service=${1#*=} ;;
  *) die "flags: must be --vulnerability-service=pypi or osv, or none. Received: '$*'." ;;
esac

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
make_tools "$work/tools" cyclonedx-bom pip-audit uv

uv=$work/tools/bin/uv python=$work/tools/bin/python

write_sbom() { # of what, its pins
  local file=dist/din_dist-$1.cdx.json pin
  "$work/tools/bin/cyclonedx-py" requirements --output-reproducible --short-PURLs --output-file "$file" "$2"
  while read -r pin; do
    grep -qF "\"pkg:pypi/$pin\"" "$file" || die "$file must name every pinned version. Received: none of $pin. Renew cyclonedx-bom."
  done < <(sed -n 's/^\([a-z0-9-]*\)==\([^ ]*\).*/\1@\2/p' "$2")
  echo "$file: $(grep -c '"purl"' "$file") packages"
}

audit() {
  local answered other
  mapfile -t answered < <(sed -nE 's/^([A-Z]+-[0-9A-Za-z-]+).*/--ignore-vuln=\1/p' "$root/launch/answered_vulnerabilities.txt")
  if "$work/tools/bin/pip-audit" --requirement "$constraints" --disable-pip --strict --progress-spinner off \
    --vulnerability-service "$service" "${answered[@]}" >"$work/found" 2>"$work/log"; then
    echo "vulnerabilities: none is known that is not answered"
  elif [[ -s $work/found ]]; then
    cat "$work/found"
    say "no pinned version may have a known vulnerability. Received: those above. Renew them (launch/pin.sh), or answer them in launch/answered_vulnerabilities.txt."
  else
    other=$([[ $service == osv ]] && echo pypi || echo osv)
    say "$service must tell the known vulnerabilities of every pinned version. Received: $(tail -n 1 "$work/log"). Connect to it, or ask another: --vulnerability-service=$other."
  fi
}

failed=
say() {
  echo "release_check.sh: $*" >&2
  failed=1
}

cd "$root"
mkdir -p dist
for image in cpu gpu; do
  requirements_of "$python" "$image" distributed >"$work/requirements.in"
  resolve "$uv" "$work/requirements.in" "$work/$image.txt" --constraint "$constraints"
  write_sbom "$image" "$work/$image.txt"
done
write_sbom development "$constraints"
"$root/docker/pin_images.sh" --check || failed=1
audit
[[ ! $failed ]]
