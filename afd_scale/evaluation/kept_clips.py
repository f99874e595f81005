"""Clips in a file, beside the facts that they follow from."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from afd_scale.config import ConfigError, one_line
from afd_scale.files import replacing
from afd_scale.mp4 import FrameArray

log = logging.getLogger(__name__)


def write_clips(frames: FrameArray, path: Path, facts: Mapping[str, str]) -> None:
    """Keep clips; the file appears only when it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        partial.touch()
        mode = partial.stat().st_mode
        save_file({"frames": frames}, partial, dict(facts))
        partial.chmod(mode)  # safetensors 0.8 leaves 0600


def read_clips(path: Path, facts: Mapping[str, str], rows: Sequence[int]) -> FrameArray | None:
    """Some of the clips that were kept; None where there are none, they follow from other facts, or the file is
    damaged."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="np") as file:
            kept = file.metadata() or {}
            changed = [name for name in facts if facts[name] != kept.get(name)]
            if not changed:
                kept_frames = file.get_slice("frames")
                return np.concatenate([kept_frames[row : row + 1] for row in rows])
            reason = f"{', '.join(changed)} changed since"
    except (SafetensorError, OSError) as error:
        reason = str(error).splitlines()[0]
    log.warning("clips in %s are not used: %s", path, reason)
    return None


def kept(path: Path, field: str) -> tuple[tuple[int, ...], dict[str, str]]:
    """Shape of the clips in a file, (N, T, H, W) or (N, T, H, W, 3), and the facts that they follow from.

    Args:
        field: the user's setting that names the file, for errors.
    Raises:
        ConfigError: it cannot be read.
    """
    try:
        with safe_open(path, framework="np") as file:
            return tuple(file.get_slice("frames").get_shape()), file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{field} ({path}) must be clips that a run kept: {one_line(error)}") from error
