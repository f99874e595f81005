"""The gravity probe: it is right, agrees with the tracks that it knows nothing of, and sees through what blurs them."""

import ast
import hashlib
import inspect
import json

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.torch import load_file

from afd_scale.data.worlds.kick import KickPrompt, prompt_values, render_clips
from afd_scale.evaluation.suites import gravity_probe, gravity_probe_fit
from afd_scale.evaluation.suites.gravity_probe import WEIGHTS, probed_gravity
from afd_scale.evaluation.suites.gravity_probe_fit import BINS, falling_clips, fit
from afd_scale.evaluation.suites.kick import measured_gravity
from afd_scale.evaluation.suites.tracks import track
from tests.tools import call_tool

PROMPTS = KickPrompt.every() * 8
ASKED = prompt_values(PROMPTS).gravity


@pytest.fixture(scope="module")
def wrong() -> NDArray[np.uint8]:
    return render_clips(PROMPTS, seed=21, physics="wrong")


@pytest.fixture(scope="module")
def true_gravity(wrong) -> NDArray[np.float64]:
    """Of the sharp clips, where tracks are right."""
    return measured_gravity(track(wrong))[0]


def rank_correlation(first, second) -> float:
    ranks = [np.argsort(np.argsort(each)) for each in (first, second)]
    return float(np.corrcoef(*ranks)[0, 1])


def smeared(clips, axis, shifts):
    return np.mean([np.roll(clips, shift, axis) for shift in shifts], axis=0).astype(np.uint8)


def test_it_is_right_about_the_teacher() -> None:
    error = np.abs(probed_gravity(render_clips(PROMPTS, seed=20)) - ASKED)
    assert error.mean() < 0.008
    assert np.quantile(error, 0.99) < 0.03


def test_it_agrees_with_the_tracks_on_wrong_physics(wrong, true_gravity) -> None:
    answer = probed_gravity(wrong)
    assert rank_correlation(answer, true_gravity) > 0.97
    assert np.abs(answer - true_gravity).mean() < 0.015
    assert np.polyfit(true_gravity, answer, 1)[0] == pytest.approx(1, abs=0.08)


@pytest.mark.parametrize(("axis", "shifts"), [(3, (-2, 0, 2)), (2, (-1, 0, 1)), (3, (-3, 3))])
def test_a_blurred_ball_falls_as_it_does_and_not_as_it_was_asked(wrong, true_gravity, axis, shifts) -> None:
    answer = probed_gravity(smeared(wrong, axis, shifts))
    assert rank_correlation(answer, true_gravity) > 0.95
    assert np.abs(answer - true_gravity).mean() < 0.025
    assert np.abs(answer - ASKED).mean() > 0.8 * np.abs(true_gravity - ASKED).mean()


@pytest.mark.parametrize("frame", [0, 8, 17])  # at the last, many balls lie on the floor
def test_a_still_ball_does_not_fall(frame) -> None:
    clips = render_clips(PROMPTS, seed=22)
    still = np.repeat(clips[:, frame : frame + 1], clips.shape[1], axis=1)
    assert np.abs(probed_gravity(still)).mean() < 0.01
    assert np.abs(probed_gravity(np.zeros_like(clips[:1]))) < 0.01


def test_each_clip_has_its_own_answer(wrong) -> None:
    """Neither a prompt nor the clips beside it have a say."""
    assert list(inspect.signature(probed_gravity).parameters) == ["clips", "probe"]
    answer = probed_gravity(wrong)
    assert np.array_equal(answer, probed_gravity(wrong)), "the same every time"
    order = np.random.default_rng(0).permutation(len(wrong))
    assert probed_gravity(wrong[order]) == pytest.approx(answer[order], abs=1e-5)
    assert probed_gravity(wrong[3:4]) == pytest.approx(answer[3:4], abs=1e-5)
    assert probed_gravity(wrong[:0]).shape == (0,)


@pytest.mark.parametrize("module", [gravity_probe, gravity_probe_fit])
def test_it_shares_nothing_with_tracks(module) -> None:
    names = [node.module for node in ast.walk(ast.parse(inspect.getsource(module))) if isinstance(node, ast.ImportFrom)]
    own = {name for name in names if name.startswith("afd_scale.evaluation")}
    assert own <= {"afd_scale.evaluation.suites.gravity_probe"}


def test_its_weights_are_those_that_are_written_about() -> None:
    content = WEIGHTS.read_bytes()
    assert hashlib.sha256(content).hexdigest() in gravity_probe.__doc__
    assert len(content) < 200_000


@pytest.mark.parametrize("clips", [np.zeros((1, 12, 16, 16), np.uint8), np.zeros((1, 18, 16, 16), np.float32)])
def test_other_clips_are_refused(clips) -> None:
    with pytest.raises(ValueError, match=r"clips \(.*\) must be uint8 of shape \(N, 18, 16, 16\)"):
        probed_gravity(clips)


def test_clips_to_fit_on_are_of_all_gravities_and_faulty_where_asked() -> None:
    clean, faulty = (falling_clips(512, np.random.default_rng(5), faults=faults) for faults in (False, True))
    assert clean.clips.shape == faulty.clips.shape == (512, 18, 16, 16)
    assert np.histogram(clean.gravity, BINS)[0].min() > 60
    fall, is_measured = measured_gravity(track(clean.clips))
    assert np.abs(fall - clean.gravity)[is_measured].mean() < 0.01
    assert track(clean.clips).visible.all()
    assert not track(faulty.clips).visible.all(axis=1).all()
    still = (faulty.clips == faulty.clips[:, :1]).all(axis=(1, 2, 3))
    assert still.any()
    assert (faulty.gravity[still] == 0).all()


def test_the_tool_fits_and_measures(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(gravity_probe_fit, "CLIPS_A_STEP", 8)
    monkeypatch.setattr(gravity_probe_fit, "HELD_OUT_CLIPS", 240)
    out = tmp_path / "probe.safetensors"
    code, printed, _ = call_tool("fit_probe", "--out", out, "--steps", "20")
    found = json.loads(printed)
    assert code == 0
    assert hashlib.sha256(out.read_bytes()).hexdigest() == found["sha256"]
    assert list(found["teacher"]) == ["all", "no", "gentle", "strong"]
    assert all(len(found[kind]) == len(BINS) for kind in ("clean", "degraded"))
    again = fit(20, 0, lambda done, total: None)
    assert all((weight == again.state_dict()[name]).all() for name, weight in load_file(out).items())


def test_too_few_steps_are_refused(tmp_path) -> None:
    code, _, said = call_tool("fit_probe", "--out", tmp_path / "probe.safetensors", "--steps", "3")
    assert code == 2
    assert "steps (3) must be at least 20" in said
    assert not list(tmp_path.iterdir())
