#!/bin/bash
# sbatch slurm/export_phi3_mini_128k.sh      the trained Phi3-mini as a Hugging Face folder, checked by loading it again.
#SBATCH --job-name=export_phi3_mini_128k
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
. slurm/models/phi3_mini_128k.sh
export_model "${EXTENSION[@]}" "$@"
