"""The generate function behind --environment-path: one episode, turn by turn, on `slime.rollout.turns`."""

from typing import Any

from slime.data.chat import render, token_ids
from slime.data.sample import Sample
from slime.environments.episode import Episode
from slime.environments.interface import Observation
from slime.errors import DeadlineExceeded, EpisodeError
from slime.rollout.failures import mark_failed
from slime.rollout.state import GenerateState
from slime.rollout.turns import ROUND_NUMBER, TURN_START, Turns
from slime.rollout.unfinished import renewed

Status = Sample.Status
# Between a prompt's last message and the first observation, where both are the user's.
SEPARATOR = "\n"


async def generate(
    args: Any, sample: Sample, sampling_params: dict[str, Any], evaluation: bool = False
) -> Sample:
    """`sample` with a whole episode: the model's turns train, what the environment says does not.

    The prompt of the row comes first, then the first observation. The sample's reward is the sum of those of the
    steps; `sample.metadata["episode"]` has each, as `episode.Record` says. An episode that the environment cuts
    short is TRUNCATED, as is one that meets a limit of `Turns`, with the rewards it has.

    What an environment raises makes the sample FAILED, in the category "environment".

    With --partial-rollout an episode that was cut goes on: a new environment gets the same seed and the same
    actions. If it does not come to the same place, the episode begins anew.

    Raises:
        ConfigError: no environment is named, or the prompts are no messages any more.
        EngineError: as `Turns.ask`.
    """
    if not sample.response_length:
        sample = _prompt_alone(sample)
    episode = Episode(args, sample, evaluation=evaluation)
    try:
        if not sample.response_length:
            _set_prompt(args, sample, await episode.begin())
        elif not await episode.repeat():
            _prompt_alone(sample)
            _set_prompt(args, sample, await episode.begin())
        await _play(args, sample, episode, sampling_params, evaluation)
    except (EpisodeError, DeadlineExceeded) as error:
        mark_failed(args, sample, "environment", error)
    finally:
        await episode.close()
    return sample


async def _play(
    args: Any, sample: Sample, episode: Episode, params: dict[str, Any], evaluation: bool
) -> None:
    turns = Turns(args, sample, params, max_turns=args.environment_max_turns, evaluation=evaluation)
    while await turns.ask():
        (step,) = await turns.call(episode.step(turns.text), timeout_s=args.environment_timeout_s)
        assert not isinstance(step, Exception)
        if step.terminated:
            break
        if step.truncated:
            sample.status = Status.TRUNCATED
            break
        if not _tell(sample, turns, step.observation):
            break
    if sample.status is not Status.ABORTED:
        sample.reward = episode.record.total()


def _prompt_alone(sample: Sample) -> Sample:
    """`sample` as its row is, without what an environment said first."""
    vars(sample).update(vars(renewed(sample)))
    sample.tokens = []
    for key in (TURN_START, ROUND_NUMBER):
        sample.metadata.pop(key, None)
    return sample


def _set_prompt(args: Any, sample: Sample, observation: Observation) -> None:
    """Tokens of the row's prompt with the first observation behind it; `sample.prompt` stays."""
    tokenizer, prompt = GenerateState(args).tokenizer, sample.prompt
    if isinstance(prompt, str):
        text = prompt + _as_text(observation)
    else:
        *before, last = prompt
        if not isinstance(observation, str):
            messages = [*prompt, *observation]
        elif last["role"] == "user" and isinstance(last.get("content"), str):
            content = f"{last['content']}{SEPARATOR}{observation}"
            messages = [*before, {**last, "content": content}]
        else:
            messages = [*prompt, {"role": "user", "content": observation}]
        text = render(
            tokenizer,
            messages,
            where=f"sample {sample.index}",
            tools=sample.metadata.get("tools"),
            template_kwargs=sample.apply_chat_template_kwargs,
        )
    sample.tokens = token_ids(tokenizer, text)


def _tell(sample: Sample, turns: Turns, observation: Observation) -> bool:
    if isinstance(sample.prompt, str):
        return turns.tell(_as_text(observation))
    if isinstance(observation, str):
        observation = [{"role": "user", "content": observation}]
    return turns.tell_messages(observation)


def _as_text(observation: Observation) -> str:
    if isinstance(observation, str):
        return observation
    raise EpisodeError(
        "an observation is messages, but the prompt is text; give rows whose prompts are messages"
    )
