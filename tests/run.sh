#!/usr/bin/env bash
# Sets itself up in .venv, then runs lint, format, types, import floors and all tests; every stage runs whatever failed.
#   bash tests/run.sh [fast] [more options of pytest]
# "fast" leaves out tests that start Ray or take more than ten seconds, and stays under two minutes.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
venv_extras=dev
source examples/setup_venv.sh

# The older transformers that exported models must load in: a directory of its own, which a test's process puts first in
# its path. What it needs beside these three is in .venv; torch above all is never fetched twice.
setup_old_transformers() {
  local target=.venv/transformers-4.57 wanted=('transformers==4.57.*' 'huggingface_hub>=0.34,<1.0' 'tokenizers>=0.22,<=0.23.0')
  if [[ -f "$target/.setup" && "$(<"$target/.setup")" == "${wanted[*]}" ]]; then return 0; fi
  rm -rf "$target"
  python -m pip install -qq --no-deps --target "$target" "${wanted[@]}" || return 1
  printf '%s' "${wanted[*]}" >"$target/.setup"
}

# The engine's kernels are compiled at first use; without a compiler their tests would be skipped.
ensure_compiler() {
  command -v g++ >/dev/null || command -v clang++ >/dev/null && return 0
  [[ "$(id -u)" == 0 ]] && command -v apt-get >/dev/null && apt-get update -qq && apt-get install -qq -y g++ >&2
}

selection=()
if [[ "${1:-}" == fast ]]; then
  shift
  selection=(-m "not ray and not slow and not gpu")
fi

failed=()
ensure_compiler || printf 'No C++ compiler, and none could be installed; tests of the CPU kernels are skipped.\n' >&2
setup_old_transformers || failed+=("set-up of transformers 4.57")
run_stage() {
  local name="$1" started=$SECONDS
  shift
  printf '\n== %s\n' "$name"
  "$@" || failed+=("$name")
  printf '%s: %d s\n' "$name" $((SECONDS - started))
}

run_stage lint ruff check
run_stage format ruff format --check
run_stage types mypy
run_stage floors lint-imports --no-logo
if ((${#failed[@]})); then printf '\nFailed before the tests: %s\n' "${failed[*]}"; fi

printf '\n== tests\n'
python -m pytest "${selection[@]}" "$@" || failed+=(tests)
# The last line on standard output is pytest's summary.
if ((${#failed[@]})); then
  printf 'Failed: %s\n' "${failed[*]}" >&2
  exit 1
fi
