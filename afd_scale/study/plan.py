"""Which runs a study needs, in their order, as far as the learning rates are chosen."""

import statistics
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from afd_scale.config import ConfigError, RunConfig, load_config
from afd_scale.evaluation.suites import SUITES
from afd_scale.evaluation.suites.suite import Metric
from afd_scale.planning.spent import Spent
from afd_scale.study.results import Record
from afd_scale.study.sections import Rates, Study

CLOSE = 0.06  # of the steps: a run that is so little longer or shorter stands for one at equal FLOPs
MOST_TIMES = 100  # as many steps as the method compared with, at equal FLOPs
OWN, STEPS, FLOPS = "own", "steps", "flops"


@dataclass(frozen=True)
class Trial:
    """One run.

    Attributes:
        rate: learning rate; None is its config's.
        config, overrides: of the run, but for its own name, folder, seed and steps.
        source: the run whose student is measured again, with `sampler`; None where it trains.
    """

    method: str
    base: str
    rate: float | None
    seed: int
    steps: int
    config: Path
    overrides: tuple[str, ...]
    source: "Trial | None" = None
    sampler: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        rate = "own" if self.rate is None else f"{self.rate:g}"
        return f"{self.method}-{self.base}-{rate}-{self.seed}-{self.steps}"

    def run_overrides(self, out: Path) -> list[str]:
        """All overrides of the run's config."""
        return [*self.overrides, *self.sampler, f"train.steps={self.steps}", f"seed={self.seed}", f"name={self.name}",
                f"out={out}"]  # fmt: skip

    def run_config(self, out: Path) -> RunConfig:
        return load_config(self.config, self.run_overrides(out))


@dataclass(frozen=True)
class Tried:
    """A learning rate that was tried.

    Attributes:
        mean: of the metric that decides; None where runs are missing, have failed or measured nothing.
        runs, planned: runs that are there, and that there should be.
    """

    rate: float
    mean: float | None
    runs: int
    planned: int


class Plan:
    """A study with its configs read.

    Args:
        root: of the project, which configs lie under.
    Raises:
        ConfigError: a config cannot be read, or measures other things than the tables show.
    """

    def __init__(self, study: Study, root: Path):
        self.study, self.root = study, root
        self._configs = {(name, base): self._read(name, base) for name in self.trained for base in study.bases}
        self._check_metrics()
        first = next(iter(study.bases))
        for name, method in study.methods.items():
            if method.of is not None:
                self._read(name, first)
            elif rates := self.rates_of(name):
                for value in rates.values:
                    self._read(name, first, value)

    def _read(self, name: str, base: str, rate: float | None = None) -> RunConfig:
        method = self.study.methods[name]
        path, overrides = self._settings(method.of or name, base, rate)
        try:
            return load_config(path, [*overrides, *method.sampler])
        except ConfigError as error:
            raise ConfigError(f"methods.{name}: {error}") from error

    def _check_metrics(self) -> None:
        """All methods are measured by one suite, which has all that is asked for."""
        suite = next(iter(self._configs.values())).evaluation.metrics
        for (name, _), config in self._configs.items():
            if config.evaluation.metrics != suite:
                raise ConfigError(f"methods.{name}: evaluation.metrics ({config.evaluation.metrics}) must be {suite}, "
                                  "as the first method has it: one table holds the figures of all")  # fmt: skip
        known = SUITES[suite].metrics if suite in SUITES else {}
        wanted = [("metrics", name) for name in self.study.metrics]
        wanted += [("choose.metric", self.study.choose.metric)] if self.study.choose else []
        for field, metric in wanted:
            if metric not in known:
                raise ConfigError(f"{field} ({metric}) must be one that evaluation.metrics ({suite}) measures: "
                                  f"{', '.join(known) or 'nothing'}")  # fmt: skip

    @property
    def trained(self) -> list[str]:
        """Methods that train."""
        return [name for name, method in self.study.methods.items() if method.of is None]

    @cached_property
    def metrics(self) -> dict[str, Metric]:
        """How to read the metrics of the tables."""
        suite = SUITES[next(iter(self._configs.values())).evaluation.metrics]
        return {name: suite.metrics[name] for name in self.study.metrics}

    def config_of(self, name: str) -> RunConfig:
        """Of a method on the first base, by its file, without a chosen rate."""
        return self._configs[self.study.methods[name].of or name, next(iter(self.study.bases))]

    def rates_of(self, name: str) -> Rates | None:
        """Rates of which one is this method's."""
        chooser = self.chooser(name)
        return None if chooser is None else self.study.methods[chooser].rates

    def chooser(self, name: str) -> str | None:
        """The method whose choice of a rate is this one's; None where it has the rate of its config."""
        return next((each for each in self._chain(name) if self.study.methods[each].rates), None)

    def steps_of(self, name: str, view: str = OWN) -> int:
        """Updates of a method in one of the tables."""
        name = self.study.methods[name].of or name
        return {OWN: self._own_steps, STEPS: self._equal_steps, FLOPS: self._equal_flops}[view](name)

    @cached_property
    def views(self) -> list[str]:
        """Tables: of the methods at their own steps, and those at equal ones that differ from it."""
        views = [OWN]
        for view in self.study.equal:
            if any(self.steps_of(name, view) != self.steps_of(name) for name in self.trained):
                views.append(view)
        return views

    def choosing(self, name: str) -> list[Trial]:
        """Runs that choose the rate of a method; empty where it chooses none of its own."""
        rates, choose = self.study.methods[name].rates, self.study.choose
        if rates is None or choose is None:
            return []
        return [
            self._trial(name, base, value, seed, self.steps_of(name))
            for seed in choose.seeds for base in self.study.bases for value in rates.values
        ]  # fmt: skip

    def tried(self, name: str, records: Mapping[str, Record]) -> list[Tried]:
        """What is known of each rate of a method."""
        choose, rates = self.study.choose, self.study.methods[name].rates
        if choose is None or rates is None:
            return []
        tried = []
        for value in rates.values:
            trials = [trial for trial in self.choosing(name) if trial.rate == value]
            found = [records[trial.name] for trial in trials if trial.name in records]
            scores = [score for record in found if (score := record.value(choose.metric)) is not None]
            mean = statistics.mean(scores) if len(scores) == len(trials) else None
            tried.append(Tried(value, mean, len(found), len(trials)))
        return tried

    def chosen(self, name: str, records: Mapping[str, Record], failed: Collection[str]) -> float | None:
        """The rate of a method that has rates, once all of its choosing runs have ended; one of whose runs failed is
        none. None where it cannot be said."""
        choose, chooser = self.study.choose, self.chooser(name)
        if choose is None or chooser is None:
            return None
        if any(trial.name not in records and trial.name not in failed for trial in self.choosing(chooser)):
            return None
        sign = 1 if choose.better == "lower" else -1
        means = {each.rate: sign * each.mean for each in self.tried(chooser, records) if each.mean is not None}
        return min(means, key=means.__getitem__) if means else None

    def row(self, name: str, steps: int, records: Mapping[str, Record], failed: Collection[str]) -> list[Trial]:
        """Runs of a method at so many steps on the tables' seeds and all bases; empty where its rate is not chosen."""
        return [trial for seed in self.study.seeds for trial in self._of_seed(name, steps, seed, records, failed)]

    def trials(self, records: Mapping[str, Record], failed: Collection[str]) -> list[Trial]:
        """All runs that are known to be needed, in the order in which they are to be done."""
        ordered = [trial for name in self.trained for trial in self.choosing(name)]
        for steps in ({name: self.steps_of(name, view) for name in self.study.methods} for view in self.views):
            for seed in self.study.seeds:
                for name in self.study.methods:
                    ordered += self._of_seed(name, steps[name], seed, records, failed)
        for seed in self.study.seeds:
            for steps_each in self.study.budgets:
                for name in self.trained:
                    ordered += self._of_seed(name, steps_each, seed, records, failed)
        return list({trial.name: trial for trial in ordered}.values())

    def _of_seed(
        self, name: str, steps: int, seed: int, records: Mapping[str, Record], failed: Collection[str]
    ) -> Iterator[Trial]:
        method = self.study.methods[name]
        trained = method.of or name
        rate = self.chosen(trained, records, failed)
        if rate is None and self.chooser(trained) is not None:
            return
        for base in self.study.bases:
            trial = self._trial(trained, base, rate, seed, steps)
            if method.of is None:
                yield trial
            else:
                yield Trial(name, base, rate, seed, steps, trial.config, trial.overrides, trial, method.sampler)

    def _trial(self, name: str, base: str, rate: float | None, seed: int, steps: int) -> Trial:
        return Trial(name, base, rate, seed, steps, *self._settings(name, base, rate))

    def _settings(self, name: str, base: str, rate: float | None) -> tuple[Path, tuple[str, ...]]:
        """Config and overrides of a method that trains."""
        chain = self._chain(name)
        path, rates = self.study.methods[chain[-1]].config, self.rates_of(name)
        assert path is not None, "a chain ends at a method with a config"
        own = [override for each in reversed(chain) for override in self.study.methods[each].overrides]
        learned = [] if rate is None or rates is None else [f"{rates.field}={rate!r}"]
        return self.root / path, (*self.study.overrides, *self.study.bases[base], *own, *learned)

    def _chain(self, name: str) -> list[str]:
        """The method, what it is like, what that is like, ..."""
        chain = [name]
        while (like := self.study.methods[chain[-1]].like) is not None:
            chain.append(like)
        return chain

    def _own_steps(self, name: str) -> int:
        given = (steps for each in self._chain(name) if (steps := self.study.methods[each].steps))
        return next(given, self.config_of(name).train.steps)

    def _equal_steps(self, name: str) -> int:
        assert self.study.compared_with is not None, "the study was checked"
        return self._own_steps(self.study.compared_with)

    def _equal_flops(self, name: str) -> int:
        compared = self.study.compared_with
        assert compared is not None, "the study was checked"
        if name == compared:
            return self._own_steps(name)
        budget = self._spent[compared].pflop(self._own_steps(compared))
        spent = self._spent[name]
        most = MOST_TIMES * self._own_steps(compared)
        paid = next((step for step in range(1, most) if spent.pflop(step + 1) > budget), most)
        for steps in (self._own_steps(name), self._equal_steps(name)):
            if abs(paid - steps) <= CLOSE * steps:
                return steps
        return paid

    @cached_property
    def _spent(self) -> dict[str, Spent]:
        return {name: spent_of(self.config_of(name)) for name in self.trained}


def spent_of(config: RunConfig) -> Spent:
    """The compute of a run of one process."""
    return Spent(config, 1, config.method.warm_up)
