"""Reasoning with a search engine: `<search>query</search>`, `<information>what is found</information>`, and so on.

The idea is that of Search-R1 (Jin et al. 2025, arXiv:2503.09516). Everything stands in one answer of the assistant;
what is found is not trained on (loss mask 0).
"""

import re
import unicodedata
from collections.abc import Sequence
from typing import Any

from slime.errors import EngineError
from slime.rollout.turns import Turns
from slime.utils.http_utils import post
from slime.utils.types import Sample

QUESTION = "Question: "  # what the prompt has before the question, after all instructions
SEPARATOR = "|"  # between the answers of a label, each of which is right
WORDS = "search_r1_words"  # in Sample.metadata: what the model itself wrote, turn by turn
MAX_QUERY_CHARACTERS = 500  # the server refuses much longer ones, which would fail the sample
_MARK = re.compile(r"</?(?:search|information|answer)>")
_QUERY = re.compile(r"<search>([^<>]*)</search>\s*$")
_ANSWER = re.compile(r"<answer>([^<>]*)</answer>\s*$")


async def generate(
    args: Any, sample: Sample, sampling_params: dict[str, Any], evaluation: bool = False
) -> Sample:
    """The sample with as many turns as it searches, and one with the answer.

    Args:
        args: has `search_url`, `search_topk`, `search_timeout_s`, `search_characters` (of all that is told for one
            query), `search_passage`, `search_told` (how it is told) and `search_max_turns` from --custom-config-path.
    """
    turns = Turns(
        args, sample, sampling_params, max_turns=args.search_max_turns, evaluation=evaluation
    )
    if not sample.response_length:  # also of a sample that begins anew
        sample.metadata.pop(WORDS, None)
    # The token that ends the query may end other text too, such as a line; that is the model's.
    while await turns.ask(stop=["</search>"]):
        sample.metadata[WORDS] = [*sample.metadata.get(WORDS, []), turns.text]
        query = query_in(turns.text)
        if query is None:
            break
        (found,) = await turns.call(search(args, query), timeout_s=args.search_timeout_s)
        if not turns.tell(args.search_told.format(found)):
            break
    return sample


async def reward(args: Any, sample: Sample, **kwargs: Any) -> float:
    """1.0 if the sample ended by itself with one right answer in the right form, else 0.0.

    The form: every turn but the last is words and one query, the last is words and one answer, and nothing comes
    after either. An answer that stands in the question, or information that the model wrote itself, earns nothing.
    """
    if sample.status is not Sample.Status.COMPLETED:
        return 0.0
    answer = normalised(answer_in(sample.metadata.get(WORDS, [])) or "")
    right = {normalised(one) for one in str(sample.label).split(SEPARATOR)}
    return float(answer != "" and answer in right and not stands_in(answer, _question(sample)))


async def search(args: Any, query: str) -> str:
    """What the model is told about `query`, without marks of its own.

    Raises:
        EngineError: the server cannot be reached, refuses the query, or answers something else.
    """
    url = f"{args.search_url}/retrieve"
    asked = {
        "queries": [query[:MAX_QUERY_CHARACTERS]],
        "topk": args.search_topk,
        "return_scores": True,
    }
    try:
        answer = await post(url, asked, max_retries=2, timeout_s=args.search_timeout_s)
    except EngineError as error:
        raise EngineError(
            f"the search server at {args.search_url} (search_url) gave no answer: {error}; "
            "start it with examples/search-r1/search_server.py"
        ) from error
    try:
        contents = [hit["document"]["contents"] for hit in answer["result"][0]]
    except (KeyError, IndexError, TypeError) as error:
        raise EngineError(
            f"{url} answered {str(answer)[:200]!r}, "
            'not {"result": [[{"document": {"contents": ...}, "score": ...}]]}'
        ) from error
    told = "".join(
        args.search_passage.format(number=number, title=title.strip('"'), text=text)
        for number, (title, _, text) in enumerate((c.partition("\n") for c in contents), 1)
    )
    # A page that has marks in it would end the information, or answer.
    return re.sub(r"[<>]", " ", told)[: args.search_characters].strip() or "nothing was found"


def query_in(text: str) -> str | None:
    """The query that a turn ends with; None if it does not."""
    found = _QUERY.search(text)
    return found[1].strip() if found else None


def answer_in(turns: Sequence[str]) -> str | None:
    """The answer that these turns end with; None if their form is not that of `reward`."""
    *searches, last = turns or [""]
    if any(_MARK.findall(turn) != ["<search>", "</search>"] for turn in searches):
        return None
    if not all(map(_QUERY.search, searches)) or _MARK.findall(last) != ["<answer>", "</answer>"]:
        return None
    found = _ANSWER.search(last)
    return found[1].strip() if found else None


def normalised(text: str) -> str:
    """Lower case, without accents, articles and punctuation; hyphens are blanks."""
    letters = unicodedata.normalize("NFKD", text.lower().replace("-", " "))
    kept = "".join(c for c in letters if c.isalnum() or c.isspace())
    return " ".join(word for word in kept.split() if word not in ("a", "an", "the"))


def stands_in(answer: str, question: str) -> bool:
    """Whether the words of `answer`, normalised, follow each other in `question`."""
    return f" {answer} " in f" {normalised(question)} "


def _question(sample: Sample) -> str:
    """The question without what comes before it."""
    prompt = sample.prompt
    text = prompt if isinstance(prompt, str) else str(prompt[-1]["content"])
    return text.rpartition(QUESTION)[2]
