# Model flags of DeepSeek-V3 and R1; source this file and pass "${MODEL_ARGS[@]}".
# MODEL_ARGS_NUM_LAYERS replaces the number of layers, for a shorter model to try things with.
# shellcheck shell=bash disable=SC2034
MODEL_ARGS=(
    --swiglu
    --num-layers "${MODEL_ARGS_NUM_LAYERS:-61}"
    --hidden-size 7168
    --ffn-hidden-size 18432
    --num-attention-heads 128
    --kv-channels 128
    --multi-latent-attention
    --q-lora-rank 1536
    --kv-lora-rank 512
    --qk-head-dim 128
    --qk-pos-emb-head-dim 64
    --v-head-dim 128
    --use-rotary-position-embeddings
    --rotary-base 10000
    --rope-type yarn
    --rotary-scaling-factor 40.0
    --mscale 1.0
    --mscale-all-dim 1.0
    --disable-bias-linear
    --qk-layernorm
    --normalization RMSNorm
    --norm-epsilon 1e-06
    --vocab-size 129280
    --untie-embeddings-and-output-weights
    --num-experts 256
    --moe-layer-freq "[0]*3+[1]*$((${MODEL_ARGS_NUM_LAYERS:-61} - 3))"
    --moe-ffn-hidden-size 2048
    --moe-shared-expert-intermediate-size 2048
    --moe-router-topk 8
    --moe-router-score-function sigmoid
    --moe-router-pre-softmax
    --moe-router-enable-expert-bias
    --moe-router-bias-update-rate 0.0
    --moe-router-topk-scaling-factor 2.5
    --moe-router-num-groups 8
    --moe-router-group-topk 4
    --moe-router-dtype fp32
    --moe-router-load-balancing-type none
    --moe-aux-loss-coeff 0.0
)
