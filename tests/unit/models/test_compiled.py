"""Blocks whose parts are compiled against blocks as they are: the same numbers."""

from functools import partial

import pytest
import torch

from afd_scale.layers.choose_compile import choose_compile
from afd_scale.layers.fp8_emulated import EmulatedFp8
from afd_scale.layers.lora import Adapters
from afd_scale.layers.ops import ModelOps
from afd_scale.rollout.sampler import Noise, Sampler
from tests.networks import make_policy
from tests.unit.budgets.compilations import count_compilations

FRAMES = 6
FIELDS = {"dim": 32, "ffn_dim": 48, "num_heads": 2, "num_layers": 2, "freq_dim": 16, "text_dim": 8, "text_length": 5,
          "latent_channels": 3, "prediction": "velocity", "chunk_frames": 2, "timesteps": (1000, 500)}  # fmt: skip

pytestmark = [  # of torch's compiler about itself
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def inductor():
    """What `compile: true` makes; needs a C++ compiler."""
    limit = torch._dynamo.config.recompile_limit
    try:
        compile = choose_compile(True, torch.device("cpu"))
    except ValueError as error:
        pytest.skip(str(error))
    yield compile
    torch._dynamo.config.recompile_limit = limit


def make_network(compile, precision=None, lora=False, **fields):
    adapters = Adapters(("one",), 2, 1.0) if lora else None
    network = make_policy({**FIELDS, **fields}, ModelOps(precision=precision, adapters=adapters, compile=compile))
    with torch.no_grad():
        for number, parameter in enumerate(network.parameters()):
            parameter.copy_(randn(*parameter.shape, seed=number) / 5)
    return network


TEXT, NOISE = randn(2, 3, 8, seed=1), randn(2, FRAMES, 3, 4, 6, seed=2)


def gradients(network, **options):
    """A velocity, and gradients."""
    velocity = network(NOISE, torch.full((2, FRAMES), 500.0), TEXT, **options)
    velocity.square().mean().backward()
    return [velocity.detach(), *(p.grad for p in network.parameters() if p.grad is not None)]


def results(network, lora):
    """The same with clean frames before it, and a rollout."""
    options = {"adapter": "one"} if lora else {}
    found = gradients(network, clean=NOISE.flip(0), clean_gradient=False, **options)
    network.fuse()
    return [*found, Sampler(network.sampler).rollout(network, TEXT, Noise(NOISE, NOISE[None]))]


CASES = {
    "all weights": {},
    "an adapter, recomputed": {"lora": True, "activation_checkpointing": "full"},
    "attention kept": {"activation_checkpointing": "keep_attention"},
    "fp8": {"precision": EmulatedFp8(), "activation_checkpointing": "full"},
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_compiled_blocks_give_the_same_bits(case):
    compile = partial(torch.compile, backend="aot_eager", dynamic=False)
    lora = case.get("lora", False)
    plain = results(make_network(None, **case), lora)
    with count_compilations() as made:
        compiled = results(make_network(compile, **case), lora)
    assert (made.graphs, made.num_breaks) == (8, 0), "two parts: without gradient, with, a chunk, two chunks"
    for ours, expected in zip(compiled, plain, strict=True):
        assert torch.equal(ours, expected)


def test_fused_kernels_stay_within_a_few_units_in_the_last_place(inductor):
    plain = gradients(make_network(None))
    with count_compilations() as made:
        compiled = gradients(make_network(inductor))
    assert made.graphs == 2
    for ours, expected in zip(compiled, plain, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_fused_kernels_predict_the_same_bits_with_gradient_and_without(inductor):
    """In bf16, or policies that are equal would seem to be apart."""
    network = make_network(inductor, num_layers=1).bfloat16()
    arguments = NOISE, torch.full((2, FRAMES), 500.0), TEXT
    with torch.no_grad():
        without = network(*arguments)
    assert torch.equal(network(*arguments).detach(), without)


def test_a_cpu_compiles_only_when_it_is_asked_to():
    assert choose_compile("auto", torch.device("cpu")) is None
    assert choose_compile(False, torch.device("cuda")) is None
    assert choose_compile("auto", torch.device("cuda")) is not None
