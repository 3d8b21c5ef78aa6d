#!/usr/bin/env bash
# Installs everything and runs the complete method on the embedded world, in about 25 minutes on two CPU cores. At the
# end it prints the path of a report. Started again, it resumes. Arguments go to the stage, e.g.
#   launch/demo.sh --workdir=runs/longer --config.reflow.loop.steps=2000
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"
install demo
exec python -m instaflow_jax.main --config=configs/demo.py --workdir=runs/demo --cpu_devices=2 "$@"
