#!/bin/bash
# sbatch slurm/train_llama3_128k.sh [training.tokens=1e9 ...]      LLaMA3-8B to 128k on 64 A100s; the paper took 54 h.
# The job ends when the token budget is done: it saves and starts itself again before every time limit.
#SBATCH --job-name=train_llama3_128k
#SBATCH --output=slurm/logs/%x-%j.log
#SBATCH --open-mode=append
#SBATCH --nodes=8
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=1-00:00:00
#SBATCH --requeue
#SBATCH --signal=B:USR1@900
. "${SLURM_SUBMIT_DIR:-.}/slurm/common.sh"
. slurm/models/llama3_128k.sh
train experiment="$EXPERIMENT" "$@"
