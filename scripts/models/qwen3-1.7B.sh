# Model flags of Qwen3-1.7B; source this file and pass "${MODEL_ARGS[@]}".
# MODEL_ARGS_ROTARY_BASE replaces the RoPE base, for a checkpoint with another one.
# shellcheck shell=bash disable=SC2034
MODEL_ARGS=(
    --swiglu
    --num-layers 28
    --hidden-size 2048
    --ffn-hidden-size 6144
    --num-attention-heads 16
    --group-query-attention
    --num-query-groups 8
    --kv-channels 128
    --use-rotary-position-embeddings
    --rotary-base "${MODEL_ARGS_ROTARY_BASE:-1000000}"
    --disable-bias-linear
    --qk-layernorm
    --normalization RMSNorm
    --norm-epsilon 1e-06
    --vocab-size 151936
)
