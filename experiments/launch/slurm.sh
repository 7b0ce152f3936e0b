#!/bin/bash
# One run on many GPUs: sbatch --nodes=4 experiments/launch/slurm.sh --config FILE --workdir FOLDER [--config.a.b=v ...]
#
# The workdir lies on a file system that all nodes share, or is gs:// or s3://. The mesh must use every GPU:
# --config.mesh.data times the other axes = nodes * GPUs. JAX finds the processes in SLURM's environment.
# Two minutes before the time limit, and when it is preempted, the run saves a checkpoint and ends with 130;
# then the job is queued again and goes on. A dead process ends the others within a minute.
#SBATCH --job-name=mhc_jax
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gres=gpu:8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.out
# One task per GPU, and each task sees all GPUs of its node: JAX takes the one of the task's local number.
set -uo pipefail

cd "${SLURM_SUBMIT_DIR:?start this with sbatch from the top folder of the project}" || exit 1
srun .venv/bin/python -m mhc_jax.train "$@"
code=$?
if [ "$code" -eq 130 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
