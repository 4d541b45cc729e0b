#!/usr/bin/env bash
# A job or a server in Kubernetes: prints its manifests, submits it, follows it to its end or until it serves, deletes it.
#
#   launch/k8s.sh render|submit|follow|delete OVERLAY [--name=NAME] [--queue=QUEUE] [--namespace=NAME] [--dry_run] [--with_data]
#
# OVERLAY is a folder of k8s/overlays. With --name, several jobs or servers are in one namespace: each has its own objects, and
# all share the claims with data and results. --queue is a LocalQueue of Kueue, which starts the job when its turn comes. To go on
# with a job that has ended, delete it and submit it again. A server that is submitted again is changed, one pod after another. follow ends with 0 when the job is done or all
# servers are ready, with 1 when that failed. delete waits until the pods have written their
# checkpoint, and keeps prepared data and results unless --with_data is given. --dry_run prints the commands.
set -euo pipefail

# shellcheck source=launch/common.sh
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/common.sh"

actions='render, submit, follow or delete'
positional=()
kubectl=(kubectl)
dry_run=
with_data=
name=
queue=
while (($#)); do
  case $1 in
    --namespace=?*) kubectl+=("$1") ;;
    --name=?*) name=${1#*=} ;;
    --queue=?*) queue=${1#*=} ;;
    --dry_run) dry_run=1 ;;
    --with_data) with_data=1 ;;
    -h | --help)
      sed -n '2,/^set /s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" # the comment above
      exit
      ;;
    -*) die "flags: must be --name=NAME, --queue=QUEUE, --namespace=NAME, --dry_run or --with_data. Received: '$1'. Correct it." ;;
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
[[ ! $with_data || ! $name ]] ||
  die "--with_data: deletes what all jobs of the namespace share. Received: it, with --name=$name. Drop one of the two."
for flag in name queue; do # names of pods begin with that of the job, and may have 63 characters
  [[ ! ${!flag} || ${!flag} =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] ||
    die "--$flag: must be of a-z, 0-9 and -, begin with a letter and have at most 40. Received: '${!flag}'. For example clicks-2."
done
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
kind=Job
for other in MPIJob TrainJob CronJob Deployment; do
  [[ $manifests != *$'\nkind: '$other$'\n'* ]] || kind=$other
done
base=din-dist
[[ $kind != Deployment ]] || base=din-dist-serve
object=${name:-$base}
case $kind in
  MPIJob)
    job=mpijobs.kubeflow.org/$object
    launcher=jobs.batch/$object-launcher # which the operator makes
    pods=batch.kubernetes.io/job-name=$object-launcher
    ;;
  TrainJob)
    job=trainjobs.trainer.kubeflow.org/$object
    launcher=$job
    pods=jobset.sigs.k8s.io/jobset-name=$object,jobset.sigs.k8s.io/replicatedjob-name=launcher # Kubeflow Trainer makes them
    ;;
  CronJob)
    job=cronjobs.batch/$object
    [[ $action != follow ]] ||
      die "follow: is for an overlay with one job. Received: '$overlay', with a job for each day. Look at one: kubectl logs --selector=app.kubernetes.io/name=$object"
    ;;
  Deployment) job=deployments.apps/$object ;;
  Job)
    job=jobs.batch/$object
    launcher=$job
    pods=batch.kubernetes.io/job-name=$object,batch.kubernetes.io/job-completion-index=0
    ;;
esac
[[ ! $queue || ! $kind =~ ^(CronJob|Deployment)$ ]] || die "--queue: is for overlays with one job. Received: --queue=$queue, with $overlay. Drop it."
secret=$object-ssh
has_secret=
[[ $manifests != *"secretName: $base-ssh"* ]] || has_secret=1

# The objects that are no job's alone keep their names: claims, and what others have made. kustomize writes every manifest in one
# form, so a line tells what it is. A ConfigMap's name ends in ten characters of its contents' hash.
as_named() {
  local keys='name|serviceAccountName|subdomain|app\.kubernetes\.io/name'
  sed -E -e "s#^( *(- )?($keys): )$base(-[a-z0-9]{10})?\$#\\1$object\\4#" -e "s#^( *secretName: )$base-ssh\$#\\1$object-ssh#" \
    -e "s#^( +)$base(-[0-9]+)\\.$base:#\\1$object\\2.$object:#"
}

as_queued() {
  awk -v queue="$queue" -v kind="$kind" '
    /^kind: / { is_job = $2 == kind }
    { print }
    !queue || !is_job { next }
    /^  labels:$/ { print "    kueue.x-k8s.io/queue-name: " queue }
    (kind == "MPIJob" && /^  runPolicy:$/) { print "    suspend: true" }
    (kind != "MPIJob" && /^spec:$/) { print "  suspend: true" }'
}

own=() # what makes the manifests others than those of the overlay
[[ ! $name ]] || own+=("--name=$name")
[[ ! $queue ]] || own+=("--queue=$queue")
if ((${#own[@]})); then
  manifests=$(as_named <<<"$manifests" | as_queued)
fi

# Calls kubectl with the manifests: ACTION [FLAGS].
with_manifests() {
  local action=$1
  shift
  if ((!${#own[@]})); then
    run "${kubectl[@]}" "$action" --kustomize="$folder" "$@"
  elif [[ $dry_run ]]; then
    echo "$(run "$root/launch/k8s.sh" render "$overlay" "${own[@]}") | $(run "${kubectl[@]}" "$action" --filename=- "$@")"
  else
    "${kubectl[@]}" "$action" --filename=- "$@" <<<"$manifests"
  fi
}

submit() {
  local found=
  [[ $dry_run || $job == deployments* ]] || found=$("${kubectl[@]}" get "$job" --ignore-not-found --output=name)
  [[ ! $found ]] || die "$job: must be new. Received: one that is there already. Delete it: launch/k8s.sh delete $overlay${name:+ --name=$name}"
  if [[ $has_secret ]]; then
    [[ $dry_run ]] || found=$("${kubectl[@]}" get "secrets/$secret" --ignore-not-found --output=name)
    [[ $found ]] || make_ssh_keys
  fi
  with_manifests apply
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
  if [[ $job == deployments* ]]; then
    run "${kubectl[@]}" rollout status "$job"
    return
  fi
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
    [[ $found ]] || die "$job: must have been submitted. Received: none there. Submit it: launch/k8s.sh submit $overlay${name:+ --name=$name}"
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
  with_manifests delete --ignore-not-found --cascade=foreground "${kept[@]}"
  # The flags of earlier submissions have other names.
  run "${kubectl[@]}" delete configmaps "--selector=app.kubernetes.io/name=$object"
  [[ ! $has_secret ]] || run "${kubectl[@]}" delete "secrets/$secret" --ignore-not-found
}

case $action in
  render)
    if ((!${#own[@]})); then
      run "${kubectl[@]}" kustomize "$folder"
    elif [[ $dry_run ]]; then
      run "$root/launch/k8s.sh" render "$overlay" "${own[@]}"
    else
      printf '%s\n' "$manifests"
    fi
    ;;
  *) "$action" ;;
esac
