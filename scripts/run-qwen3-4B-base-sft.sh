#!/usr/bin/env bash
# Supervised fine-tuning of Qwen3-4B-Base on OpenHermes-2.5: one node of 8 GPUs. scripts/prepare_openhermes.py makes
# TRAIN_DATA of the published file.
#
#   MODEL_DIR=... TRAIN_DATA=... SAVE_DIR=... \
#     scripts/run-qwen3-4B-base-sft.sh [--dry-run] [FLAGS...]
#
# FLAGS are added at the end, where they win over those below. --dry-run checks all flags and files, starts nothing, and
# needs no GPU and no weights.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=lib/recipe.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib/recipe.sh"

needs \
  MODEL_DIR "the Hugging Face folder of Qwen3-4B-Base" \
  TRAIN_DATA "the output of scripts/prepare_openhermes.py" \
  SAVE_DIR "folder for checkpoints; a run that finds one there goes on with it"
cluster 1 8
# shellcheck source-path=SCRIPTDIR source=models/qwen3-4B.sh
source "$SCRIPTS/models/qwen3-4B.sh"

CKPT_ARGS=(
  --hf-checkpoint "$MODEL_DIR" --run-dir "$SAVE_DIR/run" # metrics, samples, logs
  # Also after each epoch; 64 GB each, and none is ever deleted. --dry-run says how many there will be.
  --load "$SAVE_DIR" --save "$SAVE_DIR" --save-interval 2000
)
SFT_ARGS=(
  --rollout-function-path slime.rollout.sft_rollout.generate_rollout --debug-train-only
  --prompt-data "$TRAIN_DATA" --input-key messages --loss-mask-type qwen3 --rollout-shuffle
  --num-epoch 3 --rollout-batch-size 128 --global-batch-size 128 --n-samples-per-prompt 1
  --loss-type sft_loss --calculate-per-token-loss --disable-compute-advantages-and-returns
)
PERF_ARGS=(
  --recompute-granularity full --recompute-method uniform --recompute-num-layers 1
  --use-dynamic-batch-size --max-tokens-per-gpu 9216
)
OPTIMIZER_ARGS=(
  --optimizer adam --lr 1e-5 --min-lr 1e-6 --lr-decay-style cosine --lr-warmup-fraction 0.1
  --weight-decay 0.1 --adam-beta1 0.9 --adam-beta2 0.95
)
MISC_ARGS=(
  --device cuda --actor-num-nodes "$NUM_NODES" --actor-num-gpus-per-node "$GPUS_PER_NODE"
  --attention-dropout 0.0 --hidden-dropout 0.0 --accumulate-allreduce-grads-in-fp32
)

# One step off: the next conversations are tokenised while the model trains on these.
launch train_async.py "${MODEL_ARGS[@]}" "${CKPT_ARGS[@]}" "${SFT_ARGS[@]}" "${PERF_ARGS[@]}" "${OPTIMIZER_ARGS[@]}" \
  "${MISC_ARGS[@]}" "$@"
