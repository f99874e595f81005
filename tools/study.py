"""What settings change: runs of one config under named overrides, several seeds each, at equal steps and equal FLOPs.

    tools/study.py tools/studies/economies.yaml --out runs/economies
    tools/study.py tools/studies/economies.yaml --out runs/economies --table

A study is a YAML file: `config`, `overrides` of all its runs, `seeds`, `metrics` of the table, `variants` by name, each
a list of overrides; the first is what the others are compared with. At equal FLOPs a variant trains for as many steps
as the first one's FLOPs pay for. Runs are done `--jobs` at a time, in one process each; those that are complete are not
done again, and others go on, so a study may be stopped. `--table` prints what is there.
"""

import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from afd_scale.config import ConfigError, RunConfig, load_config, read_yaml
from afd_scale.config.command_line import Parser
from afd_scale.config.section import Section, first_problem
from afd_scale.evaluation.run_files import read_summary
from afd_scale.evaluation.suites import SUITES
from afd_scale.planning.spent import Spent
from afd_scale.progress import progress

ROOT = Path(__file__).parent.parent
TRAIN = ROOT / "launch" / "train.py"
CLOSE = 0.06  # of the steps: a run at equal steps stands for one at equal FLOPs that is so little longer or shorter


class Study(Section):
    """A study file."""

    config: Path
    """Of all its runs, from the root of the project."""
    overrides: tuple[str, ...] = ()
    """Of all its runs."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Each variant is run with each."""
    metrics: tuple[str, ...]
    """Of summary.json, in the table."""
    variants: dict[str, tuple[str, ...]]
    """Overrides by name; the first is what the others are compared with."""


@dataclass(frozen=True)
class Trial:
    """One run of a study.

    Attributes:
        at: `steps` or `flops`, what is equal to the first variant's.
        cost: of a step, over the first variant's.
    """

    variant: str
    at: str
    seed: int
    overrides: tuple[str, ...]
    steps: int
    cost: float

    @property
    def name(self) -> str:
        return f"{self.variant}-{self.steps}-{self.seed}"


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.add_argument("study", type=Path, help="YAML file of a study")
    parser.add_argument("--out", type=Path, required=True, help="folder of its runs")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time (default %(default)s)")
    parser.add_argument("--table", action="store_true", help="run nothing, print the table of what is there")
    options = parser.parse_args(arguments)
    try:
        study, out = read_study(options.study), options.out.resolve()
        if options.jobs < 1:
            raise ConfigError(f"jobs ({options.jobs}) must be at least 1")
        trials = plan_trials(study)
        if not options.table:
            run_trials(study, trials, out, options.jobs)
        print(table(study, trials, out))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def read_study(path: Path) -> Study:
    """
    Raises:
        ConfigError: it is no study.
    """
    try:
        return Study.model_validate(read_yaml(path, "study"))
    except ValidationError as error:
        raise ConfigError(f"study ({path}): {first_problem(error)}") from error


def plan_trials(study: Study) -> list[Trial]:
    """All runs, those of the first seed first."""
    if not study.variants:
        raise ConfigError("study.variants ({}) must name one: the others are compared with it")
    first, *_ = study.variants
    configs = {name: _config(study, overrides) for name, overrides in study.variants.items()}
    for name, config in configs.items():
        suite = SUITES.get(config.evaluation.metrics)
        if unknown := sorted(set(study.metrics) - set(suite.metrics if suite else ())):
            raise ConfigError(f"study.metrics ({unknown[0]}) must be of evaluation.metrics, in {name} it is "
                              f"{config.evaluation.metrics}")  # fmt: skip
    spent = {name: Spent(config, 1, config.method.warm_up) for name, config in configs.items()}
    steps = configs[first].train.steps
    budget = spent[first].pflop(steps)
    trials = []
    for seed in study.seeds:
        for name, overrides in study.variants.items():
            cost = (spent[name].pflop(steps) - spent[name].pflop(0)) / (budget - spent[first].pflop(0))
            paid = next((step for step in range(1, 100 * steps) if spent[name].pflop(step + 1) > budget), 100 * steps)
            if name == first or abs(paid - steps) <= CLOSE * steps:
                paid = steps
            for at, number in {"steps": steps, "flops": paid}.items():
                trials.append(Trial(name, at, seed, overrides, number, cost))
    return trials


def run_trials(study: Study, trials: list[Trial], out: Path, jobs: int) -> None:
    """
    Raises:
        ConfigError: a run failed; its last line says why.
    """
    waiting = {trial.name: trial for trial in trials}  # a run that is complete says so, or that it is of other settings

    def run(trial: Trial) -> None:
        command = [sys.executable, str(TRAIN), "--config", str(ROOT / study.config), *study.overrides, *trial.overrides,
                   f"train.steps={trial.steps}", f"seed={trial.seed}", f"name={trial.name}", f"out={out}"]  # fmt: skip
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
            raise ConfigError(f"run ({trial.name}) failed with exit code {done.returncode}: {last}")

    pool = ThreadPoolExecutor(jobs)
    try:
        with progress("runs of the study") as show:
            for done, finished in enumerate(_finished(pool, run, list(waiting.values())), 1):
                finished.result()
                show(done, len(waiting), "")
    finally:
        pool.shutdown(cancel_futures=True)


def _finished(pool: ThreadPoolExecutor, run: Callable[[Trial], None], trials: list[Trial]) -> Iterator[Future[None]]:
    """Each run as it is done; the first one alone, for it makes the data of all."""
    for part in (trials[:1], trials[1:]):
        yield from as_completed([pool.submit(run, trial) for trial in part])


def table(study: Study, trials: list[Trial], out: Path) -> str:
    """Markdown: a row a variant, mean and half-range over the seeds that are there; equal steps, then equal FLOPs."""
    lines = []
    for at in ("steps", "flops"):
        lines += [f"At equal {at}:", "", f"| | step's FLOPs | steps | {' | '.join(study.metrics)} | seeds |",
                  "|" + " --- |" * (len(study.metrics) + 4)]  # fmt: skip
        for name in study.variants:
            mine = [trial for trial in trials if trial.variant == name and trial.at == at]
            found = [metrics for trial in mine if (metrics := _metrics(out / trial.name, study.metrics))]
            cells = [_spread([metrics[metric] for metrics in found]) for metric in study.metrics]
            lines.append(f"| {name} | {mine[0].cost:.2f} | {mine[0].steps} | {' | '.join(cells)} | {len(found)} |")
        lines.append("")
    return "\n".join(lines)


def _config(study: Study, overrides: tuple[str, ...]) -> RunConfig:
    return load_config(ROOT / study.config, [*study.overrides, *overrides])


def _metrics(run: Path, names: tuple[str, ...]) -> dict[str, float] | None:
    """The student's, of a run that is there; ConfigError where it lacks one."""
    summary = read_summary(run)
    if summary is None:
        return None
    found = summary.get("metrics", {}).get("student", {})
    metrics = {name: value for name in names if (value := found.get(name)) is not None}
    if absent := [name for name in names if name not in metrics]:
        raise ConfigError(f"run ({run}) must have {absent[0]} of its student in summary.json: run the study again")
    return metrics


def _spread(values: list[float]) -> str:
    if not values:
        return ""
    half = (max(values) - min(values)) / 2
    return f"{statistics.mean(values):.3g} ± {half:.2g}"


if __name__ == "__main__":
    sys.exit(main())
