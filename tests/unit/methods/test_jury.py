"""Several judges: who learns what, in which order they are asked, and what their scores add up to."""

import itertools
import weakref
from dataclasses import replace

import pytest
import torch

from afd_scale.flow.advantage import most_telling
from afd_scale.flow.augmentation import Change, change_of
from afd_scale.types import Videos
from tests.unit.methods.engines import SHAPE, Oracle, build, make_batch

CONV = {"name": "conv", "channels": 4, "identity_patch": (2, 1), "optimizer": {"learning_rate": 1e-2}}
FIXED = {"name": "http", "url": "http://scorer/"}  # never asked: tests answer in its place


def make_afd(judges, *, replaced=None, micro_batch=None, **fields):
    method = {"name": "afd", "rollouts_per_prompt": 3, "prior_weight": 0.0, "discriminator": CONV, "judges": judges}
    return build(method | fields, micro_batch=micro_batch, **(replaced or {}))


def test_each_judge_learns_by_itself_and_has_its_own_metrics():
    second = CONV | {"channels": 8, "objective": "softplus", "r1_weight": 0.1, "optimizer": {"learning_rate": 1e-3}}
    afd, alone = make_afd({"second": second}), make_afd({})
    metrics, other = afd.train_step(make_batch(), 1), alone.train_step(make_batch(), 1)
    for name in ("loss", "accuracy", "margin", "win_probability", "gradient_norm"):
        assert metrics[f"discriminator/{name}"] == other[f"discriminator/{name}"]
        assert metrics[f"discriminator/second/{name}"] != metrics[f"discriminator/{name}"] or name == "accuracy"
    assert "discriminator/second/penalty" in metrics
    assert "discriminator/penalty" not in metrics
    assert torch.equal(afd.engines["discriminator"].weights(), alone.engines["discriminator"].weights())


def test_each_judge_has_its_own_warm_up():
    afd = make_afd({"second": CONV | {"warmup_steps": 3}, "fixed": FIXED})
    assert afd.warmup_steps == 3
    first, second = (afd.engines[name].weights() for name in ("discriminator", "second"))
    metrics = afd.train_step(make_batch(), -2)
    assert metrics.keys() == {f"discriminator/second/{name}" for name in
                              ("loss", "accuracy", "margin", "win_probability", "gradient_norm")}  # fmt: skip
    assert torch.equal(afd.engines["discriminator"].weights(), first)
    assert not torch.equal(afd.engines["second"].weights(), second)
    assert not afd.engines["fixed"].calls


def test_a_judge_is_frozen_after_so_many_steps():
    afd = make_afd({}, discriminator=CONV | {"warmup_steps": 1, "freeze_after": 2})
    judge, whole = afd.engines["discriminator"], "discriminator/"
    changed, metrics = {}, {}
    for step in (0, 1, 2, 3, 4):
        before = judge.weights()
        metrics[step] = afd.train_step(make_batch(), step)
        changed[step] = not torch.equal(judge.weights(), before)
    assert changed == {0: True, 1: True, 2: True, 3: False, 4: False}
    assert {name for name in metrics[3] if name.startswith(whole)} == {"discriminator/reward_mean"}
    assert metrics[3]["discriminator/reward_mean"] == metrics[3]["rollout/reward_mean"]
    assert "discriminator/reward_mean" not in metrics[2]
    assert "discriminator/accuracy" in metrics[2]


def test_a_judge_that_learns_in_the_warm_up_only():
    afd = make_afd({"second": CONV}, discriminator=CONV | {"warmup_steps": 1, "freeze_after": 0})
    afd.train_step(make_batch(), 0)
    first, second = (afd.engines[name].weights() for name in ("discriminator", "second"))
    metrics = afd.train_step(make_batch(), 1)
    assert torch.equal(afd.engines["discriminator"].weights(), first)
    assert not torch.equal(afd.engines["second"].weights(), second)
    assert {"discriminator/reward_mean", "discriminator/second/accuracy"} < metrics.keys()


def test_scores_are_standardised_and_weighed():
    """With one decided and one tiny judge: after division by their deviations they count as their weights say."""
    afd = make_afd({"fixed": FIXED | {"weight": 0.5}}, advantage={"baseline": "batch", "spread_floor": 1e-6})
    logits = {"discriminator": torch.tensor([1.0, 2, 3, 4, 5, 9]), "fixed": torch.tensor([0.1, 0.3, 0.2, 0, 0, 0])}
    found = afd.jury.reward(logits)
    assert found.shape == (2, 3)
    expected = torch.zeros(6)
    for weight, values in zip((1.0, 0.5), logits.values(), strict=True):
        expected += weight * (values - values.mean()) / values.std(correction=0)
    torch.testing.assert_close(found.flatten(), expected)
    assert afd.jury.memory["discriminator/mean"].item() == pytest.approx(4)
    later = afd.jury.reward(logits)  # the same values: mean and deviation stay
    torch.testing.assert_close(later, found)
    afd.jury.reward({name: 10 + values for name, values in logits.items()})
    assert afd.jury.memory["discriminator/mean"].item() == pytest.approx(2 / 12 * 4 + 10 / 12 * 14)
    assert afd.jury.memory["steps"] == 3


def test_a_group_baseline_is_divided_by_the_spread_within_groups():
    """Prompts that differ much from each other must not drown what rollouts of a prompt differ by."""
    afd = make_afd({"fixed": FIXED}, advantage={"baseline": "group", "spread_floor": 1e-6})
    wide = torch.tensor([100.0, 101, 102, -100, -101, -102])
    found = afd.jury.reward({"discriminator": wide, "fixed": torch.zeros(6)})
    centred = found - found.mean(dim=1, keepdim=True)
    assert centred.square().mean().sqrt().item() == pytest.approx(1, abs=1e-4)


def test_one_judge_is_taken_as_it_is():
    afd = make_afd({})
    logits = torch.arange(6.0)
    assert torch.equal(afd.jury.reward({"discriminator": logits}).flatten(), logits)
    assert not afd.jury.memory


def test_fixed_judges_alone_teach_the_student():
    afd = make_afd({"light": FIXED}, discriminator=None, replaced={"light": Oracle()}, advantage={"clip": 1.0},
                   policy_mix=1.0, old_policy_decay=0.7, optimizer={"learning_rate": 3e-3})  # fmt: skip
    steps = range(1, 41)
    rewards = [afd.train_step(make_batch((2 * step, 2 * step + 1)), step)["rollout/reward_mean"] for step in steps]
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.1


def test_a_fixed_judge_that_fails_leaves_the_step_undone():
    def fail(videos):
        raise OSError("no answer")

    afd = make_afd({"served": FIXED}, replaced={"served": Oracle(fail)})
    before = {name: afd.engines[name].weights() for name in ("student", "old_policy", "discriminator")}
    with pytest.raises(OSError, match="no answer"):
        afd.train_step(make_batch(), 1)
    for name, weights in before.items():
        assert torch.equal(afd.engines[name].weights(), weights), name
    assert not afd.jury.memory


def test_reused_logits_are_those_before_the_update():
    def run(**fields):
        afd = make_afd({}, **fields)
        afd.train_step(make_batch(), 1)
        return afd.engines["discriminator"].calls, afd

    (taught,), _ = run(reuse_logits=True)
    both, _ = run()
    assert len(both) == 2
    again = build({"name": "afd", "rollouts_per_prompt": 3, "prior_weight": 0.0, "discriminator": CONV})
    expected = again.engines["discriminator"](taught[0][0])[2:]  # as it starts
    torch.testing.assert_close(taught[2][2:], expected)
    assert not torch.equal(both[1][2], expected), "the second pass sees the judge after its update"


def test_judges_may_be_trained_on_some_rollouts():
    afd = make_afd({}, trained_rollouts=2)
    afd.train_step(make_batch(), 1)
    taught, asked = (arguments[0] for arguments, _, _ in afd.engines["discriminator"].calls)
    assert len(taught) == 2 * (1 + 2)
    assert torch.equal(taught.latents[2:], asked.latents.unflatten(0, (2, 3))[:, :2].flatten(0, 1))
    assert len(asked) == 6


def test_a_mismatched_prompt_is_another_ones_with_the_same_video():
    judge = CONV | {"mismatch_weight": 1.0}
    afd = make_afd({}, discriminator=judge)
    batch = make_batch((4, 9, 2, 7))
    metrics = afd.train_step(batch, 1)
    (videos,) = afd.engines["discriminator"].calls[0][0]
    own, wrong = videos[:4], videos[16:]
    assert torch.equal(own.latents, wrong.latents)
    assert wrong.prompts.texts == tuple(batch.teacher.prompts.texts[row] for row in (1, 0, 3, 2))
    assert torch.equal(wrong.prompts.embeddings, batch.teacher.prompts.embeddings[[1, 0, 3, 2]])
    assert 0 <= metrics["discriminator/mismatch_accuracy"] <= 1


def test_equal_prompts_are_no_mismatch():
    afd = make_afd({}, discriminator=CONV | {"mismatch_weight": 1.0})
    plain = make_afd({}, discriminator=CONV)
    batch = make_batch((4, 9))
    same = replace(batch.teacher.prompts, ids=("a", "a"))
    batch = replace(batch, teacher=replace(batch.teacher, prompts=same))
    found, expected = (method.train_step(batch, 1) for method in (afd, plain))
    assert found["discriminator/gradient_norm"].item() == pytest.approx(
        expected["discriminator/gradient_norm"].item(), rel=1e-4
    )
    assert found["discriminator/mismatch_accuracy"] == 0.5


def test_a_judge_learns_to_tell_prompts_by_mismatched_ones():
    def accuracy(weight):
        optimizer = {"learning_rate": 1e-2, "weight_decay": 0.0}
        judge = CONV | {"mismatch_weight": weight, "warmup_steps": 60, "optimizer": optimizer}
        afd = make_afd({}, discriminator=judge)
        return [afd.train_step(make_batch(), step)["discriminator/mismatch_accuracy"].item() for step in range(-59, 1)]

    assert sum(accuracy(1.0)[-10:]) == 10


def test_a_mismatch_in_pieces_is_the_whole():
    judge = CONV | {"mismatch_weight": 0.7, "optimizer": {"learning_rate": 1e-3}}
    whole, parts = make_afd({}, discriminator=judge), make_afd({}, discriminator=judge, micro_batch=1)
    for afd in (whole, parts):
        found = afd.engines["discriminator"]
        found.engine.optimizer = torch.optim.SGD(found.network.parameters(), lr=1.0)
    expected, found = (afd.train_step(make_batch((4, 9)), 1) for afd in (whole, parts))
    for name in expected.keys() - {"discriminator/mismatch_accuracy"}:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        parts.engines["discriminator"].weights(), whole.engines["discriminator"].weights(), rtol=0, atol=1e-5
    )


def test_inner_updates_use_the_same_rollouts_with_new_noise():
    afd = make_afd({}, inner_updates=3)
    afd.train_step(make_batch(), 1)
    assert len(afd.student.calls) == 3
    noisy = [arguments[0] for arguments, _, _ in afd.student.calls]
    clean = [options["clean"] for _, options, _ in afd.student.calls]
    assert torch.equal(clean[0], clean[2])
    assert not torch.equal(noisy[0], noisy[1])
    assert len(afd.old_policy.decays) == 1


def test_the_prior_may_skip_steps():
    afd = make_afd({}, prior_weight=0.1, prior_every=2)
    metrics = [afd.train_step(make_batch(), step) for step in (1, 2, 3, 4)]
    assert ["student/reference_distance" in found for found in metrics] == [False, True, False, True]
    assert len(afd.engines["reference"].calls) == 2


def test_the_student_may_learn_from_the_most_telling_rollouts():
    afd = make_afd({}, student_rollouts=2)
    weight = torch.tensor([[0.5, 0.9, 0.2], [0.0, 0.45, 0.4]])
    rollouts = make_batch((4, 9)).teacher.take([0, 0, 0, 1, 1, 1])
    rollouts = rollouts.of(torch.arange(6.0)[:, None, None, None, None].expand(rollouts.latents.shape))
    chosen, its_weight = afd._choose(rollouts, weight, weight[..., None], 1)
    assert torch.equal(chosen.latents[:, 0, 0, 0, 0], torch.tensor([1.0, 2, 3, 4]))
    assert torch.equal(its_weight, torch.tensor([[0.9], [0.2], [0.0], [0.45]]))
    metrics = afd.train_step(make_batch(), 1)
    ((arguments, options, _),) = afd.student.calls
    assert len(arguments[0]) == len(options["clean"]) == 4
    assert metrics["student/loss"].isfinite()


def test_judges_may_see_a_window_the_same_for_a_prompts_videos():
    afd = make_afd({}, judged_frames=1, reuse_logits=True)
    seen = set()
    for step in range(1, 13):
        batch = make_batch((4, 9))
        afd.train_step(batch, step)
        (videos,) = afd.engines["discriminator"].calls[-1][0]
        whole = torch.cat([batch.teacher.latents, afd.student.calls[-1][1]["clean"]])
        assert videos.latents.shape == (8, 1, *SHAPE[1:])
        starts = [int(torch.equal(part[0], all_frames[1])) for part, all_frames in zip(videos.latents, whole)]
        assert all(torch.equal(whole[row, start], videos.latents[row, 0]) for row, start in enumerate(starts))
        assert starts == [starts[0], starts[1], *[starts[0]] * 3, *[starts[1]] * 3]
        seen.add(tuple(starts[:2]))
    assert len(seen) > 2, "windows are drawn"


def test_each_chunk_may_be_weighed_by_the_windows_that_hold_it():
    """Of two frames, each its own window: the first is the better the brighter, the second the better the darker."""

    def score(videos):
        brightness = videos.latents.mean(dim=(1, 2, 3, 4))
        return torch.where(torch.tensor([bool(first) for first in is_first(videos.latents)]), brightness, -brightness)

    def is_first(latents):
        whole = afd.old_policy.rollouts
        return [any(torch.equal(part[0], video[0]) for video in whole) for part in latents]

    light = Oracle(score)
    afd = make_afd({"light": FIXED}, discriminator=None, replaced={"light": light}, judged_frames=1, judged_windows=2,
                   advantage={"clip": 1.0}, prior_weight=0.0)  # fmt: skip
    rollouts = afd._roll_out(make_batch().prompts, make_batch().teacher, 1)
    afd.old_policy.rollouts = rollouts.latents
    _, logits = afd.jury.hear(make_batch().teacher, rollouts, afd.randomness, 1, 10)
    assert len(logits["light"]) == 2 * 2 * 3
    weight = afd._weigh(afd.jury.reward(logits), 2)
    assert weight.shape == (2, 3, 2)
    brightness = rollouts.latents.mean(dim=(2, 3, 4)).unflatten(0, (2, 3))
    assert torch.equal(weight[..., 0].argsort(1), brightness[..., 0].argsort(1))
    assert torch.equal(weight[..., 1].argsort(1), (-brightness[..., 1]).argsort(1))
    assert (weight[..., 0] != weight[..., 1]).any()


@pytest.mark.parametrize(
    "fields", [{}, {"student_rollouts": 2}, {"taught": "resampled"}, {"credit": "regression"}], ids=str
)
def test_several_windows_go_with_what_chooses_and_weighs(fields):
    afd = make_afd({"second": CONV}, judged_frames=1, judged_windows=2, states_per_rollout=2, **fields)
    metrics = afd.train_step(make_batch(), 1)
    assert all(value.isfinite() for value in metrics.values())
    assert metrics["student/gradient_norm"] > 0


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"judged_windows": 2}, r"method.judged_windows \(2\) must be 1: windows of method.judged_frames \(None\)"),
        ({"judged_windows": 3, "judged_frames": 1}, r"method.judged_windows \(3\) must be 1, or 2 to 2: windows"),
        (
            {"judged_windows": 2, "judged_frames": 1, "reuse_logits": True},
            r"judged_windows \(2\) must be 1 with reuse_logits",
        ),
    ],
)
def test_windows_that_are_no_cover_are_refused(fields, line):
    with pytest.raises(ValueError, match=line):
        make_afd({}, **fields)


def test_a_window_of_half_a_chunk_is_refused():
    with pytest.raises(ValueError, match=r"method.judged_frames \(1\) must be whole chunks of"):
        build({"name": "afd", "judged_frames": 1, "discriminator": CONV}, sampler={"chunk_frames": 2})


def test_nothing_keeps_pixels_behind_the_last_judge():
    shown = []

    def look(videos):
        shown.append(weakref.ref(videos.pixels()))
        return videos.latents.mean(dim=(1, 2, 3, 4))

    afd, alive = make_afd({}, replaced={"discriminator": Oracle(look)}), []
    afd.student.network.register_forward_hook(lambda *_: alive.append(sum(ref() is not None for ref in shown)))
    batch = make_batch()
    batch = replace(batch, teacher=replace(batch.teacher, decode=lambda latents: latents + 1))
    afd.train_step(batch, 1)
    assert shown
    assert alive == [0]
    assert not any(batch.teacher._decoded)


def test_the_best_and_the_worst_are_the_most_telling():
    weight = torch.tensor([[0.1, 0.9, 0.5, 0.45], [0.0, 0.05, 0.6, 0.7], [0.2, 0.2, 0.2, 1.0]])
    assert most_telling(weight, 2).tolist() == [[0, 1], [0, 3], [2, 3]]
    found = most_telling(weight, 3)
    for row, rows in zip(weight, found, strict=True):
        best = max(itertools.combinations(range(4), 3), key=lambda chosen: row[list(chosen)].var(correction=0))
        assert row[rows].var(correction=0) == pytest.approx(row[list(best)].var(correction=0).item())


def test_changes_of_pixels():
    pixels = torch.arange(24.0).view(1, 1, 1, 4, 6) / 24
    assert torch.equal(Change(mirror=True)(pixels), pixels.flip(-1))
    moved = Change(rows=0.25, columns=-1 / 3)(pixels)
    assert torch.equal(moved[..., 1:, :4], pixels[..., :3, 2:])
    assert torch.equal(moved[..., 0, :4], pixels[..., 0, 2:])  # the border again
    torch.testing.assert_close(Change(brightness=0.5)(pixels), (pixels + 1) / 2 - 1)
    assert Change(brightness=4)(pixels).max() == 1
    assert change_of((), (0.1, 0.9, 0.9, 0.9)) == Change()
    assert change_of(("mirror",), (0.4, 0.9, 0.9, 0.9)) == Change(mirror=True)
    assert change_of(("brightness", "shift"), (0.4, 0.0, 1.0, 0.5)) == Change(False, 0.8, 1 / 8, 0.0)


def test_views_change_what_is_seen_and_not_what_is_decoded():
    decoded = []

    def decode(latents):
        decoded.append(len(latents))
        return latents

    batch = make_batch((4, 9)).teacher
    videos = Videos(batch.prompts, batch.latents.clamp(-1, 1), 8.0, decode)
    mirrored = videos.seen([Change(mirror=True), None])
    both = videos + mirrored + mirrored.take([1, 0]) + videos.under(videos.prompts)[1:]
    pixels = both.pixels()
    assert len(decoded) == 2
    latents = videos.latents
    expected = [latents[0], latents[1], latents[0].flip(-1), latents[1], latents[1], latents[0].flip(-1), latents[1]]
    assert torch.equal(pixels, torch.stack(expected))
    assert pixels.shape[1:] == SHAPE


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"discriminator": None}, "discriminator .null. must be given where judges is empty"),
        ({"judges": {"Big": CONV}}, "judges .Big. must be small letters"),
        ({"judges": {"student": CONV}}, "role .student. must stand once"),
        ({"student_rollouts": 4}, "student_rollouts .4. must be at most rollouts_per_prompt .3."),
        ({"trained_rollouts": 4}, "trained_rollouts .4. must be at most rollouts_per_prompt .3."),
        ({"trained_rollouts": 2, "reuse_logits": True}, "trained_rollouts .2. must be all"),
        (
            {"judges": {}, "discriminator": CONV | {"weight": 2.0}},
            "weight .2.0. must be left out",
        ),
        (
            {"discriminator": None, "judges": {"fixed": FIXED}, "reuse_logits": True},
            "reuse_logits .True. must",
        ),
        ({"discriminator": None, "judges": {"second": CONV}, "r1_weight": 1.0}, "r1_weight must be left out"),
        ({"prior_every": 2}, "prior_every .2. must be 1"),
        ({"discriminator": CONV | {"freeze_after": 0}}, "freeze_after .0. must come with warmup_steps"),
        ({"judges": {"fixed": FIXED | {"freeze_after": 3}}}, "freeze_after .3. must be left out of a fixed judge"),
        (
            {"discriminator": CONV | {"freeze_after": 3}, "reuse_logits": True},
            "reuse_logits .True. must be off with a judge's freeze_after",
        ),
        ({"judges": {"second": CONV | {"channel": 4}}}, "judges.second.channel .4. is not a known key"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(fields, line):
    with pytest.raises(ValueError, match=line):
        make_afd(**({"judges": {}} | fields))
