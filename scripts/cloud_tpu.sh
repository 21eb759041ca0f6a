#!/usr/bin/env bash
# Training on all hosts of a Cloud TPU slice: `scripts/cloud_tpu.sh NAME ZONE configs/modern_7b.py gs-mount/runs/modern_7b`.
# The repository is installed on each host in ~/textgen_jax/.venv (with the extra `tpu`), and the workdir is on a disk that all hosts
# mount. JAX reads from the TPU's metadata who each host is. Each host starts train.py again where it ends for want of another.
set -euo pipefail
name=${1:?the TPU}; zone=${2:?its zone}; config=${3:?a file of configs/}; workdir=${4:?a folder that all hosts see}
command=$(printf '%q ' python train.py --config="$config" --workdir="$workdir" "${@:5}")
gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all \
  --command="cd ~/textgen_jax && . .venv/bin/activate && scripts/again.sh $command"
