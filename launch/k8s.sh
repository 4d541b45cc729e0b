#!/usr/bin/env bash
# A job in Kubernetes: prints its manifests, submits it, follows its launcher's log to the end, deletes it.
#
#   launch/k8s.sh render|submit|follow|delete OVERLAY [--namespace=NAME] [--dry_run] [--with_data]
#
# OVERLAY is a folder of k8s/overlays. A namespace has one job at a time; to go on with one that has ended, delete it and submit
# it again. follow ends with 0 when the job is done, with 1 when it failed. delete waits until the pods have written their
# checkpoint, and keeps prepared data and results unless --with_data is given. --dry_run prints the commands.
set -euo pipefail

# shellcheck source=launch/common.sh
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/common.sh"

actions='render, submit, follow or delete'
secret=din-dist-ssh

positional=()
kubectl=(kubectl)
dry_run=
with_data=
while (($#)); do
  case $1 in
    --namespace=?*) kubectl+=("$1") ;;
    --dry_run) dry_run=1 ;;
    --with_data) with_data=1 ;;
    -h | --help)
      sed -n '2,/^set /s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" # the comment above
      exit
      ;;
    -*) die "flags: must be --namespace=NAME, --dry_run or --with_data. Received: '$1'. Correct it." ;;
    *) positional+=("$1") ;;
  esac
  shift
done
action=${positional[0]:-}
overlay=${positional[1]:-}
((${#positional[@]} <= 2)) || die "arguments: must be an action and an overlay. Received: '${positional[*]}'. Drop the rest."
[[ $action =~ ^(render|submit|follow|delete)$ ]] || die "action: must be $actions. Received: '$action'. Give one of them first."
folder=$root/k8s/overlays/$overlay
[[ $overlay && -f $folder/kustomization.yaml ]] ||
  die "overlay: must be a folder of $root/k8s/overlays. Received: '$overlay'. Choose one of: $(cd "$root/k8s/overlays" && echo *)."
[[ ! $with_data || $action == delete ]] || die "--with_data: belongs to delete. Received: it, with $action. Drop it."
command -v kubectl >/dev/null ||
  die "kubectl: must be on PATH. Received: none there. Install it: https://kubernetes.io/docs/tasks/tools/"

# Runs a command, or prints it as it can be copied.
run() {
  local word line=
  [[ $dry_run ]] || { "$@"; return; }
  for word; do
    [[ $word =~ ^[A-Za-z0-9_./:,=@-]+$ ]] || word=${word@Q}
    line+=" $word"
  done
  echo "${line# }"
}

manifests=$(kubectl kustomize "$folder")
if [[ $manifests == *$'\nkind: MPIJob\n'* ]]; then
  job=mpijobs.kubeflow.org/din-dist
  launcher=jobs.batch/din-dist-launcher # which the operator makes
  pods=batch.kubernetes.io/job-name=din-dist-launcher
elif [[ $manifests == *$'\nkind: CronJob\n'* ]]; then
  job=cronjobs.batch/din-dist
  [[ $action != follow ]] ||
    die "follow: is for an overlay with one job. Received: '$overlay', with a job for each day. Look at one: kubectl logs --selector=app.kubernetes.io/name=din-dist"
else
  job=jobs.batch/din-dist
  launcher=$job
  pods=batch.kubernetes.io/job-name=din-dist,batch.kubernetes.io/job-completion-index=0
fi
has_secret=
[[ $manifests != *"secretName: $secret"* ]] || has_secret=1

submit() {
  local found=
  [[ $dry_run ]] || found=$("${kubectl[@]}" get "$job" --ignore-not-found --output=name)
  [[ ! $found ]] || die "$job: must be new. Received: one that is there already. Delete it: launch/k8s.sh delete $overlay"
  if [[ $has_secret ]]; then
    [[ $dry_run ]] || found=$("${kubectl[@]}" get "secrets/$secret" --ignore-not-found --output=name)
    [[ $found ]] || make_ssh_keys
  fi
  run "${kubectl[@]}" apply --kustomize="$folder"
}

make_ssh_keys() {
  command -v ssh-keygen >/dev/null ||
    die "ssh-keygen: must be on PATH. Received: none there. Install it (Debian, Ubuntu: apt-get install openssh-client)."
  [[ ! $dry_run ]] || echo "# Unless there is the Secret $secret:"
  keys=$(mktemp --directory --dry-run) # made by mkdir, which fails if somebody else has been faster
  [[ $dry_run ]] || trap 'rm -rf "$keys"' EXIT
  run mkdir --mode=0700 "$keys"
  run ssh-keygen -q -t ed25519 -N '' -C din_dist -f "$keys/id_ed25519"
  run "${kubectl[@]}" create secret generic "$secret" \
    "--from-file=id_ed25519=$keys/id_ed25519" "--from-file=authorized_keys=$keys/id_ed25519.pub"
  run rm -r "$keys"
}

follow() {
  local list=("${kubectl[@]}" get pods "--selector=$pods" --sort-by=.metadata.creationTimestamp --output=name)
  local logs=(--follow --all-containers --ignore-errors) # a launcher that never came to run has a preparation's log only
  local conditions='{range .status.conditions[?(@.status=="True")]}{.type}: {.message}{"\n"}{end}'
  local ask=("${kubectl[@]}" get "$launcher" --ignore-not-found "--output=jsonpath=$conditions")
  if [[ $dry_run ]]; then
    echo "${kubectl[*]} logs \"\$($(run "${list[@]}") | tail -n 1)\" ${logs[*]}"
    run "${ask[@]}"
    return
  fi
  local found pod phase shown='' since=() state
  echo "k8s.sh: waiting for the launcher of $job; if it does not come: ${kubectl[*]} get events" >&2
  while :; do
    found=$("${kubectl[@]}" get "$job" --ignore-not-found --output=name)
    [[ $found ]] || die "$job: must have been submitted. Received: none there. Submit it: launch/k8s.sh submit $overlay"
    pod=$("${list[@]}" | tail -n 1) # of the last start
    phase=
    [[ ! $pod ]] || phase=$("${kubectl[@]}" get "$pod" --ignore-not-found '--output=jsonpath={.status.phase}')
    [[ $pod == "$shown" ]] || since=()
    if [[ ${phase:-Pending} != Pending && ($pod != "$shown" || $phase == Running) ]]; then
      "${kubectl[@]}" logs "$pod" "${logs[@]}" "${since[@]}" || true # which has said what is wrong
      since=("--since-time=$(date --utc +%FT%TZ)") # should that have been the end of the connection only
      shown=$pod
    fi
    state=$'\n'$("${ask[@]}")
    case $state in
      *$'\nComplete: '*) return ;;
      *$'\nFailed: '*)
        echo "k8s.sh: $job failed: ${state##*$'\nFailed: '}" >&2
        return 1
        ;;
    esac
    sleep 2
  done
}

delete() {
  local kept=()
  [[ $with_data ]] || kept=('--selector=app.kubernetes.io/component!=storage')
  run "${kubectl[@]}" delete --kustomize="$folder" --ignore-not-found --cascade=foreground "${kept[@]}"
  # The flags of earlier submissions have other names.
  run "${kubectl[@]}" delete configmaps --selector=app.kubernetes.io/name=din-dist
  [[ ! $has_secret ]] || run "${kubectl[@]}" delete "secrets/$secret" --ignore-not-found
}

case $action in
  render) run "${kubectl[@]}" kustomize "$folder" ;;
  *) "$action" ;;
esac
