"""What the sample videos of a run cost: generated and decoded on all ranks by share, written on one."""

from collections.abc import Mapping
from dataclasses import dataclass

from afd_scale.config import RunConfig
from afd_scale.planning import vae
from afd_scale.planning.flops import video_flops
from afd_scale.planning.gpus import COMPUTE_FRACTION, Gpu
from afd_scale.planning.memory import cache_bytes, itemsize
from afd_scale.planning.parameters import NetworkSize
from afd_scale.planning.workload import Workload, sample_pass

DECODE_FRACTION = 0.1  # of the bf16 matmul rate: float32 convolutions as TF32
WRITE_SECONDS = 4.5  # a video of 81 frames, 832 x 480, three policies, on one core: as mp4, and small as a GIF


@dataclass(frozen=True)
class Samples:
    """One time of `train.sample_every`.

    Attributes:
        generating, decoding, writing: seconds.
        share: of the run's time; None where they are made at its end only.
    """

    generating: float
    decoding: float
    writing: float
    share: float | None

    @property
    def seconds(self) -> float:
        return self.generating + self.decoding + self.writing


def decoding_seconds(config: RunConfig, videos: int, gpu: Gpu, frames: int | None = None) -> float:
    """Of so many videos on one GPU; 0 where the config has no VAE.

    Args:
        frames: latent frames of each that are decoded; None is all.
    """
    if config.codec.name != "wan":
        return 0.0
    data = config.data
    pixels = vae.frames_of(frames or data.latent_frames) * data.latent_height * data.latent_width * vae.PIXELS**2
    return videos * pixels * vae.DECODE_FLOPS_PER_PIXEL / (DECODE_FRACTION * gpu.matmul_tflops * 1e12)


def plan_samples(
    config: RunConfig, load: Workload, networks: Mapping[str, NetworkSize], gpu: Gpu, step_seconds: float
) -> Samples | None:
    """None where the config has no VAE: other videos cost nothing that counts."""
    each = sample_pass(config, load)
    if each is None:
        return None
    flops = each.videos / load.sequence * video_flops(config, load, each).total
    moved = networks[each.role].base * itemsize(config) + cache_bytes(config, load, each.at_once) / 2
    reading = each.runs * load.calls_of(each) * moved / (gpu.memory_gb_per_second * 1e9)
    generating = max(flops / (COMPUTE_FRACTION * gpu.matmul_tflops * 1e12), reading)
    writing = config.evaluation.samples * WRITE_SECONDS
    samples = Samples(generating, decoding_seconds(config, each.videos, gpu), writing, None)
    if config.train.sample_every is None:
        return samples
    share = samples.seconds / (samples.seconds + config.train.sample_every * step_seconds)
    return Samples(samples.generating, samples.decoding, samples.writing, share)
