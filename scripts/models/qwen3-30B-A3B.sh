# Model flags of Qwen3-30B-A3B; source this file and pass "${MODEL_ARGS[@]}".
# MODEL_ARGS_ROTARY_BASE replaces the RoPE base, for a checkpoint with another one.
# shellcheck shell=bash disable=SC2034
MODEL_ARGS=(
    --swiglu
    --num-layers 48
    --hidden-size 2048
    --ffn-hidden-size 6144
    --num-attention-heads 32
    --group-query-attention
    --num-query-groups 4
    --kv-channels 128
    --use-rotary-position-embeddings
    --rotary-base "${MODEL_ARGS_ROTARY_BASE:-1000000}"
    --disable-bias-linear
    --qk-layernorm
    --normalization RMSNorm
    --norm-epsilon 1e-06
    --vocab-size 151936
    --untie-embeddings-and-output-weights
    --num-experts 128
    --moe-layer-freq '[1]*48'
    --moe-ffn-hidden-size 768
    --moe-router-topk 8
    --moe-router-score-function softmax
    --moe-router-dtype fp32
    --moe-router-load-balancing-type none
    --moe-aux-loss-coeff 0.0
)
