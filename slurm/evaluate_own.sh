#!/bin/bash
# sbatch slurm/evaluate_own.sh experiment=NAME [key=value ...]      the result beside its baselines.
# NAME is an experiment of conf/experiment/, as launch.init writes it (docs/your_own.md).
#SBATCH --job-name=evaluate_own
#SBATCH --output=slurm/logs/%x-%j.log
#SBATCH --open-mode=append
#SBATCH --array=1-8
#SBATCH --nodes=1
#SBATCH --gpus-per-node=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=12
#SBATCH --mem=120G
#SBATCH --time=1-00:00:00
#SBATCH --requeue
#SBATCH --signal=B:USR1@300
. "${SLURM_SUBMIT_DIR:-.}/slurm/common.sh"
. slurm/models/own.sh
evaluate "$@"
