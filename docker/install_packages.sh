#!/bin/sh
# In an image: installs packages of its distribution and leaves nothing else behind.
#
# Their versions are those of the release that the base image's tag names. They cannot be pinned further: a mirror drops a
# version as soon as there is a security fix.
set -eu

apt-get update
DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends "$@"
rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/log/apt /var/log/dpkg.log
# openssh-server makes host keys as it is installed. Baked in, they would be everybody's: docker/sshd.sh makes its own.
rm -f /etc/ssh/ssh_host_*
