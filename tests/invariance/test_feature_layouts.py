"""Critics, own losses and routing replay on two ranks against one process."""

import functools
from pathlib import Path

import pytest
import torch
from support import feature_cases as cases
from support.critics import CriticReference, critic_reference
from support.device import skip_unless_possible
from support.megatron_runs import hf_model
from support.ranks import make_models, result, run_ranks
from support.routing import RoutingReference, routing_reference

pytestmark = pytest.mark.trainer

MOE = ("qwen3_moe", "deepseek_v3")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The models, and what the ranks left: one start for all cases."""
    skip_unless_possible(2)
    folder = tmp_path_factory.mktemp("features")
    make_models(folder, ["qwen3", *MOE])
    for model in MOE:
        torch.save(moved(folder / model).experts, folder / f"{model}.experts")
    names = [*cases.CRITICS, *cases.CUSTOM_LOSSES, *cases.REPLAYS]
    run_ranks(folder, 2, names, cases.__name__)
    return folder


@functools.cache
def moved(model: Path) -> RoutingReference:
    return routing_reference(model, cases.whole_batch(cases.REPLAY_SEED))


@pytest.fixture(scope="module")
def critic(folder: Path) -> CriticReference:
    batches = [cases.whole_batch(seed) for seed in cases.SEEDS]
    return critic_reference(str(folder / "qwen3"), batches, cases.whole_batch(cases.PROBE_SEED))


@pytest.mark.parametrize("name", cases.CRITICS)
def test_a_critic_on_two_ranks_equals_transformers(
    folder: Path, critic: CriticReference, name: str
) -> None:
    found = result(folder, name)
    metrics = found["metrics"]
    assert [m["loss"] for m in metrics] == pytest.approx(critic.losses, rel=1e-5)
    assert [m["grad_norm"] for m in metrics] == pytest.approx(critic.grad_norms, rel=1e-4)
    assert [m["value_clipfrac"] for m in metrics] == pytest.approx(critic.clipfracs, abs=1e-6)
    for ours, theirs in zip(found["values"], critic.values, strict=True):
        rows = theirs[:: found["dp_size"]]  # those of data-parallel rank 0
        for row, expected in zip(ours, rows, strict=True):
            torch.testing.assert_close(row, expected, rtol=0.0, atol=2e-5)


@pytest.fixture(scope="module")
def own_loss(folder: Path) -> tuple[float, float]:
    """(loss, norm of the gradient) of the first step of `masked_nll`, by transformers."""
    model, batch = hf_model(folder / "qwen3"), cases.whole_batch(cases.SEEDS[0])
    terms: list[torch.Tensor] = []
    rows = zip(batch.tokens, batch.response_lengths, batch.loss_masks, strict=True)
    for tokens, length, mask in rows:
        logits = model(tokens[None]).logits[0, -length - 1 : -1]
        terms.append((logits.logsumexp(-1) * mask).sum())
    loss = torch.stack(terms).sum() / batch.steps[0].num_rollouts
    loss.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    return float(loss.detach()), float(norm)


@pytest.mark.parametrize("name", cases.CUSTOM_LOSSES)
def test_an_own_loss_on_two_ranks_equals_transformers(
    folder: Path, own_loss: tuple[float, float], name: str
) -> None:
    metrics = result(folder, name)["metrics"][0]
    assert (metrics["loss"], metrics["grad_norm"]) == pytest.approx(own_loss, rel=1e-5)


@pytest.mark.parametrize("name", cases.REPLAYS)
def test_routing_replayed_on_two_ranks_equals_transformers_with_forced_experts(
    folder: Path, name: str
) -> None:
    found, reference = result(folder, name), moved(folder / cases.REPLAYS[name][0])
    assert found["metrics"]["grad_norm"] == pytest.approx(reference.grad_norm, rel=1e-4)
    rows = reference.log_probs[:: found["dp_size"]]
    for row, expected in zip(found["log_probs"] or rows, rows, strict=True):
        torch.testing.assert_close(row, expected, rtol=0.0, atol=2e-5)
