"""What stands in for a file is read by what reads the real one, and what is here is looked at at its full size."""

import json
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch

from afd_scale.checkpoint.formats.models_folder import check_models
from afd_scale.checkpoint.formats.vlm import load_vlm_state
from afd_scale.checkpoint.load_student import load_lora_state, load_student_state, read_student
from afd_scale.config import RunConfig, load_config
from afd_scale.config.judges import VlmDiscriminatorConfig
from afd_scale.config.models import WanConfig
from afd_scale.data.check import check_dataset
from afd_scale.data.reader import read_rows
from afd_scale.data.schema import DatasetFacts
from afd_scale.data.storage import Location, teacher_data
from afd_scale.layers.lora import Adapters
from afd_scale.layers.ops import ModelOps
from afd_scale.models.vlm import VlmDiscriminator
from afd_scale.planning.gpus import GPUS
from afd_scale.rehearsal.checks import check_full_size, fewest_gpus, stops_too_late
from afd_scale.rehearsal.machine import Machine, adapt
from afd_scale.rehearsal.scorer import scorer
from afd_scale.rehearsal.shards import make_shards_small
from afd_scale.rehearsal.shrink import Layout, shrink
from afd_scale.rehearsal.stand_ins import StandIn, make_stand_ins

ROOT = Path(__file__).parents[3]
AFD = ROOT / "configs" / "wan_1_3b" / "self_forcing.yaml"
PAPER = ROOT / "configs" / "wan_1_3b" / "paper_afd.yaml"
NOWHERE = "http://nowhere/score"
H100 = GPUS["h100"]


def small_of(config: RunConfig) -> RunConfig:
    return adapt(shrink(config, Layout(4, 1), Layout(1, 1)), Machine(1, 0))


def stand_ins(folder: Path, config: RunConfig) -> tuple[RunConfig, dict[str, StandIn]]:
    small, made = make_stand_ins(small_of(config), config, folder / "stand_ins", NOWHERE)
    return small, {each.field: each for each in made}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, dict[str, StandIn]]:
    """Of the config that most others are like."""
    return stand_ins(tmp_path_factory.mktemp("afd"), load_config(AFD))


def test_every_file_that_a_config_names_has_one(made: tuple[RunConfig, dict[str, StandIn]], tmp_path: Path) -> None:
    small, named = made
    assert named.keys() == {"student.weights", "method.discriminator.weights", "codec.models", "data.shards"}
    assert str(named["student.weights"]) == (
        "student.weights (weights/self_forcing_dmd.pt) is not here: in its place a file of Self-Forcing's form"
    )
    for role in small.cast:
        if role.of is None:
            assert isinstance(role.network, WanConfig)
            assert role.network.weights is not None
            state = load_student_state(role.network.weights, role.network, role.section)
            assert all(torch.isfinite(state[name]).all() for name in state)
    assert small.student.weights is not None
    assert (small.student.weights.name, read_student(small.student.weights).kind) == ("self_forcing_dmd.pt", "Wan file")
    check_models(Path(str(small.codec.models)), small.student)
    facts = check_dataset(small.model_copy(update={"out": tmp_path}))
    assert facts.codec == "wan:4x8x8"


@pytest.mark.parametrize(
    ("weights", "kind"),
    [
        ("a/student.safetensors", "Wan file"),
        ("a/x.pt", "Wan file"),
        ("a/Wan2.1-T2V-1.3B-Diffusers", "diffusers folder"),
        ("runs/my-run", "student folder"),
    ],
)
@pytest.mark.parametrize("lora", ["lora.safetensors", "lora.pt", "lora"])
def test_weights_and_adapters_have_the_format_that_their_names_say(
    weights: str, kind: str, lora: str, tmp_path: Path
) -> None:
    config = load_config(AFD, [f"student.weights={weights}", f"student.lora.weights={lora}", "codec.name=identity",
                               "codec.models=null"])  # fmt: skip
    small, named = stand_ins(tmp_path, config)
    student = small.student
    assert student.weights is not None
    assert student.lora is not None
    assert student.lora.weights is not None
    assert read_student(student.weights).kind == kind
    state = load_student_state(student.weights, student)
    adapters = load_lora_state(student.lora.weights, student.lora, {name: s.shape for name, s in state.stored.items()})
    assert len(adapters) == 2 * 10 * student.num_layers
    assert {"student.weights", "student.lora.weights"} <= named.keys()


VIDEO_ALIGN = ("weights=VideoReward", "reward_tokens=['<|VQ_reward|>']", "template='{video}{prompt}<|VQ_reward|>'")


@pytest.mark.parametrize(
    ("model", "overrides"),
    [
        ("Qwen2-VL-2B-Instruct", ()),
        ("Qwen2.5-VL-3B", ("head=yes_no",)),
        ("Qwen2-VL-2B-Instruct", VIDEO_ALIGN),
        ("Qwen2-VL-2B-Instruct", ("weights=scorer.pth", "weights_adapters=keep", "lora_vision=true")),
    ],
)  # fmt: skip
def test_a_video_language_judge_reads_its_stand_ins(model: str, overrides: tuple[str, ...], tmp_path: Path) -> None:
    judge = "method.discriminator"
    small, _ = stand_ins(tmp_path, load_config(PAPER, [f"{judge}.model={model}", *(f"{judge}.{o}" for o in overrides)]))
    network = small.role("discriminator").network
    assert isinstance(network, VlmDiscriminatorConfig)
    assert network.lora is not None
    adapters = Adapters(("discriminator",), network.lora.rank, network.lora.alpha / network.lora.rank)
    with torch.device("meta"):
        built = VlmDiscriminator(network, ModelOps(adapters=adapters))
    assert len(built.tokens.rewards) == (0 if network.head == "yes_no" else 1)
    shapes = {name: tuple(parameter.shape) for name, parameter in built.named_parameters()}
    state = load_vlm_state(network, judge, "discriminator", shapes)
    assert len(state) > 20
    assert any(".adapters." in name for name in state) == (network.weights_adapters == "keep")


def test_a_score_is_of_the_video_and_its_prompt_alone() -> None:
    def ask(url: str, *videos: str) -> list[float]:
        body = json.dumps({"videos": [{"prompt": video, "fps": 16.0, "mp4": ""} for video in videos]}).encode()
        with urllib.request.urlopen(urllib.request.Request(url, body, method="POST"), timeout=10) as answer:
            return list(json.load(answer)["scores"])

    with scorer() as url:
        first, second = ask(url, "a", "b")
        assert first != second
        assert ask(url, "b") == [second]


# Streaming 0.13 leaves the compressed shards open that it unpacks.
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_shards_that_are_here_are_cut_and_not_touched(
    made: tuple[RunConfig, dict[str, StandIn]], tmp_path: Path
) -> None:
    """The small dataset stands for a real one of the config's shape."""
    real, _ = made
    config = load_config(AFD, [
        f"data.shards={real.data.shards}", "data.latent_frames=9", "data.latent_height=4", "data.latent_width=6",
        "student.text_dim=32", "student.text_length=16", "method.discriminator.text_dim=32",
        "method.discriminator.text_length=16", "codec.name=identity", "codec.models=null", "sampler.chunk_frames=1",
    ])  # fmt: skip
    before = files_of(real.data.shards)
    small, named = stand_ins(tmp_path, config)
    assert files_of(real.data.shards) == before
    assert small.data.latent_frames == 3
    assert named["data.shards"].is_here
    ours, theirs = (list(read_rows(Location(str(shards), tmp_path / "cache", "shards"), range(4)))
                    for shards in (small.data.shards, real.data.shards))  # fmt: skip
    for cut, whole in zip(ours, theirs, strict=True):
        assert (cut["prompt"], cut["prompt_id"], cut["fps"]) == (whole["prompt"], whole["prompt_id"], whole["fps"])
        assert np.array_equal(cut["latents"], whole["latents"][:3, :, :4, :6])


@pytest.mark.parametrize("start", [0, 3])
def test_prompts_that_give_clips_their_starts_have_videos(tmp_path: Path, start: int) -> None:
    config = load_config(AFD, [f"data.start_frames={start}", "evaluation.prompts=held/out"])
    for name, *_, folder, _ in make_shards_small(small_of(config), config, tmp_path):
        shape = DatasetFacts.load(Path(folder), name).latent_shape
        assert (shape is not None) == (name == "data.shards" or start > 0)


def files_of(folder: str) -> dict[str, int]:
    """Their names and when they were written."""
    return {path.name: path.stat().st_mtime_ns for path in Path(folder).iterdir()}


def test_at_full_size_each_file_that_is_here_is_looked_at(
    made: tuple[RunConfig, dict[str, StandIn]], tmp_path: Path
) -> None:
    """The small run, as the real one, has all of its files."""
    config = made[0].model_copy(update={"out": tmp_path})
    rows = {row.stage: row for row in check_full_size(config, 1, H100)}
    assert rows.keys() == {"plan", "run folder", "train.trackers", "student.weights", "method.discriminator.weights",
                           "codec.models", "data.shards", "data"}  # fmt: skip
    assert {row.status for row in rows.values()} == {"ok"}
    assert "fits on 1 h100" in rows["plan"].said

    wrong = config.model_copy(update={
        "student": config.student.model_copy(update={"ffn_dim": 128}),
        "data": config.data.model_copy(update={"latent_height": 8}),
    })  # fmt: skip
    failed = {row.stage: row.said for row in check_full_size(wrong, 1, H100) if row.status == "failed"}
    assert failed.keys() == {"student.weights", "data"}
    assert "must have ffn_dim 128 as student.ffn_dim says, it has 384" in failed["student.weights"]
    assert "data.shards" in failed["data"]


def test_a_shard_that_was_cut_short_is_seen(made: tuple[RunConfig, dict[str, StandIn]], tmp_path: Path) -> None:
    location = teacher_data(made[0])
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in location.folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes()[: None if path.suffix == ".json" else -1])
    config = made[0].model_copy(update={"data": made[0].data.model_copy(update={"shards": str(copy)}), "out": tmp_path})
    (row,) = [row for row in check_full_size(config, 1, H100) if row.stage == "data.shards"]
    assert row.status == "failed"


def test_a_plan_that_does_not_fit_says_what_would() -> None:
    config = load_config(AFD)
    assert fewest_gpus(config, H100) == 4
    row = next(check_full_size(config, 1, H100))
    assert row.status == "failed"
    assert "gpus (1) must hold the run" in row.said
    assert "it would fit on 4" in row.said
    row = next(check_full_size(config, 5, H100))
    assert row.said.startswith("data.global_batch (32) must divide among 5 data ranks")
    assert stops_too_late(config, 8, H100) is None
    late = stops_too_late(load_config(AFD, ["train.micro_batch=null"]), 4, H100)
    assert late is not None
    assert "a SIGTERM in time: it is predicted to take" in late
