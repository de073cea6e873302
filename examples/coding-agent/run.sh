#!/usr/bin/env bash
# A coding agent of mini-swe-agent on two CPU cores: demonstrations of those who test and those who guess -> SFT -> GRPO.
# Usage: bash examples/coding-agent/run.sh [SEED] [RUN_FOLDER]
# NUM_ROLLOUT is the number of rounds of the second stage (30).
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=../lib/tiny.sh
source "$(dirname "${BASH_SOURCE[0]}")/../lib/tiny.sh"
begin coding-agent "$@"
"${python}" "${here}/repairs.py" "${run}" --seed "${seed}"

supervised 72 1 --global-batch-size 32 # the commands, and any of the names
grpo 72 \
   --custom-config-path "${here}/tiny.yaml" --agent-function-path coder.run_coder \
   --generate-timeout-s 120 --rollout-max-context-len 240 \
   --num-rollout "${NUM_ROLLOUT:-30}" --rollout-batch-size 8 --n-samples-per-prompt 8 --global-batch-size 64 \
   --rollout-max-response-len 220 --lr 8e-4 --min-lr 2e-4 \
   --eval-interval 15 --n-samples-per-eval-prompt 1 --eval-temperature 1 --eval-max-response-len 220
