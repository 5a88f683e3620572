#!/usr/bin/env bash
# From nothing to a densely trained model that answers sparsely: installs into .venv, trains on the Python standard
# library's source text with two Ray actors, compares routing settings, and writes some Python.
#   bash examples/quickstart.sh [more options of `dsmoe train`, e.g. --set train.steps=100]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source examples/setup_venv.sh

run_dir="${RUN_DIR:-runs/quickstart}"
artifact="$run_dir/artifact"
held_out="$run_dir/data/held_out"

dsmoe train examples/quickstart.yaml --set "run.dir=$run_dir" "$@"

printf '\nHeld-out perplexity under several routing settings:\n'
dsmoe evaluate "$artifact" --data "$held_out" --max-tokens "${EVAL_TOKENS:-32768}" \
  --routing dense --routing top_k=16 --routing top_k=8 --routing top_k=4 \
  --routing threshold=0.48 --routing threshold=1.0 --routing threshold_top_k=0.48

prompt=$'def read_lines(path):\n    '
printf '\nGenerated with the deployed sparse routing, after this prompt:\n%s' "$prompt"
dsmoe generate "$artifact" --prompt "$prompt" --max-tokens 96 --temperature 0.7 --seed 1

cat <<END

Left in $run_dir:
  config.yaml    the resolved configuration       checkpoints/  to resume from
  metrics.jsonl  one line a step                  artifact/     the published model
  events.jsonl   evaluations, checkpoints, faults plots/        loss.png, routing.png
Next:
  .venv/bin/dsmoe inspect $artifact
  .venv/bin/dsmoe generate $artifact --prompt 'import ' --routing threshold=0.48
  .venv/bin/dsmoe train examples/quickstart.yaml --set run.dir=$run_dir --set train.steps=2000   # trains on
END
