#!/usr/bin/env bash
# GRPO of Qwen3-4B on DAPO-Math-17k with Python as a tool: one node of 8 GPUs, which trainer and engines share.
#
#   MODEL_DIR=... PROMPT_DATA=... EVAL_DATA=... SAVE_DIR=... \
#     examples/retool/run-qwen3-4B.sh [--dry-run] [FLAGS...]
#
# FLAGS are added at the end, where they win over those below. --dry-run checks all flags and files, starts nothing, and
# needs no GPU and no weights.
# shellcheck disable=SC2034 # the arrays are for launch_rl
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
export PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}" # python_tool
# shellcheck source-path=SCRIPTDIR source=../../scripts/run-qwen3-4B.sh
source "$here/../../scripts/run-qwen3-4B.sh"

ROLLOUT_ARGS=(
  --prompt-data "$PROMPT_DATA" --input-key prompt --label-key label --rollout-shuffle
  # Prompts stay messages: python_tool.generate adds the system message that explains the tool.
  --custom-config-path "$here/tool-qwen3.yaml" --custom-generate-function-path python_tool.generate
  --custom-rm-path python_tool.reward --sandbox-packages numpy sympy --log-multi-turn
  --rollout-max-context-len 16384 --generate-timeout-s 1800
  --num-rollout 3000 --rollout-batch-size 32 --n-samples-per-prompt 8 --global-batch-size 256
  --rollout-max-response-len 8192 --rollout-temperature 1
  --balance-data
)
EVAL_ARGS=(
  --eval-interval 20 --eval-prompt-data aime "$EVAL_DATA"
  --n-samples-per-eval-prompt 16 --eval-max-response-len 16384 --eval-max-context-len 20480 --eval-top-p 1
)

launch_rl "$@"
