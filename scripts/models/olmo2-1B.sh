# Model flags of OLMo-2-0425-1B; source this file and pass "${MODEL_ARGS[@]}".
# shellcheck shell=bash disable=SC2034
MODEL_ARGS=(
    --swiglu
    --num-layers 16
    --hidden-size 2048
    --ffn-hidden-size 8192
    --num-attention-heads 16
    --kv-channels 128
    --use-rotary-position-embeddings
    --rotary-base 500000
    --disable-bias-linear
    --normalization RMSNorm
    --norm-epsilon 1e-06
    --vocab-size 100352
    --untie-embeddings-and-output-weights
)
