#!/bin/bash
# A sweep, its runs taken by an array of single-GPU jobs:
#   sbatch --array=0-7 experiments/launch/slurm_sweep.sh NAME [--retry-failed ...]
#
# Every job is the same command: it takes runs that no other holds, takes over those of jobs that died, and ends
# when none is left to take. The folder of the runs is one that all nodes share, or --out is gs:// or s3://.
#SBATCH --job-name=mhc_jax_sweep
#SBATCH --array=0-7
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --gres=gpu:1
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%A_%a.out
set -uo pipefail

cd "${SLURM_SUBMIT_DIR:?start this with sbatch from the top folder of the project}" || exit 1
: "${SLURM_ARRAY_JOB_ID:?start this with sbatch --array=0-K}"
# A job that is killed is queued again by SLURM, and goes on: none needs to wait for what another holds.
srun .venv/bin/python -m experiments.sweep "$@" --no-wait
code=$?
if [ "$code" -eq 130 ]; then
  scontrol requeue "${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}"
fi
exit "$code"
