"""What moves in a video, as numbers for each frame: from pixels, without gradient, the same whatever is beside it.

Lengths are in frame heights, to the right and down, and times in seconds, each over a fixed scale; asinh keeps far
outliers near.

Shape suffixes: B batch, T frames, C channels, H rows, W columns, K numbers a frame, G cells along each side.
"""

from collections.abc import Callable, Iterator
from pickle import UnpicklingError

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from afd_scale.codecs.conversions import to_uint8
from afd_scale.config import ConfigError, one_line
from afd_scale.config.judges import MotionDiscriminatorConfig
from afd_scale.models.motion_flow import FlowPool, pooled, shares
from afd_scale.mp4 import FrameArray
from afd_scale.torchvision_ops import define_torchvision_ops
from afd_scale.types import Videos
from afd_scale.vision import FLOW_ROWS

Features = Callable[[Videos], Tensor]  # (B, T, K)

TRACKS = 10  # numbers a frame of `tracks`

# What counts as 1: heights, heights a second, and heights a second squared.
POSITION, EXTENT, MASS, SPEED, ACCELERATION = 0.25, 0.05, 0.05, 0.5, 1.0

LEAST_PEAK = 0.05  # of full brightness; a darker clip shows nothing bright
EDGE = 0.15  # of a clip's peak: what is less above the background is none of the bright thing
LEAST_MASS = 1e-3  # heights squared of full brightness, a quarter of a pixel of 16 x 16

RAFT_STRIDE, RAFT_LEAST = 8, 128  # pixels: sizes are multiples, and no side is shorter
RAFT_PAIRS = 8  # at once


def make_features(config: MotionDiscriminatorConfig) -> tuple[Features, int]:
    """What a config names, and its K."""
    if config.features == "tracks":
        return lambda videos: torch.cat([tracks(pixels, rate_of(videos)) for pixels in one_by_one(videos)]), TRACKS
    flow = DenseSearch(config) if config.features == "flow" else Raft(config)
    return lambda videos: of_cells(flow(videos), rate_of(videos)), 5 * config.grid**2


def one_by_one(videos: Videos) -> Iterator[Tensor]:
    """(1, T, C, H, W) pixels of each."""
    return (videos[row : row + 1].pixels() for row in range(len(videos)))


def rate_of(videos: Videos) -> float:
    assert videos.fps is not None, "speed is by the second"
    return videos.fps


def tracks(pixels: Tensor, fps: float) -> Tensor:
    """(B, T, TRACKS) of the one bright thing that moves: place, speed and acceleration of its centre of light, its
    extent, light and brightest pixel. What is not there, as the speed after the last frame, is 0."""
    light_BTHW = (pixels.float().mean(2) + 1) / 2
    light_BTHW = (light_BTHW - light_BTHW.flatten(2).median(-1).values[..., None, None]).clamp(min=0)
    peak_BT = light_BTHW.amax((-2, -1))
    edge = EDGE * peak_BT.amax(1).clamp(min=LEAST_PEAK)
    light_BTHW = (light_BTHW - edge[:, None, None, None]).clamp(min=0) / (1 - EDGE)

    height, width = light_BTHW.shape[-2:]
    down, right = ((torch.arange(size, device=pixels.device) + 0.5 - size / 2) / height for size in (height, width))
    mass_BT = light_BTHW.sum((-2, -1)) / height**2
    share_BTHW = light_BTHW / (height**2 * mass_BT.clamp(min=LEAST_MASS))[..., None, None]
    of_columns, of_rows = share_BTHW.sum(-2), share_BTHW.sum(-1)
    place_BT2 = torch.stack([of_columns @ right, of_rows @ down], dim=-1)
    square_BT2 = torch.stack([of_columns @ right.square(), of_rows @ down.square()], dim=-1)
    extent_BT2 = (square_BT2 - place_BT2.square()).clamp(min=0).sqrt()

    speed = place_BT2.diff(dim=1) * fps
    acceleration = speed.diff(dim=1) * fps
    parts = (
        place_BT2 / POSITION, F.pad(speed, (0, 0, 0, 1)) / SPEED, F.pad(acceleration, (0, 0, 1, 1)) / ACCELERATION,
        extent_BT2 / EXTENT, mass_BT[..., None] / MASS, peak_BT[..., None],
    )  # fmt: skip
    return torch.cat(parts, dim=-1).asinh()


def of_cells(flow: Tensor, fps: float) -> Tensor:
    """(B, T - 1, 5 G G) of the flow in cells: its mean, its spread, and how the mean changes to the next pair.

    Args:
        flow: (B, T - 1, 3, G, G) in heights a frame, as `motion_flow.cell_flow` has it.
    """
    speed = flow * fps
    change = F.pad(speed[:, :, :2].diff(dim=1) * fps, (0, 0, 0, 0, 0, 0, 0, 1))
    return torch.cat([speed / SPEED, change / ACCELERATION], dim=2).asinh().flatten(2)


class DenseSearch:
    """Flow by OpenCV on the CPU: from pixels of B videos to (B, T - 1, 3, G, G) in heights a frame."""

    def __init__(self, config: MotionDiscriminatorConfig):
        self.flow = FlowPool(config.grid, config.workers)

    def __call__(self, videos: Videos) -> Tensor:
        flow = self.flow(_frames(pixels[0]) for pixels in one_by_one(videos))
        return torch.from_numpy(np.stack(flow)).to(videos.latents.device)


class Raft:
    """The same by torchvision's RAFT, where the pixels are. It is none of a judge's own modules, so it is neither
    trained nor sharded nor saved.


    Source: Teed and Deng, arXiv:2003.12039.
    """

    def __init__(self, config: MotionDiscriminatorConfig):
        assert config.raft_weights is not None, "checked with the section"
        self.grid, self.weights = config.grid, config.raft_weights  # which `check_files` has looked for
        self._network: nn.Module | None = None

    def __call__(self, videos: Videos) -> Tensor:
        return torch.cat([self._flow(pixels) for pixels in one_by_one(videos)])

    @torch.no_grad()
    def _flow(self, pixels: Tensor) -> Tensor:
        if self._network is None:  # not before: what a network is made in may shard all that is made there
            self._network = self._load().to(pixels.device)
        height, width = pixels.shape[3:]
        rows = min(max(height, FLOW_ROWS[0]), FLOW_ROWS[1])
        size = [max(RAFT_LEAST, RAFT_STRIDE * round(side / RAFT_STRIDE)) for side in (rows, rows * width / height)]
        frames = F.interpolate(pixels[0].float(), size, mode="bilinear", antialias=True).expand(-1, 3, -1, -1)
        pairs = zip(frames[:-1].split(RAFT_PAIRS), frames[1:].split(RAFT_PAIRS))
        found = [self._network(first, second)[-1] for first, second in pairs]
        in_heights = pixels.new_tensor([width / height / size[1], 1 / size[0]], dtype=torch.float32)
        flow = torch.cat(found) * in_heights[:, None, None]
        to_cells = [torch.from_numpy(share).to(pixels.device) for share in shares(size[0], size[1], self.grid)]
        return torch.cat(pooled(flow, *to_cells), dim=1)[None]

    def _load(self) -> nn.Module:
        define_torchvision_ops()
        from torchvision.models import optical_flow

        try:
            if self.weights.suffix == ".safetensors":
                state = load_file(self.weights)
            else:
                state = torch.load(self.weights, map_location="cpu", weights_only=True)
            is_large = any(name.startswith("mask_predictor.") for name in state)
            network: nn.Module = (optical_flow.raft_large if is_large else optical_flow.raft_small)(weights=None)
            network.load_state_dict(state)
        except (OSError, RuntimeError, SafetensorError, UnpicklingError) as error:
            raise ConfigError(f"raft_weights ({self.weights}) must hold torchvision's raft_small or raft_large: "
                              f"{one_line(error)}") from error  # fmt: skip
        return network.float().eval().requires_grad_(False)


def _frames(pixels: Tensor) -> FrameArray:
    """(T, H, W, C) bytes of pixels (T, C, H, W)."""
    return to_uint8(pixels)
