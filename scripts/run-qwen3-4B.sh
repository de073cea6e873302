#!/usr/bin/env bash
# GRPO of Qwen3-4B on DAPO-Math-17k: one node of 8 GPUs, which trainer and engines share.
#
#   MODEL_DIR=... PROMPT_DATA=... EVAL_DATA=... SAVE_DIR=... \
#     scripts/run-qwen3-4B.sh [--dry-run] [FLAGS...]
#
# FLAGS are added at the end, where they win over those below. --dry-run checks all flags and files, starts nothing, and
# needs no GPU and no weights.
# shellcheck disable=SC2034 # the arrays are for launch_rl
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=lib/recipe.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib/recipe.sh"

needs_math_inputs "the Hugging Face folder of Qwen3-4B"
cluster 1 8
# shellcheck source-path=SCRIPTDIR source=models/qwen3-4B.sh
source "$SCRIPTS/models/qwen3-4B.sh"

CKPT_ARGS=(
  --hf-checkpoint "$MODEL_DIR" --run-dir "$SAVE_DIR/run" # metrics, samples, logs
  # Also after each epoch; 64 GB each, and none is ever deleted. --dry-run says how many there will be.
  --load "$SAVE_DIR" --save "$SAVE_DIR" --save-interval 100
)
ROLLOUT_ARGS=(
  --prompt-data "$PROMPT_DATA" --input-key prompt --label-key label --apply-chat-template --rollout-shuffle
  --rm-type deepscaler
  --num-rollout 3000 --rollout-batch-size 32 --n-samples-per-prompt 8 --global-batch-size 256
  --rollout-max-response-len 8192 --rollout-temperature 1
  --balance-data
)
EVAL_ARGS=(
  --eval-interval 20 --eval-prompt-data aime "$EVAL_DATA"
  --n-samples-per-eval-prompt 16 --eval-max-response-len 16384 --eval-top-p 1
)
PERF_ARGS=(
  --tensor-model-parallel-size 2 --sequence-parallel
  --recompute-granularity full --recompute-method uniform --recompute-num-layers 1
  --use-dynamic-batch-size --max-tokens-per-gpu 9216
)
GRPO_ARGS=(
  --advantage-estimator grpo --eps-clip 0.2 --eps-clip-high 0.28
  --use-kl-loss --kl-loss-coef 0.00 --kl-loss-type low_var_kl # at 0 no reference model is loaded
  --entropy-coef 0.00
)
OPTIMIZER_ARGS=(
  --optimizer adam --lr 1e-6 --lr-decay-style constant --weight-decay 0.1 --adam-beta1 0.9 --adam-beta2 0.98
)
SGLANG_ARGS=(
  --rollout-num-gpus-per-engine 2 --sglang-mem-fraction-static 0.7
)
MISC_ARGS=(
  --device cuda --actor-num-nodes "$NUM_NODES" --actor-num-gpus-per-node "$GPUS_PER_NODE" --colocate
  --attention-dropout 0.0 --hidden-dropout 0.0 --accumulate-allreduce-grads-in-fp32
)

# A recipe that differs in some arrays sources this one, and launches by itself.
[[ ${BASH_SOURCE[0]} != "$0" ]] || launch_rl "$@"
