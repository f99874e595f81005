"""What the sample videos of a run cost: generated and decoded on all ranks by share, written on one."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from afd_scale.config import RunConfig
from afd_scale.config.cast import Pass
from afd_scale.planning.flops import video_flops
from afd_scale.planning.gpus import COMPUTE_FRACTION, Gpu
from afd_scale.planning.memory import cache_bytes, itemsize
from afd_scale.planning.parameters import NetworkSize
from afd_scale.planning.workload import Workload

# Of Wan 2.1's VAE, for each pixel of each frame that it decodes; a test counts them.
DECODE_FLOPS_PER_PIXEL = 8.51e6
WAN_FRAMES, WAN_PIXELS = 4, 8  # that its VAE makes of a latent frame, along a latent's side
DECODE_FRACTION = 0.1  # of the bf16 matmul rate: float32 convolutions as TF32
WRITE_SECONDS = 3.0  # a video of 81 frames, 832 x 480, three policies: shrunk and compressed on one core


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


def plan_samples(
    config: RunConfig, load: Workload, networks: Mapping[str, NetworkSize], gpu: Gpu, step_seconds: float
) -> Samples | None:
    """None where the config has no VAE: other videos cost nothing that counts."""
    wanted, data = config.evaluation.samples, config.data
    if config.codec.name != "wan" or not wanted:
        return None
    videos = math.ceil(wanted / load.data_ranks)
    each = Pass("samples", config.method.exported, "rollout", videos, min(videos, config.evaluation.batch))
    computing = videos / load.sequence * video_flops(config, load, each).total / (COMPUTE_FRACTION * gpu.matmul_tflops)
    moved = networks[each.role].base * itemsize(config) + cache_bytes(config, load, each.at_once) / 2
    reading = each.runs * sum(config.sampler.passes(load.frames)) * moved / gpu.memory_gb_per_second
    frames = 1 + (data.latent_frames - 1) * WAN_FRAMES
    pixels = frames * data.latent_height * data.latent_width * WAN_PIXELS**2
    decoding = videos * pixels * DECODE_FLOPS_PER_PIXEL / (DECODE_FRACTION * gpu.matmul_tflops * 1e12)
    samples = Samples(max(computing / 1e12, reading / 1e9), decoding, wanted * WRITE_SECONDS, None)
    if config.train.sample_every is None:
        return samples
    share = samples.seconds / (samples.seconds + config.train.sample_every * step_seconds)
    return Samples(samples.generating, decoding, samples.writing, share)
