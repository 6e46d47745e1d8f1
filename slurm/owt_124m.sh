#!/usr/bin/env bash
# OpenWebText, GPT-2 tokens, the 124M shape. Meant for one node of 8 GPUs of 40 GB or more.
# sbatch [OPTIONS OF SBATCH] slurm/owt_124m.sh [section.key=value ...]; docs/slurm.md says what to change for a site.
# Nodes as the config means them; hours and rate have not been measured.
#SBATCH --job-name=owt_124m
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@600
#SBATCH --output=slurm-%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
root=${DLM_ROOT:-${SLURM_SUBMIT_DIR:-$PWD}}
# shellcheck source=slurm/_common.sh
source "$root/slurm/_common.sh" ||
    { echo "error: no slurm/_common.sh in $root: submit there, or set DLM_ROOT" >&2; exit 2; }
train configs/owt_124m.yaml "$@"
