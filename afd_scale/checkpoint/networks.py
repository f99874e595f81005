"""The student's network in what a file holds, found by structure: whatever dicts and prefixes are around it.

A Wan is where its first block's query matrix is. What stands before `blocks.0.` in that name, dicts included, is the
prefix of all its tensors: `model.diffusion_model.` (ComfyUI), `pipe.dit.` (DiffSynth), `state_dict.model.` (Lightning),
`module.` (DeepSpeed), `generator_ema.model.` (Self-Forcing), or another. What FSDP, torch.compile and activation
checkpointing put into names is taken out first.
"""

import logging
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from afd_scale.checkpoint.formats.wan import named
from afd_scale.checkpoint.lazy import Stored, Tree
from afd_scale.checkpoint.signatures import LORA, network_kind

log = logging.getLogger(__name__)

STUDENT, EMA = "generator", "generator_ema"  # in training checkpoints of Self-Forcing and its kin
_NO_STUDENTS = {"critic", "fake_score"}  # there, too
_WRAPPERS = {"_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod"}
_QUERY = re.compile(r"(|.*\.)blocks\.0\.(self_attn\.q|attn1\.to_q)\.(base_layer\.)?weight")
_ANY_BLOCK = re.compile(r"(|.*?\.)blocks\.\d+\.(self_attn|cross_attn|attn1|attn2)\..*")
_OPTIMIZER = re.compile(r"optim|scheduler|exp_avg")
_BESIDE_BASE = "adapters beside their base: merge them into it first"
_NO_BASE = ("adapters without their base; train from it as student.lora.weights, or convert it with --to peft or "
            "comfyui-lora")  # fmt: skip
# Models that a whole pipeline's file has beside the transformer.
_COMPANIONS = {"vae", "first_stage_model", "cond_stage_model", "text_encoder", "text_encoders", "tokenizer"}


def find_network(tree: Tree, path: Path, weights: str | None = None) -> dict[str, Stored]:
    """The only Wan in a tree, its names without prefixes.

    Args:
        weights: `student` or `ema` of a training checkpoint; None takes the EMA where there is one.
    Raises:
        ValueError: there is none, what is asked for is not there, or several might be meant.
    """
    tensors, dicts = _without_wrappers(tree, path)
    prefixes = sorted({match[1] for name in tensors if (match := _QUERY.fullmatch(name))})
    if any(LORA.search(name) for name in tensors):
        raise ValueError(f"weights ({path}) must be whole: this is a LoRA, {_BESIDE_BASE if prefixes else _NO_BASE}")
    # A part of one says by its other blocks that it is incomplete.
    prefixes = prefixes or sorted({match[1] for name in tensors if (match := _ANY_BLOCK.fullmatch(name))})[:1]
    if not prefixes:
        kind = network_kind(tensors)
        what = f"this is {kind}" if kind else f"it holds {named(tensors) or 'no tensors'}"
        raise ValueError(f"weights ({path}) must be of a Wan 2.1 transformer: {what}")
    prefix, scope = _chosen(prefixes, path, weights)
    scope = max((scope, *(name for name in dicts if prefix.startswith(name))), key=len)
    others = [name for name in tensors if not name.startswith(prefix)]
    # Beside it in its dict; what other networks' prefixes stand before is of those.
    beside = [name for name in others if name.startswith(scope) and not (prefix and name.startswith(tuple(prefixes)))]
    unknown = [name for name in beside if not _is_companion(name.removeprefix(scope), tensors[name])]
    if unknown:
        raise ValueError(f"weights ({path}) must be of one network: beside {prefix}blocks it holds {named(unknown)}")
    if others:
        log.warning("%s: reading %s of it, and not %s", path, prefix.rstrip("."), named(_tops(others, scope)))
    return {name.removeprefix(prefix): stored for name, stored in tensors.items() if name.startswith(prefix)}


def _chosen(prefixes: list[str], path: Path, weights: str | None) -> tuple[str, str]:
    """The prefix of the network that is meant, and its beginning up to the name of its role, if it has one."""
    wanted = {"student": (STUDENT,), "ema": (EMA,), None: (EMA, STUDENT)}.get(weights, ())
    for role in wanted:
        if of_role := [prefix for prefix in prefixes if role in prefix.split(".")]:
            prefix = _only(of_role, path)
            return prefix, prefix[: f".{prefix}".index(f".{role}.") + len(role) + 1]
    if weights not in (None, "student"):
        raise ValueError(f"weights ({path}) must hold {weights}: it is neither a run that has it, nor a training "
                         f"checkpoint with {EMA}")  # fmt: skip
    others = [prefix for prefix in prefixes if not {EMA, *_NO_STUDENTS} & set(prefix.split("."))]
    if not others:
        raise ValueError(f"weights ({path}) must hold the student: it holds {_listed(prefixes)} alone")
    return _only(others, path), ""


def _only(prefixes: list[str], path: Path) -> str:
    if len(prefixes) > 1:
        raise ValueError(f"weights ({path}) must be of one network: it holds {len(prefixes)}, {_listed(prefixes)}; "
                         "save the one that is meant by itself")  # fmt: skip
    return prefixes[0]


def _listed(prefixes: list[str]) -> str:
    return " and ".join(prefix.rstrip(".") or "one without a prefix" for prefix in prefixes)


def _is_companion(name: str, stored: Stored) -> bool:
    """Whether a tensor beside the network is of another model of its pipeline, or a mere counter."""
    return bool(_COMPANIONS & set(name.split(".")[:-1])) or stored.shape in ((), (1,))


def _tops(names: Iterable[str], scope: str) -> set[str]:
    """What names are in, one step below a scope, or below the file."""
    return {name.removeprefix(scope).split(".")[0] for name in names}


def _without_wrappers(tree: Tree, path: Path) -> tuple[dict[str, Stored], set[str]]:
    """All tensors but an optimizer's, the names of the dicts around them before theirs; and those of all such dicts."""
    tensors: dict[str, Stored] = {}
    dicts = set()
    for where, key, stored in _leaves(tree):
        name = _unwrapped(where + key)
        if name in tensors:
            raise ValueError(f"weights ({path}) must hold one network: two tensors are named {name} without prefixes")
        tensors[name] = stored
        dicts.add(_unwrapped(where))
    return tensors, dicts


def _unwrapped(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _leaves(tree: Tree, where: str = "") -> Iterator[tuple[str, str, Stored]]:
    """The name of the dict around each tensor, with a dot behind it, and the tensor's own in it."""
    for name, value in tree.items():
        if isinstance(value, Stored):
            yield where, name, value
        elif isinstance(value, dict) and not _OPTIMIZER.search(name):
            yield from _leaves(value, f"{where}{name}.")
