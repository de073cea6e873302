"""The quickstart's model with words for tool calls in its tokenizer and its chat template.

The pieces of a call that are the same in every call are one token each, as larger tokenizers have them.
"""

import argparse
import json
from pathlib import Path

import make_model  # pyright: ignore[reportMissingImports] - run.sh puts it on the path
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

CALL = ["<tool_call>", "</tool_call>", '{"name": "', '", "arguments": {"', '": "', '"}}']
WORDS = ["tool", "sort", "letters"]
CHARACTERS = '"{}_'
# Tools are named, not described: this model has seen what its only tool does.
CHAT_TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool.function.name }}{% endfor %}<|im_end|>\n"
    "{% endif %}{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}"
    "{% for call in message.tool_calls or [] %}"
    '<tool_call>{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}'
    "</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_tokenizer(folder: Path) -> int:
    """tokenizer.json and tokenizer_config.json; the size of the vocabulary."""
    special, added = (
        make_model.SPECIAL[:3],
        [*make_model.SPECIAL[3:], *make_model.ROLES, *CALL, *WORDS],
    )
    words = [*special, *added, *make_model.CHARACTERS, *CHARACTERS]
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="?")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(
        [AddedToken(word, special=True, normalized=False) for word in special]
    )
    tokenizer.add_tokens([AddedToken(word, normalized=False) for word in added])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": "<|endoftext|>",
        "eos_token": "<|im_end|>",
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 256,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
    return len(words)


def main() -> None:
    """Write the folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    vocab_size = write_tokenizer(options.folder)
    size = make_model.SIZES["cpu"]
    make_model.write_config(options.folder, vocab_size, size)
    make_model.write_weights(options.folder, vocab_size, size, options.seed)


if __name__ == "__main__":
    main()
