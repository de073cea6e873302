#!/usr/bin/env bash
# A tool on two CPU cores: demonstrations of those who ask Python and those who guess -> SFT -> GRPO.
# Usage: bash examples/retool/run.sh [SEED] [RUN_FOLDER]
# NUM_ROLLOUT is the number of rounds of the second stage (40).
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
seed="${1:-0}"
run="${2:-${root}/runs/retool-seed${seed}-$(date +%Y%m%d-%H%M%S)}"
python="${PYTHON:-${root}/.venv/bin/python}"
here="${root}/examples/retool"

unset PYTHONDONTWRITEBYTECODE # Without bytecode files each process spends three times as long on its imports.
export OMP_NUM_THREADS=1      # Two torch threads on shared cores are many times slower than one.
export PYTHONPATH="${here}:${root}/examples/quickstart${PYTHONPATH:+:${PYTHONPATH}}"
mkdir -p "${run}"

echo "== data and a random model (seed ${seed}) in ${run}"
"${python}" "${here}/products.py" "${run}" --seed "${seed}"

MODEL_ARGS=(
   --num-layers 2 --hidden-size 96 --ffn-hidden-size 288 --num-attention-heads 3 --kv-channels 32
   --group-query-attention --num-query-groups 1 --qk-layernorm --normalization RMSNorm --norm-epsilon 1e-6
   --swiglu --disable-bias-linear --use-rotary-position-embeddings --rotary-base 10000 --vocab-size 60
)
COMMON_ARGS=(
   --device cpu --actor-num-nodes 1 --actor-num-gpus-per-node 1
   --seed "${seed}" --rollout-seed "${seed}"
   --optimizer adam --adam-beta1 0.9 --adam-beta2 0.98 --attention-dropout 0 --hidden-dropout 0
   --use-dynamic-batch-size --max-tokens-per-gpu 8192
)
SFT_ARGS=(
   --hf-checkpoint "${run}/model"
   --run-dir "${run}/sft" --save "${run}/sft/checkpoints" --save-hf "${run}/sft/hf"
   --rollout-function-path slime.rollout.sft_rollout.generate_rollout
   --loss-type sft_loss --calculate-per-token-loss --disable-compute-advantages-and-returns --debug-train-only
   --prompt-data "${run}/data/demos.jsonl" --input-key messages --rollout-shuffle --num-epoch 2
   --rollout-batch-size 1920 --global-batch-size 128 --n-samples-per-prompt 1
   --lr 3e-3 --min-lr 3e-4 --lr-decay-style cosine --lr-warmup-iters 20 --weight-decay 0.01
)
TOOL_ARGS=(
   --custom-config-path "${here}/tool.yaml" --custom-generate-function-path python_tool.generate
   --custom-rm-path python_tool.exact_reward --rollout-max-context-len 64 --log-multi-turn
)
GRPO_ARGS=(
   --hf-checkpoint "${run}/sft/hf"
   --run-dir "${run}/grpo" --save "${run}/grpo/checkpoints" --save-hf "${run}/grpo/hf"
   --rollout-num-gpus 2 --rollout-num-gpus-per-engine 1
   --prompt-data "${run}/data/train.jsonl" --input-key prompt --label-key label --rollout-shuffle
   --num-rollout "${NUM_ROLLOUT:-40}" --rollout-batch-size 16 --n-samples-per-prompt 8 --global-batch-size 128
   --rollout-max-response-len 48 --rollout-temperature 1
   --eval-interval 20 --eval-prompt-data held_out "${run}/data/held_out.jsonl"
   --n-samples-per-eval-prompt 8 --eval-temperature 1 --eval-max-response-len 48
   --advantage-estimator grpo --eps-clip 0.2 --eps-clip-high 0.28 --entropy-coef 0
   --lr 4e-4 --min-lr 4e-5 --lr-decay-style linear --lr-warmup-iters 5 --weight-decay 0
)

echo "== stage 1: supervised fine-tuning on demonstrations with and without the tool"
"${python}" "${root}/train_async.py" "${MODEL_ARGS[@]}" "${COMMON_ARGS[@]}" "${SFT_ARGS[@]}"

echo "== stage 2: GRPO, programs in the sandbox"
"${python}" "${root}/train.py" "${MODEL_ARGS[@]}" "${COMMON_ARGS[@]}" "${GRPO_ARGS[@]}" "${TOOL_ARGS[@]}"
