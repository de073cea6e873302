"""Log-probs and entropy from logits: values, gradients, chunks, and a split vocabulary."""

import math
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from slime.training.log_probs import log_probs_and_entropy


def reference(logits: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    log_p = (logits / temperature).log_softmax(-1)
    return log_p.gather(1, targets[:, None]).squeeze(1), -(log_p.exp() * log_p).sum(-1)


def random_case(rows: int = 7, vocab: int = 13, dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(rows, vocab, generator=generator) * 3).to(dtype).requires_grad_()
    return logits, torch.randint(vocab, (rows,), generator=generator)


def test_by_hand() -> None:
    # p = (1/2, 1/4, 1/4): log p, and an entropy of 1.5 bits
    logits = torch.tensor([[math.log(2), 0.0, 0.0]])
    log_probs, entropy = log_probs_and_entropy(logits, torch.tensor([1]), needs_entropy=True)
    assert log_probs.item() == pytest.approx(-math.log(4))
    assert entropy is not None
    assert entropy.item() == pytest.approx(1.5 * math.log(2))


@pytest.mark.parametrize("chunk_size", [-1, 1, 3, 7, 100])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_values_and_gradients_match_log_softmax(chunk_size: int, temperature: float) -> None:
    logits, targets = random_case()
    weights = torch.randn(2, 7).double()
    log_probs, entropy = log_probs_and_entropy(
        logits, targets, temperature=temperature, needs_entropy=True, chunk_size=chunk_size
    )
    expected = reference(logits, targets, temperature)
    assert entropy is not None
    torch.testing.assert_close((log_probs, entropy), expected)
    (gradient,) = torch.autograd.grad((weights[0] * log_probs + weights[1] * entropy).sum(), logits)
    total = (weights[0] * expected[0] + weights[1] * expected[1]).sum()
    (expected_gradient,) = torch.autograd.grad(total, logits)
    torch.testing.assert_close(gradient, expected_gradient)


@pytest.mark.parametrize("used", ["log_probs", "entropy"])
def test_gradient_of_one_output_alone(used: str) -> None:
    logits, targets = random_case()
    outputs = log_probs_and_entropy(logits, targets, needs_entropy=True)
    number = ["log_probs", "entropy"].index(used)
    chosen = outputs[number]
    assert chosen is not None
    (gradient,) = torch.autograd.grad(chosen.sum(), logits)
    (expected,) = torch.autograd.grad(reference(logits, targets, 1.0)[number].sum(), logits)
    torch.testing.assert_close(gradient, expected)


def test_bf16_logits_are_worked_on_in_fp32() -> None:
    logits, targets = random_case(dtype=torch.bfloat16)
    log_probs, entropy = log_probs_and_entropy(logits, targets, needs_entropy=True)
    assert entropy is not None
    assert log_probs.dtype == entropy.dtype == torch.float32
    expected = reference(logits.detach().double(), targets, 1.0)
    torch.testing.assert_close(log_probs.double(), expected[0], atol=1e-5, rtol=0)
    log_probs.sum().backward()
    assert logits.grad is not None
    assert logits.grad.dtype == torch.bfloat16


def test_padding_columns_get_no_probability_and_no_gradient() -> None:
    logits, targets = random_case()
    padded = torch.cat([logits.detach(), torch.full((7, 3), 50.0)], dim=1).requires_grad_()
    log_probs, entropy = log_probs_and_entropy(padded, targets, vocab_size=13, needs_entropy=True)
    assert entropy is not None
    torch.testing.assert_close((log_probs, entropy), reference(logits, targets, 1.0))
    (log_probs + entropy).sum().backward()
    assert padded.grad is not None
    assert padded.grad[:, 13:].abs().max() == 0


def test_minus_infinity_and_large_logits_stay_finite() -> None:
    logits = torch.tensor([[1e4, 1e4, -math.inf]], requires_grad=True)
    log_probs, entropy = log_probs_and_entropy(logits, torch.tensor([0]), needs_entropy=True)
    assert entropy is not None
    assert log_probs.item() == pytest.approx(-math.log(2))
    assert entropy.item() == pytest.approx(math.log(2))
    (log_probs + entropy).sum().backward()
    assert logits.grad is not None
    assert logits.grad.tolist() == [pytest.approx([0.5, -0.5, 0.0])]


def test_no_rows_give_no_values() -> None:
    logits = torch.zeros(0, 5, requires_grad=True)
    log_probs, entropy = log_probs_and_entropy(
        logits, torch.zeros(0, dtype=torch.int64), needs_entropy=True
    )
    assert entropy is not None
    assert log_probs.shape == entropy.shape == (0,)
    (log_probs.sum() + entropy.sum()).backward()


def test_overwriting_gives_the_same_gradient_in_the_memory_of_the_logits() -> None:
    logits, targets = random_case()
    log_probs, _ = log_probs_and_entropy(logits, targets, chunk_size=2)
    (expected,) = torch.autograd.grad(log_probs.sum(), logits)
    hidden = logits.detach().clone().requires_grad_()
    own = hidden * 1.0
    log_probs, _ = log_probs_and_entropy(own, targets, chunk_size=2, overwrite_logits=True)
    log_probs.sum().backward()
    torch.testing.assert_close(hidden.grad, expected)
    torch.testing.assert_close(own.detach(), expected)


def test_only_one_chunk_exists_in_fp32() -> None:
    """Bytes held for the backward pass: the logits themselves and four vectors."""
    logits, targets = random_case(rows=64, vocab=256, dtype=torch.bfloat16)
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        log_probs_and_entropy(logits, targets, needs_entropy=True)
    own = [tensor for tensor in saved if tensor.data_ptr() != logits.data_ptr()]
    # targets, largest logit, log of the sum, entropy
    assert sum(tensor.numel() for tensor in own) == 4 * 64


@pytest.mark.parametrize("vocab_size", [13, 8, 4])
def test_split_vocabulary_gives_the_same_on_every_rank(vocab_size: int) -> None:
    logits, _ = random_case(vocab=16)
    targets = torch.arange(7) % vocab_size
    weights = torch.randn(2, 7).double()
    whole = logits.detach()[:, :vocab_size].clone().requires_grad_()
    expected = reference(whole, targets, 0.7)
    (weights[0] * expected[0] + weights[1] * expected[1]).sum().backward()
    assert whole.grad is not None
    store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]

    def on_rank(rank: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
        # With 4 ids the second rank holds nothing but padding.
        group: Any = dist.ProcessGroupGloo(store, rank, 2, timedelta(seconds=30))
        part = logits.detach()[:, rank * 8 : rank * 8 + 8].clone().requires_grad_()
        log_probs, entropy = log_probs_and_entropy(
            part,
            targets,
            temperature=0.7,
            needs_entropy=True,
            chunk_size=3,
            vocab_size=vocab_size,
            vocab_start=rank * 8,
            vocab_group=group,
        )
        assert entropy is not None
        (weights[0] * log_probs + weights[1] * entropy).sum().backward()
        return log_probs.detach(), entropy.detach(), part.grad

    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(on_rank, range(2)))
    for log_probs, entropy, _ in results:
        torch.testing.assert_close((log_probs, entropy), tuple(e.detach() for e in expected))
    gradients = [gradient for _, _, gradient in results if gradient is not None]
    torch.testing.assert_close(torch.cat(gradients, dim=1)[:, :vocab_size], whole.grad)
