"""Methods on plain engines that remember what they were asked."""

import torch

from afd_scale.config import RunConfig
from afd_scale.engines.cast import build_cast
from afd_scale.engines.plain import Plain
from afd_scale.methods import make_method
from afd_scale.models.wan import CausalWan
from afd_scale.protocols import Unwatched
from tests.networks import make_batch as batch_of

TEXT_DIM = 4
STUDENT = {
    "dim": 16, "ffn_dim": 32, "num_heads": 2, "num_layers": 1, "freq_dim": 8, "text_dim": TEXT_DIM, "text_length": 2,
    "latent_channels": 2, "prediction": "x0",
}  # fmt: skip
SAMPLER = {"chunk_frames": 1, "timesteps": [1000, 500], "timestep_shift": 3.0}
SHAPE = (2, 2, 4, 4)  # (F, C, H, W) of a video


class Recorded:
    """An engine that remembers its calls."""

    def __init__(self, engine):
        self.engine, self.calls, self.decays = engine, [], []

    def __getattr__(self, name):
        return getattr(self.engine, name)

    def __call__(self, *arguments, **options):
        result = self.engine(*arguments, **options)
        self.calls.append((arguments, options, result.detach()))
        return result

    def follow(self, student, decay):
        self.decays.append(decay)
        self.engine.follow(student, decay)

    def weights(self):
        """A copy of all parameters as one vector."""
        return torch.cat([p.detach().flatten() for p in self.network.parameters()])


class Oracle:
    """A frozen judge of brightness, or of anything else that is given."""

    micro_batch = None
    watch = Unwatched()

    def __init__(self, score=lambda videos: videos.latents.mean(dim=(1, 2, 3, 4))):
        self.score, self.calls = score, []

    def __call__(self, videos):
        self.calls.append(videos)
        return self.score(videos)

    def resident(self, sampling=False):
        return torch.no_grad()

    def backward(self, loss):
        assert not loss.requires_grad

    def step(self, learning_rate):
        return torch.zeros(())


def build(method, *, student=None, sampler=None, data=None, micro_batch=None, **replaced):
    """A method with its `engines` by role, whose student is not all zero before training.

    Args:
        method: its section.
        replaced: engines by role, instead of the cast's own.
    """
    config = RunConfig.model_validate({
        "method": method, "student": STUDENT | (student or {}), "sampler": SAMPLER | (sampler or {}),
        "data": {"latent_frames": SHAPE[0], "latent_height": SHAPE[2], "latent_width": SHAPE[3], "global_batch": 2}
                | (data or {}),
        "train": {"steps": 100, "micro_batch": micro_batch},
    })  # fmt: skip
    engines = build_cast(config, Plain(config, torch.device("cpu")))
    for engine in engines.values():
        if isinstance(engine.network, CausalWan):
            head = engine.network.head.head.weight
            head.data.normal_(0, 0.2, generator=torch.Generator().manual_seed(0))
    engines = {role: Recorded(engine) for role, engine in engines.items()} | replaced
    method = make_method(config, engines, lambda x: x)
    method.engines = engines  # for tests to look at
    return method


def make_batch(samples=(4, 9), *, frames=SHAPE[0], teacher_seed=0):
    """Prompts with texts and teacher videos that belong to their samples."""

    def draw(shape, seed):
        generators = [torch.Generator().manual_seed(1000 * seed + sample) for sample in samples]
        return torch.stack([torch.randn(shape, generator=generator) for generator in generators])

    return batch_of(draw((frames, *SHAPE[1:]), 2 + teacher_seed), draw((2, TEXT_DIM), 1), tuple(samples))
