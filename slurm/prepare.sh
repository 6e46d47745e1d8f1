#!/usr/bin/env bash
# Text to indexed datasets: each task of the array takes its share of the files and writes OUT/part_NNNN.
# sbatch [--array=0-N] slurm/prepare.sh FILE... --tokenizer T --out OUT [OPTIONS OF dlm prepare]
# A finished part is left as it is; the last line of the log says how a config reads them. Hours have not been measured.
#SBATCH --job-name=prepare
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=32
#SBATCH --mem=64G
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@60
#SBATCH --array=0-7
#SBATCH --output=slurm-%x-%A_%a.log
#SBATCH --open-mode=append
#SBATCH --requeue
root=${DLM_ROOT:-${SLURM_SUBMIT_DIR:-$PWD}}
# shellcheck source=slurm/_common.sh
source "$root/slurm/_common.sh" ||
    { echo "error: no slurm/_common.sh in $root: submit there, or set DLM_ROOT" >&2; exit 2; }
enter_repository
files=() options=() out=''
while [ $# -gt 0 ] && [ "${1#--}" = "$1" ]; do files+=("$1"); shift; done
while [ $# -gt 0 ]; do
    case $1 in
        --out=*) out=${1#*=} ;;
        --out) out=${2:-}; shift ;;
        *) options+=("$1") ;;
    esac
    shift
done
[ -n "$out" ] || refuse "--out is missing: sbatch slurm/prepare.sh FILE... --tokenizer T --out OUT"
index=$((${SLURM_ARRAY_TASK_ID:-0} - ${SLURM_ARRAY_TASK_MIN:-0})) count=${SLURM_ARRAY_TASK_COUNT:-1}
[ "${#files[@]}" -ge "$count" ] || refuse "${#files[@]} files for $count tasks: --array=0-$((${#files[@]} - 1))"
share=()
for ((i = index; i < ${#files[@]}; i += count)); do share+=("${files[i]}"); done
part=$out/$(printf 'part_%04d' "$index")
prefixes=$(for ((i = 0; i < count; i++)); do printf '{path: %s/part_%04d/train}, ' "$out" "$i"; done)
say "share $((index + 1)) of $count: ${#share[@]} files; once all are there: data.train=[${prefixes%, }]"
if [ -e "$part/meta.json" ]; then say "$part is finished"; exit 0; fi
work -m dlm_scale.cli prepare "${share[@]}" "${options[@]}" --out "$part"
