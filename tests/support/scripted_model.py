"""A causal LM that follows a script: what it writes next depends on the last token only.

A real Qwen3 checkpoint for real engines and trainers. Its layers add nothing; the output layer holds the
script. Whole phrases are single tokens, so that a script can make it call tools and answer.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from support.tiny_tokenizer import CHATML_TEMPLATE, make_char_tokenizer
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

# Logit of what the script allows; the others have 0, so exp(-30) of its probability.
SCRIPT_LOGIT = 30.0
END = "<|im_end|>"

Script = Mapping[str, Sequence[str]]

# Flags of train.py for it; the vocabulary is padded to `VOCAB_SIZE`.
VOCAB_SIZE = 160
MODEL_ARGS = (
    "--num-layers 1 --hidden-size 160 --ffn-hidden-size 32 --num-attention-heads 2 "
    "--group-query-attention --num-query-groups 1 --kv-channels 16 --qk-layernorm "
    "--normalization RMSNorm --norm-epsilon 1e-6 --swiglu --disable-bias-linear "
    "--use-rotary-position-embeddings --rotary-base 10000 --untie-embeddings-and-output-weights "
    f"--vocab-size {VOCAB_SIZE}"
)


def save_random_model(folder: Path, *, chat_template: str = CHATML_TEMPLATE) -> Path:
    """A folder with weights at random, large enough that each token has an opinion; returns it."""
    save_scripted_model(folder, {}, chat_template=chat_template)
    config = Qwen3Config.from_pretrained(folder)
    config.initializer_range = 0.3
    torch.manual_seed(1)
    Qwen3ForCausalLM(config).save_pretrained(folder)
    return folder


def save_scripted_model(
    folder: Path, script: Script, *, chat_template: str = CHATML_TEMPLATE, context: int = 512
) -> Path:
    """A folder with model and tokenizer; returns it.

    Args:
        script: token -> what may follow, all equally likely; after any other token comes END. A word
            of more than one character that the character tokenizer lacks becomes a token.
    """
    make_char_tokenizer(folder, chat_template=chat_template)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    words = [*script, *(word for following in script.values() for word in following)]
    tokenizer.add_tokens(list(dict.fromkeys(word for word in words if len(word) > 1)))
    tokenizer.save_pretrained(folder)
    assert len(tokenizer) <= VOCAB_SIZE
    config = Qwen3Config(
        vocab_size=VOCAB_SIZE, hidden_size=VOCAB_SIZE, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, intermediate_size=32, max_position_embeddings=context,
        rope_theta=10000.0, tie_word_embeddings=False, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(config)
    layer = model.model.layers[0]
    with torch.no_grad():
        for weight in (layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight):
            weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(VOCAB_SIZE))
        model.lm_head.weight.copy_(_script_matrix(tokenizer, script))
    model.save_pretrained(folder)
    return folder


def _script_matrix(tokenizer: Any, script: Script) -> torch.Tensor:
    """[V, V]: row = next token, column = last token. The last norm makes sqrt(V) of each 1."""
    matrix = torch.zeros(VOCAB_SIZE, VOCAB_SIZE)
    matrix[tokenizer.convert_tokens_to_ids(END)] = 1.0
    for word, following in script.items():
        column = tokenizer.convert_tokens_to_ids(word)
        matrix[:, column] = 0.0
        matrix[tokenizer.convert_tokens_to_ids(list(following)), column] = 1.0
    return matrix * SCRIPT_LOGIT / math.sqrt(VOCAB_SIZE)
