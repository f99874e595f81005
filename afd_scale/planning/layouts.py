"""The fastest way to lay a run out on so many GPUs: every choice of how work is shared, none of what is computed."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import reduce
from itertools import product
from typing import Any

from pydantic import ValidationError

from afd_scale.config import ConfigError, RunConfig
from afd_scale.config.cast import Load, Pass
from afd_scale.config.judges import VlmDiscriminatorConfig
from afd_scale.config.models import WanConfig
from afd_scale.config.section import first_problem
from afd_scale.planning.flops import has_frozen_trunk
from afd_scale.planning.gpus import Gpu
from afd_scale.planning.memory import is_resident
from afd_scale.planning.parameters import network_sizes
from afd_scale.planning.plan import Plan, Seconds, make_plan
from afd_scale.planning.workload import valid_degrees, workload

# That activation_checkpointing may be, by the kind of network.
CHECKPOINTING: Mapping[type, tuple[Any, ...]] = {
    WanConfig: ("full", "keep_attention", "none"),
    VlmDiscriminatorConfig: (True, False),
}
WEIGHTS = ("gathered", "sharded")  # that rollout.weights may be; auto is one of them
SAME_TIME = 1.001  # layouts within this factor of the fastest are as fast
SAME_WORK = 1.02  # and of those, within this factor of the least work, equally safe

Choices = dict[str, Any]


@dataclass(frozen=True)
class Layout:
    """One way to run.

    Attributes:
        choices: value by field.
        plan: with them.
    """

    choices: Choices
    plan: Plan

    @property
    def overrides(self) -> list[str]:
        """To paste behind a command."""
        return [f"{name}={_as_yaml(value)}" for name, value in self.choices.items()]

    @property
    def seconds(self) -> float:
        return self.plan.step_seconds

    @property
    def parts(self) -> dict[str, float]:
        """Seconds of a step by what they are spent on, as if nothing overlapped."""
        names = [field.name for field in fields(Seconds) if field.name != "overlaps"]
        return {name: sum(getattr(each, name) for each in self.plan.seconds.values()) for name in names}


@dataclass(frozen=True)
class Search:
    """What was tried.

    Attributes:
        layouts: all of them, the fastest first.
        best: of those that fit; None where none does.
        as_configured: the config's own layout; None where it does not divide on these GPUs.
    """

    layouts: list[Layout]
    best: Layout | None
    as_configured: Layout | None

    @property
    def smallest(self) -> Layout:
        """That takes the least memory."""
        return min(self.layouts, key=_peak)

    def runners_up(self) -> list[Layout]:
        """The best micro-batch that fits with each other choice of the rest, the fastest first."""
        found = [_best(layouts) for layouts in self._by_the_rest() if self.best not in layouts]
        return sorted((layout for layout in found if layout), key=_seconds)

    def too_large(self) -> list[Layout]:
        """Of each choice of the rest that fits with no micro-batch, the smallest; those that would beat the best."""
        found = [min(layouts, key=_peak) for layouts in self._by_the_rest() if _best(layouts) is None]
        return sorted((each for each in found if self.best and each.seconds < self.best.seconds), key=_seconds)

    def _by_the_rest(self) -> Collection[list[Layout]]:
        """Layouts that differ in their micro-batch alone are together."""
        together: dict[tuple[Any, ...], list[Layout]] = {}
        for layout in self.layouts:
            rest = tuple(value for name, value in layout.choices.items() if name != "train.micro_batch")
            together.setdefault(rest, []).append(layout)
        return together.values()


def search_layouts(config: RunConfig, gpus: int, gpu: Gpu) -> Search:
    """Plan every layout: sequence degree, micro-batch, where policies' weights are, recomputation.

    The fastest that fits is best. Of those as fast, because what takes longer hides the rest, it is one that would be
    among the fastest if nothing overlapped, and of those the one that takes the least memory.

    Raises:
        ConfigError: no layout is valid on this number of GPUs.
    """
    networks = network_sizes(config)
    layouts = [
        Layout(choices, make_plan(changed, gpus, gpu, networks)) for choices, changed in _candidates(config, gpus)
    ]
    if not layouts:  # not even with the fewest data ranks, which says why
        fewest = max(valid_degrees(config, gpus)) if gpus > 0 else 1
        workload(with_choices(config, {"parallel.sequence": fewest}), gpus)
    layouts.sort(key=_seconds)
    try:
        workload(config, gpus)
        as_configured = Layout({}, make_plan(config, gpus, gpu, networks))
    except ConfigError:
        as_configured = None
    return Search(layouts, _best(layouts), as_configured)


def _seconds(layout: Layout) -> float:
    return layout.seconds


def _peak(layout: Layout) -> int:
    return layout.plan.memory.peak


def _work(layout: Layout) -> float:
    return sum(layout.parts.values())


def _best(layouts: Sequence[Layout]) -> Layout | None:
    fitting = [layout for layout in layouts if layout.plan.fits]
    if not fitting:
        return None
    fastest = min(map(_seconds, fitting))
    as_fast = [layout for layout in fitting if layout.seconds <= SAME_TIME * fastest]
    least = min(map(_work, as_fast))
    return min((layout for layout in as_fast if _work(layout) <= SAME_WORK * least), key=_peak)


def _candidates(config: RunConfig, gpus: int) -> Iterator[tuple[Choices, RunConfig]]:
    """Every valid choice, and the config with it."""
    options = _recomputation(config)
    if any(is_resident(config, each) for each in _passes(config)):
        options = {"rollout.weights": WEIGHTS, **options}
    for degree in valid_degrees(config, gpus) if gpus > 0 else ():
        shared = with_choices(config, {"parallel.sequence": degree})
        try:
            micro_batches = _micro_batches(shared, gpus)
        except ConfigError:  # the batch does not divide
            continue
        for values in product(*options.values()):
            others = dict(zip(options, values, strict=True))
            try:
                changed = with_choices(shared, others)
            except ConfigError:  # a rule forbids it
                continue
            for micro_batch in micro_batches:
                choices = {"parallel.sequence": degree, "train.micro_batch": micro_batch, **others}
                yield choices, _cut(changed, micro_batch)


def _passes(config: RunConfig) -> Sequence[Pass]:
    """Of one prompt: which there are does not depend on how many."""
    return config.method.passes(Load(prompts=1))


def _recomputation(config: RunConfig) -> dict[str, tuple[Any, ...]]:
    """Values by field, of networks that a gradient passes through and whose blocks may be recomputed for it."""
    differentiated = {each.role: each for each in _passes(config) if each.gradient}
    return {
        f"{role.section}.activation_checkpointing": values
        for role, (kind, values) in product(config.cast, CHECKPOINTING.items())
        if role.name in differentiated
        and isinstance(role.network, kind)
        and not (differentiated[role.name].trains and has_frozen_trunk(role.network))
    }


def _micro_batches(config: RunConfig, gpus: int) -> list[int | None]:
    """All that differ in how passes are cut, the smallest of each, and None: all at once, with nothing to add up.

    Raises:
        ConfigError: the batch does not divide.
    """
    most = max(each.videos for each in workload(config, gpus).passes)
    smallest: dict[tuple[int, ...], int | None] = {}
    for size in range(1, most + 1):
        smallest.setdefault(tuple(each.at_once for each in workload(_cut(config, size), gpus).passes), size)
    return [*smallest.values(), None]


def _cut(config: RunConfig, micro_batch: int | None) -> RunConfig:
    return config.model_copy(update={"train": config.train.model_copy(update={"micro_batch": micro_batch})})


def with_choices(config: RunConfig, choices: Choices) -> RunConfig:
    """The config with other values of fields, its rules checked.

    Raises:
        ConfigError: a rule forbids them.
    """
    tree = config.model_dump()
    for name, value in choices.items():
        *sections, last = name.split(".")
        reduce(dict.__getitem__, sections, tree)[last] = value
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(first_problem(error)) from error


def search_as_dict(search: Search) -> dict[str, Any]:
    """For JSON; seconds and bytes, one rank's share of one step."""

    def layout_as_dict(layout: Layout) -> dict[str, Any]:
        return {
            "overrides": layout.overrides, "step_seconds": layout.seconds, "parts_seconds": layout.parts,
            "peak_bytes": layout.plan.memory.peak, "fits": layout.plan.fits,
        }  # fmt: skip

    gpu = search.layouts[0].plan.gpu
    return {
        "run": search.layouts[0].plan.config.name,
        "gpu": gpu.name,
        "gpus": search.layouts[0].plan.load.gpus,
        "usable_bytes": gpu.usable_bytes,
        "tried": len(search.layouts),
        "fitting": sum(layout.plan.fits for layout in search.layouts),
        "best": search.best and layout_as_dict(search.best),
        "as_configured": search.as_configured and layout_as_dict(search.as_configured),
        "smallest": layout_as_dict(search.smallest),
        "runners_up": [layout_as_dict(layout) for layout in search.runners_up()],
        "too_large": [layout_as_dict(layout) for layout in search.too_large()],
        "assumptions": gpu.assumptions(),
    }


def _as_yaml(value: Any) -> str:
    return "null" if value is None else str(value).lower()
