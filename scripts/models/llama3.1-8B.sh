# Model flags of Llama-3.1-8B; source this file and pass "${MODEL_ARGS[@]}".
# shellcheck shell=bash disable=SC2034
MODEL_ARGS=(
    --swiglu
    --num-layers 32
    --hidden-size 4096
    --ffn-hidden-size 14336
    --num-attention-heads 32
    --group-query-attention
    --num-query-groups 8
    --kv-channels 128
    --use-rotary-position-embeddings
    --rotary-base 500000
    --use-rope-scaling
    --rope-scaling-factor 8.0
    --disable-bias-linear
    --normalization RMSNorm
    --norm-epsilon 1e-05
    --vocab-size 128256
    --untie-embeddings-and-output-weights
)
