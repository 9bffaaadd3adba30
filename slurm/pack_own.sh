#!/bin/bash
# sbatch slurm/pack_own.sh experiment=NAME [key=value ...]      your documents in segments.
# NAME is an experiment of conf/experiment/, as launch.init writes it (docs/your_own.md).
#SBATCH --job-name=pack_own
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
. slurm/models/own.sh
pack "$@"
