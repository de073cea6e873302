#!/usr/bin/env bash
# GSPO of GLM-4.5-Air (106B-A12B) on DAPO-Math-17k: 4 nodes of 8 GPUs, which trainer and engines share. The layout
# leaves 3.1 B weights of experts and 0.4 B others per GPU, 21 GB with gradients in fp32.
#
#   MODEL_DIR=... PROMPT_DATA=... EVAL_DATA=... SAVE_DIR=... \
#     scripts/run-glm4.5-106B-A12B.sh [--dry-run] [FLAGS...]
#
# FLAGS are added at the end, where they win over those below. --dry-run checks all flags and files, starts nothing, and
# needs no GPU and no weights.
# shellcheck disable=SC2034 # the arrays are for launch_rl
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=lib/recipe.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib/recipe.sh"

needs_math_inputs "the Hugging Face folder of GLM-4.5-Air"
cluster 4 8
# shellcheck source-path=SCRIPTDIR source=models/glm4.5-106B-A12B.sh
source "$SCRIPTS/models/glm4.5-106B-A12B.sh"

# Left out: DeepEP, which SGLang's wheel does not bring (the trainer has a dispatcher of its own), and EAGLE with the
# checkpoint's layer for several tokens ahead, whose weights are neither trained nor synced yet.
CKPT_ARGS=(
  --hf-checkpoint "$MODEL_DIR" --run-dir "$SAVE_DIR/run" # metrics, samples, logs
  # Also after each epoch; 1.7 TB each, and none is ever deleted. --dry-run says how many there will be.
  --load "$SAVE_DIR" --save "$SAVE_DIR" --save-interval 500
)
ROLLOUT_ARGS=(
  --prompt-data "$PROMPT_DATA" --input-key prompt --label-key label --apply-chat-template --rollout-shuffle
  --rm-type deepscaler
  --num-rollout 3000 --rollout-batch-size 128 --n-samples-per-prompt 8 --num-steps-per-rollout 4
  --rollout-max-response-len 32768 --rollout-temperature 1
  --over-sampling-batch-size 256
  --dynamic-sampling-filter-path slime.rollout.filter_hub.dynamic_sampling_filters.check_reward_nonzero_std
  --rollout-stop-token-ids 151329 151336 151338 # <|endoftext|> <|user|> <|observation|>
  --balance-data
)
EVAL_ARGS=(
  --eval-interval 20 --eval-prompt-data aime "$EVAL_DATA"
  --n-samples-per-eval-prompt 8 --eval-max-response-len 32768 --eval-top-p 1
)
PERF_ARGS=(
  --tensor-model-parallel-size 8 --sequence-parallel --pipeline-model-parallel-size 2 --context-parallel-size 2
  --expert-model-parallel-size 16 --expert-tensor-parallel-size 1
  --recompute-granularity full --recompute-method uniform --recompute-num-layers 1
  --use-dynamic-batch-size --max-tokens-per-gpu 16384
)
GRPO_ARGS=(
  --advantage-estimator gspo --eps-clip 1e-4 --eps-clip-high 2e-4 --use-tis
  --use-kl-loss --kl-loss-coef 0.00 --kl-loss-type low_var_kl # at 0 no reference model is loaded
  --entropy-coef 0.00
)
OPTIMIZER_ARGS=(
  --optimizer adam --lr 1e-6 --lr-decay-style constant --weight-decay 0.1 --adam-beta1 0.9 --adam-beta2 0.98
  --optimizer-cpu-offload --overlap-cpu-optimizer-d2h-h2d --use-precision-aware-optimizer
)
SGLANG_ARGS=(
  # Whole experts per GPU, as an eighth of one has 176 rows only.
  --rollout-num-gpus-per-engine 8 --sglang-ep-size 8 --sglang-mem-fraction-static 0.7
)
MISC_ARGS=(
  --device cuda --actor-num-nodes "$NUM_NODES" --actor-num-gpus-per-node "$GPUS_PER_NODE" --colocate
  --attention-dropout 0.0 --hidden-dropout 0.0 --accumulate-allreduce-grads-in-fp32
)

launch_rl "$@"
