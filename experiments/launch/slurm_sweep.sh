#!/bin/bash
# A sweep, its runs spread over an array of single-GPU jobs:
#   sbatch --array=0-7 experiments/launch/slurm_sweep.sh NAME [--retry-failed ...]
#
# Job i of k does every k-th planned run from the i-th on. Finished runs are skipped, so the same command does
# what is left. The folder of the project, and so of the runs, must be one that all nodes share.
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
first=${SLURM_ARRAY_TASK_MIN:?start this with sbatch --array=0-K}
shard="$((SLURM_ARRAY_TASK_ID - first))/$SLURM_ARRAY_TASK_COUNT"
srun .venv/bin/python -m experiments.sweep "$@" --shard "$shard"
code=$?
if [ "$code" -eq 130 ]; then
  scontrol requeue "${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}"
fi
exit "$code"
