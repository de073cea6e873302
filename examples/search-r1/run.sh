#!/usr/bin/env bash
# A search engine on two CPU cores: demonstrations of those who search and those who do not -> SFT -> GRPO.
# Usage: bash examples/search-r1/run.sh [SEED] [RUN_FOLDER]
# NUM_ROLLOUT is the number of rounds of the second stage (40).
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
seed="${1:-0}"
run="${2:-${root}/runs/search-r1-seed${seed}-$(date +%Y%m%d-%H%M%S)}"
python="${PYTHON:-${root}/.venv/bin/python}"
here="${root}/examples/search-r1"

unset PYTHONDONTWRITEBYTECODE # Without bytecode files each process spends three times as long on its imports.
export OMP_NUM_THREADS=1      # Two torch threads on shared cores are many times slower than one.
export PYTHONPATH="${here}:${root}/examples/quickstart${PYTHONPATH:+:${PYTHONPATH}}"
mkdir -p "${run}"

echo "== data and a random model (seed ${seed}) in ${run}"
"${python}" "${here}/tiny_search.py" "${run}" --seed "${seed}"

MODEL_ARGS=(
   --num-layers 2 --hidden-size 96 --ffn-hidden-size 288 --num-attention-heads 3 --kv-channels 32
   --group-query-attention --num-query-groups 1 --qk-layernorm --normalization RMSNorm --norm-epsilon 1e-6
   --swiglu --disable-bias-linear --use-rotary-position-embeddings --rotary-base 10000 --vocab-size 67
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
   --prompt-data "${run}/data/demos.jsonl" --input-key messages --rollout-shuffle --num-epoch 8
   --rollout-batch-size 1920 --global-batch-size 128 --n-samples-per-prompt 1
   --lr 3e-3 --min-lr 3e-4 --lr-decay-style cosine --lr-warmup-iters 20 --weight-decay 0.01
)
SEARCH_ARGS=(
   --custom-config-path "${run}/search.yaml" --custom-generate-function-path search_r1.generate
   --custom-rm-path search_r1.reward --rollout-max-context-len 64 --log-multi-turn
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

echo "== stage 1: supervised fine-tuning on demonstrations with and without a search"
"${python}" "${root}/train_async.py" "${MODEL_ARGS[@]}" "${COMMON_ARGS[@]}" "${SFT_ARGS[@]}"

echo "== the search server"
rm -f "${run}/search.url"
"${python}" "${here}/search_server.py" --port 0 --corpus "${run}/data/corpus.jsonl" --url-file "${run}/search.url" \
   >"${run}/search.log" 2>&1 &
server=$!
trap 'kill "${server}" 2>/dev/null || true' EXIT
deadline=$((SECONDS + 60))
until [[ -s ${run}/search.url ]]; do
   if ! kill -0 "${server}" 2>/dev/null || ((SECONDS > deadline)); then
      echo "the search server does not answer; ${run}/search.log says:" >&2
      cat "${run}/search.log" >&2
      exit 1
   fi
   sleep 0.2
done
{ cat "${here}/search-tiny.yaml"; echo "search_url: $(<"${run}/search.url")"; } >"${run}/search.yaml"

echo "== stage 2: GRPO with the search server"
"${python}" "${root}/train.py" "${MODEL_ARGS[@]}" "${COMMON_ARGS[@]}" "${GRPO_ARGS[@]}" "${SEARCH_ARGS[@]}"
