#!/usr/bin/env bash
# GRPO of DeepSeek-R1 on DAPO-Math-17k: 16 nodes of 8 GPUs, which trainer and engines share. The stages
# have 16, 16, 16 and 13 layers. Adam's numbers are 12 bytes a parameter on the host, about 0.5 TB a node.
#
#   MODEL_DIR=... PROMPT_DATA=... EVAL_DATA=... SAVE_DIR=... \
#     scripts/run-deepseek-r1.sh [--dry-run] [FLAGS...]
#
# FLAGS are added at the end, where they win over those below. --dry-run checks all flags and files, starts nothing, and
# needs no GPU and no weights.
# shellcheck disable=SC2034 # the arrays are for launch_rl
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=lib/recipe.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib/recipe.sh"

needs_math_inputs "the Hugging Face folder of DeepSeek-R1 in bf16 (engines get bf16 weights; docs/checkpoints.md converts)"
cluster 16 8
# shellcheck source-path=SCRIPTDIR source=models/deepseek-v3.sh
source "$SCRIPTS/models/deepseek-v3.sh"

# Left out: DeepEP, which SGLang's wheel does not bring (the trainer has a dispatcher of its own), and EAGLE with the
# checkpoint's layer for several tokens ahead, whose weights are neither trained nor synced yet.
CKPT_ARGS=(
  --hf-checkpoint "$MODEL_DIR" --run-dir "$SAVE_DIR/run" # metrics, samples, logs
  # Also after each epoch; 10.7 TB each, and none is ever deleted. --dry-run says how many there will be.
  --load "$SAVE_DIR" --save "$SAVE_DIR" --save-interval 500
)
ROLLOUT_ARGS=(
  --prompt-data "$PROMPT_DATA" --input-key prompt --label-key label --apply-chat-template --rollout-shuffle
  --rm-type deepscaler
  --num-rollout 3000 --rollout-batch-size 128 --n-samples-per-prompt 8 --num-steps-per-rollout 4
  --rollout-max-response-len 32768 --rollout-temperature 1
  --balance-data
)
EVAL_ARGS=(
  --eval-interval 20 --eval-prompt-data aime "$EVAL_DATA"
  --n-samples-per-eval-prompt 8 --eval-max-response-len 32768 --eval-top-p 1
)
PERF_ARGS=(
  --tensor-model-parallel-size 8 --sequence-parallel --pipeline-model-parallel-size 4 --context-parallel-size 4
  --decoder-last-pipeline-num-layers 13
  --expert-model-parallel-size 32 --expert-tensor-parallel-size 1
  --recompute-granularity full --recompute-method uniform --recompute-num-layers 1
  --use-dynamic-batch-size --max-tokens-per-gpu 16384
)
GRPO_ARGS=(
  --advantage-estimator grpo --eps-clip 0.2 --eps-clip-high 0.28
  --use-kl-loss --kl-loss-coef 0.00 --kl-loss-type low_var_kl # at 0 no reference model is loaded
  --entropy-coef 0.00
)
OPTIMIZER_ARGS=(
  --optimizer adam --lr 1e-6 --lr-decay-style constant --weight-decay 0.1 --adam-beta1 0.9 --adam-beta2 0.98
  --optimizer-cpu-offload --overlap-cpu-optimizer-d2h-h2d --use-precision-aware-optimizer
)
SGLANG_ARGS=(
  --rollout-num-gpus-per-engine 64 --sglang-mem-fraction-static 0.7 --sglang-server-concurrency 1024
  --sglang-enable-dp-attention --sglang-dp-size 8 --sglang-ep-size 64
  --sglang-enable-dp-lm-head --sglang-moe-dense-tp-size 1
)
MISC_ARGS=(
  --device cuda --actor-num-nodes "$NUM_NODES" --actor-num-gpus-per-node "$GPUS_PER_NODE" --colocate
  --attention-dropout 0.0 --hidden-dropout 0.0 --accumulate-allreduce-grads-in-fp32
)

launch_rl "$@"
