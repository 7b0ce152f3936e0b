#!/bin/bash
# One run on a TPU slice, the same command on every host of it:
#   TPU=my-slice ZONE=us-east5-a experiments/launch/tpu_slice.sh setup
#   TPU=my-slice ZONE=us-east5-a experiments/launch/tpu_slice.sh \
#     --config configs/laptop.py --workdir gs://my-bucket/run --config.mesh.fsdp=64
#   TPU=my-slice ZONE=us-east5-a experiments/launch/tpu_slice.sh stop    # from another terminal: after a checkpoint
#
# `setup` copies this folder to every host and installs it: once per slice, and after every change. The hosts
# share no disk, so the workdir is gs://; the mesh must use every chip. JAX finds the hosts in the slice's own
# metadata. Where the slice was preempted, create it anew, set it up, and give the same command: the run goes on
# from its last checkpoint. A slice comes from, for example,
#   gcloud compute tpus tpu-vm create my-slice --zone us-east5-a --accelerator-type v5p-128 --version v2-alpha-tpuv5
set -euo pipefail

: "${TPU:?name of the slice}" "${ZONE:?its zone}"
here=$(cd "$(dirname "$0")/../.." && pwd)

on_every_host() {
  gcloud compute tpus tpu-vm ssh "$TPU" --zone "$ZONE" --worker=all --command "$1"
}

case "${1:-}" in
  setup)
    archive=$(mktemp)
    trap 'rm -f "$archive"' EXIT
    tar -C "$here" --exclude='.venv*' --exclude='.*_cache' --exclude=runs -czf "$archive" .
    gcloud compute tpus tpu-vm scp "$archive" "$TPU:mhc_jax.tgz" --zone "$ZONE" --worker=all
    on_every_host 'mkdir -p mhc_jax && tar -C mhc_jax -xzf mhc_jax.tgz && cd mhc_jax && python3 -m pip install -q uv &&
      python3 -m uv venv -q --allow-existing --python 3.11 && # the hosts own Python may be older
      python3 -m uv pip install -q -r requirements/3.11.txt -e ".[tpu,cloud]"'
    ;;
  stop)
    on_every_host 'pkill -TERM -f "mhc_jax[.]train"'
    ;;
  *)
    # Collectives beside computation (mhc_jax/runtime.py).
    on_every_host "cd mhc_jax && exec .venv/bin/python -m mhc_jax.train --xla-flags preset $(printf '%q ' "$@")"
    ;;
esac
