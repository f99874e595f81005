"""The search for the fastest layout: against every plan that the tool makes of the same choices, one by one."""

import json
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest

from afd_scale.config import load_config
from afd_scale.planning.gpus import GPUS
from afd_scale.planning.host import BLOCK_SECONDS, GRAPH_SECONDS, HOOKED_SECONDS
from afd_scale.planning.layouts import SAME_TIME, search_layouts
from afd_scale.planning.plan import make_plan
from tests.tools import call_tool

CONFIGS = Path(__file__).parents[3] / "configs"
SMALL = (
    "method.discriminator={name: latent}", "method.rollouts_per_prompt=2", "data.global_batch=2",
    "evaluation.samples=0",
)  # fmt: skip
FIELDS = (
    "parallel.sequence", "train.micro_batch", "rollout.weights", "student.activation_checkpointing",
    "method.discriminator.activation_checkpointing",
)  # fmt: skip


def test_the_best_is_the_least_of_all_plans() -> None:
    arguments = ("--config", CONFIGS / "toy" / "afd.yaml", "--gpus", 2, "--json", *SMALL)
    found = json.loads(call_tool("plan", *arguments, "--best").stdout)
    plans = {}
    sizes = (*range(1, 7), "null")  # at most two prompts of a data rank, each with one video and two rollouts
    kinds = ("full", "keep_attention", "none")
    for values in product((1, 2), sizes, ("sharded", "gathered"), kinds, kinds):
        overrides = [f"{name}={value}" for name, value in zip(FIELDS, values, strict=True)]
        done = call_tool("plan", *arguments, *overrides)
        if done.returncode == 0:
            plan = json.loads(done.stdout)
            if plan["fits"] and plan["notes"] == []:  # a note says that another degree was planned
                plans[tuple(overrides)] = plan["step_seconds"]
    assert len(plans) > found["tried"] > 30, "micro-batches that cut alike are tried once"
    best, others = found["best"], found["runners_up"]
    assert best["step_seconds"] == pytest.approx(plans[tuple(best["overrides"])])
    assert best["step_seconds"] <= SAME_TIME * min(plans.values())
    assert min(plans.values()) < 0.9 * sorted(plans.values())[len(plans) // 2], "the choice matters"
    for other in others:
        assert other["step_seconds"] == pytest.approx(plans[tuple(other["overrides"])])
    assert others == sorted(others, key=lambda other: other["step_seconds"])


def test_what_does_not_fit_is_said_and_not_chosen() -> None:
    config = load_config(CONFIGS / "wan_1_3b" / "self_forcing_full.yaml")
    roomy = search_layouts(config, 64, replace(GPUS["h100"], memory_gib=10_000))
    assert roomy.best is not None
    assert roomy.too_large() == []
    assert roomy.best.choices["student.activation_checkpointing"] == "none"
    assert roomy.best.choices["parallel.sequence"] == 2, "32 data ranks at most"
    search = search_layouts(config, 64, GPUS["h100"])
    assert search.best is not None
    assert search.best.plan.fits
    fitting = [layout.seconds for layout in search.layouts if layout.plan.fits]
    assert search.best.seconds <= SAME_TIME * min(fitting)
    assert roomy.best.seconds < search.best.seconds
    too_large = search.too_large()
    assert too_large
    for layout in too_large:
        assert not layout.plan.fits
        assert layout.seconds < search.best.seconds
    assert all(layout.plan.fits for layout in search.runners_up())
    none = search_layouts(config, 64, replace(GPUS["h100"], memory_gib=1))
    assert none.best is None
    assert none.too_large() == none.runners_up() == []
    assert none.smallest.plan.memory.peak == min(layout.plan.memory.peak for layout in none.layouts)


@pytest.mark.parametrize("name", ["wan_1_3b/self_forcing", "wan_1_3b/paper_dmd", "wan_1_3b/paper_sft", "wan_14b/afd"])
def test_shipped_configs_have_the_layout_that_is_found(name: str) -> None:
    config, gpus = load_config(CONFIGS / f"{name}.yaml"), 64 if "14b" in name else 8
    search = search_layouts(config, gpus, GPUS["h100"])
    assert search.best is not None
    assert search.as_configured is not None
    assert search.as_configured.seconds == pytest.approx(search.best.seconds, rel=1e-3)


@pytest.mark.parametrize(("name", "gpus"), [("wan_14b/afd", 8), ("wan_14b/afd_full", 256), ("wan_1_3b/paper_gan", 64)])
def test_there_is_a_layout_for_other_numbers_of_gpus(name: str, gpus: int) -> None:
    search = search_layouts(load_config(CONFIGS / f"{name}.yaml"), gpus, GPUS["h100"])
    assert search.best is not None
    pasted = make_plan(load_config(CONFIGS / f"{name}.yaml", search.best.overrides), gpus, GPUS["h100"])
    assert pasted.fits
    assert pasted.notes == ()
    assert pasted.step_seconds == pytest.approx(search.best.seconds)


def test_a_rule_of_the_config_leaves_layouts_out() -> None:
    overrides = ["precision=fp8", "student.activation_checkpointing=full",
                 "method.discriminator.activation_checkpointing=full"]  # fmt: skip
    config = load_config(CONFIGS / "wan_1_3b" / "self_forcing_full.yaml", overrides)
    layouts = search_layouts(config, 8, GPUS["h100"]).layouts
    assert {layout.choices["student.activation_checkpointing"] for layout in layouts} == {"full", "keep_attention"}


def test_the_report_can_be_pasted_and_says_why() -> None:
    arguments = ("--config", CONFIGS / "toy" / "afd.yaml", "--gpus", 2, *SMALL)
    best = json.loads(call_tool("plan", *arguments, "--best", "--json").stdout)["best"]
    printed = call_tool("plan", *arguments, "--best").stdout
    assert f"\n  {' '.join(best['overrides'])}\n" in printed
    assert "the config as it is" in printed
    assert "Runners-up" in printed
    assert "not measured" in printed


@pytest.mark.parametrize(
    ("gpus", "message"),
    [("0", "gpus (0) must be at least 1"), ("24", "data.global_batch (2) must divide among 6 data ranks (24 ranks /")],
)
def test_bad_input_is_one_line(gpus: str, message: str) -> None:
    done = call_tool("plan", "--config", CONFIGS / "toy" / "afd.yaml", "--gpus", gpus, "--best", *SMALL)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert message in line


def test_time_of_python_worked_by_hand() -> None:
    full = CONFIGS / "wan_1_3b" / "self_forcing_full.yaml"
    layout = ["parallel.sequence=1", "train.micro_batch=8", "student.activation_checkpointing=full",
              "method.discriminator.activation_checkpointing=full"]  # fmt: skip

    def host(*overrides: str) -> dict[str, float]:
        plan = make_plan(load_config(full, [*layout, *overrides]), 8, GPUS["h200"])  # 16 rollouts a rank: two at a time
        return {phase: seconds.host for phase, seconds in plan.seconds.items()}

    sharded, gathered = host("rollout.weights=sharded"), host("rollout.weights=gathered")
    # 28 passes of a rollout through 30 blocks; context, states and twice again for the backward pass of the student's.
    assert sharded["rollout"] == pytest.approx(2 * 28 * 30 * HOOKED_SECONDS)
    # The second rollout meets 13 kinds of passes again, of 7 chunks alone and 6 with the next one, and replays all but
    # its first pass.
    launched, replayed = 28 + 1 + 2 * 13, 27
    assert gathered["rollout"] == pytest.approx(launched * 30 * BLOCK_SECONDS + replayed * GRAPH_SECONDS)
    assert host("rollout={weights: gathered, graphs: false}")["rollout"] == pytest.approx(2 * 28 * 30 * BLOCK_SECONDS)
    shared = host("rollout.weights=gathered", "parallel.sequence=2", "train.micro_batch=16")  # again two rollouts
    assert shared["rollout"] == pytest.approx(2 * 28 * 30 * BLOCK_SECONDS), "no graphs where ranks exchange tokens"
    assert sharded["student"] == gathered["student"] == pytest.approx(2 * 4 * 30 * HOOKED_SECONDS)
    assert host("student.activation_checkpointing=keep_attention")["student"] == sharded["student"]
    assert host("student.activation_checkpointing=none")["student"] == pytest.approx(2 * 3 * 30 * HOOKED_SECONDS)
    assert host("precision=fp8", "rollout.weights=gathered")["rollout"] == sharded["rollout"], "hooks stay on"
