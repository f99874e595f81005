"""Weights of a student from whatever kind of checkpoint a path names: `student.weights`, and the conversion tool."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor

from afd_scale.checkpoint.formats import diffusers, wan
from afd_scale.checkpoint.weights import find_weights, load_weights
from afd_scale.config.models import PolicyConfig, WanConfig

FILE_SUFFIXES = (".safetensors", ".pt", ".pth")
# Fields that change what the same tensors compute.
_MEANING = ("num_heads", "text_length", "eps", "prediction")


@dataclass(frozen=True)
class StudentSource:
    """A checkpoint as read.

    Attributes:
        kind: in words.
        path: the file or folder that holds the tensors.
        stated: fields of the sections `student` and `sampler` that the checkpoint says; all, some or none.
        sizes: read off the tensors.
        state: keys of `CausalWan.state_dict()`.
    """

    kind: str
    path: Path
    stated: wan.Stated
    sizes: wan.WanSizes
    state: dict[str, Tensor]

    def config(self, architecture: str | None = None, family: str | None = None) -> PolicyConfig:
        """What the checkpoint states, completed as `formats.wan.complete_config` does."""
        return wan.complete_config(self.stated, self.sizes, self.path, architecture, family)


def read_student(path: Path, prefer_ema: bool = True) -> StudentSource:
    """Recognise and read a checkpoint.

    Args:
        path: a run (its newest complete checkpoint), checkpoint or student folder of ours; a diffusers transformer or
            pipeline folder; an original Wan folder; a .safetensors, .pt or .pth file.
        prefer_ema: of a Self-Forcing training checkpoint take the EMA weights.
    Raises:
        ValueError: it is none of these, is damaged, or is no text-to-video Wan 2.1.
    """
    if not path.exists():
        raise ValueError(f"weights ({path}) must exist: there is no such file or folder")
    if path.is_dir():
        path, kind, stated, state = _read_folder(path)
    elif path.suffix in FILE_SUFFIXES:
        kind = "Wan file"
        stated, state = wan.read_wan_file(path, prefer_ema)
        if any(key.startswith("condition_embedder.") for key in state):
            kind, state = "diffusers file", diffusers.from_diffusers(state)
    else:
        raise ValueError(f"weights ({path}) must end in one of {', '.join(FILE_SUFFIXES)}")
    sizes = wan.check_state(state, path)
    for field, size in asdict(sizes).items():
        said = stated["student"].get(field, size)
        if said != size:
            raise ValueError(f"weights ({path}) must have {field} {said} as its config says, it has {size}")
    return StudentSource(kind, path, stated, sizes, state)


def load_student_state(path: Path, config: WanConfig, section: str = "student") -> dict[str, Tensor]:
    """The state dict of a student, or for another network's trunk, from a section's `weights`.

    Returns:
        Exactly the keys and shapes of a `CausalWan`'s state dict, in the dtype that is stored.
    Raises:
        ValueError: as `read_student`; or the checkpoint is of another architecture.
    """
    try:
        source = read_student(path)
    except ValueError as error:
        raise ValueError(f"{section}.{error}") from error
    found = asdict(source.sizes) | {
        field: source.stated["student"][field] for field in _MEANING if field in source.stated["student"]
    }
    for field, value in found.items():
        if value != getattr(config, field):
            raise ValueError(f"{section}.weights ({path}) must have {field} {getattr(config, field)} as "
                             f"{section}.{field} says, it has {value}")  # fmt: skip
    return source.state


def _read_folder(path: Path) -> tuple[Path, str, wan.Stated, dict[str, Tensor]]:
    if (path / "transformer" / diffusers.CONFIG_NAME).is_file():  # a whole pipeline
        path = path / "transformer"
    described = path / diffusers.CONFIG_NAME
    if not described.is_file():
        path = find_weights(path)
        config, state = load_weights(path)
        return path, "student folder", config.model_dump(), state
    try:
        class_name = json.loads(described.read_text()).get("_class_name")
        if class_name == "WanTransformer3DModel":
            return path, "diffusers folder", *diffusers.read_diffusers_folder(path)
        if class_name == "WanModel":
            return path, "Wan folder", *wan.read_wan_folder(path)
    except (KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"weights ({described}) must be a transformer's config: {error!r}") from error
    raise ValueError(f"weights ({described}) must be of a WanTransformer3DModel or WanModel, it is of {class_name}")
