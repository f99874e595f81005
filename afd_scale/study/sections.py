"""A study file: which methods are compared, on what, and how their runs are chosen and shown."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, ValidationError, model_validator

from afd_scale.config import ConfigError, read_yaml
from afd_scale.config.section import Section, first_problem

Name = Annotated[str, Field(pattern=r"^\w+$", max_length=60)]  # a part of a folder's name, between hyphens
Seeds = Annotated[tuple[NonNegativeInt, ...], Field(min_length=1)]
Overrides = tuple[str, ...]
Equal = Literal["steps", "flops"]

_ROWS_BESIDE = ("base", "teacher")  # what the tables show beside the methods
_RUNS_OWN = ("name", "out", "seed", "train.steps", "train.resume")  # what the study says of each run itself


class Rates(Section):
    """Learning rates of which one is chosen."""

    field: str
    """Of the config that takes them."""
    values: Annotated[tuple[PositiveFloat, ...], Field(min_length=1)]
    """To try; they differ in their first six digits, by which their runs are called."""

    @model_validator(mode="after")
    def _check(self) -> "Rates":
        named = [f"{value:g}" for value in self.values]
        if len(set(named)) != len(named):
            raise ValueError(f"values ({', '.join(named)}) must name each once")
        return self


class Choose(Section):
    """How learning rates are chosen: by runs of their own, which no table shows."""

    seeds: Seeds
    """None of the tables' seeds."""
    metric: str
    """Of the student; its mean over these seeds and all bases decides."""
    better: Literal["lower", "higher"]
    """Which mean wins."""


class Method(Section):
    """A row of the tables. It has a config, or is `like` another method, or is another's student sampled otherwise."""

    config: Path | None = None
    """Of its runs, from the root of the project."""
    like: Name | None = None
    """Takes config, overrides, steps and chosen rate of that method; what is given here comes on top."""
    of: Name | None = None
    """Trains nothing: the students of that method's runs are measured again, with `sampler`."""
    overrides: Overrides = ()
    """Of its runs, over those of study and base."""
    sampler: Overrides = ()
    """`sampler.key=value`, with `of`."""
    steps: PositiveInt | None = None
    """Updates; None takes train.steps of its config."""
    rates: Rates | None = None
    """None takes the rate of its config, or of the method that it is like."""

    @model_validator(mode="after")
    def _check(self) -> "Method":
        given = [name for name in ("config", "like", "of") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"config, like and of ({', '.join(given) or 'none is given'}) must be one of the three: "
                             "they say where the runs come from")  # fmt: skip
        if self.of is None and self.sampler:
            raise ValueError(f"sampler ({list(self.sampler)}) must come with of: what is trained has it in overrides")
        if self.of is not None:
            for name in ("overrides", "steps", "rates"):
                if value := getattr(self, name):
                    raise ValueError(f"{name} ({value}) must not come with of: nothing is trained")
            if not self.sampler or any(not _of_sampler(override) for override in self.sampler):
                raise ValueError(f"sampler ({list(self.sampler)}) must be overrides sampler.key=value, no "
                                 "sampler.family: with of, they are all that differs")  # fmt: skip
        return self


class Study(Section):
    """A comparison of methods."""

    title: str
    """Of the page."""
    overrides: Overrides = ()
    """Of all runs."""
    bases: Annotated[dict[Name, Overrides], Field(min_length=1)] = {"base": ()}
    """Overrides by name: what each method starts from, `student.weights` say."""
    seeds: Seeds = (0, 1, 2)
    """Of the tables."""
    metrics: Annotated[tuple[str, ...], Field(min_length=1)]
    """Of summary.json, in the tables."""
    compared_with: Name | None = None
    """Method that the others are given differences and ratios to."""
    choose: Choose | None = None
    """How rates are chosen, where a method has some."""
    methods: Annotated[dict[Name, Method], Field(min_length=1)]
    """By name."""
    budgets: tuple[PositiveInt, ...] = ()
    """Updates: each method that trains is run to each of them as well, for its result over compute."""
    equal: tuple[Equal, ...] = ()
    """More tables: all methods at as many updates as `compared_with`, or at as many as its FLOPs pay for."""
    groups: dict[str, tuple[Name, ...]] = {}
    """Methods by the heading of their table; none is one table of all."""

    @model_validator(mode="after")
    def _check(self) -> "Study":
        for name, method in self.methods.items():
            other = method.like or method.of
            if other is not None and other not in self.methods:
                raise ValueError(f"methods.{name}: {'like' if method.like else 'of'} ({other}) must be a method")
            if method.of is not None and self.methods[method.of].of is not None:
                raise ValueError(f"methods.{name}: of ({other}) must be a method that trains")
            seen = [name]
            while (like := self.methods[seen[-1]].like) is not None:
                if like in seen or like not in self.methods or self.methods[like].of is not None:
                    raise ValueError(f"methods.{seen[-1]}: like ({like}) must lead to a method with a config")
                seen.append(like)
        if self.choose is None and (rated := [name for name, method in self.methods.items() if method.rates]):
            raise ValueError(f"choose (None) must be given: methods.{rated[0]} has rates")
        if self.choose is not None and (both := set(self.choose.seeds) & set(self.seeds)):
            raise ValueError(f"choose.seeds ({min(both)}) must be none of seeds: what was chosen by a run is not "
                             "judged by it")  # fmt: skip
        if self.compared_with is not None and (
            self.compared_with not in self.methods or self.methods[self.compared_with].of
        ):
            raise ValueError(f"compared_with ({self.compared_with}) must be a method that trains")
        if self.equal and self.compared_with is None:
            raise ValueError(
                f"equal ({', '.join(self.equal)}) must come with compared_with, whose steps or FLOPs count"
            )
        self._check_names()
        return self

    def _check_names(self) -> None:
        for name in _ROWS_BESIDE:
            if name in self.methods:
                raise ValueError(f"methods ({name}) must have other names: tables have a row of this one")
        chosen_on = self.choose.seeds if self.choose else ()
        for name, listed in (("seeds", self.seeds), ("budgets", self.budgets), ("metrics", self.metrics),
                             ("equal", self.equal), ("choose.seeds", chosen_on)):  # fmt: skip
            if len(set(listed)) != len(listed):
                raise ValueError(f"{name} ({list(listed)}) must name each once")
        for heading, names in self.groups.items():
            if unknown := [name for name in names if name not in self.methods]:
                raise ValueError(f"groups.{heading} ({unknown[0]}) must be a method")
        shown = {name for names in self.groups.values() for name in names}
        if self.groups and (hidden := [name for name in self.methods if name not in shown]):
            raise ValueError(f"groups must have every method in one: {hidden[0]} is in none")
        lists = [self.overrides, *self.bases.values(), *(method.overrides for method in self.methods.values())]
        for override in (override for overrides in lists for override in overrides):
            if override.partition("=")[0] in _RUNS_OWN:
                raise ValueError(f"override ({override}) must be none of {', '.join(_RUNS_OWN)}: the study says them")

    def tables(self) -> dict[str, tuple[str, ...]]:
        """Methods by heading."""
        return self.groups or {"Methods": tuple(self.methods)}


def read_study(path: Path) -> Study:
    """
    Raises:
        ConfigError: it is no study.
    """
    try:
        return Study.model_validate(read_yaml(path, "study"))
    except ValidationError as error:
        raise ConfigError(f"study ({path}): {first_problem(error, ': see afd_scale/study/sections.py')}") from error


def _of_sampler(override: str) -> bool:
    """A family is a preset below what is written out in a finished run's config, and would change nothing."""
    key = override.partition("=")[0]
    return key.startswith("sampler.") and key != "sampler.family"
