# Sourced by the other scripts. Each value may be set from outside:
#   PYTHON  the interpreter that makes the virtual environment
#   VENV    the environment's folder, kept between runs; delete it to start over
#   JAX_COMPILATION_CACHE_DIR  compiled programs, kept so that a run that starts again does not compile again
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=${VENV:-$ROOT/.venv}
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$VENV/compiled}
AGAIN=75 # exit code of a run that was told to stop: start it again, it resumes
if [ ! -x "$VENV/bin/python" ]; then
  "${PYTHON:-python3}" -m venv "$VENV"
fi
. "$VENV/bin/activate"
cd "$ROOT"

install() { # install EXTRAS: once for each content of setup.py
  local mark="$VENV/installed-$1-$(sha256sum setup.py | cut -c1-16)"
  [ -e "$mark" ] && return
  python -m pip install --quiet --disable-pip-version-check -e ".[$1]"
  touch "$mark"
}

stage() { # stage ARGUMENTS: the run; a clean end after SIGTERM, which has python's own code 0, becomes $AGAIN
  local told='' code=0
  trap 'told=1' TERM
  python -m instaflow_jax.main "$@" || code=$?
  case "$told:$code" in 1:0 | 1:143) code=$AGAIN ;; esac
  return "$code"
}
