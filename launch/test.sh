#!/usr/bin/env bash
# Installs everything and runs the tests on the CPU. Arguments go to pytest, e.g.
#   launch/test.sh -m "not slow"          # two minutes
#   launch/test.sh tests/test_flow.py
# REFERENCES=newest tests with the newest diffusers and transformers, in an environment of its own.
set -euo pipefail
EXTRA=test
if [ "${REFERENCES:-pinned}" = newest ]; then
  EXTRA=test-newest
  VENV=${VENV:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/.venv-newest}
fi
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"
install "$EXTRA"
# Not among the extra's packages, because it asks for an older Orbax, which the conversion does not use.
python -m pip install --quiet --disable-pip-version-check --no-deps "jax2onnx==0.17.*"
# Two processes: compiling keeps one core busy in each.
exec env JAX_PLATFORMS=cpu python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder "$@"
