#!/usr/bin/env bash
# GRPO of Qwen3-4B as a coding agent of mini-swe-agent: one node of 8 GPUs, which trainer and engines share.
#
#   python examples/coding-agent/mbpp_tasks.py sanitized-mbpp.json DATA     # the tasks, once
#   MODEL_DIR=... PROMPT_DATA=DATA/train.jsonl EVAL_DATA=DATA/held_out.jsonl SAVE_DIR=... \
#     examples/coding-agent/run-qwen3-4B.sh [--dry-run] [FLAGS...]
#
# FLAGS are added at the end, where they win over those below. --dry-run checks all flags and files, starts nothing, and
# needs no GPU and no weights. This run was never made.
# shellcheck disable=SC2034 # the arrays are for launch_rl
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
export PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}" # coder
# shellcheck source-path=SCRIPTDIR source=../../scripts/lib/recipe.sh
source "$here/../../scripts/lib/recipe.sh"
needs MODEL_DIR "the Hugging Face folder of Qwen3-4B" \
  PROMPT_DATA "train.jsonl of mbpp_tasks.py" \
  EVAL_DATA "held_out.jsonl of mbpp_tasks.py" \
  SAVE_DIR "folder for checkpoints; a run that finds one there goes on with it"
# shellcheck source-path=SCRIPTDIR source=../../scripts/run-qwen3-4B.sh
source "$here/../../scripts/run-qwen3-4B.sh"

ROLLOUT_ARGS=(
  # Prompts stay messages, as the agent writes its own around the task.
  --prompt-data "$PROMPT_DATA" --input-key prompt --label-key label --metadata-key metadata --rollout-shuffle
  --apply-chat-template-kwargs '{"enable_thinking": false}' # thinking would be cut from the history, a branch each turn
  --custom-config-path "$here/coder-qwen3.yaml" --agent-function-path coder.run_coder --log-multi-turn
  --rollout-max-context-len 16384 --generate-timeout-s 1800
  --num-rollout 300 --rollout-batch-size 32 --n-samples-per-prompt 8 --global-batch-size 256
  --rollout-max-response-len 14336 --rollout-temperature 1
  --balance-data
)
EVAL_ARGS=(
  --eval-interval 20 --eval-prompt-data held_out "$EVAL_DATA"
  --n-samples-per-eval-prompt 1 --eval-max-response-len 14336 --eval-max-context-len 16384 --eval-top-p 1
)

launch_rl "$@"
