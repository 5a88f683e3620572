# Sourced from the repository root: makes .venv, installs the package into it and puts .venv/bin first in PATH.
# Set venv_extras=dev before sourcing it for the tools of the tests too. Does nothing when the last set-up still fits
# pyproject.toml. On a machine without a GPU, PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu fetches less.

setup_venv() {
  local torch="torch==2.13.0" extras="${1:-}" python stamp digest
  digest="$(cat pyproject.toml examples/setup_venv.sh <(pwd) | sha256sum | cut -d' ' -f1)"
  # What "dev" installs holds what the plain package needs.
  for stamp in ".venv/.setup-${extras:-base}" .venv/.setup-dev; do
    if [[ -f "$stamp" && "$(<"$stamp")" == "$digest" ]]; then return 0; fi
  done
  if ! [[ -x .venv/bin/python ]]; then
    python="$(find_python)" || return 1
    ensure_venv_module "$python" || return 1
    printf 'Making .venv with %s\n' "$("$python" --version)" >&2
    "$python" -m venv .venv || return 1
  fi
  printf 'Installing into .venv; the first time this takes a few minutes\n' >&2
  # torch first and by itself: left to the resolver, a newer one could be chosen.
  .venv/bin/python -m pip install -qq "$torch" || return 1
  .venv/bin/python -m pip install -qq -e ".${extras:+[$extras]}" "$torch" || return 1
  printf '%s' "$digest" >".venv/.setup-${extras:-base}"
}

find_python() {
  local candidate
  for candidate in python3 python3.12 python3.11; do
    if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; then
      printf '%s' "$candidate"
      return 0
    fi
  done
  printf 'Python 3.11 or 3.12 is needed; found: %s. Install one and run this again.\n' \
    "$(python3 --version 2>&1 || true)" >&2
  return 1
}

# Debian and Ubuntu leave ensurepip out of python3.
ensure_venv_module() {
  "$1" -c 'import ensurepip' 2>/dev/null && return 0
  local package
  package="$("$1" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')"
  if [[ "$(id -u)" == 0 ]] && command -v apt-get >/dev/null; then
    apt-get update -qq && apt-get install -qq -y "$package" >&2 && return 0
  fi
  printf 'This Python cannot make virtual environments. Install %s and run this again.\n' "$package" >&2
  return 1
}

setup_venv "${venv_extras:-}" || {
  printf 'Setting up .venv failed; see above.\n' >&2
  exit 1
}
export PATH="$PWD/.venv/bin:$PATH"
