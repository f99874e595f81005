"""Causal Wan: its passes agree with one another, sizes are data, and nothing in it waits for the device."""

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from afd_scale.config.models import StudentConfig
from afd_scale.config.sampler import SamplerConfig
from afd_scale.layers.ops import ModelOps
from afd_scale.models.wan import CausalWan, PatchEmbedding
from afd_scale.rollout.sampler import Noise, Sampler
from tests.networks import make_policy

CHANNELS, HEIGHT, WIDTH, TEXT = 3, 4, 6, 8
TINY = {
    "dim": 24, "ffn_dim": 40, "num_heads": 2, "num_layers": 3, "freq_dim": 16, "text_dim": TEXT, "text_length": 5,
    "latent_channels": CHANNELS, "prediction": "velocity", "chunk_frames": 2, "timesteps": [1000, 500],
    "timestep_shift": 5.0,
}  # fmt: skip
WINDOWS = {
    "no_window": {},
    "window": {"window_frames": 4},
    "window_sink": {"window_frames": 6, "sink_frames": 2},
}
every_window = pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS.keys())


def build(seed=0, **fields):
    """A tiny student with random numbers in every parameter (an untrained one predicts zero)."""
    model = make_policy(TINY | fields)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3, generator=generator)
    return model


def video(frames=6, *, rows=2, seed=1, channels=CHANNELS, height=HEIGHT, width=WIDTH):
    return torch.randn(rows, frames, channels, height, width, generator=torch.Generator().manual_seed(seed))


def chunkwise_timestep(frames=6, *, rows=2, chunk_frames=2):
    """(B, F), different in each chunk and row."""
    chunks = torch.linspace(150, 950, rows * (frames // chunk_frames)).reshape(rows, -1)
    return chunks.repeat_interleave(chunk_frames, dim=1)


def text(length=4, *, rows=2):
    return torch.randn(rows, length, TEXT, generator=torch.Generator().manual_seed(9))


def gradients(model, output):
    """Of every parameter, for one random direction of the output."""
    direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(5))
    values = torch.autograd.grad((output * direction).sum(), list(model.parameters()))
    return {name: value for (name, _), value in zip(model.named_parameters(), values, strict=True)}


def assert_same_gradients(ours, reference, tolerance):
    assert ours.keys() == reference.keys()
    for name, gradient in ours.items():
        scale = reference[name].abs().max()
        assert scale > 0, f"{name} has no gradient"
        assert (gradient - reference[name]).abs().max() <= tolerance * scale, name


# Passes against passes.


@torch.no_grad()
def cached_velocities(model, noisy, clean, timestep, prompt):
    """Chunk by chunk: the velocity given the cache, then the clean chunk into the cache."""
    frames, chunk = noisy.shape[1], model.sampler.chunk_frames
    cache = model.new_cache(frames)
    velocities = []
    for start in range(0, frames, chunk):
        here = slice(start, start + chunk)
        # Another pass first, whose keys and values must leave no trace.
        model(noisy[:, here] * 3, timestep[:, here], prompt, cache=cache)
        velocities.append(model(noisy[:, here], timestep[:, here], prompt, cache=cache))
        if start + chunk < frames:
            model(clean[:, here], torch.zeros_like(timestep[:, here]), prompt, cache=cache)
            cache.advance()
    return torch.cat(velocities, dim=1)


@every_window
def test_the_cache_changes_nothing(window):
    model, noisy, clean, timestep = build(**window), video(12), video(12, seed=2), chunkwise_timestep(12)
    cached = cached_velocities(model, noisy, clean, timestep, text())
    with torch.no_grad():
        forced = model(noisy, timestep, text(), clean=clean)
        # Recomputed: the clean past and the chunk in one block-causal pass, once for each chunk.
        recomputed = [
            model(
                torch.cat([clean[:, :start], noisy[:, start : start + 2]], dim=1),
                torch.cat([torch.zeros(2, start), timestep[:, start : start + 2]], dim=1),
                text(),
            )[:, start:]
            for start in range(0, 12, 2)
        ]
    torch.testing.assert_close(cached, forced, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(cached, torch.cat(recomputed, dim=1), rtol=1e-4, atol=1e-4)


def long_video_and_its_velocities(**window):
    """A model of three layers, noisy and clean latents of 20 frames, their timesteps, and the cached velocities."""
    model, noisy, clean, timestep = build(**window), video(20), video(20, seed=2), chunkwise_timestep(20)
    return model, noisy, clean, timestep, cached_velocities(model, noisy, clean, timestep, text())


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize(("window", "first", "gap"), [
    ({}, 14, (0, 0)),
    ({"window_frames": 4}, 14, (0, 8)),
    ({"window_frames": 6, "sink_frames": 2}, 14, (2, 8)),
    ({"window_frames": 6, "sink_frames": 2}, 4, (0, 0)),
    ({"window_frames": 6, "sink_frames": 2}, 0, (0, 0)),
    ({"window_frames": 4, "positions": "window"}, 14, (0, 8)),
    ({"window_frames": 20, "sink_frames": 2, "positions": "window"}, 14, (0, 0)),
])  # fmt: skip
def test_a_window_of_a_longer_video_given_what_counts_of_its_past(window, first, gap, joint):
    """Three layers see three windows back; what is older leaves no trace."""
    model, noisy, clean, timestep, cached = long_video_and_its_velocities(**window)
    given = torch.cat([clean[:, : gap[0]], clean[:, gap[1] : first + 4]], dim=1)
    here = slice(first, first + 4)
    # Two states of each row, the second one of other noise.
    states = torch.stack([noisy[:, here], noisy[:, here] + 1], dim=1).flatten(0, 1)
    times = timestep[:, here].repeat_interleave(2, dim=0)
    with torch.set_grad_enabled(joint):
        velocities = model(states, times, text(), clean=given, first_frame=first).detach()
    torch.testing.assert_close(velocities[::2], cached[:, here], rtol=1e-4, atol=1e-4)
    assert (velocities[1::2] - cached[:, here]).abs().max() > 1e-2


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize(("window", "clean_frames", "noisy_frames"), [
    ({"window_frames": 6, "sink_frames": 2}, [0, 1, *range(8, 18)], range(14, 18)),
    ({"window_frames": 6, "positions": "window"}, range(12), range(8, 12)),
])  # fmt: skip
def test_a_window_stands_where_positions_are_counted_from(window, clean_frames, noisy_frames, joint, monkeypatch):
    model, asked = build(**window), []
    make = model.rotation

    def watched(latents, *frames, repeats=1):
        asked.extend([frame for run in frames for frame in run] * repeats)
        return make(latents, *frames, repeats=repeats)

    monkeypatch.setattr(model, "rotation", watched)
    with torch.set_grad_enabled(joint):
        model(video(4, rows=4), chunkwise_timestep(4, rows=4), text(), clean=video(12), first_frame=14)
    assert asked == [*clean_frames, *noisy_frames, *noisy_frames], "of the clean frames, and of two states"


@torch.no_grad()
def test_a_window_given_less_of_its_past_is_near_and_elsewhere_is_far():
    model, noisy, clean, timestep, cached = long_video_and_its_velocities(window_frames=6, sink_frames=2)

    def distance(given, first=14):
        velocities = model(noisy[:, 14:18], timestep[:, 14:18], text(), clean=given, first_frame=first)
        return (velocities - cached[:, 14:18]).abs().mean()

    sink, recent = model.sampler.context(14)
    assert (sink, recent) == (range(2), range(12, 14))
    seen = torch.cat([clean[:, :2], clean[:, 12:18]], dim=1)
    assert 1e-4 < distance(seen) < 0.3 * distance(torch.cat([clean[:, :2], clean[:, 14:18]], dim=1), first=14)
    assert distance(seen, first=20) > 1e-4, "positions count"


def test_a_window_forgets():
    noisy, clean, timestep = video(12), video(12, seed=2), chunkwise_timestep(12)
    everything, window, sink = (
        cached_velocities(build(**fields), noisy, clean, timestep, text()) for fields in WINDOWS.values()
    )
    torch.testing.assert_close(window[:, :4], everything[:, :4], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sink[:, :6], everything[:, :6], rtol=1e-4, atol=1e-4)
    assert (window[:, 4:] - everything[:, 4:]).abs().amax(dim=(0, 2, 3, 4)).min() > 1e-3
    assert (sink[:, 6:] - everything[:, 6:]).abs().amax(dim=(0, 2, 3, 4)).min() > 1e-3


@torch.no_grad()
def test_no_chunk_sees_a_later_one():
    noisy, timestep = video(), chunkwise_timestep()
    changed = noisy.clone()
    changed[:, 4:] += 1

    def difference(**fields):
        model = build(**fields)
        change = model(changed, timestep, text()) - model(noisy, timestep, text())
        return change.abs().amax(dim=(0, 2, 3, 4))

    assert difference()[:4].max() == 0
    assert difference()[4:].min() > 1e-3
    assert difference(chunk_frames=6).min() > 1e-3


@torch.no_grad()
def test_a_noisy_chunk_sees_itself_and_clean_chunks_before_it():
    model, noisy, clean, timestep = build(), video(), video(seed=2), chunkwise_timestep()

    def seen_after_changing(which):
        videos = {"noisy": noisy.clone(), "clean": clean.clone()}
        videos[which][:, 2:4] += 1
        change = model(videos["noisy"], timestep, text(), clean=videos["clean"])
        change = change - model(noisy, timestep, text(), clean=clean)
        return [bool(x > 1e-4) for x in change.abs().amax(dim=(0, 2, 3, 4)).unflatten(0, (3, 2)).amax(1)]

    assert seen_after_changing("noisy") == [False, True, False]
    assert seen_after_changing("clean") == [False, False, True]


@pytest.mark.parametrize("clean_gradient", [True, False])
@every_window
def test_noised_states_share_a_clean_row(window, clean_gradient):
    model, states, frames = build(**window), 3, 8
    clean, prompt = video(frames, seed=2), text()
    noisy, timestep = video(frames, rows=2 * states), chunkwise_timestep(frames, rows=2 * states)
    together = model(noisy, timestep, prompt, clean=clean, clean_gradient=clean_gradient)
    apart = [
        model(noisy[s::states], timestep[s::states], prompt, clean=clean, clean_gradient=clean_gradient)
        for s in range(states)
    ]
    expected = torch.stack(apart, dim=1).flatten(0, 1)
    torch.testing.assert_close(together, expected, rtol=1e-4, atol=1e-4)
    assert_same_gradients(gradients(model, together), gradients(model, expected), 1e-4)


@every_window
def test_the_clean_pass_with_and_without_gradient(window):
    model, noisy, timestep = build(**window), video(8), chunkwise_timestep(8)
    clean = video(8, seed=2).requires_grad_()
    through = model(noisy, timestep, text(), clean=clean)
    stopped = model(noisy, timestep, text(), clean=clean, clean_gradient=False)
    torch.testing.assert_close(stopped, through, rtol=1e-4, atol=1e-4)

    ours, full = gradients(model, stopped), gradients(model, model(noisy, timestep, text(), clean=clean))
    name = "blocks.0.self_attn.k.weight"
    assert (ours[name] - full[name]).abs().max() > 1e-2 * full[name].abs().max()
    assert torch.autograd.grad(through.square().sum(), clean)[0].abs().max() > 0
    assert torch.autograd.grad(stopped.square().sum(), clean, allow_unused=True) == (None,)


class ConstantPast(ModelOps):
    """Cuts the gradient at the keys and values of the clean half of a teacher-forcing pass."""

    def attention(self, q_BLND, k_BLND, v_BLND, *rest):
        cut = [torch.cat([x[:, : x.shape[1] // 2].detach(), x[:, x.shape[1] // 2 :]], dim=1) for x in (k_BLND, v_BLND)]
        return super().attention(q_BLND, *cut, *rest)


@every_window
def test_without_gradient_the_clean_past_is_a_constant(window):
    model, noisy, clean, timestep = build(**window), video(8), video(8, seed=2), chunkwise_timestep(8)
    stopped = gradients(model, model(noisy, timestep, text(), clean=clean, clean_gradient=False))
    cut = CausalWan(model.config, model.sampler, ConstantPast())
    cut.load_state_dict(model.state_dict())
    assert_same_gradients(stopped, gradients(cut, cut(noisy, timestep, text(), clean=clean)), 1e-4)


@pytest.mark.parametrize("recompute", ["full", "keep_attention"])
@pytest.mark.parametrize("mode", ["block_causal", "teacher_forcing", "clean_past"])
def test_activation_checkpointing_changes_no_gradient(mode, recompute):
    noisy, timestep = video(), chunkwise_timestep()
    options = {
        "block_causal": {},
        "teacher_forcing": {"clean": video(seed=2)},
        "clean_past": {"clean": video(seed=2), "clean_gradient": False},
    }[mode]
    attention, calls = Counter(), []
    plain, recomputing = build(), build(activation_checkpointing=recompute)
    recomputing.blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    outputs = [model(noisy, timestep, text(), **options) for model in (plain, recomputing)]
    before = len(calls)
    assert torch.equal(*outputs)
    with CountingAttention(attention):
        found = gradients(recomputing, outputs[1])
    assert_same_gradients(found, gradients(plain, outputs[0]), 1e-6)
    assert len(calls) == before + 1, "the block must run once more for its gradient"
    assert bool(attention) == (recompute == "full"), "kept attention is not computed again"


class CountingAttention(TorchDispatchMode):
    """Forward calls of the attention kernel."""

    def __init__(self, calls):
        super().__init__()
        self.calls = calls

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default:
            self.calls["forward"] += 1
        return function(*args, **(kwargs or {}))


# What goes in and comes out.


def test_an_untrained_student_predicts_nothing():
    model = make_policy(TINY)
    assert model(video(), chunkwise_timestep(), text()).abs().max() == 0


@torch.no_grad()
def test_an_x0_prediction_comes_out_as_a_velocity():
    timestep = chunkwise_timestep()
    timestep[:, :2] = 0
    prediction = build()(video(), timestep, text())
    velocity = build(prediction="x0")(video(), timestep, text())
    sigma = timestep.div(1000).clamp(min=1e-3)[..., None, None, None]
    torch.testing.assert_close(velocity, (video() - prediction) / sigma)


@torch.no_grad()
def test_text_is_padded_with_zero_rows():
    model, padded = build(), F.pad(text(3), (0, 0, 0, 2))
    velocity = model(video(), chunkwise_timestep(), text(3))
    assert torch.equal(model(video(), chunkwise_timestep(), padded), velocity)
    assert not torch.allclose(build(text_length=9)(video(), chunkwise_timestep(), text(3)), velocity), (
        "the padding is attended"
    )


def test_too_much_text_is_refused_in_one_line():
    message = r"^text rows \(6\) must be at most text_length \(5\)$"
    with pytest.raises(ValueError, match=message):
        build()(video(), chunkwise_timestep(), text(6))


def test_a_time_for_all_frames_is_refused_in_one_line():
    with pytest.raises(ValueError, match=r"^timestep \(2, 1\) must be \(B, F\) \(2, 6\), as the latents$"):
        build()(video(), chunkwise_timestep()[:, :1], text())


@pytest.mark.parametrize("options", [{}, {"clean": video(seed=2)}], ids=["block_causal", "teacher_forcing"])
def test_bfloat16_weights_take_and_give_float32_latents(options):
    model = build()
    expected = model(video(), chunkwise_timestep(), text(), **options)
    velocity = model.bfloat16()(video(), chunkwise_timestep(), text(), **options)
    assert velocity.dtype == torch.float32
    assert (velocity - expected).abs().mean() < 0.05 * expected.abs().mean()
    velocity.square().mean().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert model.bfloat16()(video().bfloat16(), chunkwise_timestep(), text()).dtype == torch.bfloat16


def test_each_frame_is_modulated_by_its_own_time():
    model, timestep = build(), chunkwise_timestep()
    later = timestep.clone()
    later[:, 4:] += 40
    with torch.no_grad():
        change = model(video(), later, text()) - model(video(), timestep, text())
    assert change[:, :4].abs().max() == 0
    assert change[:, 4:].abs().max() > 1e-3


def test_patch_embedding_is_a_strided_convolution():
    embedding = PatchEmbedding(3, 10, (1, 2, 3))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in embedding.parameters():
            parameter.normal_(generator=generator)
    latents = video(5, height=4, width=9)
    expected = F.conv3d(latents.transpose(1, 2), embedding.weight, embedding.bias, stride=(1, 2, 3))
    embedded = embedding(embedding.patches(latents))
    torch.testing.assert_close(embedded, expected.flatten(2).transpose(1, 2), rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize(
    ("frames", "height", "width", "fields"),
    [
        (5, 6, 10, {"dim": 30, "num_heads": 3, "chunk_frames": 1}),
        (9, 2, 14, {"dim": 20, "num_heads": 1, "chunk_frames": 3, "window_frames": 6, "sink_frames": 3}),
        (7, 3, 5, {"dim": 14, "num_heads": 7, "chunk_frames": 7, "patch": (1, 1, 5)}),
    ],
    ids=str,
)
def test_any_size(frames, height, width, fields):
    model = build(**fields)
    noisy, clean = (video(frames, seed=seed, height=height, width=width) for seed in (1, 2))
    timestep = chunkwise_timestep(frames, chunk_frames=fields["chunk_frames"])
    videos = Sampler(model.sampler).rollout(model, text(), Noise(noisy, clean[None]))
    assert videos.shape == noisy.shape
    assert videos.isfinite().all()
    cached = cached_velocities(model, noisy, clean, timestep, text())
    torch.testing.assert_close(cached, model(noisy, timestep, text(), clean=clean), rtol=1e-4, atol=1e-4)


# Without a device: `.item()`, `.tolist()`, `.cpu()` and branches on values fail on meta tensors.


@pytest.mark.parametrize(
    "fields", [{}, {"window_frames": 4, "sink_frames": 2, "activation_checkpointing": True}], ids=str
)
def test_no_pass_waits_for_the_device(fields):
    model = build(**fields).to("meta")
    noisy, clean, timestep, prompt = (x.to("meta") for x in (video(), video(seed=2), chunkwise_timestep(), text()))
    for options in ({}, {"clean": clean}, {"clean": clean, "clean_gradient": False}):
        velocity = model(noisy, timestep, prompt, **options)
        velocity.sum().backward()
        assert velocity.shape == noisy.shape
    assert all(p.grad is not None for p in model.parameters())
    assert Sampler(model.sampler).rollout(model, prompt, Noise(noisy, noisy[None])).shape == noisy.shape


class RecordingOps(ModelOps):
    """Writes down what a model asks of its ops."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def linear(self, in_features, out_features):
        self.calls.append("linear")
        return super().linear(in_features, out_features)

    def attention(self, *arguments):
        self.calls.append("attention")
        return super().attention(*arguments)


def test_linears_and_attention_go_through_the_ops():
    ops = RecordingOps()
    model = make_policy(TINY, ops)
    assert ops.calls == ["linear"] * 3 * 10
    ops.calls.clear()
    model(video(), chunkwise_timestep(), text())
    assert ops.calls == ["attention"] * 3


def num_parameters(*, dim, ffn, layers, channels=16, text=4096, freq=256):
    def linear(inputs, outputs):
        return (inputs + 1) * outputs

    attention = 4 * linear(dim, dim) + 2 * dim  # q, k, v, o, and the norms of q and k
    block = 2 * attention + 2 * dim + linear(dim, ffn) + linear(ffn, dim) + 6 * dim
    embeddings = linear(4 * channels, dim) + linear(text, dim) + linear(dim, dim)
    time = linear(freq, dim) + linear(dim, dim) + linear(dim, 6 * dim)
    return layers * block + embeddings + time + linear(dim, 4 * channels) + 2 * dim


@pytest.mark.parametrize(
    ("architecture", "expected", "published"),
    [
        ("wan-1.3b", num_parameters(dim=1536, ffn=8960, layers=30), 1.42e9),
        ("wan-14b", num_parameters(dim=5120, ffn=13824, layers=40), 14.29e9),
    ],
)
def test_presets_have_the_published_size(architecture, expected, published):
    with torch.device("meta"):
        model = CausalWan(StudentConfig(architecture=architecture), SamplerConfig(family="self-forcing"))
    assert sum(p.numel() for p in model.parameters()) == expected == pytest.approx(published, rel=2e-3)


def test_1_3b_has_1_418_996_800_parameters():
    assert num_parameters(dim=1536, ffn=8960, layers=30) == 1_418_996_800
