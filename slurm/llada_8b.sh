#!/usr/bin/env bash
# The shape of LLaDA-8B (Nie et al., 2025): 8.0B parameters, 126,464 ids of which the mask lies inside the vocabulary.
# sbatch [OPTIONS OF SBATCH] slurm/llada_8b.sh [section.key=value ...]; docs/slurm.md says what to change for a site.
# Nodes as the config means them; hours and rate have not been measured.
#SBATCH --job-name=llada_8b
#SBATCH --nodes=16
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@600
#SBATCH --array=1-20%1
#SBATCH --output=slurm-%x-%A_%a.log
#SBATCH --open-mode=append
#SBATCH --requeue
root=${DLM_ROOT:-${SLURM_SUBMIT_DIR:-$PWD}}
# shellcheck source=slurm/_common.sh
source "$root/slurm/_common.sh" ||
    { echo "error: no slurm/_common.sh in $root: submit there, or set DLM_ROOT" >&2; exit 2; }
train configs/llada_8b.yaml parallel.tensor_parallel_size=8 parallel.sequence_parallel=true "$@"
