"""A character-level Hugging Face tokenizer with a ChatML template, made in milliseconds."""

import string
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<unk>")
# As in Qwen3 these are single tokens, yet part of the text: skip_special_tokens keeps them.
MARKUP_TOKENS = (
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
)
CHARACTERS = "\n" + "".join(sorted(set(string.printable) - set(string.whitespace) | {" "}))

CHATML_TEMPLATE = """\
{%- if tools %}{{- '<|im_start|>system\\n# Tools\\n' }}
{%- for tool in tools %}{{- tool | tojson }}{{- '\\n' }}{%- endfor %}
{{- '<|im_end|>\\n' }}{%- endif %}
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and not enable_thinking %}
{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}{%- endif %}"""


def make_char_tokenizer(path: Path | str, *, chat_template: str = CHATML_TEMPLATE) -> str:
    """Save the tokenizer to the folder `path`; returns `path`. `AutoTokenizer` loads it.

    106 tokens: one per printable ASCII character and newline, ChatML and <think> markers. eos is
    <|im_end|>, pad is <|endoftext|> (id 0); any other character becomes <unk>.
    """
    vocab = [*SPECIAL_TOKENS, *MARKUP_TOKENS, *CHARACTERS]
    core = Tokenizer(
        models.WordLevel({token: i for i, token in enumerate(vocab)}, unk_token="<unk>")
    )
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    core.decoder = decoders.Fuse()
    core.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL_TOKENS])
    core.add_tokens([AddedToken(token, normalized=False) for token in MARKUP_TOKENS])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token="<unk>",
        model_max_length=1_000_000,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(path)
    return str(path)
