#!/bin/bash
# In a container: lets the launcher in another container start workers in this one.
#
#   docker/sshd.sh [--make_key]
#
# Serves ssh on port ${DIN_DIST_SSH_PORT:-2222}, as the user it runs as and to that user only, with a host key made now and
# the keys of ~/.ssh/authorized_keys, which is to be mounted. --make_key makes a pair there if there is none, for a volume that
# launcher and workers share. Needs no capability, and nothing that can be written but /tmp.
set -euo pipefail

port=${DIN_DIST_SSH_PORT:-2222}
keys=$HOME/.ssh
if [[ ${1:-} == --make_key && ! -f $keys/authorized_keys ]]; then
  ssh-keygen -q -t ed25519 -N '' -C din_dist -f "$keys/id_ed25519"
  cp "$keys/id_ed25519.pub" "$keys/authorized_keys"
fi
if [[ ! -r $keys/authorized_keys ]]; then
  echo "sshd.sh: $keys/authorized_keys must hold the launcher's public key. Received: no such file. Mount a folder with it." >&2
  exit 2
fi
own=$(mktemp -d)
host_key=$own/host_key
ssh-keygen -q -t ed25519 -N '' -f "$host_key"

# A container that is stopped lets its workers finish a step, and save or leave. It ends with the code for another try, as
# the launcher does: with 0 Kubernetes would take a pod that was evicted for one that is done.
stop() {
  local pid agents=()
  # Those that were started by this server: in a cluster's debugging modes a container sees the processes of others too.
  while read -r pid; do
    if grep -qszxF "DIN_DIST_SSHD=$own" "/proc/$pid/environ"; then agents+=("$pid"); fi
  done < <(grep -lszx 'din_dist\.cluster\.agent' /proc/[0-9]*/cmdline | cut -d / -f 3)
  if ((${#agents[@]})); then
    kill -TERM "${agents[@]}" 2>/dev/null || true
    while kill -0 "${agents[@]}" 2>/dev/null; do sleep 0.2; done
  fi
  kill "$server"
  exit 75
}
/usr/sbin/sshd -D -e -f /dev/null -o "Port $port" -o "HostKey $host_key" -o "AuthorizedKeysFile $keys/authorized_keys" \
  -o 'AuthenticationMethods publickey' -o 'PermitRootLogin no' -o 'AllowTcpForwarding no' -o 'X11Forwarding no' \
  -o 'PidFile none' -o 'UsePAM no' -o 'PrintMotd no' -o 'MaxStartups 100' -o 'ClientAliveInterval 30' \
  -o "SetEnv DIN_DIST_SSHD=$own" -o 'StrictModes no' & # a mounted Secret is not this user's, and its links can be written by all
server=$!
trap stop TERM INT
wait "$server"
