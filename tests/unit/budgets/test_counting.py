"""The counting that budgets rest on, on operators whose numbers are worked out by hand."""

import warnings
from contextlib import suppress

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorDeviceMismatchError

from tests.unit.budgets.counting import Counting
from tests.unit.budgets.fake_cuda import WITH_GRADIENT, WITHOUT_GRADIENT, fake_gpu

DEVICES = [WITHOUT_GRADIENT, WITH_GRADIENT]
SIZE = 2 * 8 * 64 * 2  # bytes of what `bf16` makes


def bf16(device, *shape, **options):
    return torch.empty(*(shape or (2, 8, 64)), device=device, dtype=torch.bfloat16, **options)


@pytest.fixture(params=DEVICES, ids=str)
def device(request):
    with fake_gpu(request.param):
        yield request.param


def test_views_and_allocations_are_no_kernels(device):
    x = bf16(device)
    with Counting() as tally:
        y = x.unflatten(-1, (4, 16)).transpose(1, 2).unbind(1)[0][..., None, 1:3]
        y.new_empty(y.shape).expand_as(y), x.detach(), x[None, :, 0, ::2], torch.empty_like(x), x.chunk(2)
    assert (tally.num_kernels, tally.elementwise_gb) == (0, 0)
    assert y.shape == (2, 8, 1, 2)


@pytest.mark.parametrize(
    ("run", "kernels", "size"),
    [
        (lambda x: x + x.transpose(0, 1).contiguous().transpose(0, 1), {"aten.clone": 1, "aten.add": 1}, 5 * SIZE),
        (lambda x: x.add_(x[:1, :1].expand_as(x)), {"aten.add_": 1}, 2 * SIZE + 64 * 2),
        (lambda x: x.float(), {"aten._to_copy": 1}, 3 * SIZE),
        (lambda x: x.new_zeros(x.shape).copy_(x), {"aten.new_zeros": 1, "aten.copy_": 1}, 4 * SIZE),
        (lambda x: x.__setitem__(slice(0, 1), 1.0), {"aten.fill_": 1}, SIZE / 2),
        (lambda x: x.__setitem__((..., slice(0, 32)), x[..., 32:]), {"aten.copy_": 1}, SIZE),
        (lambda x: F.gelu(x, approximate="tanh"), {"aten.gelu": 1}, 2 * SIZE),
        (lambda x: torch.addcmul(x, x, x), {"aten.addcmul": 1}, 4 * SIZE),
        (lambda x: F.rms_norm(x, (64,), x[0, 0], 1e-6), {"aten._fused_rms_norm": 1}, 2 * SIZE + 64 * 2 + 16 * 4),
    ],
    ids=["add", "broadcast", "cast", "copy", "fill", "put", "gelu", "addcmul", "rms_norm"],
)
def test_elementwise_operators(device, run, kernels, size):
    x = bf16(device)
    with Counting() as tally:
        run(x)
    assert dict(tally.kernels) == kernels
    assert sum(tally.moved.values()) == size == tally.elementwise_gb * 1e9
    assert tally.num_products == 0


def test_products_move_no_elementwise_bytes(device):
    x, weight, bias = bf16(device), bf16(device, 64, 64), bf16(device, 64)
    heads = x.unflatten(-1, (4, 16)).transpose(1, 2)
    with Counting() as tally:
        F.linear(x, weight, bias)
        F.linear(x, weight)
        F.scaled_dot_product_attention(heads, heads, heads)
    assert dict(tally.kernels) == {"aten.addmm": 1, "aten.mm": 1, "aten._scaled_dot_product_cudnn_attention": 1}
    assert (tally.num_products, tally.elementwise_gb) == (3, 0)


def test_norms_in_mixed_dtypes_are_many_kernels(device):
    with Counting() as tally, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says so once
        F.rms_norm(bf16(device), (64,), torch.empty(64, device=device))
    assert "aten.pow" in tally.kernels


@torch.library.custom_op("budgets::turned", mutates_args=())
def turned(x: Tensor, angle: Tensor) -> Tensor:
    return x * angle.cos()


@turned.register_fake
def _(x, angle):
    return torch.empty_like(x)


turned.register_autograd(
    lambda ctx, grad_y: (turned(grad_y, -ctx.saved_tensors[0]), None),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(inputs[1]),
)


def test_an_operator_that_nobody_knows_is_elementwise(device):
    x, angle = bf16(device), bf16(device, 64)
    with Counting() as tally:
        turned(x, angle)
    assert dict(tally.kernels) == {"budgets.turned": 1}
    assert tally.elementwise_gb * 1e9 == 2 * SIZE + 64 * 2


@torch.library.custom_op("budgets::turned_into", mutates_args=("x_out", "count"))
def turned_into(x: Tensor, x_out: Tensor, count: Tensor) -> None:
    x_out.copy_(x.sin())
    count.add_(1)


@turned_into.register_fake
def _(x, x_out, count):
    return None


def test_an_operator_that_writes_to_what_it_is_given(device):
    x, count = bf16(device), bf16(device, 64)
    with Counting() as tally:
        turned_into(x, torch.empty_like(x), count)
    assert dict(tally.kernels) == {"budgets.turned_into": 1}
    assert tally.elementwise_gb * 1e9 == 2 * SIZE + 2 * 64 * 2


def test_an_operator_of_ours_goes_backward():
    with fake_gpu(WITH_GRADIENT):
        x, angle = bf16(WITH_GRADIENT, requires_grad=True), bf16(WITH_GRADIENT, 64)
        with Counting() as tally:
            turned(x, angle).sum().backward()
    assert tally.kernels["budgets.turned"] == 2


def test_backward_and_recomputation_are_counted():
    with fake_gpu(WITH_GRADIENT):
        x = bf16(WITH_GRADIENT, requires_grad=True)

        def block(x):
            heads = F.rms_norm(x, (64,), None, 1e-6).unflatten(-1, (4, 16)).transpose(1, 2)
            return F.scaled_dot_product_attention(heads, heads, heads).sin()

        loss = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False).sum()
        with Counting() as tally:
            loss.backward()
    assert x.grad.shape == x.shape
    for name in ("_fused_rms_norm", "_scaled_dot_product_cudnn_attention"):
        assert tally.kernels[f"aten.{name}"] == tally.kernels[f"aten.{name}_backward"] == 1


@pytest.mark.parametrize(
    ("run", "name"),
    [
        (lambda x: x.sum().item(), "_local_scalar_dense"),
        (lambda x: float(x.sum()), "_local_scalar_dense"),
        (lambda x: int(x.sum()), "_local_scalar_dense"),
        (lambda x: 1 if x.sum() > 0 else 2, "_local_scalar_dense"),
        (lambda x: torch.equal(x, x), "equal"),
        (lambda x: x.cpu(), "_to_copy"),
        (lambda x: torch.empty(2, 8, 64).copy_(x), "copy_"),
        (lambda x: torch.ones(3).to(x.device), "_to_copy"),
    ],
    ids=["item", "float", "int", "if", "equal", "cpu", "copy_", "to"],
)
def test_waits_of_the_host_are_seen(device, run, name):
    x = bf16(device)
    with Counting() as tally:
        run(x)
    (wait,) = tally.syncs
    assert wait.startswith(f"{name} at test_counting.py:")


def test_numbers_that_the_host_gives_are_a_wait():
    with fake_gpu(WITHOUT_GRADIENT), Counting() as tally:  # torch makes "meta" tensors of numbers without a copy
        torch.tensor([1.0, 2.0], device=WITHOUT_GRADIENT)
    assert len(tally.syncs) == 1


@pytest.mark.parametrize("run", [lambda x: x.nonzero(), lambda x: x[x > 0]], ids=["nonzero", "mask"])
def test_shapes_that_follow_from_values_end_the_count(device, run):
    x = bf16(device)
    with Counting() as tally, pytest.raises(AssertionError, match="the host waits"):
        run(x)
    assert len(tally.syncs) == 1


def test_what_does_not_wait(device):
    x = bf16(device)
    with Counting() as tally:
        float(torch.tensor([0.5, 0.25])[0])
        torch.ones(3).to(x.device, non_blocking=True)
        x.to(torch.float32), torch.arange(3, device=x.device)
    assert (tally.syncs, tally.mixed) == ([], [])


@pytest.mark.parametrize("cpu", [(2, 8, 64), ()], ids=["tensor", "scalar"])
def test_a_cpu_tensor_among_a_gpus_is_seen(device, cpu):
    x = bf16(device)
    with Counting() as tally, suppress(FakeTensorDeviceMismatchError):  # torch's own word on it
        x * torch.ones(cpu)
    assert len(tally.mixed) == 1


def test_tallies_subtract_and_extrapolate(device):
    def count(layers):
        network = nn.Sequential(*(nn.GELU() for _ in range(layers)))
        with Counting() as tally:
            network(bf16(device)).sin()
        return tally

    one, two = count(1), count(2)
    assert dict((two - one).kernels) == {"aten.gelu": 1}
    all_layers = one.more(two - one, times=29)
    assert dict(all_layers.kernels) == {"aten.gelu": 30, "aten.sin": 1}
    assert all_layers.elementwise_gb * 1e9 == 31 * 2 * SIZE
