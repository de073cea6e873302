# Model flags of SmolLM2-135M; source this file and pass "${MODEL_ARGS[@]}".
# shellcheck shell=bash disable=SC2034
MODEL_ARGS=(
    --swiglu
    --num-layers 30
    --hidden-size 576
    --ffn-hidden-size 1536
    --num-attention-heads 9
    --group-query-attention
    --num-query-groups 3
    --kv-channels 64
    --use-rotary-position-embeddings
    --rotary-base 100000
    --disable-bias-linear
    --normalization RMSNorm
    --norm-epsilon 1e-05
    --vocab-size 49152
)
