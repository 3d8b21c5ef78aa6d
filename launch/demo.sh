#!/usr/bin/env bash
# Sets everything up and runs the whole method on the embedded world, on two CPU cores in about 25 minutes; at
# the end it prints the path of a report. Run again, it goes on where it was. Arguments go to the stage, e.g.
#   launch/demo.sh --workdir=runs/longer --config.reflow.loop.steps=2000
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"
install demo
exec python -m instaflow_jax.main --config=configs/demo.py --workdir=runs/demo --cpu_devices=2 "$@"
