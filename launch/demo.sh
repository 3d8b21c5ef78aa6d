#!/usr/bin/env bash
# Sets everything up and draws pictures with the embedded model. Arguments go to the stage, e.g.
#   launch/demo.sh --config.prompts='red apple|cat face' --config.N=8
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"
install demo
exec python -m instaflow_jax.main --config=configs/sample.py "$@"
