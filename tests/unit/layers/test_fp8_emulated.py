"""Emulated FP8 against rounding by hand, and its gradients against float64 within the error of the formats."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from afd_scale.layers.fp8_emulated import BACKWARD, FORWARD, EmulatedFp8, EmulatedFp8Linear, quantise

# Half a unit in the last place: e4m3 has 3 bits after the point, e5m2 has 2.
ROUNDING = {FORWARD: 2**-4, BACKWARD: 2**-3}


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def linear(in_features, out_features, dtype=torch.float32):
    made = EmulatedFp8Linear(in_features, out_features)
    made.weight.data, made.bias.data = random(out_features, in_features, seed=1), random(out_features, seed=2)
    return made.to(dtype)


def relative_error(ours, reference):
    return ((ours.double() - reference).norm() / reference.norm()).item()


def test_e4m3_by_hand():
    """The largest, 14, becomes 448: the scale is 32. 0.3 x 32 = 9.6 lies between 9 and 10; 17 x 32 / 16 = 34 between 32
    and 36, and of two as near the even one is taken; 1e-5 x 32 is under half of the smallest, 2^-9."""
    values, unit = quantise(torch.tensor([14.0, 0.3, 17 / 16, -1.0, 1e-5]), FORWARD)
    assert values.float().tolist() == [448.0, 10.0, 32.0, -32.0, 0.0]
    assert unit.item() == 1 / 32


def test_e5m2_by_hand():
    """The largest, 7, becomes 57344: the scale is 8192. 1.1 x 8192 lies between 8192 and 10240."""
    values, unit = quantise(torch.tensor([-7.0, 1.1, 1.2]), BACKWARD)
    assert values.float().tolist() == [-57344.0, 8192.0, 10240.0]
    assert unit.item() == 1 / 8192


@pytest.mark.parametrize("format", [FORWARD, BACKWARD])
@pytest.mark.parametrize("magnitude", [1e-30, 1e-3, 1.0, 3e37])
def test_the_largest_stays_and_the_rest_is_rounded(format, magnitude):
    for seed in range(50):
        x = random(64, seed=seed) * magnitude
        values, unit = quantise(x, format)
        again = values.float() * unit
        largest = x.abs().argmax()
        assert values[largest].float().abs() == torch.finfo(format).max
        normal = values.float().abs() >= torch.finfo(format).tiny
        assert normal.sum() > 32
        error = ((again - x).abs() / x.abs())[normal].max().item()
        assert ROUNDING[format] / 2 < error < ROUNDING[format] * 1.001


@pytest.mark.parametrize("x", [torch.zeros(3, 4), torch.full((2,), 1e-45), torch.tensor([1e-40, -1e-41])])
def test_nothing_and_next_to_nothing_stay_finite(x):
    values, unit = quantise(x, FORWARD)
    again = values.float() * unit
    assert again.isfinite().all()
    assert (again - x).abs().max() <= 1e-41


@pytest.mark.parametrize("broken", [torch.inf, torch.nan])
def test_a_diverged_tensor_stays_visible(broken):
    x = random(2, 16)
    x[0, 3] = broken
    assert linear(16, 16)(x)[0].isnan().any()


def test_product_by_hand():
    """x = (448, 100) rounds to (448, 96): of two as near, 96 is even. W = (1, 0.3) has the scale 448; 0.3 x 448 = 134.4
    lies between 128 and 144. The gradient (7, 1.1) rounds to (7, 1); the bias sees it as it came."""
    made = EmulatedFp8Linear(2, 1)
    made.weight.data, made.bias.data = torch.tensor([[1.0, 0.3]]), torch.tensor([0.5])
    x = torch.tensor([[448.0, 100.0], [0.0, 1.0]], requires_grad=True)
    y = made(x)
    y.backward(torch.tensor([[7.0], [1.1]]))
    rounded = 128 / 448
    torch.testing.assert_close(y, torch.tensor([[448 + 96 * rounded + 0.5], [rounded + 0.5]]))
    torch.testing.assert_close(x.grad, torch.tensor([[7.0, 7 * rounded], [1.0, rounded]]))
    torch.testing.assert_close(made.weight.grad, torch.tensor([[7 * 448.0, 7 * 96.0 + 1]]))
    torch.testing.assert_close(made.bias.grad, torch.tensor([8.1]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("leading", [(1,), (7,), (2, 5), (3, 1, 11)])
def test_outputs_and_gradients_are_within_the_formats_error(dtype, leading):
    """Independent roundings add in squares: less than half of the worst case of two operands."""
    made = linear(64, 48, dtype)
    x = random(*leading, 64, dtype=dtype, seed=3).requires_grad_()
    direction = random(*leading, 48, dtype=dtype, seed=4)
    y = made(x)
    ours = torch.autograd.grad(y, (x, made.weight, made.bias), direction)
    exact = [tensor.detach().double().requires_grad_() for tensor in (x, made.weight, made.bias)]
    expected = F.linear(*exact)
    reference = torch.autograd.grad(expected, exact, direction.double())
    forward, backward = ROUNDING[FORWARD], (ROUNDING[FORWARD] + ROUNDING[BACKWARD]) / 2
    assert y.dtype == dtype
    assert [gradient.dtype for gradient in ours] == [dtype] * 3
    assert 0.01 < relative_error(y, expected) < forward
    for gradient, of in zip(ours[:2], reference[:2], strict=True):
        assert 0.01 < relative_error(gradient, of) < backward
    assert relative_error(ours[2], reference[2]) < (1e-6 if dtype == torch.float32 else 2**-8), (
        "the bias is not rounded"
    )


def test_backward_takes_the_operands_of_forward():
    """Gradients are exactly those of a plain linear at the rounded operands, along a direction that FP8 can hold."""
    made, x = linear(16, 32), random(6, 16, seed=3).requires_grad_()
    direction = torch.ones(6, 32)
    ours = torch.autograd.grad(made(x), (x, made.weight), direction)
    rounded = []
    for tensor in (x, made.weight):
        values, unit = quantise(tensor.detach(), FORWARD)
        rounded.append((values.float() * unit).requires_grad_())
    expected = torch.autograd.grad(F.linear(*rounded), rounded, direction)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def test_frozen_weights_pass_gradients_on():
    made, x = linear(16, 32).requires_grad_(False), random(3, 16).requires_grad_()
    made(x).sum().backward()
    assert x.grad.norm() > 0
    assert made.weight.grad is None


def test_the_weight_may_come_back_elsewhere_before_the_backward_pass():
    """As under ZeRO-3, where its numbers go after the forward pass and nothing may hold on to them."""
    made, x = linear(16, 32), random(3, 16).requires_grad_()
    (expected,) = torch.autograd.grad(made(x).square().sum(), x)
    y, whole = made(x), made.weight.data
    made.weight.data = torch.empty(0)
    loss = y.square().sum()
    made.weight.data = whole.clone()
    whole.zero_()
    assert torch.equal(torch.autograd.grad(loss, x)[0], expected)


def test_parameters_are_those_of_a_plain_linear():
    plain, made = nn.Linear(16, 32), EmulatedFp8().linear(16, 32)
    assert list(made.state_dict()) == list(plain.state_dict()) == ["weight", "bias"]
    made.load_state_dict(plain.state_dict())
    x = random(5, 16)
    assert relative_error(made(x), plain(x).double()) < ROUNDING[FORWARD]


def test_recomputed_blocks_give_the_same_numbers():
    precision = EmulatedFp8()
    block = nn.Sequential(precision.linear(16, 32), nn.GELU(), precision.linear(32, 16))
    x = random(5, 16).requires_grad_()
    results = []
    for recompute in ("none", "full"):
        y = precision.run_block(block, x, recompute=recompute)
        results.append((y, *torch.autograd.grad(y.square().sum(), (x, *block.parameters()))))
    for stored, recomputed in zip(*results, strict=True):
        assert torch.equal(stored, recomputed)
