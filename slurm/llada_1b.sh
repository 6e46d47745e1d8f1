#!/usr/bin/env bash
# A 1.4B model at context 2048, GPT-2 tokens. Meant for 4 nodes of 8 GPUs of 80 GB.
# sbatch [OPTIONS OF SBATCH] slurm/llada_1b.sh [section.key=value ...]; docs/slurm.md says what to change for a site.
# Nodes as the config means them; hours and rate have not been measured.
#SBATCH --job-name=llada_1b
#SBATCH --nodes=4
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
train configs/llada_1b.yaml parallel.tensor_parallel_size=2 parallel.sequence_parallel=true deepspeed.zero_optimization.stage=3 "$@"
