"""FLOPs of networks that no formula here describes: small ones, run once without memory under torch's own counter."""

from dataclasses import dataclass, field
from functools import cache

import torch
from torch.utils.flop_counter import FlopCounterMode

from afd_scale.config import RunConfig
from afd_scale.config.cast import NetworkConfig
from afd_scale.layers.ops import ModelOps
from afd_scale.models.build import build_network
from afd_scale.planning.vlm import Shown, shown_video
from afd_scale.types import Prompts, Videos


@dataclass(frozen=True)
class _Case:
    """All that a count follows from; the config builds the network."""

    network: NetworkConfig
    latents: tuple[int, ...]  # (F, C, H, W)
    text: tuple[int, ...]  # (T, E)
    shown: Shown
    gradient: bool
    of_input: bool
    config: RunConfig = field(compare=False, repr=False)


def counted_flops(
    config: RunConfig, network: NetworkConfig, *, gradient: bool = False, of_input: bool = False,
    frames: int | None = None,
) -> int:  # fmt: skip
    """One video through a judge, its backward pass included.

    A network without parameters computes nothing here, as a judge behind HTTP does: 0.

    Args:
        gradient: a backward pass follows.
        of_input: it is of what passes through alone, and weights get none.
        frames: latent frames that it sees; None is all.
    Raises:
        ValueError: the network does not run on tensors without memory.
    """
    data, student = config.data, config.student
    latents = (frames or data.latent_frames, student.latent_channels, data.latent_height, data.latent_width)
    text = (student.text_length, student.text_dim)
    return _counted(_Case(network, latents, text, shown_video(config, frames), gradient, of_input, config))


@cache
def _counted(case: _Case) -> int:
    with torch.device("meta"):
        network = build_network(case.config, case.network, ModelOps())
        latents, text = torch.empty(1, *case.latents), torch.empty(1, *case.text)
    if next(network.parameters(), None) is None:
        return 0
    shown = case.shown
    pixels = torch.empty(1, shown.frames, shown.colours, shown.height, shown.width, device="meta")
    network.requires_grad_(case.gradient and not case.of_input)
    videos = Videos(
        Prompts(("",), ("",), (0,), text), latents.requires_grad_(case.of_input), shown.fps, lambda _: pixels
    )
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(case.gradient):
        try:
            logits = network(videos)
            if case.gradient:
                logits.sum().backward()
        except (RuntimeError, NotImplementedError) as error:
            raise ValueError(f"{type(network).__name__} must run on tensors without memory, or have a formula in "
                             f"planning/flops.py: {error}") from error  # fmt: skip
    return int(counter.get_total_flops())
