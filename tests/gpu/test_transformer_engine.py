"""Transformer Engine's FP8 linears against bf16 ones, and against the emulation that stands in for them on a CPU.

Tolerances are of the relative error in norm. An operand in e4m3 is off by about 2.6 %, one in e5m2 by about 5 %: in
squares 4 % for a product of two of the first, 6 % for a gradient. Allowed are 6 and 9 %. Between the two makers of FP8
only the order of sums and a last bit differ: 1 %. Four bits (nvfp4) are off by about 10 % an operand: 25 % of a product
are allowed.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from afd_scale.layers.fp8_emulated import TILINGS, EmulatedFp8Linear
from afd_scale.layers.lora import Adapters, adapted
from afd_scale.layers.precision import Recompute
from afd_scale.layers.transformer_engine import TransformerEngineFp8

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
    pytest.mark.filterwarnings("default"),  # the library's own
]
FORWARD, BACKWARD, EMULATION, FOUR_BITS = 0.06, 0.09, 0.01, 0.25


@pytest.fixture(scope="module", params=["current", "delayed", "block", "mxfp8"])
def precision(request: pytest.FixtureRequest) -> TransformerEngineFp8:
    return asked_for(request.param)


@pytest.fixture(scope="module")
def current() -> TransformerEngineFp8:
    return asked_for("current")


def asked_for(scaling: str) -> TransformerEngineFp8:
    try:
        return TransformerEngineFp8(scaling)
    except ValueError as refusal:
        pytest.skip(str(refusal))


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator("cuda").manual_seed(seed), device="cuda").bfloat16()


def results(run: object, module: nn.Module, x: Tensor, direction: Tensor) -> list[Tensor]:
    """Output, and gradients of x and of all parameters."""
    x = x.detach().requires_grad_()
    y = run(x)
    return [y.detach(), *torch.autograd.grad(y, (x, *module.parameters()), direction)]


def relative_error(ours: Tensor, reference: Tensor) -> float:
    return ((ours.double() - reference.double()).norm() / reference.double().norm()).item()


def made(precision: TransformerEngineFp8, in_features: int = 128, out_features: int = 96) -> nn.Module:
    linear = precision.linear(in_features, out_features).bfloat16()
    linear.bias.data = random(out_features, seed=7)
    return linear


@pytest.mark.parametrize("scaling", ["current", "block", "mxfp8"])
@pytest.mark.parametrize("leading", [(64,), (2, 40), (1,), (7,), (3, 8), (2, 5, 11)])  # rows of 16, and others
def test_forward_and_backward(scaling: str, leading: tuple[int, ...]) -> None:
    precision = asked_for(scaling)
    linear = made(precision)
    emulated = EmulatedFp8Linear(128, 96, TILINGS[scaling]).to("cuda", torch.bfloat16)
    emulated.load_state_dict(linear.state_dict())
    x, direction = random(*leading, 128, seed=1), random(*leading, 96, seed=2)
    ours = results(lambda x: precision.run_block(linear, x, recompute="none"), linear, x, direction)
    plain = results(lambda x: F.linear(x, linear.weight, linear.bias), linear, x, direction)
    stand_in = results(emulated, emulated, x, direction)
    for value, reference, tolerance in zip(ours, plain, (FORWARD, BACKWARD, BACKWARD, EMULATION), strict=True):
        assert value.shape == reference.shape
        assert relative_error(value, reference) < tolerance
    for value, reference in zip(ours, stand_in, strict=True):
        assert relative_error(value, reference) < EMULATION
    assert relative_error(ours[0], plain[0]) > 0.01, "the products are not in FP8"


def test_four_bits() -> None:
    precision = asked_for("nvfp4")
    linear, x, direction = made(precision), random(2, 40, 128, seed=1), random(2, 40, 96, seed=2)
    ours = results(lambda x: precision.run_block(linear, x, recompute="none"), linear, x, direction)
    plain = results(lambda x: F.linear(x, linear.weight, linear.bias), linear, x, direction)
    for value, reference in zip(ours[:3], plain[:3], strict=True):
        assert relative_error(value, reference) < FOUR_BITS
    assert relative_error(ours[0], plain[0]) > FORWARD, "the products are not in four bits"


class Block(nn.Module):
    """Two linears that are called in turn, the first of them with an adapter beside it."""

    def __init__(self, precision: TransformerEngineFp8):
        super().__init__()
        self.into, self.out = precision.linear(128, 256), precision.linear(256, 128)
        Adapters(("policy",), rank=16, scale=1.0).attach(self.into, 128, 256)
        self.to("cuda", torch.bfloat16)
        self.into.adapters["policy"].up.data = random(256, 16, seed=4)

    def forward(self, x: Tensor, adapter: str | None) -> tuple[Tensor, Tensor]:
        hidden = F.gelu(adapted(self.into, x, adapter))
        return x + self.out(hidden), hidden


def test_a_recomputed_block_gives_the_same_numbers(precision: TransformerEngineFp8) -> None:
    """Delayed scales move between the passes, so each way begins with a block of its own."""
    stored, recomputed = Block(precision), Block(precision)
    recomputed.load_state_dict(stored.state_dict())
    for seed in range(3):
        x, direction = random(2, 19, 128, seed=seed), random(2, 19, 128, seed=9)
        values = [
            passed(precision, block, x, direction, recompute=recompute)
            for block, recompute in ((stored, "none"), (recomputed, "full"))
        ]
        for one, other in zip(*values, strict=True):
            assert relative_error(one, other) < 1e-3


def passed(
    precision: TransformerEngineFp8, block: Block, x: Tensor, direction: Tensor, *, recompute: Recompute
) -> list[Tensor]:
    """As `results`, by `backward`: of the two ways of recomputing one knows no other."""
    block.zero_grad()
    x = x.detach().requires_grad_()
    y, _ = precision.run_block(block, x, "policy", recompute=recompute)
    y.backward(direction)
    return [y.detach(), x.grad, *(p.grad for p in block.parameters() if p.grad is not None)]


def test_passes_without_gradient_are_in_fp8_too(precision: TransformerEngineFp8) -> None:
    """Delayed scales settle in the first passes."""
    linear, x = made(precision), random(3, 7, 128)
    plain = F.linear(x, linear.weight, linear.bias)
    with torch.no_grad():
        for _ in range(3):
            y = precision.run_block(linear, x, recompute="full")
    assert not y.requires_grad
    assert 0.01 < relative_error(y, plain) < FORWARD


def test_the_adapter_stays_in_bf16(current: TransformerEngineFp8) -> None:
    block, x = Block(current), random(5, 128)
    adapter = block.into.adapters["policy"]
    base = current.run_block(block.into, x, recompute="none")
    both = current.run_block(lambda x: adapted(block.into, x, "policy"), x, recompute="none")
    product = F.linear(F.linear(x, adapter.down), adapter.up)
    assert relative_error(both - base, product) < 0.01


def test_parameters_are_all_that_is_exported(precision: TransformerEngineFp8) -> None:
    """After passes that give delayed scaling a state."""
    block = Block(precision)
    passed(precision, block, random(8, 128), random(8, 128), recompute="full")
    names = {"into.weight", "into.bias", "out.weight", "out.bias"}
    assert set(block.state_dict()) == names | {f"into.adapters.policy.{side}" for side in ("down", "up")}
    nn.Linear(256, 128).load_state_dict(block.out.state_dict())
    block.out.load_state_dict(nn.Linear(256, 128).state_dict())


def test_it_begins_as_the_models_let_linears_begin(current: TransformerEngineFp8) -> None:
    linear = current.linear(128, 96)
    bound = (6 / (128 + 96)) ** 0.5
    assert 0.95 * bound < linear.weight.abs().max().item() <= bound
    assert not linear.bias.any()
