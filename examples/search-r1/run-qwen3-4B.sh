#!/usr/bin/env bash
# GRPO of Qwen3-4B that searches the CIA World Factbook: one node of 8 GPUs, which trainer and engines share.
#
#   python examples/search-r1/border_questions.py DATA     # the questions, once (PYTHONPATH: this checkout)
#   python examples/search-r1/search_server.py &           # where Ray's head runs; search-qwen3.yaml has its address
#   MODEL_DIR=... PROMPT_DATA=DATA/train.jsonl EVAL_DATA=DATA/held_out.jsonl SAVE_DIR=... \
#     examples/search-r1/run-qwen3-4B.sh [--dry-run] [FLAGS...]
#
# FLAGS are added at the end, where they win over those below. --dry-run checks all flags and files, starts nothing, and
# needs no GPU and no weights.
# shellcheck disable=SC2034 # the arrays are for launch_rl
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
export PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}" # search_r1
# shellcheck source-path=SCRIPTDIR source=../../scripts/lib/recipe.sh
source "$here/../../scripts/lib/recipe.sh"
needs MODEL_DIR "the Hugging Face folder of Qwen3-4B" \
  PROMPT_DATA "train.jsonl of border_questions.py" \
  EVAL_DATA "held_out.jsonl of border_questions.py" \
  SAVE_DIR "folder for checkpoints; a run that finds one there goes on with it"
# shellcheck source-path=SCRIPTDIR source=../../scripts/run-qwen3-4B.sh
source "$here/../../scripts/run-qwen3-4B.sh"

ROLLOUT_ARGS=(
  --prompt-data "$PROMPT_DATA" --input-key prompt --label-key label --metadata-key metadata --rollout-shuffle
  # It thinks in plain words: a query inside <think> would be one that it only ponders.
  --apply-chat-template --apply-chat-template-kwargs '{"enable_thinking": false}'
  --custom-config-path "$here/search-qwen3.yaml" --custom-generate-function-path search_r1.generate
  --custom-rm-path search_r1.reward --log-multi-turn
  --rollout-max-context-len 8192 --generate-timeout-s 900
  --num-rollout 300 --rollout-batch-size 32 --n-samples-per-prompt 8 --global-batch-size 256
  --rollout-max-response-len 7168 --rollout-temperature 1
  --balance-data
)
EVAL_ARGS=(
  --eval-interval 20 --eval-prompt-data held_out "$EVAL_DATA"
  --n-samples-per-eval-prompt 4 --eval-max-response-len 7168 --eval-max-context-len 8192 --eval-top-p 1
)

launch_rl "$@"
