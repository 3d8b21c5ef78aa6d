# Sourced by the other scripts: makes and enters the project's virtual environment. PYTHON chooses the interpreter,
# VENV the folder (kept between runs; delete it to start over).
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=${VENV:-$ROOT/.venv}
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
