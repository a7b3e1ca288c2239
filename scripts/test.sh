#!/usr/bin/env bash
# Makes an environment for tests, then runs lint, the type checker and all tests. Further arguments go to pytest, such as -m slow.
#   bash scripts/test.sh
# With --oldest first, the tests marked so run with the oldest supported TensorFlow and Keras, in an environment of their own.
#   bash scripts/test.sh --oldest
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON=${PYTHON:-python3}
if [ "${1:-}" = --oldest ]; then
  shift
  VENV=${VENV:-.venv-oldest}
  PINS=("tensorflow-cpu==2.18.*" "keras==3.5.*")
  SELECTED=(-m "oldest and not slow")
  if ! "$PYTHON" -c "import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))"; then
    echo "error: Expected Python 3.10 to 3.12, for TensorFlow 2.18; PYTHON names another one. Received: $("$PYTHON" --version)" >&2
    exit 2
  fi
else
  VENV=${VENV:-.venv-test}
  PINS=()
  SELECTED=()
fi
STAMP=$VENV/installed-$(cat setup.py scripts/test.sh | cksum | cut -d" " -f1)
if [ ! -e "$STAMP" ]; then
  echo "Installing robust_keras[cpu,test] ${PINS[*]} into $VENV"
  "$PYTHON" -m venv "$VENV"
  # Half of its time would go into compiling what nobody imports.
  "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --no-compile --editable ".[cpu,test]" "${PINS[@]}"
  # Tests start a hundred processes. Each would look for garbage among all that TensorFlow imports, and again at its end.
  echo "import atexit, gc; gc.set_threshold(100_000, 20, 50); atexit.register(gc.freeze)" \
    >"$("$VENV/bin/python" -c "import sysconfig; print(sysconfig.get_path('purelib'))")/rarely_collect.pth"
  touch "$STAMP"
fi
export TF_ENABLE_ONEDNN_OPTS=1 TF_CPP_MIN_LOG_LEVEL=2

if [ ${#PINS[@]} -eq 0 ]; then
  "$VENV/bin/ruff" check .
  "$VENV/bin/ruff" format --check .
  "$VENV/bin/mypy"
fi
# Files side by side on two cores: most tests keep one busy.
"$VENV/bin/python" -m pytest -n 2 --dist loadfile --no-loadscope-reorder "${SELECTED[@]}" "$@"
