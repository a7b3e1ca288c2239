#!/usr/bin/env bash
# Makes an environment for tests, then runs lint and tests. Further arguments go to pytest, such as -m slow.
#   bash scripts/test.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

VENV=${VENV:-.venv-test}
SETUP=$(cksum setup.py | cut -d" " -f1)
if [ ! -e "$VENV/installed-$SETUP" ]; then
  echo "Installing robust_keras[cpu,test] into $VENV"
  python3 -m venv "$VENV"
  "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --editable ".[cpu,test]"
  touch "$VENV/installed-$SETUP"
fi
export TF_ENABLE_ONEDNN_OPTS=1 TF_CPP_MIN_LOG_LEVEL=2

"$VENV/bin/ruff" check .
"$VENV/bin/ruff" format --check .
# Files side by side on two cores: most tests keep one busy.
"$VENV/bin/python" -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
