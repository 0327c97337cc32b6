#!/usr/bin/env bash
# A virtual environment for each peer, so that neither sees the other's versions nor tiltjax's: .venv.trl and .venv.tunix.
# pip writes its log to <environment>/pip.log; an environment that is whole is left as it is.
set -euo pipefail
cd "$(dirname "$0")/../.."
python="${PYTHON:-python3}"

make_environment() { # name, then rounds of requirements, one argument each
  local venv=".venv.$1"
  shift
  if [ -e "$venv/.installed" ]; then
    echo "$venv: there already"
    return
  fi
  test -x "$venv/bin/python" || "$python" -m venv "$venv"
  for round in "$@"; do
    # shellcheck disable=SC2086
    "$venv/bin/pip" install --quiet --disable-pip-version-check --progress-bar=off $round >>"$venv/pip.log" 2>&1 ||
      { echo "$venv: pip failed on '$round', see $venv/pip.log" >&2; exit 1; }
  done
  touch "$venv/.installed"
  echo "$venv: made"
}

# torch on its own and first: what pip finds for it alone is the build for a machine without a GPU.
make_environment trl "torch==2.13.0" "trl==1.16.0 transformers==5.23.0 psutil"
make_environment tunix "google-tunix==0.1.7 psutil"
