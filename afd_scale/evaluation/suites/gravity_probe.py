"""How a ball falls, by a small network that looks at pixels: a second opinion on gravity in the world of kicks.

It shares nothing with what tracks the ball, and no judge was trained on it or with it: a student that only learned to
please tracks need not please it. It sees a clip and nothing else, so no prompt can pull its answer. It was fitted once,
by gravity_probe_fit.py, on clips of any gravity that are blurred, noisy, faded and torn as students' are.

    tools/fit_probe.py --out afd_scale/evaluation/suites/gravity_probe.safetensors --steps 2000

made the weights, in 4 minutes of one core: sha256 ecf382596885b04eb923d666a8fa2a2a3dfe598b3298e2be9329c45535247a1a.
Mean absolute errors on some 4,000 held-out clips each, in thousandths of a pixel per frame squared:

    gravity in the clip   all   -0.15 to -0.05   to 0.05   to 0.15   to 0.25   to 0.35
    clean                 8.0             10.5       5.3       4.7       7.7      11.6
    degraded             10.9             13.5       6.3       7.9      12.4      16.8

    the teacher's clips: 5.3; of no gravity 4.9, gentle 5.5, strong 5.7

On the clips of three base students that keep a ball together it ranked the gravities as the tracks do (correlations
0.80, where they hardly differ, to 0.94), and the means over the clips were 0.001 to 0.007 apart: differences below 0.01
mean nothing. Where a ball jumps from chunk to chunk there is no one gravity to be found: the two were 0.07 apart.
"""

from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from afd_scale.data.worlds.ball import FRAME_SIZE, FloatArray
from afd_scale.data.worlds.kick import NUM_FRAMES
from afd_scale.mp4 import FrameArray

WEIGHTS = Path(__file__).with_suffix(".safetensors")
WIDTH, ROW_CHANNELS = 64, 16
DILATIONS = (1, 2, 4)
CLIPS_AT_ONCE = 128


class GravityProbe(nn.Module):
    """Downward acceleration from pixels.

    Where a ball is from left to right does not matter: of each row it keeps the mean of what filters found. Each frame
    then has an estimate, from the frames around it, and says how much it should count.
    """

    def __init__(self) -> None:
        super().__init__()
        self.filters = nn.Conv2d(1, ROW_CHANNELS, (3, 7), stride=(1, 4), padding=(1, 3))
        self.of_rows = nn.Linear(ROW_CHANNELS * FRAME_SIZE, WIDTH)
        self.over_time = nn.ModuleList(nn.Conv1d(WIDTH, WIDTH, 3, padding=gap, dilation=gap) for gap in DILATIONS)
        self.answer = nn.Linear(WIDTH, 2)

    def forward(self, levels: Tensor) -> Tensor:
        """(N,) pixels per frame squared, of clips (N, T, FRAME_SIZE, FRAME_SIZE) in [0, 1]."""
        found = self.filters(levels.flatten(0, 1)[:, None]).relu()
        hidden = self.of_rows(found.mean(dim=-1).flatten(1)).unflatten(0, levels.shape[:2]).transpose(1, 2)
        for convolution in self.over_time:
            hidden = hidden + convolution(nn.functional.gelu(hidden))
        estimate, counts = self.answer(hidden.transpose(1, 2)).unbind(dim=-1)
        return (estimate * counts.softmax(dim=1)).sum(dim=1)


def probed_gravity(clips: FrameArray, probe: GravityProbe | None = None) -> FloatArray:
    """(N,) downward acceleration, pixels per frame squared; about 0 where nothing moves, or nothing is there.

    Args:
        clips: (N, NUM_FRAMES, FRAME_SIZE, FRAME_SIZE) uint8.
        probe: None is the one of the package.
    Raises:
        ValueError: another shape or type.
    """
    if clips.dtype != np.uint8 or clips.shape[1:] != (NUM_FRAMES, FRAME_SIZE, FRAME_SIZE):
        raise ValueError(f"clips ({clips.dtype} {clips.shape}) must be uint8 of shape "
                         f"(N, {NUM_FRAMES}, {FRAME_SIZE}, {FRAME_SIZE}): the probe was fitted on such")  # fmt: skip
    network = _fitted() if probe is None else probe
    with torch.inference_mode():
        parts = [network(torch.from_numpy(part).float() / 255) for part in _parts(clips)]
    return np.concatenate([part.double().numpy() for part in parts]) if parts else np.zeros(0)


def _parts(clips: FrameArray) -> list[FrameArray]:
    return [np.ascontiguousarray(clips[at : at + CLIPS_AT_ONCE]) for at in range(0, len(clips), CLIPS_AT_ONCE)]


@lru_cache(maxsize=1)
def _fitted() -> GravityProbe:
    """The package's probe: weights are kept in half precision, and computed with in single."""
    probe = GravityProbe()
    probe.load_state_dict({name: weight.float() for name, weight in load_file(WEIGHTS).items()})
    return probe.eval()
