"""What a run has computed by a step, from the costs of its passes."""

import pytest

from afd_scale.config import RunConfig
from afd_scale.planning.flops import pass_flops
from afd_scale.planning.spent import PFLOP, Spent
from afd_scale.planning.workload import workload

CONV = {"name": "conv", "channels": 8}


def make_config(**method) -> RunConfig:
    return RunConfig.model_validate({
        "student": {"dim": 16, "ffn_dim": 24, "num_heads": 2, "num_layers": 1}, "data": {"global_batch": 4},
        "method": {"discriminator": CONV, **method},
    })  # fmt: skip


def costs(config: RunConfig) -> dict[str, float]:
    """PFLOP of each pass of one rank, by its place."""
    load = workload(config, 1)
    return {
        f"{each.phase}/{each.role}{'/trains' if each.trains else ''}": pass_flops(config, load, each).total / PFLOP
        for each in load.passes
    }


def test_warm_up_steps_run_what_is_theirs_and_the_prior_runs_every_third_time():
    judge = {**CONV, "warmup_steps": 2}
    config = make_config(name="afd", rollouts_per_prompt=2, prior_every=3, discriminator=judge)
    cost = costs(config)
    assert all(cost.values())
    spent = Spent(config, 1, warm_up_steps=2)
    warm_up = cost["rollout/old_policy"] + cost["discriminator/discriminator/trains"]
    assert spent.pflop(-2) == 0
    assert spent.pflop(-1) == pytest.approx(warm_up)
    assert spent.pflop(0) == pytest.approx(2 * warm_up)
    reference = cost["velocities/reference"]
    step = sum(cost.values()) - reference
    assert spent.pflop(2) == pytest.approx(2 * warm_up + 2 * step)
    assert spent.pflop(3) == pytest.approx(2 * warm_up + 3 * step + reference)
    assert spent.pflop(7) == pytest.approx(2 * warm_up + 7 * step + 2 * reference)


def test_a_student_that_is_updated_every_fifth_step():
    config = make_config(name="gan", student_every=5)
    cost, spent = costs(config), Spent(config, 1, warm_up_steps=0)
    always = cost["rollout/student"] + cost["discriminator/discriminator/trains"]
    assert spent.pflop(4) == pytest.approx(4 * always)
    assert spent.pflop(5) > 5 * always + cost["student/student/trains"]


def test_judges_warm_up_each_as_long_as_it_says():
    judges = {"late": {**CONV, "channels": 4, "warmup_steps": 1}}
    config = make_config(name="afd", rollouts_per_prompt=2, discriminator={**CONV, "warmup_steps": 3}, judges=judges)
    cost, spent = costs(config), Spent(config, 1, warm_up_steps=3)
    early = cost["rollout/old_policy"] + cost["discriminator/discriminator/trains"]
    assert spent.pflop(-1) == pytest.approx(2 * early)
    assert spent.pflop(0) == pytest.approx(3 * early + cost["late/late/trains"])


def test_a_judge_that_is_frozen_costs_no_training():
    judge = {**CONV, "warmup_steps": 1, "freeze_after": 2}
    config = make_config(name="afd", rollouts_per_prompt=2, discriminator=judge)
    cost, spent = costs(config), Spent(config, 1, warm_up_steps=1)
    training, step = cost["discriminator/discriminator/trains"], sum(cost.values())
    assert spent.pflop(0) == pytest.approx(cost["rollout/old_policy"] + training)
    assert spent.pflop(2) - spent.pflop(0) == pytest.approx(2 * step)
    assert spent.pflop(5) - spent.pflop(2) == pytest.approx(3 * (step - training))


def test_long_rollouts_cost_what_lengths_that_are_drawn_do_on_average():
    def config(**long) -> RunConfig:
        made = make_config(name="afd", rollouts_per_prompt=2, long_rollouts=long)
        return made.model_copy(update={"sampler": made.sampler.with_fields({"window_frames": 4})})

    cost = {frames: costs(config(frames=frames)) for frames in range(5, 17)}
    rollout = {frames: each.pop("rollout/old_policy") for frames, each in cost.items()}
    rest = sum(cost[16].values())
    assert rollout[5] < rollout[6] < rollout[16]
    spent = Spent(config(frames=16, from_frames=5, growth_steps=2), 1, warm_up_steps=1)
    assert spent.pflop(0) == pytest.approx(rollout[5])
    for step, most in ((1, 10), (2, 16), (3, 16)):
        mean = sum(rollout[frames] for frames in range(5, most + 1)) / (most - 4)
        assert spent.pflop(step) - spent.pflop(step - 1) == pytest.approx(mean + rest)


def test_ranks_share_the_same_work():
    config = make_config(name="afd", rollouts_per_prompt=2)
    assert Spent(config, 2, 0).pflop(9) == pytest.approx(Spent(config, 1, 0).pflop(9))


@pytest.mark.parametrize("judge", [CONV, {"name": "motion", "features": "tracks"}], ids=["conv", "motion"])
def test_judges_of_windows_cost_less(judge):
    """In one process, where counts are remembered."""

    def trained(**fields):
        config = make_config(name="afd", rollouts_per_prompt=2, discriminator=judge, **fields)
        assert Spent(config, 1, warm_up_steps=0).pflop(1) > 0
        return costs(config)["discriminator/discriminator/trains"]

    assert trained(judged_frames=2) < trained() == trained()
