#!/bin/bash
# sbatch slurm/search_llama3_128k.sh corpus.folder=PG19_VALIDATION [search.population=32 ...]      factors of LLaMA3-8B at 128k.
# Candidates are spread over all GPUs; any number of them gives the same factors.
#SBATCH --job-name=search_llama3_128k
#SBATCH --output=slurm/logs/%x-%j.log
#SBATCH --open-mode=append
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=1-00:00:00
#SBATCH --requeue
#SBATCH --signal=B:USR1@300
. "${SLURM_SUBMIT_DIR:-.}/slurm/common.sh"
. slurm/models/llama3_128k.sh
search "${EXTENSION[@]}" corpus=pg19 "$@"
