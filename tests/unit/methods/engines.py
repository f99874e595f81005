"""Engines in one process, without DeepSpeed: what a training method asks of the networks that it is given."""

import contextlib
import copy

import torch

from afd_scale.config.models import StudentConfig
from afd_scale.models.wan import CausalWan
from afd_scale.types import Batch

STUDENT = StudentConfig.model_validate(
    {
        "dim": 16, "ffn_dim": 32, "num_heads": 2, "num_layers": 1, "freq_dim": 8, "text_dim": 4, "text_length": 2,
        "latent_channels": 2, "prediction": "x0", "chunk_frames": 1, "timesteps": [1000, 500], "timestep_shift": 3.0,
    }
)  # fmt: skip
SHAPE = (2, 2, 4, 4)  # (F, C, H, W) of a video


class Engine:
    """A network that is called as it is, and remembers its calls."""

    def __init__(self, network):
        self.network, self.calls = network, []

    def __call__(self, *arguments, **options):
        result = self.network(*arguments, **options)
        self.calls.append((arguments, options, result.detach()))
        return result

    def new_cache(self, frames):
        return self.network.new_cache(frames)

    def resident(self):
        return contextlib.nullcontext()

    def weights(self):
        """A copy of all parameters as one vector."""
        return torch.cat([p.detach().flatten() for p in self.network.parameters()])


class TrainedEngine(Engine):
    def __init__(self, network):
        super().__init__(network)
        self.optimizer = torch.optim.AdamW(network.parameters(), lr=1.0, weight_decay=0.0)

    def backward(self, loss):
        loss.backward()

    def step(self, learning_rate):
        self.optimizer.param_groups[0]["lr"] = learning_rate
        norm = torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm


class AveragedEngine(Engine):
    def __init__(self, network):
        super().__init__(network.requires_grad_(False))
        self.decays = []

    def follow(self, student, decay):
        self.decays.append(decay)
        for ours, theirs in zip(self.network.parameters(), student.network.parameters(), strict=True):
            ours.copy_(decay * ours + (1 - decay) * theirs.detach())


class Oracle:
    """A frozen judge of brightness, or of anything else that is given."""

    def __init__(self, score=lambda latents, text: latents.mean(dim=(1, 2, 3, 4))):
        self.score, self.calls = score, []

    def __call__(self, latents, text):
        self.calls.append((latents, text))
        return self.score(latents, text)

    def resident(self):
        return contextlib.nullcontext()

    def backward(self, loss):
        assert not loss.requires_grad

    def step(self, learning_rate):
        return torch.zeros(())


def make_student(config=STUDENT):
    """A tiny student that is not all zero before training."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = CausalWan(config)
        torch.nn.init.normal_(network.head.head.weight, 0, 0.2)
    return network


def copies(network, count):
    return [copy.deepcopy(network) for _ in range(count)]


def make_batch(samples=(4, 9), *, frames=SHAPE[0], teacher_seed=0):
    """Prompts with texts and teacher videos that belong to their samples."""

    def draw(shape, seed):
        generators = [torch.Generator().manual_seed(1000 * seed + sample) for sample in samples]
        return torch.stack([torch.randn(shape, generator=generator) for generator in generators])

    names = tuple(f"prompt {sample}" for sample in samples)
    videos = draw((frames, *SHAPE[1:]), 2 + teacher_seed)
    return Batch(names, names, tuple(samples), draw((2, STUDENT.text_dim), 1), videos)
