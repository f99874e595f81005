"""The judge of motion: features of clips whose motion is known, the same however they are cut and computed."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError

from afd_scale.config import ConfigError, LostInputError, RunConfig
from afd_scale.config.judges import MotionDiscriminatorConfig
from afd_scale.models import motion_features
from afd_scale.models.build import check_files
from afd_scale.models.motion import MotionDiscriminator
from afd_scale.models.motion_features import ACCELERATION, EDGE, EXTENT, MASS, POSITION, SPEED, make_features, tracks
from afd_scale.models.motion_flow import FlowPool, cell_flow, pooled, shares
from afd_scale.torchvision_ops import define_torchvision_ops
from afd_scale.types import Videos
from tests.networks import make_prompts

FPS, TEXT, SIZE, FRAMES = 8.0, 6, 32, 6
SOURCE = Path(__file__).parents[3]


def blob(x, y, light=1.0, width=2.0, size=SIZE):
    """(T, 1, H, W) pixels of a soft blob in [-1, 1], its centre at x and y, in pixels from the upper left."""
    centres = torch.arange(size) + 0.5
    across = (-((centres - x[:, None]) / width).square() / 2).exp()
    along = (-((centres - y[:, None]) / width).square() / 2).exp()
    return 2 * light * (along[:, :, None] * across[:, None, :])[:, None] - 1


def texture(shift, rows=128, columns=128, seed=0):
    """(T, H, W) bytes of a smooth random texture that has moved by (x, y) pixels in each frame."""
    coarse = torch.randn(1, 1, 24, 24, generator=torch.Generator().manual_seed(seed))
    whole = F.interpolate(coarse, (2 * rows, 2 * columns), mode="bicubic")[0, 0]
    whole = ((whole - whole.min()) / (whole.max() - whole.min()) * 255).round().to(torch.uint8).numpy()
    frames = [whole[rows // 2 - y : rows // 2 - y + rows, columns // 2 - x : columns // 2 - x + columns]
              for x, y in shift]  # fmt: skip
    return np.stack(frames)


def make_videos(pixels, text=None):
    """Videos whose latents are their pixels."""
    text = torch.ones(len(pixels), 3, TEXT) if text is None else text
    return Videos(make_prompts(text), pixels, FPS, lambda latents: latents)


def moving(rows=2, frames=3, size=SIZE):
    generator = torch.Generator().manual_seed(1)
    start, speed = (torch.rand(2, rows, 1, generator=generator) for _ in range(2))
    place = size * (0.3 + 0.2 * start + 0.05 * speed * torch.arange(frames))
    return torch.stack([blob(x, y, size=size) for x, y in zip(*place)])


def text_of(rows=2):
    return torch.randn(rows, 3, TEXT, generator=torch.Generator().manual_seed(2))


def make_judge(**fields):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = MotionDiscriminatorConfig.model_validate({"channels": 8, "grid": 4, **fields})
        return MotionDiscriminator(config, TEXT)


@pytest.fixture(scope="module")
def raft_weights(tmp_path_factory):
    """A random raft_small's."""
    define_torchvision_ops()
    from torchvision.models import optical_flow

    path = tmp_path_factory.mktemp("raft") / "small.pth"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        torch.save(optical_flow.raft_small(weights=None).state_dict(), path)
    return path


@pytest.fixture(params=["tracks", "flow", "raft"])
def features(request):
    """Fields that choose each kind."""
    if request.param == "raft":
        return {"features": "raft", "raft_weights": request.getfixturevalue("raft_weights")}
    return {"features": request.param}


def test_tracks_of_constant_speed():
    frames = torch.arange(FRAMES)
    seen = tracks(blob(10 + 1.5 * frames, 20 - 0.75 * frames, light=0.6)[None], FPS).sinh()[0]
    x, y = (10 + 1.5 * frames - SIZE / 2) / SIZE, (20 - 0.75 * frames - SIZE / 2) / SIZE
    torch.testing.assert_close(seen[:, :2] * POSITION, torch.stack([x, y], 1), atol=1e-3, rtol=0)
    speed = torch.tensor([1.5, -0.75]) / SIZE * FPS
    torch.testing.assert_close(seen[:-1, 2:4] * SPEED, speed.expand(FRAMES - 1, 2), atol=1e-2, rtol=0)
    assert (seen[1:-1, 4:6] * ACCELERATION).abs().max() < 0.1
    assert (seen[-1, 2:4] == 0).all(), "there is no speed after the last frame"
    assert (seen[[0, -1], 4:6] == 0).all()
    assert seen[:, 9].std() < 0.03
    assert seen[:, 9].mean() == pytest.approx(0.6, abs=0.03)
    # A Gauss of width 2, exp(-u), that is lowered by a share of its peak and cut off at 0: integrals over u of it, and
    # of u times it.
    low, end = EDGE, -np.log(EDGE)
    light, moment = 1 - low - low * end, 1 - (end + 1) * low - low * end**2 / 2
    assert (seen[:, 6:8] * EXTENT * SIZE).mean() == pytest.approx(2 * np.sqrt(moment / light), rel=0.02)
    assert (seen[:, 8] * MASS * SIZE**2).mean() == pytest.approx(0.6 * 2 * np.pi * 4 * light / (1 - low), rel=0.02)


def test_tracks_of_a_fall():
    frames, gravity = torch.arange(FRAMES), 0.8
    seen = tracks(blob(16 + 0 * frames, 5 + gravity / 2 * frames.square())[None], FPS).sinh()[0]
    torch.testing.assert_close(seen[1:-1, 5] * ACCELERATION, torch.full((FRAMES - 2,), gravity / SIZE * FPS**2),
                               atol=0.1, rtol=0)  # fmt: skip
    assert (seen[1:-1, 4] * ACCELERATION).abs().max() < 0.01
    assert (seen[:-1, 3] * SPEED).diff().min() > 0.1


def test_a_place_does_not_depend_on_light_and_background():
    frames = torch.arange(FRAMES)
    clip = blob(10 + frames, 12 + 0 * frames)[None]
    bright, dim = tracks(clip, FPS), tracks(0.3 * (clip + 1) - 0.9, FPS)
    torch.testing.assert_close(dim[..., :8], bright[..., :8], atol=1e-4, rtol=1e-4)
    assert (dim[..., 8] < bright[..., 8] - 0.1).all()
    colour = clip.expand(-1, -1, 3, -1, -1)
    torch.testing.assert_close(tracks(colour, FPS), bright)


def test_nothing_bright_gives_finite_tracks():
    seen = tracks(torch.full((1, 3, 1, 8, 8), -0.5), FPS)
    assert seen.abs().max() == 0


@pytest.mark.parametrize("rows", [128, 64, 400])
def test_flow_of_a_texture_is_in_heights_a_frame(rows):
    step = (rows // 32, -rows // 64)
    clip = texture([(step[0] * t, step[1] * t) for t in range(3)], rows, rows * 3 // 2)
    cells = cell_flow(clip, 4)
    assert cells.shape == (2, 3, 4, 4)
    inner = cells[:, :, 1:3, 1:3]
    np.testing.assert_allclose(inner[:, 0], step[0] / rows, atol=2e-3)
    np.testing.assert_allclose(inner[:, 1], step[1] / rows, atol=2e-3)
    assert inner[:, 2].max() < 4e-3


def test_flow_becomes_speed_and_its_change():
    flow = torch.zeros(1, 3, 3, 2, 2)
    flow[0, :, 0, 1, 1] = torch.tensor([0.01, 0.02, 0.04])
    flow[0, 1, 2] = 0.03
    seen = motion_features.of_cells(flow, FPS).sinh().unflatten(2, (5, 2, 2))[0]
    torch.testing.assert_close(seen[:, 0, 1, 1] * SPEED, torch.tensor([0.08, 0.16, 0.32]))
    torch.testing.assert_close(seen[:, 3, 1, 1] * ACCELERATION, torch.tensor([0.64, 1.28, 0.0]))
    torch.testing.assert_close(seen[1, 2] * SPEED, torch.full((2, 2), 0.24))
    assert seen[:, :, 0].abs().sum() == pytest.approx(seen[1, 2, 0].sum().item())
    assert (seen[:, [1, 4]] == 0).all()


def test_cells_share_pixels_by_area():
    flow = np.arange(10.0).reshape(1, 1, 2, 5).repeat(2, axis=1).astype(np.float32)
    mean, spread = pooled(flow, *shares(2, 5, 2))
    # Columns 0, 1 and half of 2; half of 2, 3 and 4.
    np.testing.assert_allclose(mean[0, 0], [[(0 + 1 + 1) / 2.5, (1 + 3 + 4) / 2.5], [(5 + 6 + 3.5) / 2.5, 20.5 / 2.5]])
    of_first = np.average((np.arange(3) - 0.8) ** 2, weights=[1, 1, 0.5])
    np.testing.assert_allclose(spread[0, 0, 0, 0], np.sqrt(2 * of_first), rtol=1e-5)
    ours = pooled(torch.from_numpy(flow), *map(torch.from_numpy, shares(2, 5, 2)))
    torch.testing.assert_close(ours[0], torch.from_numpy(mean))
    torch.testing.assert_close(ours[1], torch.from_numpy(spread))


def test_workers_compute_the_same():
    clips = [texture([(seed * t, t) for t in range(3)], 64, 64, seed) for seed in range(5)]
    pool = FlowPool(4, 2)
    try:
        for _ in range(2):
            for ours, here in zip(pool(iter(clips)), FlowPool(4, 0)(clips), strict=True):
                np.testing.assert_array_equal(ours, here)
    finally:
        pool.close()


def test_a_killed_worker_is_one_error():
    pool, clip = FlowPool(4, 1), texture([(0, 0), (1, 0)], 64, 64)
    try:
        pool([clip])
        (process,) = pool._workers.values()
        os.kill(process.pid, signal.SIGTERM)  # as a job that is told to stop
        pool([clip])
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        with pytest.raises(LostInputError, match=r"workers \(1\) must live.*ended with -9"):
            pool([clip])
    finally:
        pool.close()


@pytest.mark.parametrize("end", ["pass", "os._exit(0)", "os.kill(os.getpid(), signal.SIGKILL)"])
def test_workers_end_with_their_process(end, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(f"""
        import os, signal, sys
        import numpy as np
        from afd_scale.models.motion_flow import FlowPool

        if __name__ == "__main__":
            pool = FlowPool(2, 2)
            pool([np.zeros((2, 64, 64), np.uint8)])
            print(*(process.pid for process in pool._workers.values()), "torch" in sys.modules, flush=True)
            {end}
    """)
    )
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    done = subprocess.run(
        [sys.executable, script], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == (-9 if "KILL" in end else 0), done.stderr
    *numbers, has_torch = done.stdout.split()
    assert has_torch == "False", "each process would load it"
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{number}").exists() for number in numbers):
        assert time.monotonic() < deadline, "they are left behind"
        time.sleep(0.05)


def test_raft_of_random_weights_is_torchvisions(raft_weights):
    from torchvision.models import optical_flow

    see, numbers = make_features(MotionDiscriminatorConfig(features="raft", raft_weights=raft_weights, grid=2))
    clip = torch.from_numpy(texture([(0, 0), (4, 2), (8, 4)], 128, 192))[None, :, None].float() / 127.5 - 1
    seen = see(make_videos(clip))
    assert seen.shape == (1, 2, numbers)
    network = optical_flow.raft_small(weights=None)
    network.load_state_dict(torch.load(raft_weights, weights_only=True))
    with torch.no_grad():
        flow = network.eval()(clip[0, :2].expand(-1, 3, -1, -1), clip[0, 1:].expand(-1, 3, -1, -1))[-1] / 128
    mean = flow.unflatten(3, (2, 96)).unflatten(2, (2, 64)).mean((3, 5))
    torch.testing.assert_close(seen.sinh().unflatten(2, (5, 2, 2))[0, :, :2] * SPEED, mean * FPS, atol=1e-5, rtol=1e-3)


def test_raft_is_no_part_of_the_network(raft_weights):
    judge = make_judge(features="raft", raft_weights=raft_weights)
    names = set(judge.state_dict())
    judge(make_videos(moving(1, frames=2)))
    assert set(judge.state_dict()) == names
    assert all(name.split(".")[0] in ("convolutions", "film", "text", "score") for name in names)


def test_raft_weights_are_checked(tmp_path):
    section = {"name": "motion", "features": "raft", "raft_weights": tmp_path / "absent.pth"}
    run = RunConfig.model_validate({"method": {"name": "afd", "discriminator": section}})
    with pytest.raises(ConfigError, match=r"raft_weights \(.*absent.pth\) must be a file of torchvision's weights"):
        check_files(run)
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pth")
    judge = make_judge(features="raft", raft_weights=tmp_path / "other.pth")
    with pytest.raises(ConfigError, match=r"raft_weights \(.*other.pth\) must hold torchvision's raft_small or"):
        judge(make_videos(moving(1, frames=2)))


@pytest.mark.parametrize(
    ("fields", "rule"),
    [
        ({"features": "raft"}, r"raft_weights \(None\) must be given with features raft"),
        ({"features": "flow", "raft_weights": "a.pth"}, r"raft_weights \(a.pth\) must be absent without"),
        ({"optimizer": None}, r"optimizer \(null\) must be given: without training it would score at random"),
        ({"features": "tracks", "workers": 2}, r"workers \(2\) must be 0 with features tracks"),
    ],
)
def test_sections_that_do_not_fit(fields, rule):
    with pytest.raises(ValidationError, match=rule):
        MotionDiscriminatorConfig.model_validate(fields)


def test_logits_do_not_depend_on_the_batch(features):
    judge, pixels, text = make_judge(**features), moving(), text_of()
    whole = judge(make_videos(pixels, text))
    assert whole.shape == (2,)
    assert whole.dtype == torch.float32
    parts = [judge(make_videos(pixels[rows], text[rows])) for rows in (slice(0, 1), slice(1, 2))]
    torch.testing.assert_close(torch.cat(parts), whole, atol=1e-5, rtol=1e-5)
    assert judge.bfloat16()(make_videos(pixels, text)).dtype == torch.float32


def test_motion_and_prompt_matter(features):
    judge, pixels, text = make_judge(**features), moving(), text_of()
    logits = judge(make_videos(pixels, text))
    assert (judge(make_videos(pixels, text.flip(0))) - logits).abs().min() > 1e-4
    assert (judge(make_videos(pixels.flip(1), text)) - logits).abs().min() > 1e-4, "the order of frames"
    padded = judge(make_videos(pixels, F.pad(text, (0, 0, 0, 3))))
    torch.testing.assert_close(padded, logits, atol=1e-5, rtol=1e-5)


def test_each_weight_has_a_gradient_and_the_pixels_none(features):
    judge, pixels = make_judge(**features), moving().requires_grad_()
    judge(make_videos(pixels, text_of())).square().sum().backward()
    without = [name for name, p in judge.named_parameters() if p.grad is None or p.grad.abs().max() == 0]
    assert without == []
    assert pixels.grad is None
