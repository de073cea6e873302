"""Log-probs from hidden states and the output weight: as from whole logits, without them."""

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from slime.training.linear_log_probs import OutputWeight, linear_log_probs_and_entropy
from slime.training.log_probs import log_probs_and_entropy

ROWS, VOCAB, HIDDEN = 7, 16, 5


def random_case(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, weight, targets below 13, and the weights of a loss [2, T]."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, HIDDEN, generator=generator, dtype=torch.float64)
    weight = torch.randn(VOCAB, HIDDEN, generator=generator, dtype=torch.float64)
    factors = torch.randn(2, ROWS, generator=generator, dtype=torch.float64)
    targets = torch.randint(13, (ROWS,), generator=generator)
    return hidden.to(dtype), weight.to(dtype), targets, factors


def loss(outputs: tuple[Tensor, Tensor | None], factors: Tensor) -> Tensor:
    log_probs, entropy = outputs
    assert entropy is not None
    return (factors[0] * log_probs + factors[1] * entropy).sum()


def from_whole_logits(**options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, gradient of the hidden states, gradient of the weight)."""
    hidden, weight, targets, factors = random_case()
    hidden.requires_grad_()
    weight.requires_grad_()
    total = loss(
        log_probs_and_entropy(hidden @ weight.t(), targets, needs_entropy=True, **options), factors
    )
    grad_hidden, grad_weight = torch.autograd.grad(total, (hidden, weight))
    return total.detach(), grad_hidden, grad_weight


@pytest.mark.parametrize("chunk_size", [-1, 1, 3, 7, 100])
@pytest.mark.parametrize("options", [{}, {"temperature": 0.6, "vocab_size": 13}])
def test_values_and_gradients_are_those_of_whole_logits(
    chunk_size: int, options: dict[str, Any]
) -> None:
    hidden, weight, targets, factors = random_case()
    hidden.requires_grad_()
    weight.requires_grad_()
    outputs = linear_log_probs_and_entropy(
        hidden, OutputWeight(weight), targets, needs_entropy=True, chunk_size=chunk_size, **options
    )
    total = loss(outputs, factors)
    found = (total.detach(), *torch.autograd.grad(total, (hidden, weight)))
    torch.testing.assert_close(found, from_whole_logits(**options))


@pytest.mark.parametrize("used", [0, 1])
def test_gradient_of_one_output_alone(used: int) -> None:
    hidden, weight, targets, _ = random_case()
    hidden.requires_grad_()
    ours = linear_log_probs_and_entropy(
        hidden, OutputWeight(weight), targets, needs_entropy=True, chunk_size=3
    )[used]
    theirs = log_probs_and_entropy(hidden @ weight.t(), targets, needs_entropy=True)[used]
    assert ours is not None
    assert theirs is not None
    (gradient,) = torch.autograd.grad(ours.sum(), hidden)
    torch.testing.assert_close(gradient, torch.autograd.grad(theirs.sum(), hidden)[0])


def test_the_weights_gradient_is_added_to_the_buffer_that_is_given() -> None:
    hidden, weight, targets, factors = random_case(torch.float32)
    weight.requires_grad_()
    hidden.requires_grad_()
    buffer = torch.full_like(weight, 2.0).detach()
    outputs = linear_log_probs_and_entropy(
        hidden, OutputWeight(weight, buffer), targets, needs_entropy=True, chunk_size=2
    )
    loss(outputs, factors.float()).backward()
    assert weight.grad is None
    expected = from_whole_logits()[2].float()
    torch.testing.assert_close(buffer - 2.0, expected, atol=1e-5, rtol=1e-4)


def test_a_marked_buffer_satisfies_the_hooks_of_megatron() -> None:
    """They ask the weight whether its buffer is complete, and want to see some gradient."""
    hidden, weight, targets, factors = random_case(torch.float32)
    weight.requires_grad_()
    hidden.requires_grad_()
    buffer = torch.zeros_like(weight).detach()
    marks: list[bool] = []

    def hook(parameter: Any) -> None:
        marks.append(parameter.grad_added_to_main_grad)
        assert parameter.grad is not None
        assert parameter.grad.shape == parameter.shape

    weight.register_post_accumulate_grad_hook(hook)
    output = OutputWeight(weight, buffer, marks_buffer=True)
    values = weight.detach().clone()
    outputs = linear_log_probs_and_entropy(
        hidden, output, targets, needs_entropy=True, chunk_size=2
    )
    loss(outputs, factors.float()).backward()
    assert marks == [True]
    assert torch.equal(weight, values)
    torch.testing.assert_close(buffer, from_whole_logits()[2].float(), atol=1e-5, rtol=1e-4)


def test_an_unmarked_buffer_leaves_the_weight_alone() -> None:
    hidden, weight, targets, factors = random_case(torch.float32)
    weight.requires_grad_()
    output = OutputWeight(weight, torch.zeros_like(weight).detach())
    outputs = linear_log_probs_and_entropy(
        hidden.requires_grad_(), output, targets, needs_entropy=True
    )
    loss(outputs, factors.float()).backward()
    assert not hasattr(weight, "grad_added_to_main_grad")
    assert weight.grad is None


def test_bf16_weights_give_fp32_logits() -> None:
    hidden, weight, targets, _ = random_case(torch.bfloat16)
    log_probs, entropy = linear_log_probs_and_entropy(
        hidden, OutputWeight(weight), targets, needs_entropy=True
    )
    expected = log_probs_and_entropy(hidden.float() @ weight.float().t(), targets)[0]
    assert log_probs.dtype == torch.float32
    assert entropy is not None
    torch.testing.assert_close(log_probs, expected, atol=1e-6, rtol=1e-6)


def test_no_rows_give_no_values_and_no_gradient() -> None:
    _, weight, _, _ = random_case()
    weight.requires_grad_()
    hidden = torch.zeros(0, HIDDEN, dtype=torch.float64, requires_grad=True)
    log_probs, entropy = linear_log_probs_and_entropy(
        hidden, OutputWeight(weight), torch.zeros(0, dtype=torch.int64)
    )
    assert entropy is None
    log_probs.sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.shape == (0, HIDDEN)
    assert weight.grad is not None
    assert not weight.grad.any()


def test_nothing_of_the_logits_is_kept_for_the_backward_pass() -> None:
    hidden, weight, targets, _ = random_case()
    hidden.requires_grad_()
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        linear_log_probs_and_entropy(hidden, OutputWeight(weight), targets, needs_entropy=True)
    inputs = {hidden.data_ptr(), weight.data_ptr(), targets.data_ptr()}
    own = [tensor for tensor in saved if tensor.data_ptr() not in inputs]
    # largest logit, log of the sum, entropy
    assert sum(tensor.numel() for tensor in own) == 3 * ROWS


@pytest.mark.parametrize("vocab_size", [13, 8])
def test_split_vocabulary_gives_the_same_on_every_rank(vocab_size: int) -> None:
    hidden, weight, targets, factors = random_case()
    targets = targets % vocab_size
    whole = [hidden.clone().requires_grad_(), weight[:vocab_size].clone().requires_grad_()]
    outputs = log_probs_and_entropy(whole[0] @ whole[1].t(), targets, needs_entropy=True)
    expected = torch.autograd.grad(loss(outputs, factors), whole)
    store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]

    def on_rank(rank: int) -> tuple[Tensor, tuple[Tensor, ...]]:
        group: Any = dist.ProcessGroupGloo(store, rank, 2, timedelta(seconds=30))
        own = [hidden.clone().requires_grad_(), weight[rank * 8 : rank * 8 + 8].clone()]
        own[1].requires_grad_()
        found = linear_log_probs_and_entropy(
            own[0],
            OutputWeight(own[1]),
            targets,
            needs_entropy=True,
            chunk_size=3,
            vocab_size=vocab_size,
            vocab_start=rank * 8,
            vocab_group=group,
        )
        total = loss(found, factors)
        return found[0].detach(), torch.autograd.grad(total, own)

    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(on_rank, range(2)))
    for log_probs, _ in results:
        torch.testing.assert_close(log_probs, outputs[0].detach())
    torch.testing.assert_close(sum(gradients[0] for _, gradients in results), expected[0])
    weight_gradient = torch.cat([gradients[1] for _, gradients in results])[:vocab_size]
    torch.testing.assert_close(weight_gradient, expected[1])
