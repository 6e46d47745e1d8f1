#!/usr/bin/env bash
# A checkpoint to Hugging Face's format or back, after the job that trains it.
# sbatch [--dependency=afterok:JOB] slurm/convert.sh SRC DST --to hf [OPTIONS OF tools/convert_checkpoint.py]
# Needs no GPU; hours and memory have not been measured.
#SBATCH --job-name=convert
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=128G
#SBATCH --time=4:00:00
#SBATCH --output=slurm-%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
root=${DLM_ROOT:-${SLURM_SUBMIT_DIR:-$PWD}}
# shellcheck source=slurm/_common.sh
source "$root/slurm/_common.sh" ||
    { echo "error: no slurm/_common.sh in $root: submit there, or set DLM_ROOT" >&2; exit 2; }
enter_repository
work tools/convert_checkpoint.py "$@"
