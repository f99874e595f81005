"""A student's passes at the sizes of a real run, counted: of one and of two layers, of which all others follow."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from afd_scale.config.models import PolicyConfig
from afd_scale.config.presets import ARCHITECTURES
from afd_scale.layers.lora import Adapters, adapter_of
from afd_scale.layers.ops import ModelOps
from afd_scale.models.wan import CausalWan
from afd_scale.rollout.sampler import Noise, Sampler
from tests.unit.budgets.compilations import Compilations, count_compilations
from tests.unit.budgets.counting import Counting, Tally
from tests.unit.budgets.fake_cuda import WITH_GRADIENT, WITHOUT_GRADIENT, fake_gpu

FRAMES, HEIGHT, WIDTH = 21, 60, 104  # latents of an 81 x 480 x 832 video: 32,760 tokens
ADAPTER, RANK = "student", 256


class Student:
    """A student of few layers on a fake GPU, bf16 weights, and what it takes.

    Attributes:
        latents, timestep, text: of one whole video.
        options: of every pass: its adapter.
    """

    def __init__(self, architecture: str, layers: int, device: torch.device, *, lora: bool = False,
                 family: str = "self-forcing", **fields: Any):  # fmt: skip
        config = PolicyConfig.model_validate(
            {
                "student": {"architecture": architecture, "num_layers": layers, **fields},
                "sampler": {"family": family},
            }
        )
        adapters = Adapters((ADAPTER, "old_policy"), RANK, 1.0) if lora else None
        with torch.device("meta"):  # where weights can be initialised
            self.network = CausalWan(config.student, config.sampler, ModelOps(adapters=adapters))
        for module in self.network.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                weight = torch.empty(parameter.shape, dtype=torch.bfloat16, device=device)
                setattr(module, name, nn.Parameter(weight))
        for name, parameter in self.network.named_parameters():
            parameter.requires_grad_(not lora or adapter_of(name) == ADAPTER)
        if device == WITHOUT_GRADIENT:
            self.network.fuse()  # as in a plain twin
        self.sampler = config.sampler
        self.options = {"adapter": ADAPTER} if lora else {}
        self.latents = torch.empty(1, FRAMES, config.student.latent_channels, HEIGHT, WIDTH, device=device)
        self.timestep = torch.empty(1, FRAMES, device=device)
        self.text = torch.empty(1, config.student.text_length, config.student.text_dim, device=device)

    def __call__(self, **options: Any) -> Tensor:
        """A pass over the whole video."""
        return self.network(self.latents, self.timestep, self.text, **options, **self.options)


@cache
def cached_pass(architecture: str, lora: bool = False, first: bool = False) -> Tally:
    """One pass of a chunk in the middle of a rollout, all layers; the chunk's first one, or a later one."""
    one, two = (count_cached_pass(architecture, layers, lora, first) for layers in (1, 2))
    return one.more(two - one, times=ARCHITECTURES[architecture]["num_layers"] - 1)


def count_cached_pass(architecture: str, layers: int, lora: bool = False, first: bool = False) -> Tally:
    """The same with so many layers."""
    with fake_gpu(WITHOUT_GRADIENT):
        student = Student(architecture, layers, WITHOUT_GRADIENT, lora=lora)
        frames = student.sampler.chunk_frames
        chunk = student.latents[:, :frames], student.timestep[:, :frames], student.text
        past = student.network.new_cache(FRAMES)
        with Counting():  # answers what asks for values
            student.network(*chunk, cache=past, **student.options)
        past.advance()
        if not first:
            with Counting():
                student.network(*chunk, cache=past, **student.options)
        with Counting() as tally:
            student.network(*chunk, cache=past, **student.options)
    return tally


@cache
def window_pass() -> Tally:
    """A later pass of a chunk in a full window of the 1.3B, with a sink, whose keys are turned when they are used."""
    one, two = (count_window_pass(layers) for layers in (1, 2))
    return one.more(two - one, times=ARCHITECTURES["wan-1.3b"]["num_layers"] - 1)


def count_window_pass(layers: int) -> Tally:
    """The same with so many layers."""
    with fake_gpu(WITHOUT_GRADIENT):
        student = Student("wan-1.3b", layers, WITHOUT_GRADIENT, family="longlive")
        student.network.sampler = student.sampler.with_fields({"positions": "window"})
        frames = student.sampler.chunk_frames
        chunk = student.latents[:, :frames], student.timestep[:, :frames], student.text
        past = student.network.new_cache(None)
        for _ in range(5):
            past.advance()
        for _ in range(2):  # the first one reads the text and computes angles
            with Counting() as tally:
                student.network(*chunk, cache=past)
    return tally


def per_block(count: Callable[[int], Tally]) -> Tally:
    """Of one layer more, given what counts a number of layers."""
    return count(2) - count(1)


@cache
def block_forward(gradient: bool) -> Tally:
    """One block of the 1.3B on a whole video."""
    device = WITH_GRADIENT if gradient else WITHOUT_GRADIENT

    def count(layers: int) -> Tally:
        with fake_gpu(device):
            student = Student("wan-1.3b", layers, device)
            with Counting() as tally:
                student()
        return tally

    return per_block(count)


@cache
def block_backward(recompute: bool) -> Tally:
    """The same, its gradients, and where it is recomputed its second forward pass."""

    def count(layers: int) -> Tally:
        with fake_gpu(WITH_GRADIENT):
            student = Student("wan-1.3b", layers, WITH_GRADIENT, activation_checkpointing=recompute)
            with Counting():
                loss = student().square().mean()
            with Counting() as tally:
                loss.backward()
        return tally

    return per_block(count)


@cache
def rollout() -> Tally:
    """All chunks of a video by the sampler, in a window that moves; one layer."""
    with fake_gpu(WITHOUT_GRADIENT):
        student = Student("wan-1.3b", 1, WITHOUT_GRADIENT, family="longlive")
        sampler = Sampler(student.sampler)
        again = torch.empty(len(sampler.sigmas) - 1, *student.latents.shape, device=WITHOUT_GRADIENT)
        with Counting() as tally:
            sampler.rollout(student.network, student.text, Noise(student.latents, again))
    return tally


@cache
def teacher_forcing(clean_gradient: bool) -> Tally:
    """A pass of two states of a video given its clean frames, and backward with recomputation; one layer."""
    with fake_gpu(WITH_GRADIENT):
        student = Student("wan-1.3b", 1, WITH_GRADIENT, activation_checkpointing=True)
        noisy, timestep = student.latents.repeat(2, 1, 1, 1, 1), student.timestep.repeat(2, 1)
        with Counting() as tally:
            velocity = student.network(
                noisy, timestep, student.text, clean=student.latents, clean_gradient=clean_gradient
            )
            velocity.square().mean().backward()
    return tally


def compiled_student() -> CausalWan:
    """A small student, really there, of three layers, whose window moves; each part of a block compiled."""
    sampler = {"family": "longlive", "timesteps": (1000, 500)}
    config = PolicyConfig.model_validate({"student": {"architecture": "toy", "num_layers": 3}, "sampler": sampler})
    compile = partial(torch.compile, backend="aot_eager", dynamic=False)
    return CausalWan(config.student, config.sampler, ModelOps(compile=compile))


def compiled_rollout() -> Compilations:
    """All chunks of a video."""
    student = compiled_student()
    noise = torch.randn(1, FRAMES, student.config.latent_channels, 4, 4)
    with count_compilations() as made:
        Sampler(student.sampler).rollout(student, torch.randn(1, 3, student.config.text_dim), Noise(noise, noise[None]))
    return made


def compiled_update() -> Compilations:
    """Clean frames without gradient, a noised state with, and backward."""
    student = compiled_student()
    latents = torch.randn(1, FRAMES, student.config.latent_channels, 4, 4)
    text, timestep = torch.randn(1, 3, student.config.text_dim), torch.full((1, FRAMES), 500.0)
    with count_compilations() as made:
        student(latents, timestep, text, clean=latents, clean_gradient=False).square().mean().backward()
    return made
