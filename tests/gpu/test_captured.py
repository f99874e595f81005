"""CUDA graphs, compiled blocks and RoPE's kernel against passes that run as they are."""

import threading
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from afd_scale.engines.captured import CapturedPasses, CudaGraphs, choose_capture
from afd_scale.layers.attention import choose_backend
from afd_scale.layers.choose_compile import choose_compile
from afd_scale.layers.ops import ModelOps
from afd_scale.layers.rope import Rotation, WindowRotation, _turn
from afd_scale.rollout.sampler import Noise, Sampler
from tests.networks import make_policy

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

SHAPE = {"dim": 128, "ffn_dim": 256, "num_heads": 2, "num_layers": 3, "freq_dim": 32, "text_dim": 16, "text_length": 8,
         "latent_channels": 4, "prediction": "velocity", "chunk_frames": 3}  # fmt: skip
FRAMES = 18


def make_network(compile: Any = None, **fields: int) -> Any:
    device = torch.device("cuda")
    backend = choose_backend("auto", device=device, dtype=torch.bfloat16, head_dim=64)
    torch.manual_seed(0)
    network = make_policy({**SHAPE, **fields}, ModelOps(attend=backend.attend, compile=compile))
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, 0, 0.05)
    network.to(device, torch.bfloat16)
    network.fuse()
    return network


def roll_out(network: Any, calls: Any, seed: int) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    draw = partial(torch.randn, generator=generator, device="cuda")
    noise = Noise(draw(2, FRAMES, 4, 26, 30), draw(3, 2, FRAMES, 4, 26, 30))
    return Sampler(network.sampler).rollout(calls, draw(2, 8, 16), noise)


def assert_close(ours: Tensor, expected: Tensor) -> None:
    error = ((ours - expected).abs().max() / expected.abs().max()).item()
    assert error < 2e-2, error


@pytest.mark.parametrize("window", [{}, {"window_frames": 9, "sink_frames": 3}], ids=["whole past", "window"])
@pytest.mark.parametrize("compiled", [False, True], ids=["", "compiled"])
def test_graphs_generate_the_same_videos(window: dict[str, int], compiled: bool) -> None:
    device = torch.device("cuda")
    network = make_network(choose_compile(True, device) if compiled else None, **window)
    new_capture = choose_capture("auto", device, shares_tokens=False)
    assert new_capture is not None
    for _ in range(2):  # two phases: the first one's graphs are gone
        captured = CapturedPasses(network, new_capture)
        for seed in range(3):
            assert_close(roll_out(network, captured, seed), roll_out(network, network, seed))
        assert captured.works
        assert captured.passes
        del captured


def test_a_capture_beside_a_thread_that_pins_memory() -> None:
    """As the one that draws the next batch does."""
    stop = threading.Event()

    def pin() -> None:
        while not stop.is_set():
            torch.empty(1 << 20).pin_memory()

    thread = threading.Thread(target=pin)
    thread.start()
    try:
        network = make_network()
        captured = CapturedPasses(network, CudaGraphs)
        for seed in range(2):
            assert_close(roll_out(network, captured, seed), roll_out(network, network, seed))
        assert captured.works
    finally:
        stop.set()
        thread.join()


def test_a_capture_that_fails_leaves_the_device_as_it_was() -> None:
    network = make_network()
    captured = CapturedPasses(network, CudaGraphs)
    roll_out(network, captured, 0)
    run = captured.network
    captured.network = lambda *arguments, **options: run(*arguments, **options) * torch.ones((), device="cuda").item()
    for name in ("cached_rotation", "new_cache"):
        setattr(captured.network, name, getattr(run, name))
    assert_close(roll_out(network, captured, 1), roll_out(network, network, 1))
    assert not captured.works
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    torch.cuda.empty_cache()
    assert_close(roll_out(network, captured, 2), roll_out(network, network, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_dim", [24, 64, 128])
def test_the_kernel_rotates(dtype: torch.dtype, head_dim: int) -> None:
    device = torch.device("cuda")
    rotation = Rotation((range(3, 8),), 1, 7, 5, head_dim, device)
    q = torch.randn(2, 175, 3, head_dim, device=device, dtype=dtype, requires_grad=True)
    k = torch.randn(2, 175, 5, 3, head_dim, device=device, dtype=dtype)[:, :, 1].requires_grad_()
    turned = rotation(q, k)
    for ours, x in zip(turned, (q, k), strict=True):
        torch.testing.assert_close(ours, _turn(x, rotation.turns))
    direction = torch.randn_like(q)
    for ours, x in zip(turned, (q, k), strict=True):
        (gradient,) = torch.autograd.grad(ours, x, direction, retain_graph=True)
        (expected,) = torch.autograd.grad(_turn(x, rotation.turns), x, direction)
        torch.testing.assert_close(gradient, expected)
    buffer = torch.zeros(2, 300, 3, head_dim, device=device, dtype=dtype)
    with torch.no_grad():
        rotation(q, k, buffer[:, 50:225])
    assert torch.equal(buffer[:, 50:225], turned[1])
    assert not buffer[:, :50].any()
    assert not buffer[:, 225:].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_kernel_rotates_a_window_s_keys_apart(dtype: torch.dtype) -> None:
    device = torch.device("cuda")
    own, seen = (Rotation(frames, 1, 7, 5, 64, device) for frames in ((range(6, 8),), (range(2), range(5, 8))))
    q, k = (torch.randn(2, tokens, 3, 64, device=device, dtype=dtype) for tokens in (70, 175))
    for ours, x, turns in zip(WindowRotation(own, seen)(q, k), (q, k), (own.turns, seen.turns), strict=True):
        torch.testing.assert_close(ours, _turn(x, turns))
