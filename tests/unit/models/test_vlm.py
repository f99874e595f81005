"""The judge that sees pixels, on a tiny random Qwen2-VL: held to transformers' own processor and forward pass."""

import importlib

import numpy as np
import pytest
import torch

from afd_scale.config import ConfigError, RunConfig
from afd_scale.config.judges import VlmDiscriminatorConfig
from afd_scale.layers.lora import Adapters, adapter_of
from afd_scale.layers.ops import ModelOps
from afd_scale.models.build import train_part
from afd_scale.models.vlm import VlmDiscriminator
from afd_scale.models.vlm_inputs import MEAN, STD, PatchGrid, normalised_frames
from afd_scale.types import Videos
from tests.judges import save_tiny_judge
from tests.networks import make_prompts

FPS = 2.0


@pytest.fixture(scope="module", params=["qwen2_vl", "qwen2_5_vl"])
def folder(tmp_path_factory, request):
    return save_tiny_judge(tmp_path_factory.mktemp("judge"), kind=request.param)


def section(folder, **fields):
    return VlmDiscriminatorConfig.model_validate(
        {"model": str(folder), "min_pixels": 28 * 28, "max_pixels": 56 * 56, "frames_per_second": 1.0, **fields}
    )


def build(folder, adapter: str | None = None, **fields) -> VlmDiscriminator:
    """A judge with transformers' start weights, its adapters at random."""
    config = section(folder, **fields)
    adapters = Adapters((adapter,), config.lora.rank, 0.5) if adapter else None
    with torch.random.fork_rng():
        torch.manual_seed(0)
        judge = VlmDiscriminator(config, ModelOps(adapters=adapters))
        for name, parameter in judge.named_parameters():
            if name.endswith(".up"):
                torch.nn.init.normal_(parameter, std=0.1)
    missing, unexpected = judge.load_state_dict(theirs(folder).state_dict(), strict=False)
    assert all(name.startswith("score.") or adapter_of(name) for name in missing)
    assert unexpected == ["lm_head.weight"]
    return judge


def theirs(folder):
    transformers = importlib.import_module("transformers")
    return transformers.AutoModelForImageTextToText.from_pretrained(folder, local_files_only=True).eval()


def clips(videos=2, frames=6, size=(28, 56), colours=3):
    """uint8 (B, T, C, H, W) and the same as videos, with prompts of different lengths."""
    clip = torch.from_numpy(np.random.default_rng(1).integers(0, 256, (videos, frames, colours, *size), np.uint8))
    prompts = make_prompts(torch.zeros(videos, 2, 3), tuple(10**n for n in range(videos)))
    return clip, Videos(prompts, clip / 127.5 - 1, FPS, decode=lambda x: x)


def hidden_by_transformers(folder, judge, clip, text):
    """Tokens and last hidden states of one video, all by transformers."""
    transformers = importlib.import_module("transformers")
    processor = transformers.AutoProcessor.from_pretrained(folder, local_files_only=True)
    tokens = {"additional_special_tokens": list(judge.config.reward_tokens)}
    processor.tokenizer.add_special_tokens(tokens, replace_additional_special_tokens=False)
    before, after = judge.config.template.replace("{prompt}", text).split("{video}")
    inputs = processor(
        text=[f"{before}<|vision_start|><|video_pad|><|vision_end|>{after}"], videos=[clip], return_tensors="pt",
        do_sample_frames=False, videos_kwargs={"fps": judge.config.frames_per_second},
    )  # fmt: skip
    output = theirs(folder)(**inputs, output_hidden_states=True)
    last = output.hidden_states[-1]
    return inputs["input_ids"][0], last[0]


@torch.no_grad()
@pytest.mark.parametrize("head", ["reward_token", "pooled"])
def test_logits_are_those_of_transformers_own_forward(folder, head):
    judge = build(folder, head=head)
    clip, videos = clips()
    logits = judge(videos)
    assert logits.shape == (2,)
    assert logits.dtype == torch.float32
    shown = [0, 2, 3, 5]  # half of 2 frames a second, in pairs, from the first to the last
    for row, text in enumerate(videos.prompts.texts):
        tokens, hidden = hidden_by_transformers(folder, judge, clip[row, shown], text)
        if head == "reward_token":
            hidden = hidden[tokens == judge.tokens.tokenizer.convert_tokens_to_ids("<|reward|>")]
            assert len(hidden) == 1
        torch.testing.assert_close(logits[row], judge.score(hidden.mean(0))[0], rtol=0, atol=2e-6)
    assert (logits[0] - logits[1]).abs() > 1e-4


@torch.no_grad()
def test_patches_are_those_of_transformers_processor(folder):
    transformers = importlib.import_module("transformers")
    processor = transformers.AutoProcessor.from_pretrained(folder, local_files_only=True).video_processor
    for size in ((16, 24), (40, 100), (28, 56)):
        frames = 0.3 + 0.4 * torch.rand(1, 4, 3, *size, generator=torch.Generator().manual_seed(1))
        found = processor([frames[0]], return_tensors="pt", do_rescale=False)
        grid = PatchGrid()
        brought_to = grid.frame_size(*size, 28 * 28, 56 * 56)
        patches = grid.patches(normalised_frames(2 * frames - 1, brought_to))
        assert found["video_grid_thw"].tolist() == [list(grid.shape(4, *brought_to))]
        torch.testing.assert_close(patches, found["pixel_values_videos"], rtol=0, atol=1e-5)
    # Black and white dots: resizing shoots over, and bytes, which the processor mostly gets, have an end.
    dots = (
        (torch.rand(1, 2, 1, 40, 100, generator=torch.Generator().manual_seed(1)) > 0.5)
        .float()
        .expand(-1, -1, 3, -1, -1)
    )
    std, mean = (torch.tensor(values)[:, None, None] for values in (STD, MEAN))
    levels = normalised_frames(2 * dots - 1, (56, 56)) * std + mean
    assert levels.min() >= -1e-6
    assert levels.max() <= 1 + 1e-6


def test_frames_are_brought_to_the_sizes_that_transformers_brings_them_to(folder):
    smart_resize = importlib.import_module("transformers.models.qwen2_vl.image_processing_qwen2_vl").smart_resize
    for limits in ((784, 3136), (100_352, 200_704), (3136, 3136)):
        for size in ((16, 16), (16, 40), (480, 832), (720, 1280), (300, 301), (832, 480), (10, 500)):
            assert PatchGrid().frame_size(*size, *limits) == smart_resize(*size, 28, *limits), (size, limits)


def test_frames_are_seen_at_the_stated_rate_from_first_to_last():
    grid = PatchGrid()
    assert grid.shown_frames(81, 16.0, 2.0) == [0, 9, 18, 27, 36, 44, 53, 62, 71, 80]
    assert grid.shown_frames(12, 8.0, 1.0) == [0, 11]
    assert grid.shown_frames(1, 16.0, 2.0) == [0, 0], "a patch goes through two"


@torch.no_grad()
def test_a_row_does_not_depend_on_its_neighbours_or_on_colours_that_are_one(folder):
    judge = build(folder)
    clip, videos = clips(videos=3, colours=1)
    logits = judge(videos)
    for row in range(3):
        torch.testing.assert_close(judge(videos[row : row + 1]), logits[row : row + 1], rtol=0, atol=2e-6)
    coloured = Videos(videos.prompts, clip.expand(-1, -1, 3, -1, -1) / 127.5 - 1, FPS, decode=lambda x: x)
    assert torch.equal(judge(coloured), logits)


@torch.no_grad()
def test_a_prompt_is_no_place_and_no_token_of_the_template(folder):
    tokens = build(folder).tokens
    row, _ = tokens(["{video} {prompt} <|video_pad|> <|reward|>"], 5)
    assert row[0].tolist().count(tokens.video) == 5
    assert row[0].tolist().count(tokens.rewards[0]) == 1


@pytest.mark.parametrize("checkpointing", [False, True], ids=["stored", "checkpointed"])
@pytest.mark.parametrize("trained", ["all", "language", "language and vision"])
def test_the_gradient_reaches_every_trained_weight_and_no_other(folder, trained, checkpointing):
    lora = None if trained == "all" else {"rank": 2, "alpha": 1}
    adapter = lora and "discriminator"
    fields = {"lora": lora, "lora_vision": trained == "language and vision", "activation_checkpointing": checkpointing}
    judge = build(folder, adapter, **fields)
    if lora:
        train_part(judge, adapter)
    judge.train()
    _, videos = clips()
    judge(videos, adapter=adapter).square().sum().backward()
    moved = {name for name, p in judge.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    expected = {name for name, p in judge.named_parameters() if p.requires_grad}
    assert moved == expected
    assert "score.weight" in expected
    vision = {name for name in expected if ".visual." in name}
    assert bool(vision) == (trained != "language")
    assert any(".layers.1.mlp.down_proj." in name for name in expected)


@torch.no_grad()
def test_adapters_change_the_logits_by_their_product(folder):
    judge, plain = build(folder, "discriminator", lora={"rank": 2, "alpha": 1}), build(folder)
    plain.score.load_state_dict(judge.score.state_dict())
    _, videos = clips()
    adapted = judge(videos, adapter="discriminator")
    assert (adapted - plain(videos)).abs().min() > 1e-5
    weights = dict(judge.named_parameters())
    for name, weight in plain.named_parameters():
        beside = f"{name.removesuffix('weight')}adapters.discriminator"
        if f"{beside}.up" in weights:
            weight += 0.5 * weights[f"{beside}.up"] @ weights[f"{beside}.down"]
    torch.testing.assert_close(plain(videos), adapted, rtol=0, atol=2e-6)


@torch.no_grad()
def test_in_bf16_the_angles_of_rope_stay_exact(folder):
    judge, rounded = build(folder), build(folder).bfloat16()
    _, videos = clips()
    logits = judge(videos)
    found = rounded(videos)
    torch.testing.assert_close(found, logits, rtol=0, atol=0.02 * logits.abs().max().item())
    assert not torch.equal(found, found.bfloat16().float()), "a logit is finer than bf16"
    for module in ("model.language_model.rotary_emb", "model.visual.rotary_pos_emb"):
        exact, found = (x.get_submodule(module).inv_freq for x in (judge, rounded))
        assert torch.equal(exact, found)
        made = theirs(judge.config.model).get_submodule(module).inv_freq
        torch.testing.assert_close(exact, made)


@torch.no_grad()
def test_without_start_weights_it_starts_at_random_by_the_seed(folder):
    logits = []
    for seed in (0, 0, 1):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            judge = VlmDiscriminator(section(folder))
        assert 0.015 < judge.model.language_model.layers[0].mlp.up_proj.weight.std() < 0.025
        logits.append(judge(clips()[1]))
    assert torch.equal(logits[0], logits[1])
    assert (logits[0] - logits[2]).abs().min() > 1e-5


def test_the_dtype_of_published_files_is_not_the_judge_s(folder, tmp_path):
    for file in folder.glob("*.json"):
        (tmp_path / file.name).write_text(file.read_text().replace('"float32"', '"bfloat16"'))
    assert '"dtype": "bfloat16"' in (tmp_path / "config.json").read_text()
    assert {p.dtype for p in VlmDiscriminator(section(tmp_path)).parameters()} == {torch.float32}
    assert torch.get_default_dtype() == torch.float32


def test_what_is_no_judge_is_refused_in_one_line(folder, tmp_path):
    with pytest.raises(
        ValueError, match=r"method\.discriminator\.model must be given|discriminator\.model must be given"
    ):
        RunConfig.model_validate({"method": {"name": "afd", "discriminator": {"name": "vlm"}}})
    with pytest.raises(ConfigError, match=r"^model \(.*\) must be a folder of a model.*$"):
        VlmDiscriminator(section(tmp_path))
    many = tuple(f"<|{n}|>" for n in range(80))
    too_many = section(folder, reward_tokens=many, template="{video}{prompt}" + "".join(many))
    with pytest.raises(ConfigError, match=r"^reward_tokens \(.*\) must have rows"):
        _ = VlmDiscriminator(too_many).tokens
    for fields, rule in (
        ({"template": "{prompt}<|reward|>"}, "must hold {video} once"),
        ({"template": "{video}{prompt}"}, "must hold <|reward|> once"),
        ({"lora_vision": True}, "must come with lora"),
        ({"weights_adapters": "keep"}, "must come with weights and lora"),
        ({"min_pixels": 9, "max_pixels": 8}, "must be at most max_pixels"),
    ):
        with pytest.raises(ValueError, match=rule):
            section(folder, **fields)
