"""The plan of a judge of pixels, held to torch's own counts on a small one, and to the size of a published one."""

import json

import pytest
import torch

from afd_scale.config import RunConfig
from afd_scale.config.judges import VlmDiscriminatorConfig
from afd_scale.layers.lora import Adapters
from afd_scale.layers.ops import ModelOps
from afd_scale.models.build import train_part
from afd_scale.models.vlm import VlmDiscriminator
from afd_scale.planning.flops import _judge_flops, video_flops
from afd_scale.planning.gpus import GPUS
from afd_scale.planning.parameters import network_sizes
from afd_scale.planning.plan import make_plan
from afd_scale.planning.vlm import Shown, activation_bytes, shown_video, stacks
from afd_scale.planning.workload import workload
from afd_scale.types import Videos
from tests.judges import save_tiny_judge
from tests.networks import make_prompts
from tests.unit.planning.test_flops import counted
from tests.unit.planning.test_memory import give_gradients, measured_peak

# Wide beside their head, so that no bias or norm decides.
TEXT = {
    "hidden_size": 256, "intermediate_size": 640, "num_hidden_layers": 6, "num_attention_heads": 8,
    "rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]},
}  # fmt: skip
VISION = {
    "qwen2_vl": {"depth": 5, "embed_dim": 256, "num_heads": 8, "hidden_size": 256, "mlp_ratio": 3},
    "qwen2_5_vl": {"depth": 5, "hidden_size": 256, "num_heads": 8, "out_hidden_size": 256, "intermediate_size": 640},
}
SHOWN = Shown(frames=12, height=112, width=168, colours=3, fps=2.0)


@pytest.fixture(scope="module", params=list(VISION))
def folder(tmp_path_factory, request):
    return save_tiny_judge(tmp_path_factory.mktemp("judge"), (), request.param, TEXT, VISION[request.param])


def build(folder, trained, checkpointing=False):
    fields = {"lora": None if trained == "all" else {"rank": 4}, "lora_vision": trained == "language and vision"}
    config = VlmDiscriminatorConfig.model_validate(
        {"model": str(folder), "frames_per_second": 1, "min_pixels": 1, "activation_checkpointing": checkpointing,
         "template": "{video}{prompt}<|reward|>", **fields}
    )  # fmt: skip
    judge = VlmDiscriminator(config, ModelOps(adapters=config.lora and Adapters(("judge",), 4, 1.0)))
    if config.lora:
        train_part(judge, "judge")
    pixels = torch.rand(1, SHOWN.frames, 3, SHOWN.height, SHOWN.width)
    videos = Videos(make_prompts(torch.zeros(1, 1, 1)), pixels, SHOWN.fps, decode=lambda x: x)
    videos.pixels()
    text = len("prompt 0") + 3  # bytes, and the three tokens around
    return judge.train(), videos, stacks(config, SHOWN, text)


ways = pytest.mark.parametrize("trained", ["all", "language", "language and vision"])


@ways
def test_flops_are_torchs(folder, trained):
    judge, videos, both = build(folder, trained)
    rank = 0 if trained == "all" else 4
    vision, language = both
    # torch counts attention to what a causal mask hides, and Qwen2.5-VL's windows are all one frame here.
    hidden = 2 * 2 * TEXT["hidden_size"] * language.layers * language.tokens * (language.tokens - 1) / 2
    with torch.no_grad():
        forward = counted(lambda: judge(videos, adapter=judge.adapter))
    planned = _judge_flops(judge.config, both, rank, gradient=False, recompute=False)
    assert forward == pytest.approx(planned.total + hidden, rel=0.005)
    update = counted(lambda: judge(videos, adapter=judge.adapter).sum().backward())
    planned = _judge_flops(judge.config, both, rank, gradient=True, recompute=False)
    # The first layers, of patches, pass no gradient on, and have one where they are trained.
    first = 2 * vision.tokens * 3 * 2 * 14**2 * vision.width if vision.gradient else 0
    assert update == pytest.approx(planned.total - first + 3.5 * hidden, rel=0.01)
    assert vision.gradient == (trained != "language")


@ways
@pytest.mark.parametrize("checkpointing", [False, True], ids=["stored", "checkpointed"])
def test_activations_are_what_is_allocated(folder, trained, checkpointing):
    judge, videos, both = build(folder, trained, checkpointing)
    give_gradients(judge)

    def update():
        judge(videos, adapter=judge.adapter).sum().backward()

    update()
    modelled = activation_bytes(judge.config, both, 1, 4, gradient=True)
    assert modelled == pytest.approx(measured_peak(update), rel=0.15)
    if checkpointing:
        return
    with torch.no_grad():
        peak = measured_peak(lambda: judge(videos, adapter=judge.adapter))
    assert activation_bytes(judge.config, both, 1, 4, gradient=False) == pytest.approx(peak, rel=0.15)


# Of Qwen/Qwen2-VL-2B-Instruct's config.json.
QWEN2_VL_2B = {
    "text": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
             "num_key_value_heads": 2, "vocab_size": 151_936,
             "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}},
    "vision": {"depth": 32, "embed_dim": 1280, "num_heads": 16, "hidden_size": 1536, "mlp_ratio": 4},
}  # fmt: skip


def test_a_run_at_scale_is_planned(tmp_path):
    """Wan 1.3B judged by a Qwen2-VL of 2B: its published number of parameters, and what decoding takes."""
    described = json.loads((save_tiny_judge(tmp_path) / "config.json").read_text())
    del described["text_config"]["layer_types"]
    described["text_config"] |= QWEN2_VL_2B["text"]
    described["vision_config"] |= QWEN2_VL_2B["vision"]
    (tmp_path / "config.json").write_text(json.dumps(described))
    config = RunConfig.model_validate(
        {"student": {"architecture": "wan-1.3b", "lora": {}}, "sampler": {"family": "self-forcing"},
         "data": {"latent_frames": 21, "latent_height": 60, "latent_width": 104, "global_batch": 8},
         "codec": {"name": "wan", "models": "absent"}, "precision": "bf16", "train": {"micro_batch": 1},
         "method": {"name": "afd", "rollouts_per_prompt": 4,
                    "discriminator": {"name": "vlm", "model": str(tmp_path), "lora": {"rank": 64, "alpha": 128}}}}
    )  # fmt: skip
    plan = make_plan(config, 8, GPUS["h100"])
    judge = plan.networks["discriminator"]
    assert judge.base == 2_208_985_600 + 1536  # and the score
    per_layer = 64 * (2 * (1536 + 1536) + 2 * (1536 + 256) + 3 * (1536 + 8960))
    assert judge.adapter == 28 * per_layer
    assert judge.trained == judge.adapter + 1536
    assert shown_video(config) == Shown(81, 480, 832, 3, 16.0)
    vision, language = stacks(config.method.discriminator, shown_video(config), text_tokens=0)
    assert (vision.tokens, language.tokens) == (5 * 24 * 42, 5 * 12 * 21)
    held = plan.memory.phases["discriminator"].parts
    assert held["decoded pixels"] == 5 * 81 * 480 * 832 * 3 * 4, "a prompt's video and its rollouts"
    decoding = {phase: seconds.decoding for phase, seconds in plan.seconds.items() if seconds.decoding}
    assert decoding == {"discriminator": pytest.approx(5 * 81 * 480 * 832 * 8.51e6 / 70e12)}
    assert plan.seconds["discriminator"].total > decoding["discriminator"]
    # Four ranks of a sequence have four prompts, and share their videos: of five at once a rank has two.
    shared = config.model_copy(update={"parallel": config.parallel.model_copy(update={"sequence": 4}),
                                       "train": config.train.model_copy(update={"micro_batch": 5})})  # fmt: skip
    load = workload(shared, 8)
    update, question = (each for each in load.passes if each.role == "discriminator")
    assert [load.videos_of_rank(each, shares_tokens=False) for each in (update, question)] == [4 * 2, 4 * 2]
    assert load.videos_of_rank(load.passes[0], shares_tokens=True) == 16 / 4
    flops = [8 * video_flops(shared, load, each) for each in (update, question)]
    together = make_plan(shared, 8, GPUS["h100"])
    assert together.flops["discriminator"].total == pytest.approx(sum(each.total for each in flops))
    assert together.seconds["discriminator"].decoding == decoding["discriminator"], "20 videos on 4 ranks"
    assert together.memory.phases["discriminator"].parts["decoded pixels"] == held["decoded pixels"]


def test_a_published_judge_is_planned_without_its_files():
    """And has its published number of parameters."""
    for name, parameters in (("2B", 2_208_985_600), ("7B", 8_291_375_616)):
        section = {"name": "vlm", "model": f"absent/Qwen2-VL-{name}-Instruct", "lora": {"rank": 64}}
        config = RunConfig.model_validate({"method": {"name": "afd", "discriminator": section}})
        base = network_sizes(config)["discriminator"].base
        width = 1536 if name == "2B" else 3584
        head = 152_064 * width if name == "7B" else 0  # of words, which this judge has none of; 2B's is its table
        assert base == parameters - head + width, name
