"""Scorers: one logit for each video, which depends on the prompt and not on its padding."""

import pytest
import torch
import torch.nn.functional as F

from afd_scale.codecs.identity import IdentityCodec
from afd_scale.config.judges import ConvDiscriminatorConfig, LatentDiscriminatorConfig
from afd_scale.config.models import StudentConfig, WanConfig
from afd_scale.config.sampler import SamplerConfig
from afd_scale.layers.lora import Adapters, adapter_of
from afd_scale.layers.ops import ModelOps
from afd_scale.models.build import train_part
from afd_scale.models.discriminators import ConvDiscriminator, LatentDiscriminator
from afd_scale.models.wan import CausalWan
from tests.networks import make_videos

FRAMES, TEXT = 4, 8


def conv(**fields):
    config = ConvDiscriminatorConfig.model_validate({"channels": 8, "identity_patch": (3, 4), **fields})
    return ConvDiscriminator(config, FRAMES, 48, (4, 6), TEXT)


def latent_config(**fields):
    config = {
        "dim": 24, "ffn_dim": 40, "num_heads": 2, "num_layers": 2, "freq_dim": 16, "text_dim": TEXT, "text_length": 9,
        "latent_channels": 48, **fields,
    }  # fmt: skip
    return LatentDiscriminatorConfig.model_validate(config)


def latent(*, ops=None, **fields):
    return LatentDiscriminator(latent_config(**fields), ops)


def build(make, **fields):
    """An untrained scorer, the same each time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make(**fields)


def inputs(rows=3):
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(rows, FRAMES, 48, 4, 6, generator=generator)
    return latents, torch.randn(rows, 5, TEXT, generator=generator)


def of_features(**fields):
    return latent(features=(1, 2), head_channels=8, weights="given", **fields)


every_scorer = pytest.mark.parametrize("make", [conv, latent, of_features])


@every_scorer
def test_one_float32_logit_for_each_row(make):
    model, (latents, text) = build(make), inputs()
    logits = model(make_videos(latents, text))
    assert logits.shape == (3,)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(model(make_videos(latents[1:2], text[1:2])), logits[1:2], rtol=1e-4, atol=1e-4)
    assert model.bfloat16()(make_videos(latents, text)).dtype == torch.float32


@every_scorer
def test_the_video_and_the_prompt_matter(make):
    model, (latents, text) = build(make), inputs()
    videos = make_videos(latents, text)
    logits = model(videos)
    assert (model(make_videos(latents, text.flip(0))) - logits).abs()[[0, 2]].min() > 1e-3
    assert (model(videos.of(latents.flip(0))) - logits).abs()[[0, 2]].min() > 1e-3
    assert (model(videos.of(latents.flip(1))) - logits).abs().min() > 1e-3, "the order of the frames must matter"


@every_scorer
def test_rows_of_zeros_in_the_text_do_not_matter(make):
    model, (latents, text) = build(make), inputs()
    logits, padded = (model(make_videos(latents, rows)) for rows in (text, F.pad(text, (0, 0, 0, 3))))
    torch.testing.assert_close(padded, logits, rtol=1e-5, atol=1e-5)


@every_scorer
def test_each_parameter_and_the_video_have_a_gradient(make):
    model, (latents, text) = build(make), inputs()
    model(make_videos(latents.requires_grad_(), text)).square().sum().backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or p.grad.abs().max() == 0]
    assert without == []
    assert (latents.grad.abs().amax(dim=(2, 3, 4)) > 0).all(), "each frame of each video"


def test_checkpointed_latent_scorer_has_the_same_gradients():
    latents, text = inputs()
    plain, recomputing = build(latent), build(latent, activation_checkpointing=True)
    for model in (plain, recomputing):
        model(make_videos(latents, text)).sum().backward()
    for ours, reference in zip(recomputing.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, reference.grad)


def test_the_latent_scorer_looks_both_ways():
    model, (latents, text) = build(latent), inputs(rows=1)
    seen = []
    model.blocks[-1].register_forward_hook(lambda block, arguments, result: seen.append(result[0]))
    model(make_videos(latents, text))
    changed = latents.clone()
    changed[:, -1] += 1
    model(make_videos(changed, text))
    tokens = (seen[1] - seen[0]).abs().amax(dim=(0, 2)).unflatten(0, (FRAMES, -1)).amax(1)
    assert tokens.min() > 1e-3, "the first frame must see the last"


def test_an_adapter_judges_when_it_is_named():
    model, (latents, text) = (
        build(latent, ops=ModelOps(adapters=Adapters(("discriminator", "other"), 2, 0.5))),
        inputs(),
    )
    videos = make_videos(latents, text)
    base = model(videos)
    assert torch.equal(model(videos, adapter="discriminator"), base), "a new adapter changes nothing"
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if adapter_of(name) == "discriminator":
                parameter.normal_(0, 0.3, generator=torch.Generator().manual_seed(2))
    assert (model(videos, adapter="discriminator") - base).abs().min() > 1e-3
    assert torch.equal(model(videos, adapter="other"), base)
    assert torch.equal(model(videos), base)


def test_a_head_on_frozen_features_learns_alone():
    model, (latents, text) = build(of_features), inputs()
    train_part(model, None)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if name.startswith("head.")}
    logits = model(make_videos(latents, text))
    seen, nodes = set(), [logits.grad_fn]
    while nodes:  # of the graph, to its leaves
        node = nodes.pop()
        seen |= {id(node.variable)} if hasattr(node, "variable") else set()
        nodes += [parent for parent, _ in node.next_functions if parent is not None]
    assert seen == {id(p) for p in model.parameters() if p.requires_grad}, "a gradient goes on into the trunk"
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.head.parameters())


def test_frozen_features_end_with_the_last_layer_read():
    deep, shallow = build(latent, features=(1,), weights="given", num_layers=2), build(latent, num_layers=2)
    assert len(deep.blocks) == 1
    assert len(shallow.blocks) == 2


def test_a_gradient_by_the_latents_passes_frozen_features():
    model, (latents, text) = build(of_features), inputs()
    train_part(model, None)
    latents.requires_grad_()
    (gradient,) = torch.autograd.grad(model(make_videos(latents, text)).sum(), latents)
    assert gradient.abs().max() > 0


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"features": (3,), "weights": "given"}, "features .3. must be at most num_layers .2."),
        ({"features": (1,)}, "must come with weights and without lora"),
        ({"features": (1,), "weights": "given", "lora": {}}, "must come with weights and without lora"),
    ],
    ids=str,
)
def test_features_that_cannot_be_are_refused(fields, line):
    with pytest.raises(ValueError, match=line):
        latent_config(**fields)


def test_what_a_wan_has_no_start_weights_for_starts_anew():
    config = latent_config().model_dump(include=set(WanConfig.model_fields))
    trunk = CausalWan(StudentConfig.model_validate(config), SamplerConfig()).state_dict()
    model = build(latent, ops=ModelOps(adapters=Adapters(("discriminator",), 2, 0.5)))
    base = {name for name, _ in model.named_parameters() if adapter_of(name) is None}
    assert {name for name, _ in model.named_parameters() if model.starts_anew(name)} == base - trunk.keys() != set()


def test_latents_become_the_video_that_the_identity_codec_encoded():
    video = torch.rand(2, 3 * FRAMES, 1, 16, 24, generator=torch.Generator().manual_seed(0))
    assert torch.equal(build(conv)._stack_frames(IdentityCodec(3, 4).encode(video)), video[:, :, 0])


@pytest.mark.parametrize(("pixels", "size"), [(1, (6, 10)), (2, (3, 5)), (4, (1, 3))], ids=str)
def test_odd_video_sizes(pixels, size):
    channels = 3 * pixels**2
    config = ConvDiscriminatorConfig(channels=4, identity_patch=(3, pixels))
    model = ConvDiscriminator(config, 2, channels, size, TEXT)
    assert model(make_videos(torch.randn(2, 2, channels, *size), torch.randn(2, 5, TEXT))).shape == (2,)
