#!/usr/bin/env bash
# A run on this machine's GPUs, one process for all of them. Arguments go to the stage, e.g.
#   launch/one_node.sh --config=configs/reflow.py:sd15 --workdir=runs/sd15
# Killed, or told to stop by SIGTERM, on which training saves: the same line started again resumes. On a machine that may
# be taken away, let it be started at boot (a systemd unit, a start-up script).
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"
install gpu
exec python -m instaflow_jax.main "$@"
