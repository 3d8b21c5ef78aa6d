# Sourced by the other scripts. Each value may be set from outside:
#   PYTHON  the interpreter that creates the virtual environment
#   VENV    the environment's folder, kept between runs; delete it to start over
#   JAX_COMPILATION_CACHE_DIR  compiled programs, kept so that a restarted run does not compile them again
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=${VENV:-$ROOT/.venv}
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$VENV/compiled}
# XLA's CPU programs allocate large arrays at each call; in huge pages that takes up to a sixth less time.
[[ ${GLIBC_TUNABLES:-} == *hugetlb* ]] || export GLIBC_TUNABLES=${GLIBC_TUNABLES:+$GLIBC_TUNABLES:}glibc.malloc.hugetlb=1
# Of a GPU's memory jax takes 3/4 unless told otherwise; NVIDIA's performance page for jax advises 0.9. No flags for XLA
# here: those that others set changed no instruction of our compiled programs (docs/hardware.md).
[ -n "${XLA_PYTHON_CLIENT_MEM_FRACTION:-}" ] || export XLA_CLIENT_MEM_FRACTION=${XLA_CLIENT_MEM_FRACTION:-0.9}
AGAIN=75 # exit code of a run that was asked to stop: start it again, and it resumes
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

stage() { # stage ARGUMENTS: runs it; exits with $AGAIN if SIGTERM stopped it cleanly, where Python itself exits with 0
  local stopped='' code=0
  trap 'stopped=1' TERM
  python -m instaflow_jax.main "$@" || code=$?
  case "$stopped:$code" in 1:0 | 1:143) code=$AGAIN ;; esac
  return "$code"
}
