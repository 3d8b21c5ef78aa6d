#!/usr/bin/env bash
# Runs a stage on this machine's GPUs, in one process. Arguments go to the stage, e.g.
#   launch/one_node.sh --config=configs/reflow.py:sd15 --workdir=runs/sd15
# On SIGTERM, training saves and stops. The same command resumes a run that was stopped or killed. On a machine that
# may be preempted, start it at boot (a systemd unit, a start-up script).
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"
install gpu,train
exec python -m instaflow_jax.main "$@"
