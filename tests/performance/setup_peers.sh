#!/usr/bin/env bash
# Makes one environment for each engine we compare with, in tests/performance/.venvs/<peer>.
#   bash tests/performance/setup_peers.sh [llama_cpp] [transformers] [vllm]     (default: all)
# Does nothing for a peer whose requirements are installed already. llama.cpp is compiled, which takes 10 to 30 minutes;
# JOBS sets how many compilers run at a time. PYTHON is the interpreter to use. On a machine whose pip does not find the
# CPU build of torch, set PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

python="${PYTHON:-python3}"

install_llama_cpp() {
  # The source package, with everything that the processor at hand knows (AVX-512, bfloat16) and OpenMP.
  CMAKE_BUILD_PARALLEL_LEVEL="${JOBS:-2}" \
    CMAKE_ARGS="-DGGML_NATIVE=ON -DGGML_OPENMP=ON -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_TOOLS=OFF -DLLAVA_BUILD=OFF" \
    "$1/bin/pip" install -q --no-binary llama-cpp-python -r requirements/llama_cpp.txt
}

install_transformers() {
  "$1/bin/pip" install -q -r requirements/transformers.txt
}

install_vllm() {
  "$1/bin/pip" install -q -r requirements/vllm.txt
  # Builds for another torch than the CPU's break the import of whatever looks for them; text needs none of them.
  "$1/bin/pip" uninstall -q -y torchvision torchaudio torchcodec
}

peers=("$@")
if ((${#peers[@]} == 0)); then peers=(llama_cpp transformers vllm); fi
for peer in "${peers[@]}"; do
  if ! [[ -f "requirements/$peer.txt" ]]; then
    printf 'unknown peer %s; known are llama_cpp, transformers, vllm\n' "$peer" >&2
    exit 2
  fi
  venv="$PWD/.venvs/$peer"
  if cmp -s "requirements/$peer.txt" "$venv/.installed"; then
    printf '%s: ready\n' "$peer"
    continue
  fi
  printf '%s: installing into %s\n' "$peer" "$venv"
  "$python" -m venv "$venv"
  "install_$peer" "$venv"
  cp "requirements/$peer.txt" "$venv/.installed"
done
