#!/usr/bin/env bash
# Runs a stage on every worker of a spot TPU VM. Creates the VM if there is none; after preemption, creates it again and
# resumes:
#   export TPU_NAME=flow TPU_ZONE=us-east5-a TPU_TYPE=v5p-32 TPU_IMAGE=v2-alpha-tpuv5
#   launch/tpu_pod.sh --config=configs/reflow.py:sd15 --workdir=gs://BUCKET/runs/sd15
# The workdir is in a bucket that the VM's service account may write to, or in a folder that all workers share and that
# outlives them. Each worker runs the command TPU_SETUP first, e.g. 'sudo mount -t nfs 10.0.0.2:/runs /mnt/runs'. Needs
# gcloud, logged in. The TPU VM is not deleted at the end.
set -euo pipefail
: "${TPU_NAME:?}" "${TPU_ZONE:?}" "${TPU_TYPE:?}" "${TPU_IMAGE:?}"
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"

tpu() { gcloud compute tpus tpu-vm "$1" "${@:2}" --zone="$TPU_ZONE"; }
state() { tpu list --filter="name~/nodes/$TPU_NAME\$" --format='value(state)'; }

folder=$(mktemp -d)
trap 'rm -r "$folder"' EXIT
tar -czf "$folder/instaflow_jax.tgz" --exclude=__pycache__ setup.py README.md LICENSE configs instaflow_jax launch
run="${TPU_SETUP:-true} && mkdir -p instaflow_jax && tar -xzf instaflow_jax.tgz -C instaflow_jax && cd instaflow_jax &&"
run+=" bash -c '. launch/env.sh; install tpu,train,gcs; stage \"\$@\"' stage --processes=0$([ $# = 0 ] || printf ' %q' "$@")"

while true; do
  now=$(state) # not inside `case`, which would ignore a failing gcloud
  case $now in
    READY)
      code=0
      { tpu scp "$folder/instaflow_jax.tgz" "$TPU_NAME:" --worker=all && tpu ssh "$TPU_NAME" --worker=all --command="$run"; } || code=$?
      if [ "$code" != "$AGAIN" ] && [ "$(state)" = READY ]; then exit "$code"; fi
      sleep 30 ;;
    PREEMPTED | TERMINATED) tpu delete "$TPU_NAME" --quiet ;;
    '') tpu create "$TPU_NAME" --accelerator-type="$TPU_TYPE" --version="$TPU_IMAGE" --spot || sleep 60 ;;
    *) echo "$TPU_NAME is $now" && sleep 30 ;;
  esac
done
