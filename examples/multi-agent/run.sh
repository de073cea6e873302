#!/usr/bin/env bash
# Several agents on two CPU cores: demonstrations of solvers and judges -> SFT -> GRPO on whole executions.
# Usage: bash examples/multi-agent/run.sh [SEED] [RUN_FOLDER]
# NUM_ROLLOUT is the number of rounds of the second stage (40).
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=../lib/tiny.sh
source "$(dirname "${BASH_SOURCE[0]}")/../lib/tiny.sh"
begin multi-agent "$@"
"${python}" "${here}/debate_data.py" "${run}/data" --seed "${seed}"
"${python}" "${root}/examples/quickstart/make_model.py" "${run}/model" --seed "${seed}"

supervised 58 1 # demonstrations of both roles
grpo 58 \
   --custom-config-path "${here}/agents.yaml" --custom-generate-function-path agents.generate \
   --custom-rm-path agents.reward --custom-reward-post-process-path agents.by_role --rollout-max-context-len 64 \
   --num-rollout "${NUM_ROLLOUT:-40}" --rollout-batch-size 32 --n-samples-per-prompt 4 --rollout-max-response-len 12 \
   --eval-interval 20 --n-samples-per-eval-prompt 1 --eval-temperature 0 --eval-max-response-len 12
