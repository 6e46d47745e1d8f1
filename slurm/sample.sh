#!/usr/bin/env bash
# Text from a checkpoint for a file of prompts, each task of the array its share; the last one to end merges.
# sbatch [--array=0-N] slurm/sample.sh CKPT --input prompts.jsonl --output out.jsonl [OPTIONS OF tools/sample_batch.py]
# A task that is killed or reaches its limit begins again and goes on. Hours and rate have not been measured.
#SBATCH --job-name=sample
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=64G
#SBATCH --time=12:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --array=0-7
#SBATCH --output=slurm-%x-%A_%a.log
#SBATCH --open-mode=append
#SBATCH --requeue
root=${DLM_ROOT:-${SLURM_SUBMIT_DIR:-$PWD}}
# shellcheck source=slurm/_common.sh
source "$root/slurm/_common.sh" ||
    { echo "error: no slurm/_common.sh in $root: submit there, or set DLM_ROOT" >&2; exit 2; }
enter_repository
work tools/sample_batch.py "$@"
