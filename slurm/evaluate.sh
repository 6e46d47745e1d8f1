#!/usr/bin/env bash
# Likelihood of a dataset under a checkpoint, data-parallel over the tasks; JSON in the job's log.
# sbatch [--dependency=afterok:JOB] [--ntasks-per-node=N --gpus-per-node=N] slurm/evaluate.sh CKPT --data PREFIX --json
# Hours have not been measured.
#SBATCH --job-name=evaluate
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=64G
#SBATCH --time=4:00:00
#SBATCH --output=slurm-%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
root=${DLM_ROOT:-${SLURM_SUBMIT_DIR:-$PWD}}
# shellcheck source=slurm/_common.sh
source "$root/slurm/_common.sh" ||
    { echo "error: no slurm/_common.sh in $root: submit there, or set DLM_ROOT" >&2; exit 2; }
enter_repository
read_allocation
launch dlm_scale.evaluate "$@"
