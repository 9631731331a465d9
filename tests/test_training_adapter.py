"""Oracle: closed forms of both norms and of their gradients."""

import pytest
import torch

from halora.training.adapter import regulariser

GENERATOR = torch.Generator().manual_seed(4)


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=GENERATOR).requires_grad_()


@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
def test_frobenius_value_and_gradient(scale):
    a, b = (scale * _random(4, 30)).detach().requires_grad_(), _random(20, 4)
    value = regulariser([(a, b)], "frobenius")
    singular_a, singular_b = torch.linalg.svdvals(a), torch.linalg.svdvals(b)
    expected = (singular_a**4).sum().sqrt() + (singular_b**4).sum().sqrt()
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    value.backward()
    gram_a, gram_b = (a @ a.T).detach(), (b.T @ b).detach()
    torch.testing.assert_close(a.grad, 2 * gram_a @ a.detach() / gram_a.norm())
    torch.testing.assert_close(b.grad, 2 * b.detach() @ gram_b / gram_b.norm())


def test_spectral_value_and_gradient():
    a, b = _random(4, 30), _random(20, 4)
    value = regulariser([(a, b)], "spectral")
    value.backward()
    total = 0.0
    for matrix in (a, b):
        u, s, vh = torch.linalg.svd(matrix.detach(), full_matrices=False)
        total += s[0].item() ** 2
        torch.testing.assert_close(matrix.grad, 2 * s[0] * torch.outer(u[:, 0], vh[0]), rtol=1e-4, atol=1e-4)
    assert value.item() == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("norm", ["frobenius", "spectral"])
@pytest.mark.parametrize("rank", [1, 4])
def test_value_and_gradient_are_finite_at_the_start_of_training(norm, rank):
    a, b = _random(rank, 30), torch.zeros(20, rank, requires_grad=True)
    value = regulariser([(a, b)], norm)
    value.backward()
    assert value.item() > 0
    assert torch.isfinite(a.grad).all()
    assert torch.equal(b.grad, torch.zeros_like(b))


@pytest.mark.parametrize("norm", ["frobenius", "spectral"])
def test_it_is_a_mean_over_modules(norm):
    first, second = (_random(4, 30), _random(20, 4)), (_random(4, 12), _random(9, 4))
    alone = [regulariser([pair], norm).item() for pair in (first, second)]
    assert regulariser([first] * 5, norm).item() == pytest.approx(alone[0], rel=1e-6)
    assert regulariser([first, second], norm).item() == pytest.approx(sum(alone) / 2, rel=1e-6)


def test_bf16_weights_are_measured_in_float32():
    pair = (_random(4, 300).detach().bfloat16(), _random(200, 4).detach().bfloat16())
    value = regulariser([pair], "frobenius")
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(regulariser([(pair[0].float(), pair[1].float())], "frobenius").item())
