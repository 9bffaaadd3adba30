#!/bin/bash
# sbatch slurm/pack_llama3_128k.sh [corpus.redpajama_v1.root=DIR ...]      the paper's corpus in segments of 128k, for LLaMA3-8B.
# This job submits one array per stage of packing (conf/cluster/slurm.yaml), waits, shows progress and goes on.
#SBATCH --job-name=pack_llama3_128k
#SBATCH --output=slurm/logs/%x-%j.log
#SBATCH --open-mode=append
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=4
#SBATCH --mem=32G
#SBATCH --time=3-00:00:00
#SBATCH --requeue
#SBATCH --signal=B:USR1@300
. "${SLURM_SUBMIT_DIR:-.}/slurm/common.sh"
. slurm/models/llama3_128k.sh
pack "${EXTENSION[@]}" corpus=paper align="$SEQUENCE_RANKS" "$@"
