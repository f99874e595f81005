"""Emulated FP8 against rounding by hand, and its gradients against float64 within the error of the formats."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from afd_scale.layers.fp8_emulated import E4M3, E5M2, TILINGS, EmulatedFp8, EmulatedFp8Linear, rounded
from afd_scale.layers.lora import Adapters, adapted

# Half a unit in the last place: e4m3 has 3 bits after the point, e5m2 has 2.
ROUNDING = {E4M3: 2**-4, E5M2: 2**-3}
WHOLE = (None, None)


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def linear(in_features, out_features, dtype=torch.float32, scaling="current"):
    made = EmulatedFp8Linear(in_features, out_features, TILINGS[scaling])
    made.weight.data, made.bias.data = random(out_features, in_features, seed=1), random(out_features, seed=2)
    return made.to(dtype)


def relative_error(ours, reference):
    return ((ours.double() - reference).norm() / reference.norm()).item()


def test_e4m3_by_hand():
    """The largest, 14, becomes 448: the scale is 32. 0.3 x 32 = 9.6 lies between 9 and 10; 17 x 32 / 16 = 34 between 32
    and 36, and of two as near the even one is taken; 1e-5 x 32 is under half of the smallest, 2^-9."""
    again = rounded(torch.tensor([[14.0, 0.3, 17 / 16, -1.0, 1e-5]]), E4M3, WHOLE, powers=False)
    assert again.tolist() == [[448 / 32, 10 / 32, 32 / 32, -32 / 32, 0.0]]


def test_e5m2_by_hand():
    """The largest, 7, becomes 57344: the scale is 8192. 1.1 x 8192 lies between 8192 and 10240."""
    again = rounded(torch.tensor([[-7.0], [1.1], [1.2]]), E5M2, WHOLE, powers=False)
    assert again.tolist() == [[-7.0], [1.0], [1.25]]


def test_powers_of_two_by_hand():
    """448 / 15 = 29.9 becomes 16: 15 x 16 = 240 is one of the format's numbers, and so is 0.3 x 16 = 4.8 as 5."""
    assert rounded(torch.tensor([[15.0, 0.3]]), E4M3, WHOLE, powers=True).tolist() == [[15.0, 5 / 16]]
    assert rounded(torch.tensor([[448.0, 0.9]]), E4M3, WHOLE, powers=True).tolist() == [[448.0, 0.875]], "1 is a power"


@pytest.mark.parametrize("tile", [WHOLE, (1, None), (1, 2), (2, 2), (2, 3), (None, 2), (4, 1), (128, 128)])
@pytest.mark.parametrize("powers", [False, True])
def test_each_tile_has_its_own_scale(tile, powers):
    """Against a loop over tiles; those at the edges of 5 x 7 are smaller. Magnitudes of neighbours are far apart."""
    x = random(5, 7) * 10.0 ** torch.arange(-17, 18).reshape(5, 7)
    expected = torch.empty(5, 7)
    height, width = tile[0] or 5, tile[1] or 7
    for top in range(0, 5, height):
        for left in range(0, 7, width):
            part = x[top : top + height, left : left + width]
            scale = 448 / part.abs().max().item()
            scale = 2.0 ** math.floor(math.log2(scale)) if powers else scale
            as_fp8 = (part.double() * scale).float().to(E4M3).double() / scale
            expected[top : top + height, left : left + width] = as_fp8.float()
    torch.testing.assert_close(rounded(x, E4M3, tile, powers), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("format", [E4M3, E5M2])
@pytest.mark.parametrize("magnitude", [1e-30, 1e-3, 1.0, 3e37])
def test_the_largest_stays_and_the_rest_is_rounded(format, magnitude):
    for seed in range(50):
        x = random(4, 16, seed=seed) * magnitude
        again = rounded(x, format, WHOLE, powers=False)
        largest = x.abs().max()
        torch.testing.assert_close(again.abs().max(), largest, rtol=1e-6, atol=0)
        normal = x.abs() > largest * torch.finfo(format).tiny / torch.finfo(format).max
        assert normal.sum() > 32
        error = ((again - x).abs() / x.abs())[normal].max().item()
        assert ROUNDING[format] / 2 < error < ROUNDING[format] * 1.001


@pytest.mark.parametrize("scaling", TILINGS)
@pytest.mark.parametrize("x", [torch.zeros(3, 4), torch.full((1, 2), 1e-45), torch.tensor([[1e-40, -1e-41]])])
def test_nothing_and_next_to_nothing_stay_finite(x, scaling):
    again = TILINGS[scaling].of(x)
    assert again.isfinite().all()
    assert (again - x).abs().max() <= 1e-41


@pytest.mark.parametrize("scaling", TILINGS)
@pytest.mark.parametrize("broken", [torch.inf, torch.nan])
def test_a_diverged_tensor_stays_visible(broken, scaling):
    x = random(2, 16)
    x[0, 3] = broken
    assert linear(16, 16, scaling=scaling)(x)[0].isnan().any()


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


@pytest.mark.parametrize("scaling", TILINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("leading", [(1,), (7,), (2, 5), (3, 1, 11)])
def test_outputs_and_gradients_are_within_the_formats_error(scaling, dtype, leading):
    """Independent roundings add in squares: less than half of the worst case of two operands."""
    made = linear(64, 48, dtype, scaling)
    x = random(*leading, 64, dtype=dtype, seed=3).requires_grad_()
    direction = random(*leading, 48, dtype=dtype, seed=4)
    y = made(x)
    ours = torch.autograd.grad(y, (x, made.weight, made.bias), direction)
    exact = [tensor.detach().double().requires_grad_() for tensor in (x, made.weight, made.bias)]
    expected = F.linear(*exact)
    reference = torch.autograd.grad(expected, exact, direction.double())
    forward = ROUNDING[E4M3]
    backward = (forward + ROUNDING[made.tiling.gradient]) / 2
    assert y.dtype == dtype
    assert [gradient.dtype for gradient in ours] == [dtype] * 3
    assert 0.01 < relative_error(y, expected) < forward
    for gradient, of in zip(ours[:2], reference[:2], strict=True):
        assert 0.01 < relative_error(gradient, of) < backward
    assert relative_error(ours[2], reference[2]) < (1e-6 if dtype == torch.float32 else 2**-8), (
        "the bias is not rounded"
    )


@pytest.mark.parametrize("scaling", TILINGS)
def test_operands_are_cut_along_what_is_summed_over(scaling):
    """Each product as one of operands rounded by hand, its sums along their rows. Magnitudes of rows and of output
    features are decades apart, so that it matters which values share a scale; in the products they cancel."""
    made, tiling = linear(160, 144, scaling=scaling), TILINGS[scaling]
    of_row, of_output = 10 ** (2 * random(140, 1, seed=5)), 10 ** (2 * random(1, 144, seed=6))
    made.weight.data *= of_output.T
    x = (random(140, 160, seed=3) * of_row).unflatten(0, (2, 70)).requires_grad_()
    g = random(140, 144, seed=4) / of_row / of_output
    y = made(x)
    ours = torch.autograd.grad(y, (x, made.weight), g.unflatten(0, (2, 70)))
    rows, weight = x.detach().flatten(0, 1), made.weight.detach()
    tile, powers, of_weight = tiling.operand, tiling.powers, tiling.weight
    forward = rounded(rows, E4M3, tile, powers) @ rounded(weight, E4M3, of_weight, powers).T + made.bias.detach()
    to_x = rounded(g, tiling.gradient, tile, powers) @ rounded(weight.T, E4M3, of_weight, powers).T
    to_weight = rounded(g.T, tiling.gradient, tile, powers) @ rounded(rows.T, E4M3, tile, powers).T
    cancelled = 1 / of_row / of_output
    torch.testing.assert_close(y.detach().flatten(0, 1) * cancelled, forward * cancelled, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(ours[0].flatten(0, 1) * of_row, to_x * of_row, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(ours[1] * of_output.T, to_weight * of_output.T, rtol=1e-3, atol=1e-3)


def test_tiles_of_the_scalings():
    """As their sources have them: 1 x 128 and 128 x 128 of DeepSeek-V3, 1 x 32 of OCP, e5m2 only for whole tensors."""
    assert {name: (t.operand, t.weight, t.gradient, t.powers) for name, t in TILINGS.items()} == {
        "current": ((None, None), (None, None), E5M2, False),
        "row": ((1, None), (1, None), E4M3, True),
        "block": ((1, 128), (128, 128), E4M3, True),
        "mxfp8": ((1, 32), (1, 32), E4M3, True),
    }


@pytest.mark.parametrize("scaling", ["row", "block", "mxfp8"])
def test_smaller_tiles_hold_an_outlier_off(scaling):
    """One row a million times the others: with one scale for all of it, they are gone."""
    x, whole = random(4, 256), linear(256, 16)
    x[0] *= 1e6
    exact = F.linear(x.double(), whole.weight.double(), whole.bias.double())
    made = linear(256, 16, scaling=scaling)
    assert relative_error(whole(x)[1:], exact[1:]) > 0.3
    assert relative_error(made(x)[1:], exact[1:]) < 0.05


@pytest.mark.parametrize("scaling", TILINGS)
def test_an_adapter_beside_it_is_not_rounded(scaling):
    """The base is frozen and its gradient goes on; the adapter's product is that of plain torch."""
    made = linear(32, 48, scaling=scaling)
    Adapters(("policy",), rank=4, scale=0.5).attach(made, 32, 48)
    adapter = made.adapters["policy"]
    made.weight.requires_grad_(False)
    adapter.up.data = random(48, 4, seed=5)
    x = random(6, 32, seed=6).requires_grad_()
    both = adapted(made, x, "policy")
    torch.testing.assert_close(both - made(x), 0.5 * x @ adapter.down.T @ adapter.up.T)
    both.square().sum().backward()
    assert made.weight.grad is None
    assert all(tensor.grad.norm() > 0 for tensor in (x, adapter.down, adapter.up))


def test_kept_blocks_are_plain():
    precision = EmulatedFp8("row", keep_blocks=2)
    kinds = [type(precision.of_block(index, 5).linear(2, 3)) for index in range(5)]
    assert kinds == [nn.Linear, nn.Linear, EmulatedFp8Linear, nn.Linear, nn.Linear]


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
    assert relative_error(made(x), plain(x).double()) < ROUNDING[E4M3]


@pytest.mark.parametrize("scaling", TILINGS)
def test_recomputed_blocks_give_the_same_numbers(scaling):
    precision = EmulatedFp8(scaling)
    block = nn.Sequential(precision.linear(16, 32), nn.GELU(), precision.linear(32, 16))
    x = random(5, 16).requires_grad_()
    results = []
    for recompute in ("none", "full"):
        y = precision.run_block(block, x, recompute=recompute)
        results.append((y, *torch.autograd.grad(y.square().sum(), (x, *block.parameters()))))
    for stored, recomputed in zip(*results, strict=True):
        assert torch.equal(stored, recomputed)
