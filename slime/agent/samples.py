"""From a tree of exchanges to Samples: one per branch, in the tokens that were read and written."""

from typing import Any

from slime.agent.tree import Exchange, Tree
from slime.data.chat import Tokenizer
from slime.data.sample import PrefixCacheInfo, Sample, SpecInfo
from slime.rollout.turns import ROUND_NUMBER, sibling_of

Status = Sample.Status


def samples_of(args: Any, tokenizer: Tokenizer, tree: Tree, sample: Sample) -> list[Sample]:
    """A Sample for each leaf of `tree`, in the order their answers came.

    Prompt is what the first request of the branch held; response everything after it. What the model
    wrote trains, but only in the first branch that has it; what the agent said has loss mask 0.

    Args:
        sample: the execution's; it becomes the first branch, the others its siblings.

    Raises:
        DataError: an exchange whose lists do not fit.
    """
    leaves = tree.leaves()
    empty(sample)
    siblings = [sample, *(sibling_of(sample, sample.prompt) for _ in leaves[1:])]
    trained = set[Exchange]()
    for part, leaf in zip(siblings, leaves, strict=True):
        _fill(args, tokenizer, part, leaf, trained)
    return siblings


def empty(sample: Sample) -> None:
    """Take out what was generated, and the prompt ids: an agent's prompt is its own."""
    sample.tokens, sample.response, sample.response_length = [], "", 0
    sample.loss_mask = sample.rollout_log_probs = sample.rollout_routed_experts = None
    sample.rollout_top_p_token_ids = sample.rollout_top_p_token_offsets = None
    sample.teacher_log_probs = None
    sample.weight_versions, sample.version_spans = [], []
    sample.status = Status.PENDING


def _fill(
    args: Any, tokenizer: Tokenizer, sample: Sample, leaf: Exchange, trained: set[Exchange]
) -> None:
    path = leaf.path()
    sample.tokens = list(path[0].told)
    for exchange in path:
        if exchange.parent is not None:
            sample.append_response_tokens(
                args, tokens=exchange.told, trainable=False, text=exchange.told_text
            )
        _append_answer(args, tokenizer, sample, exchange, trains=exchange not in trained)
        trained.add(exchange)
    last = leaf.answer
    if last.rollout_routed_experts is not None:  # the engine's, for the whole conversation
        sample.rollout_routed_experts = last.rollout_routed_experts
    sample.status = Status.TRUNCATED if leaf.is_full else last.status
    sample.metadata = {**sample.metadata, ROUND_NUMBER: len(path)}


def _append_answer(
    args: Any, tokenizer: Tokenizer, sample: Sample, exchange: Exchange, *, trains: bool
) -> None:
    answer = exchange.answer
    spans = [[version, first] for first, version in answer.version_spans]
    sample.append_response_tokens(
        args,
        tokens=answer.tokens,
        log_probs=answer.rollout_log_probs or [],
        trainable=trains and exchange.trains,
        meta_info={"weight_versions": spans} if spans else None,
        text=tokenizer.decode(answer.tokens),
    )
    if trains:  # an engine's counts, once
        sample.weight_versions = [*sample.weight_versions, *answer.weight_versions]
        _add_counts(sample.spec_info, answer.spec_info)
        _add_counts(sample.prefix_cache_info, answer.prefix_cache_info)


def _add_counts[T: (SpecInfo, PrefixCacheInfo)](total: T, part: T) -> None:
    for name, value in vars(part).items():
        setattr(total, name, getattr(total, name) + value)
