#!/usr/bin/env bash
# The quickstart: demonstrations -> SFT -> GRPO on two CPU cores, through the same train.py that runs on a cluster.
# Usage: bash examples/quickstart/run.sh [SEED] [RUN_FOLDER]
# With DEVICE=cuda it takes one GPU instead, which the trainer and a stock SGLang server share. ENGINE_ARGS are more flags for
# the second stage, such as "--sglang-attention-backend triton".
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
seed="${1:-0}"
run="${2:-${root}/runs/quickstart-seed${seed}-$(date +%Y%m%d-%H%M%S)}"
python="${PYTHON:-${root}/.venv/bin/python}"
here="${root}/examples/quickstart"
device="${DEVICE:-cpu}"
started="$(date +%s.%N)"

unset PYTHONDONTWRITEBYTECODE # Without bytecode files each process spends three times as long on its imports.
export OMP_NUM_THREADS=1      # Two torch threads on shared cores are many times slower than one.
export PYTHONPATH="${here}${PYTHONPATH:+:${PYTHONPATH}}"
mkdir -p "${run}"

echo "== data and a random model (seed ${seed}) in ${run}"
"${python}" "${here}/middle_letter.py" "${run}/data" --seed "${seed}"
"${python}" "${here}/make_model.py" "${run}/model" --seed "${seed}" --size "${device/cuda/gpu}"

read -r -a MORE_ARGS <<<"${ENGINE_ARGS:-}"
if [[ ${device} == cuda ]]; then
   SIZE_ARGS=(--hidden-size 128 --ffn-hidden-size 384 --num-attention-heads 2 --kv-channels 64)
   PLACE_ARGS=(--colocate --sglang-mem-fraction-static 0.3)
else
   SIZE_ARGS=(--hidden-size 96 --ffn-hidden-size 288 --num-attention-heads 3 --kv-channels 32)
   PLACE_ARGS=(--rollout-num-gpus 2)
fi
MODEL_ARGS=(
   --num-layers 2 "${SIZE_ARGS[@]}" --group-query-attention --num-query-groups 1
   --qk-layernorm --normalization RMSNorm --norm-epsilon 1e-6
   --swiglu --disable-bias-linear
   --use-rotary-position-embeddings --rotary-base 10000
   --vocab-size 58
)
COMMON_ARGS=(
   --device "${device}" --actor-num-nodes 1 --actor-num-gpus-per-node 1
   --seed "${seed}" --rollout-seed "${seed}"
   --optimizer adam --adam-beta1 0.9 --adam-beta2 0.98
   --attention-dropout 0 --hidden-dropout 0
   --use-dynamic-batch-size --max-tokens-per-gpu 8192
   --use-tensorboard
)
SFT_ARGS=(
   --hf-checkpoint "${run}/model"
   --run-dir "${run}/sft" --save "${run}/sft/checkpoints" --save-hf "${run}/sft/hf"
   --rollout-function-path slime.rollout.sft_rollout.generate_rollout
   --loss-type sft_loss --calculate-per-token-loss --disable-compute-advantages-and-returns --debug-train-only
   --prompt-data "${run}/data/demos.jsonl" --input-key messages --rollout-shuffle --num-epoch 1
   --rollout-batch-size 1920 --global-batch-size 128 --n-samples-per-prompt 1
   --lr 3e-3 --min-lr 3e-4 --lr-decay-style cosine --lr-warmup-iters 20 --weight-decay 0.01
)
GRPO_ARGS=(
   --hf-checkpoint "${run}/sft/hf"
   --run-dir "${run}/grpo" --save "${run}/grpo/checkpoints" --save-hf "${run}/grpo/hf"
   --rollout-num-gpus-per-engine 1
   --prompt-data "${run}/data/train.jsonl" --input-key prompt --label-key label
   --apply-chat-template --rollout-shuffle --custom-rm-path middle_letter.reward
   --num-rollout 80 --rollout-batch-size 32 --n-samples-per-prompt 8 --global-batch-size 256
   --rollout-max-response-len 12 --rollout-temperature 1
   --eval-interval 20 --eval-prompt-data held_out "${run}/data/held_out.jsonl"
   --n-samples-per-eval-prompt 1 --eval-temperature 0 --eval-max-response-len 12
   --advantage-estimator grpo --eps-clip 0.2 --eps-clip-high 0.28
   --entropy-coef 0
   --lr 4e-4 --min-lr 4e-5 --lr-decay-style linear --lr-warmup-iters 10 --weight-decay 0
)

# One step off: the next demonstrations are tokenised while the model trains on these.
echo "== stage 1: supervised fine-tuning on demonstrations"
"${python}" "${root}/train_async.py" "${MODEL_ARGS[@]}" "${COMMON_ARGS[@]}" "${SFT_ARGS[@]}"

echo "== stage 2: GRPO against engines behind the router"
"${python}" "${root}/train.py" "${MODEL_ARGS[@]}" "${COMMON_ARGS[@]}" "${GRPO_ARGS[@]}" "${PLACE_ARGS[@]}" "${MORE_ARGS[@]}"

"${python}" "${here}/report.py" "${run}" --started "${started}" --setup "${root}/.venv/setup.json"
