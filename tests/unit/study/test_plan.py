"""Which runs a study needs: choices on seeds of their own, order, `like` and `of`, equal FLOPs."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from afd_scale.config import ConfigError
from afd_scale.planning.spent import Spent
from afd_scale.study.plan import CLOSE, Plan
from afd_scale.study.sections import read_study
from tests.unit.study.stand_ins import AFD, CHOOSE, RATES, ROOT, SFT, by_name, make_plan, record

RATED = {"afd": {"config": AFD, "rates": RATES}, "sft": {"config": SFT}}


@pytest.mark.parametrize("path", sorted((ROOT / "configs/studies").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_studies_that_are_there_can_be_planned(path: Path) -> None:
    assert Plan(read_study(path), ROOT).trials({}, {})


@pytest.mark.parametrize(
    ("fields", "parts"),
    [
        ({"colour": 1}, ["colour (1) is not a known key"]),
        ({"methods": {}}, ["methods ({})"]),
        ({"methods": {"a-b": {"config": AFD}}}, ["methods", "a-b"]),
        ({"methods": {"a": {}}}, ["methods.a", "config, like and of (none is given)"]),
        ({"methods": {"a": {"config": AFD, "of": "a"}}}, ["config, of"]),
        ({"methods": {"a": {"like": "b"}}}, ["like (b) must be a method"]),
        ({"methods": {"a": {"like": "b"}, "b": {"like": "a"}}}, ["must lead to a method with a config"]),
        ({"methods": {"a": {"config": AFD}, "b": {"of": "a"}}}, ["sampler ([])", "sampler.key=value"]),
        ({"methods": {"a": {"config": AFD}, "b": {"of": "a", "sampler": ["sampler.family=longlive"]}}}, ["no sampler"]),
        ({"methods": {"a": {"config": AFD}, "b": {"of": "a", "sampler": ["sampler.x=1"], "steps": 3}}}, ["steps (3)"]),
        ({"methods": {"a": {"config": AFD, "rates": RATES}}}, ["choose (None)", "methods.a has rates"]),
        ({"choose": {**CHOOSE, "seeds": [1]}}, ["choose.seeds (1) must be none of seeds"]),
        ({"compared_with": "gan"}, ["compared_with (gan)"]),
        ({"equal": ["flops"]}, ["equal (flops) must come with compared_with"]),
        ({"groups": {"Main": ["afd"]}}, ["sft is in none"]),
        ({"seeds": [1, 1]}, ["seeds ([1, 1]) must name each once"]),
        ({"overrides": ["train.steps=3"]}, ["override (train.steps=3)"]),
        ({"methods": {"teacher": {"config": AFD}}}, ["methods (teacher)", "a row of this one"]),
        (
            {"choose": CHOOSE, "methods": {"a": {"config": AFD, "rates": RATES | {"values": [1e-4, 1.0000001e-4]}}}},
            ["methods.a.rates", "values (0.0001, 0.0001) must name each once"],
        ),
    ],
)
def test_a_bad_study_is_one_line(fields: dict[str, Any], parts: list[str], tmp_path: Path) -> None:
    study = {"title": "A", "metrics": ["trajectory_fd"], "methods": {"afd": {"config": AFD}, "sft": {"config": SFT}}}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study | fields))
    with pytest.raises(ConfigError) as caught:
        read_study(tmp_path / "study.yaml")
    assert all(part in str(caught.value) for part in ["study.yaml", *parts]), caught.value
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        (
            {"metrics": ["beauty"]},
            "metrics (beauty) must be one that evaluation.metrics (toy) measures: trajectory_fd, ",
        ),
        (
            {"choose": {**CHOOSE, "metric": "beauty"}},
            "choose.metric (beauty) must be one that evaluation.metrics (toy)",
        ),
        (
            {"methods": {"afd": {"config": AFD}, "b": {"config": SFT, "overrides": ["evaluation.metrics=video"]}}},
            "methods.b: evaluation.metrics (video) must be toy, as the first method has it",
        ),
        (
            {"methods": {"afd": {"config": AFD, "overrides": ["method.x=1"]}}},
            "methods.afd: method.x (1) is not a known",
        ),
        (
            {"methods": {**RATED, "b": {"of": "sft", "sampler": ["sampler.x=1"]}}, "choose": CHOOSE},
            "methods.b: sampler.x",
        ),
        (
            {"methods": {"afd": {"config": AFD, "rates": RATES | {"field": "method.x"}}}, "choose": CHOOSE},
            "methods.afd: method.x (0.0001) is not a known key",
        ),
    ],
)
def test_runs_that_cannot_be_made_or_compared_are_refused(fields: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_plan(**fields)
    assert str(caught.value).startswith(line)


def test_rates_come_first_then_seed_by_seed() -> None:
    plan = make_plan(methods=RATED, choose=CHOOSE, bases={"one": [], "two": []}, budgets=[7])
    choosing = plan.choosing("afd")
    first = plan.trials({}, {})
    assert first[:8] == choosing
    assert {trial.method for trial in first[8:]} == {"sft"}, "no row of afd before its rate is chosen"
    rest = plan.trials(by_name(choosing, lambda trial: trial.rate or 0), {})[8:]
    own = rest[:8]
    assert [(t.seed, t.method, t.base) for t in own] == [
        (seed, method, base) for seed in (0, 1) for method in ("afd", "sft") for base in ("one", "two")
    ]
    assert [(t.seed, t.steps) for t in rest[8:]] == [(seed, 7) for seed in (0, 1) for _ in range(4)]
    assert "afd-one-0.0001-0-60" in {trial.name for trial in own}


def test_a_rate_is_chosen_by_the_mean_on_its_own_seeds_alone() -> None:
    plan = make_plan(methods=RATED, choose=CHOOSE)
    scores = {(1e-4, 100): 5.0, (1e-4, 101): 1.0, (2e-4, 100): 3.5, (2e-4, 101): 3.0}  # means 3 and 3.25
    records = by_name(plan.choosing("afd"), lambda trial: scores[trial.rate or 0, trial.seed])
    assert plan.chosen("afd", records, {}) == 1e-4
    for trial in [plan._trial("afd", "base", rate, seed, 60) for rate in (1e-4, 2e-4) for seed in (0, 1)]:
        records[trial.name] = record(trial, 9.0 if trial.rate == 1e-4 else 0.0)  # on the tables' seeds
    assert plan.chosen("afd", records, {}) == 1e-4
    higher = make_plan(methods=RATED, choose={**CHOOSE, "better": "higher"})
    assert higher.chosen("afd", records, {}) == 2e-4


def test_a_rate_waits_for_all_its_runs_and_is_not_one_that_failed() -> None:
    plan = make_plan(methods=RATED, choose=CHOOSE)
    choosing = plan.choosing("afd")
    records = by_name(choosing, lambda trial: trial.rate or 0)
    lost = next(trial for trial in choosing if trial.rate == 1e-4)
    del records[lost.name]
    assert plan.chosen("afd", records, {}) is None
    assert plan.row("afd", 60, records, {}) == []
    assert plan.chosen("afd", records, {lost.name: "diverged"}) == 2e-4


def test_like_takes_settings_steps_and_chosen_rate() -> None:
    methods = {
        "afd": {"config": AFD, "overrides": ["method.old_policy_decay=0.7"], "steps": 40, "rates": RATES},
        "frozen": {"like": "afd", "overrides": ["method.old_policy_decay=0.95"]},
        "long": {"like": "frozen", "steps": 90},
    }
    plan = make_plan(methods=methods, choose=CHOOSE, bases={"base": ["method.policy_mix=0.5"]})
    records = by_name(plan.choosing("afd"), lambda trial: -(trial.rate or 0))
    (trial, _) = plan.row("long", plan.steps_of("long"), records, {})
    config = trial.run_config(Path("runs"))
    assert trial.name == "long-base-0.0002-0-90"
    assert plan.steps_of("frozen") == 40
    assert config.method.optimizer.learning_rate == 2e-4
    assert config.method.old_policy_decay == 0.95
    assert config.method.policy_mix == 0.5
    assert config.train.steps == 90
    assert plan.choosing("long") == []


def test_of_is_the_other_ones_run_sampled_otherwise() -> None:
    few = {"of": "afd", "sampler": ["sampler.timesteps=[1000]"]}
    plan = make_plan(methods={**RATED, "few": few}, choose=CHOOSE, budgets=[9])
    assert plan.trained == ["afd", "sft"]
    records = by_name(plan.choosing("afd"), lambda trial: trial.rate or 0)
    trials = {trial.name: trial for trial in plan.trials(records, {})}
    trial = trials["few-base-0.0001-0-60"]
    assert trial.source == trials["afd-base-0.0001-0-60"]
    assert trial.run_config(Path("runs")).sampler.timesteps == (1000,)
    assert trial.source.run_config(Path("runs")).sampler.timesteps == (1000, 750, 500, 250)
    assert not [name for name in trials if name.startswith("few") and name.endswith("-9")], "nothing of it is trained"


def test_equal_flops_pay_for_other_steps() -> None:
    methods = {
        "afd": {"config": AFD},
        "fewer": {"like": "afd", "overrides": ["method.rollouts_per_prompt=2"]},
        "same": {"like": "afd", "overrides": ["method.policy_mix=0.5"]},
        "cheaper": {"like": "afd", "overrides": ["method.reuse_logits=true"]},
        "sft": {"config": SFT},
    }
    plan = make_plan(methods=methods, compared_with="afd", equal=["steps", "flops"])
    assert plan.views == ["own", "steps", "flops"]
    assert [plan.steps_of(name, "steps") for name in methods] == [60] * 5
    assert plan.steps_of("same", "flops") == plan.steps_of("afd", "flops") == 60
    budget = Spent(plan.config_of("afd"), 1, 20).pflop(60)
    assert Spent(plan.config_of("cheaper"), 1, 20).pflop(61) <= budget
    assert plan.steps_of("cheaper", "flops") == 60, "so little more is not worth a run"
    steps = plan.steps_of("fewer", "flops")
    spent = Spent(plan.config_of("fewer"), 1, 20)
    assert steps > 60 * (1 + CLOSE)
    assert spent.pflop(steps) <= budget < spent.pflop(steps + 1)
    names = {trial.name for trial in plan.trials({}, {})}
    assert {f"fewer-base-own-0-{steps}", "sft-base-own-1-100", "sft-base-own-1-60", "same-base-own-0-60"} <= names


def test_a_table_that_says_nothing_new_is_left_out() -> None:
    same = {"like": "afd", "overrides": ["method.policy_mix=0.5"]}
    plan = make_plan(methods={"afd": {"config": AFD}, "same": same}, compared_with="afd", equal=["steps", "flops"])
    assert plan.views == ["own"]
