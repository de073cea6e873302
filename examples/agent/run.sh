#!/usr/bin/env bash
# An agent with a tool on two CPU cores: demonstrations -> SFT -> GRPO through the API that the agent speaks.
# Usage: bash examples/agent/run.sh [SEED] [RUN_FOLDER]
# NUM_ROLLOUT is the number of rounds of the second stage (20).
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=../lib/tiny.sh
source "$(dirname "${BASH_SOURCE[0]}")/../lib/tiny.sh"
begin agent "$@"
"${python}" "${here}/agent_data.py" "${run}/data" --seed "${seed}"
"${python}" "${here}/agent_model.py" "${run}/model" --seed "${seed}"

supervised 71 3 # with and without the tool
grpo 71 \
   --agent-function-path agent.run_agent --generate-timeout-s 120 --rollout-max-context-len 256 \
   --num-rollout "${NUM_ROLLOUT:-20}" --rollout-batch-size 32 --n-samples-per-prompt 4 --rollout-max-response-len 100 \
   --eval-interval 10 --n-samples-per-eval-prompt 1 --eval-temperature 0 --eval-max-response-len 100
