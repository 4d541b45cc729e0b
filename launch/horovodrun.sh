#!/usr/bin/env bash
# Trains on GPU nodes: on all that SLURM gave this job, on those named, or on this one; a worker for each GPU.
#
#   launch/horovodrun.sh [trainer flags]                                       this node, or those of the SLURM job
#   launch/horovodrun.sh --hosts=gpu1:8,gpu2:8 | --hosts_file=FILE [trainer flags]
#   launch/horovodrun.sh --dry_run ...                                         only prints the horovodrun command
#
# It is launch/train.sh, whose flags it takes, with hosts from SLURM and a log file a rank, in runs/logs/TIME unless
# --log_dir names another folder. Every NCCL_*, HOROVOD_* and other variable of this shell reaches every worker.
set -euo pipefail

flags=(--log_dir="runs/logs/$(date +%Y%m%d-%H%M%S)")
[[ ! ${SLURM_JOB_NODELIST:-} ]] || flags+=(--hosts=slurm)
exec "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/train.sh" "${flags[@]}" "$@" # later flags count
