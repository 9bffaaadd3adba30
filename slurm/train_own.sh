#!/bin/bash
# sbatch slurm/train_own.sh experiment=NAME [key=value ...]      your model, over all GPUs of the job.
# NAME is an experiment of conf/experiment/, as launch.init writes it (docs/your_own.md).
#SBATCH --job-name=train_own
#SBATCH --output=slurm/logs/%x-%j.log
#SBATCH --open-mode=append
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=1-00:00:00
#SBATCH --requeue
#SBATCH --signal=B:USR1@900
. "${SLURM_SUBMIT_DIR:-.}/slurm/common.sh"
. slurm/models/own.sh
train "$@"
