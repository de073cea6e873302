"""Log-probs from hidden states on a card: against fp64, and the memory they take."""

import pytest
import torch

from slime.training.linear_log_probs import OutputWeight, linear_log_probs_and_entropy

pytestmark = pytest.mark.gpu1


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_values_and_gradients_equal_fp64(temperature: float) -> None:
    torch.manual_seed(0)
    rows, hidden_size, vocab, real = 1500, 512, 40960, 40001
    hidden = torch.randn(rows, hidden_size, device="cuda", dtype=torch.bfloat16).requires_grad_()
    weight = (0.1 * torch.randn(vocab, hidden_size, device="cuda")).bfloat16().requires_grad_()
    targets = torch.randint(real, (rows,), device="cuda")
    factors = torch.randn(2, rows, device="cuda")
    buffer = torch.ones(vocab, hidden_size, device="cuda")  # gradients are added to what is there
    log_probs, entropy = linear_log_probs_and_entropy(
        hidden,
        OutputWeight(weight, buffer),
        targets,
        temperature=temperature,
        needs_entropy=True,
        vocab_size=real,
    )
    assert entropy is not None
    (factors[0] * log_probs + factors[1] * entropy).sum().backward()
    assert hidden.grad is not None

    wide = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    table = ((wide[0] @ wide[1][:real].T) / temperature).log_softmax(-1)
    expected = table.gather(1, targets[:, None]).squeeze(1)
    expected_entropy = -(table.exp() * table).sum(1)
    (factors[0] * expected + factors[1] * expected_entropy).sum().backward()
    # fp32 arithmetic on the same bf16 numbers: log-probs of -30 have steps of 2e-6.
    torch.testing.assert_close(log_probs.double(), expected, rtol=0.0, atol=5e-5)
    torch.testing.assert_close(entropy.double(), expected_entropy, rtol=0.0, atol=5e-5)
    # The gradient of the logits is rounded to bf16 before its two products.
    grads = [x.grad for x in wide]
    assert grads[0] is not None
    assert grads[1] is not None
    for found, reference in ((hidden.grad, grads[0]), (buffer - 1.0, grads[1])):
        assert float((found.double() - reference).norm() / reference.norm()) < 1e-2


def test_logits_of_a_long_pack_take_less_than_two_gib() -> None:
    rows, hidden_size, vocab = 32_768, 1024, 151_936
    hidden = torch.randn(rows, hidden_size, device="cuda", dtype=torch.bfloat16).requires_grad_()
    weight = torch.randn(vocab, hidden_size, device="cuda", dtype=torch.bfloat16).requires_grad_()
    buffer = torch.zeros(vocab, hidden_size, device="cuda")
    targets = torch.randint(vocab, (rows,), device="cuda")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    log_probs, entropy = linear_log_probs_and_entropy(
        hidden, OutputWeight(weight, buffer), targets, needs_entropy=True
    )
    assert entropy is not None
    (log_probs.sum() - 0.01 * entropy.sum()).backward()
    added = torch.cuda.max_memory_allocated() - before
    assert added < 2 * 2**30, f"{added / 2**30:.2f} GiB"
