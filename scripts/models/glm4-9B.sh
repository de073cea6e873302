# Model flags of GLM-4-9B-0414 and GLM-Z1-9B-0414; source this file and pass "${MODEL_ARGS[@]}".
# shellcheck shell=bash disable=SC2034
MODEL_ARGS=(
    --swiglu
    --num-layers 40
    --hidden-size 4096
    --ffn-hidden-size 13696
    --num-attention-heads 32
    --group-query-attention
    --num-query-groups 2
    --kv-channels 128
    --use-rotary-position-embeddings
    --rotary-base 10000
    --rotary-percent 0.5
    --rotary-interleaved
    --disable-bias-linear
    --add-qkv-bias
    --normalization RMSNorm
    --norm-epsilon 1e-05
    --vocab-size 151552
    --untie-embeddings-and-output-weights
)
