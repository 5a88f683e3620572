#!/usr/bin/env bash
# Runs the tests that need a CUDA device with the Python at hand. Installs nothing, and needs no Ray: only test files
# with GPU tests are read. Without a GPU all of them are skipped.
# Needs Python 3.11 or later with torch (2.11 or later, built for CUDA), numpy, pyyaml, safetensors, pytest, pydantic and
# what that needs: pydantic-core, annotated-types, typing-inspection, typing-extensions. With tokenizers (and what that
# needs: huggingface-hub) generation is tested too.
#   bash tests/gpu.sh [more options of pytest]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
mapfile -t files < <(grep -rlE 'mark\.gpu\b' tests --include='test_*.py' | sort)
if ((${#files[@]} == 0)); then
  echo 'No test file is marked gpu.' >&2
  exit 1
fi
exec "${PYTHON:-python3}" -m pytest -m gpu "${files[@]}" "$@"
