#!/bin/bash
# sbatch slurm/evaluate_phi3_mini_128k.sh corpus.folder=PG19_VALIDATION [suite=needle_map ...]: the result beside its baselines.
# Every array task takes its share of the questions (lengths x tasks x models); the last to end writes the table.
#SBATCH --job-name=evaluate_phi3_mini_128k
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
. slurm/models/phi3_mini_128k.sh
evaluate "${EXTENSION[@]}" corpus=pg19 suite=ruler "$@"
