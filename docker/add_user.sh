#!/bin/sh
# In an image: the user that everything runs as, and the folders that are volumes for it.
set -eu

if id ubuntu >/dev/null 2>&1; then # which Ubuntu's images have, with the same number
  userdel --remove ubuntu
fi
# Password "*": none fits, but keys do; with "!" sshd would take the account for locked.
useradd --uid 1000 --create-home --shell /bin/bash --password '*' din
# A new volume takes over the owner of the folder that it is mounted on.
install --directory --owner=din --group=din /data /runs
install --directory --owner=din --group=din --mode=0700 /home/din/.ssh
