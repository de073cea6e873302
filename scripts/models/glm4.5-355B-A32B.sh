# Model flags of GLM-4.5 (355B-A32B); source this file and pass "${MODEL_ARGS[@]}".
# shellcheck shell=bash disable=SC2034
MODEL_ARGS=(
    --swiglu
    --num-layers 92
    --hidden-size 5120
    --ffn-hidden-size 12288
    --num-attention-heads 96
    --group-query-attention
    --num-query-groups 8
    --kv-channels 128
    --use-rotary-position-embeddings
    --rotary-base 1000000
    --rotary-percent 0.5
    --disable-bias-linear
    --add-qkv-bias
    --qk-layernorm
    --normalization RMSNorm
    --norm-epsilon 1e-05
    --vocab-size 151552
    --untie-embeddings-and-output-weights
    --num-experts 160
    --moe-layer-freq '[0]*3+[1]*89'
    --moe-ffn-hidden-size 1536
    --moe-shared-expert-intermediate-size 1536
    --moe-router-topk 8
    --moe-router-score-function sigmoid
    --moe-router-pre-softmax
    --moe-router-enable-expert-bias
    --moe-router-bias-update-rate 0.0
    --moe-router-topk-scaling-factor 2.5
    --moe-router-dtype fp32
    --moe-router-load-balancing-type none
    --moe-aux-loss-coeff 0.0
)
