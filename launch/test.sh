#!/usr/bin/env bash
# Sets everything up and runs the tests on the CPU. Arguments go to pytest, e.g. launch/test.sh tests/test_flow.py
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"
install test
exec env JAX_PLATFORMS=cpu python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder "$@" # compiling keeps one core busy a process
