"""The quickstart's model with words for tool calls in its tokenizer and its chat template.

The pieces of a call that are the same in every call are one token each, as larger tokenizers have them.
"""

import argparse
from pathlib import Path

import make_model  # pyright: ignore[reportMissingImports] - run.sh puts it on the path

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


def main() -> None:
    """Write the folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    make_model.write_model(
        options.folder,
        options.seed,
        words=(*make_model.SPECIAL, *make_model.ROLES, *CALL, *WORDS),
        characters=make_model.CHARACTERS + CHARACTERS,
        chat_template=CHAT_TEMPLATE,
    )


if __name__ == "__main__":
    main()
