#!/usr/bin/env bash
# A tool on two CPU cores: demonstrations of those who ask Python and those who guess -> SFT -> GRPO.
# Usage: bash examples/retool/run.sh [SEED] [RUN_FOLDER]
# NUM_ROLLOUT is the number of rounds of the second stage (40).
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=../lib/tiny.sh
source "$(dirname "${BASH_SOURCE[0]}")/../lib/tiny.sh"
begin retool "$@"
"${python}" "${here}/products.py" "${run}" --seed "${seed}"

supervised 60 2 # with and without the tool
grpo 60 \
   --custom-config-path "${here}/tool.yaml" --custom-generate-function-path python_tool.generate \
   --custom-rm-path python_tool.exact_reward --rollout-max-context-len 64 \
   --num-rollout "${NUM_ROLLOUT:-40}" --rollout-batch-size 16 --n-samples-per-prompt 8 --rollout-max-response-len 48 \
   --eval-interval 20 --n-samples-per-eval-prompt 8 --eval-temperature 1 --eval-max-response-len 48
