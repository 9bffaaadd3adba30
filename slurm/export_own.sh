#!/bin/bash
# sbatch slurm/export_own.sh experiment=NAME [key=value ...]      the trained model as Hugging Face folders, checked by loading them again.
# NAME is an experiment of conf/experiment/, as launch.init writes it (docs/your_own.md).
#SBATCH --job-name=export_own
#SBATCH --output=slurm/logs/%x-%j.log
#SBATCH --open-mode=append
#SBATCH --nodes=1
#SBATCH --gpus-per-node=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=12
#SBATCH --mem=120G
#SBATCH --time=02:00:00
#SBATCH --requeue
#SBATCH --signal=B:USR1@300
. "${SLURM_SUBMIT_DIR:-.}/slurm/common.sh"
. slurm/models/own.sh
export_model "$@"
