"""Weights of a student from whatever kind of checkpoint a path names: `student.weights`, and the conversion tool."""

import logging
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from torch import Tensor

from afd_scale.checkpoint.adapters import BASE_NAME, merged, open_base
from afd_scale.checkpoint.formats import diffusers, wan
from afd_scale.checkpoint.formats.lora import Lora, open_lora
from afd_scale.checkpoint.formats.stated import WAN_CLASS, read_stated, stated_beside
from afd_scale.checkpoint.lazy import SAFETENSORS, LazyState, finite, open_weights, read_object
from afd_scale.checkpoint.networks import find_network
from afd_scale.checkpoint.roles import check_student, open_role, open_role_adapters
from afd_scale.checkpoint.weights import CONFIG_NAME, FOLDER_NAME, find_weights, read_config
from afd_scale.config.models import LoraConfig, PolicyConfig, WanConfig

log = logging.getLogger(__name__)

_PART = re.compile(r"transformer(_\d+)?|(high|low)_noise(_model)?")  # subfolders of one network each

# Fields that change what the same tensors compute.
_MEANING = ("num_heads", "text_length", "eps", "prediction")


@dataclass(frozen=True)
class StudentSource:
    """A checkpoint as read.

    Attributes:
        kind: in words.
        path: the file or folder that holds the tensors.
        stated: fields of the sections `student` and `sampler` that the checkpoint says; all, some or none.
        sizes: read off the tensors' shapes.
        state: keys of `CausalWan.state_dict()`, adapters merged; each tensor is read when asked for, and is then
            checked to be finite.
    """

    kind: str
    path: Path
    stated: wan.Stated
    sizes: wan.WanSizes
    state: LazyState

    def config(self, architecture: str | None = None, family: str | None = None) -> PolicyConfig:
        """What the checkpoint states, completed as `formats.wan.complete_config` does.

        Raises:
            ValueError: as of that; or the checkpoint states what a preset is given for.
        """
        for name, preset, said in (("architecture", architecture, "num_heads" in self.stated["student"]),
                                   ("family", family, "chunk_frames" in self.stated["sampler"])):  # fmt: skip
            if preset is not None and said:
                raise ValueError(f"{name} ({preset}) must not be given: {self.path} states its own")
        return wan.complete_config(self.stated, self.sizes, self.path, architecture, family)


def read_student(path: Path, weights: str | None = None, model_config: Path | None = None) -> StudentSource:
    """Recognise a checkpoint.

    Args:
        path: a run (its newest complete checkpoint), checkpoint or student folder of ours; a diffusers transformer or
            pipeline folder; an original or causal Wan folder; a file of weights, or a folder or index of shards.
        weights: `student`, `old_policy` or `ema`, of a run or a training checkpoint; None is the one that is exported.
        model_config: a JSON file with fields that the checkpoint does not state.
    Raises:
        ValueError: it is none of these, is damaged, or is no text-to-video Wan 2.1.
    """
    if not path.exists():
        raise ValueError(f"weights ({path}) must exist: there is no such file or folder")
    source = _read_ours(find_weights(path), weights) if _is_ours(path) else _read_others(path, weights)
    if model_config is not None:
        source = _completed(source, model_config)
    for field, size in asdict(source.sizes).items():
        said = source.stated["student"].get(field, size)
        if said != size:
            raise ValueError(f"weights ({source.path}) must have {field} {said} as its config says, it has {size}")
    return replace(source, state=finite(source.state, source.path))


def read_lora(path: Path, weights: str | None = None) -> Lora:
    """The adapters of a LoRA run, or those in a LoRA file or folder; arguments and errors as of `read_student`."""
    if not path.exists():
        raise ValueError(f"lora ({path}) must exist: there is no such file or folder")
    if not _is_ours(path):
        if weights is not None:
            raise ValueError(f"lora ({path}) must be a run's for its {weights}: this is another's file")
        return open_lora(path)
    folder = find_weights(path)
    if not (folder / BASE_NAME).is_file():
        raise ValueError(f"lora ({path}) must be of a run with adapters: {folder} holds whole weights")
    return _adapters(folder, read_config(folder / CONFIG_NAME), weights)


def load_student_state(path: Path, config: WanConfig, section: str = "student") -> LazyState:
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


def load_lora_state(path: Path, config: LoraConfig, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Start weights of adapters, from a section's `lora.weights`.

    Args:
        shapes: of the base's weights.
    Returns:
        `MODULE.down` and `MODULE.up` of the linears that the file adapts, for adapters scaled as `config` says.
    Raises:
        ValueError: as `read_lora`; the rank or the base is another.
    """
    lora = read_lora(path)
    state: dict[str, Tensor] = {}
    for module, scale in lora.scales.items():
        down, up = lora.tensors[f"{module}.down"], lora.tensors[f"{module}.up"]
        if len(down) != config.rank:
            raise ValueError(f"lora.rank ({config.rank}) must be {len(down)}, as {module} has it in {path}")
        if shapes.get(f"{module}.weight") != (len(up), down.shape[1]):
            raise ValueError(f"lora.weights ({path}) must adapt this architecture: {module} is {down.shape[1]} to "
                             f"{len(up)} there, and here {shapes.get(f'{module}.weight')}")  # fmt: skip
        ratio = scale * config.rank / config.alpha
        state |= {f"{module}.down": down, f"{module}.up": up if ratio == 1 else up.float() * ratio}
    return state


def _is_ours(path: Path) -> bool:
    """Whether a path is a run, a checkpoint or a student folder, complete or not."""
    if not path.is_dir() or (path / "transformer").is_dir():
        return False
    return any((path / name).exists() for name in ("checkpoints", FOLDER_NAME, CONFIG_NAME))


def _adapters(folder: Path, config: PolicyConfig, weights: str | None) -> Lora:
    return open_lora(folder) if weights is None else open_role_adapters(folder.parent, weights, config.student)


def _read_ours(folder: Path, weights: str | None) -> StudentSource:
    check_student(folder)
    config = read_config(folder / CONFIG_NAME)
    student = config.student
    kind = "student folder" if weights is None else f"{weights} of checkpoint"
    if (folder / BASE_NAME).is_file():
        base = open_base(folder, lambda path: read_student(path).state)
        state = merged(base, _adapters(folder, config, weights))
        kind += " with adapters"
    elif weights is None and (any(folder.glob(f"*{SAFETENSORS}")) or folder.name != FOLDER_NAME):
        state = LazyState(open_weights(folder))
    else:  # a checkpoint has them in shards
        sizes = wan.WanSizes(**{field: getattr(student, field) for field in wan.WanSizes.__dataclass_fields__})
        state = open_role(folder.parent, weights, wan.weight_shapes(sizes))
    whole = config.model_copy(update={"student": student.model_copy(update={"lora": None})})
    return StudentSource(kind, folder, whole.model_dump(), wan.check_state(state.stored, folder), state)


def _read_others(path: Path, weights: str | None) -> StudentSource:
    if path.is_dir():
        path = _only_part(path)
        if _PART.fullmatch(path.name) and (others := [part for part in _parts(path.parent) if part != path]):
            log.warning("%s is one network of several: %s beside it is left out", path, others[0].name)
    stated = stated_beside(path) if path.is_dir() else wan.nothing_stated()
    stored = find_network(open_weights(path), path, weights)
    if path.is_file() and path.suffix == SAFETENSORS:
        stated = wan.stated_in_header(path)
    name = "Wan"
    if any(key.startswith("condition_embedder.") for key in stored):
        name, stored = "diffusers", diffusers.from_diffusers(stored)
    kind = f"{name} {'folder' if path.is_dir() else 'file'}"
    return StudentSource(kind, path, stated, wan.check_state(stored, path), LazyState(stored))


def _only_part(folder: Path) -> Path:
    """The subfolder with the only network of a model's folder, or the folder itself where no subfolder has one.

    Raises:
        ValueError: there are several.
    """
    parts = _parts(folder)
    if _says_wan(folder) and parts:
        parts = [folder, *parts]
    if len(parts) > 1:
        names = " and ".join(f"{part.name}/" for part in parts)
        raise ValueError(f"weights ({folder}) must be of one network: it holds {len(parts)}, {names}; a model of "
                         "several networks is no student, name the one to start from")  # fmt: skip
    return parts[0] if parts else folder


def _parts(folder: Path) -> list[Path]:
    inside = sorted(path for path in folder.iterdir() if path.is_dir())
    return [path for path in inside if _PART.fullmatch(path.name) or _says_wan(path)]


def _says_wan(folder: Path) -> bool:
    """Whether a folder's config says that a Wan is in it."""
    config = folder / diffusers.CONFIG_NAME
    return config.is_file() and bool(WAN_CLASS.fullmatch(str(read_object(config, "config").get("_class_name"))))


def _completed(source: StudentSource, model_config: Path) -> StudentSource:
    """With what a JSON file adds to it."""
    given = read_stated(model_config)
    for section, fields in given.items():
        for field, value in fields.items():
            said = source.stated[section].get(field, value)
            if said != value:
                raise ValueError(f"--model-config ({model_config}) must agree with {source.path}: {field} is {value} "
                                 f"in the one and {said} in the other")  # fmt: skip
    stated = {section: {**given[section], **source.stated[section]} for section in given}
    return StudentSource(source.kind, source.path, stated, source.sizes, source.state)
