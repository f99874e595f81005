"""Configuration: every YAML of the project loads, and every mistake is one line that names field and value."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from afd_scale.config import ConfigError, RunConfig, load_config, resolved_yaml
from afd_scale.config.judges import QUESTION_TEMPLATE, LatentDiscriminatorConfig
from afd_scale.config.methods import AfdConfig, SftConfig
from afd_scale.config.models import StudentConfig
from afd_scale.config.sampler import SamplerConfig
from afd_scale.config.section import first_problem

ROOT = Path(__file__).parents[3]
CONFIGS = ROOT / "configs"
YAMLS = sorted(path for path in CONFIGS.rglob("*.yaml") if path.parent.name != "studies")
BASE, AFD = CONFIGS / "toy" / "base.yaml", CONFIGS / "toy" / "afd.yaml"


def name_of(path: Path) -> str:
    return str(path.relative_to(CONFIGS))


@pytest.mark.parametrize("path", YAMLS, ids=name_of)
def test_every_config_loads(path: Path) -> None:
    load_config(path)


def test_the_toy_runs_start_from_the_base_that_is_shipped() -> None:
    base = load_config(BASE).student
    for name in ("afd", "sft", "smoke/afd"):
        student = load_config(CONFIGS / "toy" / f"{name}.yaml").student
        assert student.weights is not None
        assert (ROOT / student.weights / "model.safetensors").is_file()
        assert student == base.model_copy(update={"weights": student.weights})


@pytest.mark.parametrize("path", YAMLS, ids=name_of)
def test_resolved_config_reads_back(path: Path, tmp_path: Path) -> None:
    config = load_config(path, ["train.steps=7", "data.cache=/data/cache"])
    resolved = tmp_path / "config.yaml"
    resolved.write_text(resolved_yaml(config))
    assert load_config(resolved) == config


def test_runs_have_their_own_folders() -> None:
    folders = [load_config(path).folder for path in YAMLS]
    assert len(set(folders)) == len(folders)


def test_overrides_replace_values_and_the_last_one_wins() -> None:
    config = load_config(
        AFD,
        [
            "train.steps=5",
            "train.steps=6",
            "sampler.timesteps=[1000, 500]",
            "method.optimizer.learning_rate=1e-4",  # YAML 1.1 reads this as a string
            "data.cache=null",
        ],
    )
    assert config.train.steps == 6
    assert config.sampler.timesteps == (1000, 500)
    assert isinstance(config.method, AfdConfig)
    assert config.method.optimizer.learning_rate == 1e-4
    assert config.method.optimizer.weight_decay == 0.0, "the rest of the section stays"
    assert config.data.cache is None


def test_method_may_be_a_bare_name(tmp_path: Path) -> None:
    short = tmp_path / "short.yaml"
    short.write_text("method: sft\n")
    assert load_config(short).method == SftConfig()
    config = load_config(short, ["method.ema_decay=0.9"])
    assert isinstance(config.method, SftConfig)
    assert config.method.ema_decay == 0.9


def test_requires_is_relative_to_the_file(tmp_path: Path) -> None:
    run = tmp_path / "run.yaml"
    run.write_text("method: sft\nrequires: before.yaml\n")
    assert load_config(run).requires == tmp_path / "before.yaml"


@pytest.mark.parametrize(
    ("architecture", "sizes"),
    [("toy", (96, 384, 4, 3, 48)), ("wan-1.3b", (1536, 8960, 12, 30, 16)), ("wan-14b", (5120, 13824, 40, 40, 16))],
)
def test_architecture_presets(architecture: str, sizes: tuple[int, ...]) -> None:
    student = StudentConfig.model_validate({"architecture": architecture})
    assert (student.dim, student.ffn_dim, student.num_heads, student.num_layers, student.latent_channels) == sizes


@pytest.mark.parametrize(
    ("family", "chunk_frames", "shift"),
    [("toy", 1, 3.0), ("self-forcing", 3, 5.0), ("causal-forcing", 3, 5.0), ("causal-forcing-framewise", 1, 5.0)],
)
def test_family_presets(family: str, chunk_frames: int, shift: float) -> None:
    sampler = SamplerConfig.model_validate({"family": family})
    assert (sampler.chunk_frames, sampler.timestep_shift) == (chunk_frames, shift)
    assert sampler.timesteps == sampler.timesteps_of(0) == (1000, 750, 500, 250)


def test_the_first_chunk_may_have_steps_of_its_own() -> None:
    sampler = SamplerConfig(chunk_frames=3, timesteps=(1000, 500), first_chunk_timesteps=(1000, 750, 500, 250))
    assert (sampler.timesteps_of(0), sampler.timesteps_of(1)) == ((1000, 750, 500, 250), (1000, 500))
    assert sampler.passes(9) == [4 + 1, 2 + 1, 2], "a pass caches each chunk but the last"


def test_a_field_overrides_its_preset() -> None:
    student = StudentConfig.model_validate({"architecture": "wan-1.3b", "num_layers": 2})
    assert (student.num_layers, student.num_heads) == (2, 12)


def test_discriminator_variant_is_chosen_by_name() -> None:
    config = load_config(
        AFD, ["method.discriminator={name: latent, num_layers: 1}", "method.discriminator.num_heads=2"]
    )
    assert isinstance(config.method, AfdConfig)
    assert isinstance(config.method.discriminator, LatentDiscriminatorConfig)
    assert config.method.discriminator.num_heads == 2


def test_config_is_frozen() -> None:
    config = load_config(BASE)
    with pytest.raises(ValidationError, match="frozen"):
        config.train.steps = 3  # type: ignore[misc]


# Overrides of configs/toy/afd.yaml -> parts of the error. The first part is the field, the second its value.
MISTAKES = {
    "unknown key": (["train.stepz=3"], ["train.stepz", "(3)", "not a known key"]),
    "unknown section": (["trian.steps=3"], ["trian", "steps", "not a known key"]),
    "unknown key of a variant": (["method.rollouts=3"], ["method.rollouts", "(3)", "not a known key"]),
    "unknown key, nested": (["method.advantage.klip=3"], ["method.advantage.klip", "(3)", "not a known key"]),
    "wrong type": (["train.steps=many"], ["train.steps", "(many)", "integer"]),
    "out of range": (["method.policy_mix=1.5"], ["method.policy_mix", "(1.5)", "less than or equal to 1"]),
    "not finite": (["method.prior_weight=.nan"], ["method.prior_weight", "(nan)", "finite"]),
    "not finite for DeepSpeed": (["engine.deepspeed={gradient_clipping: .inf}"], ["engine.deepspeed", "finite"]),
    "preset that is no name": (["student={architecture: [toy]}"], ["student.architecture", "(['toy'])", "one of"]),
    "date": (["train.steps=2024-01-01"], ["train.steps", "(2024-01-01)", "integer"]),
    "tag": (["name=!!binary aGk="], ["override", "(name=!!binary aGk=)", "no plain value"]),
    "twice": (["train={steps: 1, steps: 2}"], ["override", "(train={steps: 1, steps: 2})", "given twice"]),
    "no end of sections": (["a." * 9000 + "b=1"], ["override", "(a.a", "nested so deeply"]),
    "size beyond machines": (["student.num_heads=99999999999"], ["student.num_heads", "(99999999999)", "1048576"]),
    "wrong choice": (["precision=fp16"], ["precision", "(fp16)", "'fp32', 'bf16' or 'fp8'"]),
    "wrong method": (["method={name: grpo}"], ["method.name", "(grpo)", "afd, dmd, gan, sft"]),
    "method without a name": (["method={policy_mix: 1}"], ["method.name", "(None)", "afd, dmd, gan, sft"]),
    "patch of before": (
        ["method.discriminator.unpack=[3, 4]"],
        ["method.discriminator.unpack", "([3, 4])", "identity_patch"],
    ),
    **{
        f"prompts alone for {name}": (
            [f"method={name}", "data.prompts=x", "data.prompts_per_step=2"],
            ["data.prompts", "(x)", f"must be absent with method {name}"],
        )
        for name in ("sft", "gan")
    },
    "relative method": (["method=.x:Y"], ["method.name", "(.x:Y)", "module:Class"]),
    "method that is no section": (["method.name=os:path"], ["method.name", "(os:path)", "no such class"]),
    "method from nowhere": (["method=nowhere:Method"], ["method.name", "(nowhere:Method)", "No module named"]),
    "student of before": (["student.chunk_frames=3"], ["student.chunk_frames", "(3)", "sampler.chunk_frames"]),
    "family of before": (["student.family=toy"], ["student.family", "(toy)", "sampler.family"]),
    "wrong preset": (["student.architecture=wan-2b"], ["student.architecture", "(wan-2b)", "wan-1.3b"]),
    "wrong family": (["sampler.family=none"], ["sampler.family", "(none)", "self-forcing"]),
    "heads": (["student.num_heads=5"], ["student.num_heads", "(5)", "must divide dim (96)"]),
    "patch over frames": (["student.patch=[2, 2, 2]"], ["student.patch", "(2, 2, 2)", "must start with 1"]),
    "timesteps rise": (["sampler.timesteps=[500, 1000]"], ["sampler.timesteps", "[500, 1000]", "must fall"]),
    "first timesteps rise": (
        ["sampler.first_chunk_timesteps=[5, 10]"],
        ["sampler.first_chunk_timesteps", "[5, 10]", "must fall"],
    ),
    "lengths of nothing": (
        ["evaluation.metrics=none", "evaluation.lengths=2"],
        ["evaluation.lengths", "(2)", "where nothing is measured"],
    ),
    "suite of another world": (
        ["data.source={name: procedural, world: kick}"],
        ["evaluation.metrics (toy)", "data.source.world (kick)", "prompts of drop"],
    ),
    "sink without window": (["sampler.sink_frames=1"], ["sampler.sink_frames", "(1)", "needs window_frames"]),
    "window of part of a chunk": (
        ["sampler.chunk_frames=2", "sampler.window_frames=3"],
        ["sampler.window_frames", "(3)", "whole chunks of chunk_frames (2)"],
    ),
    "window too small": (
        ["sampler.window_frames=2", "sampler.sink_frames=2"],
        ["sampler.window_frames", "(2)", "one chunk (1)"],
    ),
    "chunk does not divide": (["sampler.chunk_frames=3"], ["data.latent_frames", "(4)", "sampler.chunk_frames (3)"]),
    "chunks behind the first do not": (
        ["sampler.chunk_frames=2", "sampler.first_chunk_frames=1"],
        ["data.latent_frames", "(4)", "sampler.chunk_frames (2) behind sampler.first_chunk_frames (1)"],
    ),
    "start within a first chunk": (
        ["sampler.first_chunk_frames=2", "data.start_frames=1"],
        ["data.start_frames", "(1)", "behind sampler.first_chunk_frames (2)"],
    ),
    "clips that end within a chunk": (
        ["sampler.chunk_frames=3", "sampler.first_chunk_frames=1", "evaluation.lengths=2"],
        ["evaluation.lengths", "(2)", "data.latent_frames (4)", "sampler.first_chunk_frames (1)"],
    ),
    "windows of judges and a first chunk": (
        ["sampler.first_chunk_frames=2", "method.judged_frames=2"],
        ["sampler.first_chunk_frames", "(2)", "left out with method.judged_frames"],
    ),
    "long rollouts and a first chunk": (
        ["sampler.first_chunk_frames=2", "method.long_rollouts={frames: 8}"],
        ["sampler.first_chunk_frames", "(2)", "left out with method.long_rollouts"],
    ),
    "a first chunk that leaves the window": (
        ["sampler.chunk_frames=3", "sampler.first_chunk_frames=1", "sampler.window_frames=4"],
        ["sampler.sink_frames", "(0)", "must hold the first chunk with first_chunk_frames (1)"],
    ),
    "a sink of part of a chunk": (
        [
            "sampler.chunk_frames=3",
            "sampler.first_chunk_frames=1",
            "sampler.window_frames=7",
            "sampler.sink_frames=3",
        ],
        ["sampler.sink_frames", "(3)", "whole chunks of chunk_frames (3 behind a first one of 1)"],
    ),
    "latent is no whole token": (["data.latent_width=5"], ["data.latent_width", "(5)", "multiple of student.patch"]),
    "name": (["name=a/b"], ["name", "(a/b)", "folder"]),
    "sequence": (["parallel.sequence=3"], ["parallel.sequence (3)", "student.num_heads (4)", "1, 2, 4"]),
    "sequence of the discriminator": (
        ["parallel.sequence=4", "method.discriminator={name: latent, dim: 96, num_heads: 6}"],
        ["parallel.sequence (4)", "method.discriminator.num_heads (6)", "may be 1, 2"],
    ),
    "graphs where ranks share videos": (
        ["rollout.graphs=true", "parallel.sequence=2"],
        ["rollout.graphs", "(true)", "auto or false with parallel.sequence 2"],
    ),
    "graphs of sharded passes": (
        ["rollout.graphs=true", "rollout.weights=sharded"],
        ["rollout.graphs", "(true)", "with rollout.weights sharded"],
    ),
    "attention that cannot be kept": (
        ["attention=flex", "student.activation_checkpointing=keep_attention"],
        ["student.activation_checkpointing", "(keep_attention)", "full or none with attention flex"],
    ),
    "fp8 width": (["precision=fp8", "student.ffn_dim=100"], ["student.ffn_dim", "(100)", "multiple of 16"]),
    "mxfp8 width": (
        ["precision=fp8", "fp8_scaling=mxfp8", "student.dim=112"],
        ["student.dim", "(112)", "multiple of 32 with fp8_scaling mxfp8"],
    ),
    "fp8 scaling": (["fp8_scaling=tensor"], ["fp8_scaling", "(tensor)", "'block'"]),
    "fp8 with all blocks kept": (
        ["precision=fp8", "student.activation_checkpointing=true", "fp8_keep_blocks=2"],
        ["fp8_keep_blocks", "(2)", "less than half of student.num_layers (3)"],
    ),
    "fp8 without recomputation": (["precision=fp8"], ["student.activation_checkpointing", "(none)", "must be full"]),
    "fp8 discriminator without recomputation": (
        ["precision=fp8", "student.activation_checkpointing=true", "method.discriminator={name: latent}"],
        [
            "method.discriminator.activation_checkpointing",
            "(none)",
            "must be full or keep_attention with precision fp8",
        ],
    ),
    "nvme with averages": (
        ["engine.offload_optimizer=nvme", "engine.nvme_path=/tmp"],
        ["engine.offload_optimizer", "(nvme)", "must be none or cpu"],
    ),
    "persistent parameters as a raw key": (
        ["engine.deepspeed={zero_optimization: {stage3_param_persistence_threshold: 9}}"],
        [
            "engine.deepspeed.zero_optimization.stage3_param_persistence_threshold",
            "(9)",
            "engine.parameter_persistence",
        ],
    ),
    "nvme": (["engine.offload_optimizer=nvme"], ["engine.nvme_path", "(None)", "must be given"]),
    "parameters on nvme": (["engine.offload_parameters=nvme"], ["engine.offload_parameters", "(nvme)"]),
    "group of one": (["method.rollouts_per_prompt=1"], ["method.rollouts_per_prompt", "(1)", "at least 2"]),
    "discriminator channels": (
        ["method.discriminator={name: latent, latent_channels: 16}"],
        ["method.discriminator.latent_channels", "(16)", "student.latent_channels (48)"],
    ),
    "discriminator identity_patch": (
        ["method.discriminator.identity_patch=[5, 4]"],
        ["method.discriminator.identity_patch", "(5, 4)", "student.latent_channels (48)"],
    ),
    "override without a value": (["train.steps"], ["override", "(train.steps)", "section.key=value"]),
    "override without a key": (["=3"], ["override", "(=3)", "section.key=value"]),
    "option for an override": (["--train.steps=3"], ["override", "(--train.steps=3)", "section.key=value"]),
    "override that is no YAML": (["sampler.timesteps=[1"], ["override", "(sampler.timesteps=[1)", "YAML"]),
    "override below a value": (["train.steps.x=1"], ["override", "(train.steps.x=1)", "steps is a value"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_that_names_field_and_value(mistake: str) -> None:
    overrides, parts = MISTAKES[mistake]
    with pytest.raises(ConfigError) as caught:
        load_config(AFD, overrides)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(parts[0])
    for part in parts:
        assert part in message


def test_several_mistakes_are_still_one_line() -> None:
    with pytest.raises(ConfigError, match=r"^train\.\w+ \(0\).*\(and 1 more\)$"):
        load_config(AFD, ["train.steps=0", "train.log_every=0"])


@pytest.mark.parametrize(
    ("text", "rule"),
    [("- 1\n", "must be a mapping of sections"), ("", "must be a mapping of sections"), ("a: [\n", "must be YAML")],
)
def test_a_file_that_is_no_run(text: str, rule: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert re.match(rf"config \({path}(:2)?\) {rule}", str(caught.value))
    assert "\n" not in str(caught.value)


def test_a_file_that_is_absent(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^config \(.*absent\.yaml\) must be a readable YAML file: No such file"):
        load_config(tmp_path / "absent.yaml")


def test_method_must_be_given(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({"name": "x"}))
    with pytest.raises(ConfigError, match=r"^method must be given: it has no default$"):
        load_config(path)


@pytest.mark.parametrize("name", ["prompts", "split"])
def test_what_nobody_looks_at_is_refused(name: str) -> None:
    tree = {"method": "sft", "evaluation": {"metrics": "none", "samples": 0, name: "unseen"}}
    with pytest.raises(
        ValueError, match=rf"evaluation\.{name} \(unseen\) must be absent where nothing is measured or shown"
    ):
        RunConfig.model_validate(tree)
    RunConfig.model_validate({"method": "sft", "evaluation": {"metrics": "none", name: "shown"}})


@pytest.mark.parametrize("codec", [{"name": "wan"}, {"name": "identity", "models": "folder"}])
def test_only_wan_s_codec_takes_models(codec: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"models \(.*\) must be given with codec wan, and with no other"):
        RunConfig.model_validate({"method": "sft", "codec": codec})


@pytest.mark.parametrize("method", [{"name": "gan"}, {"name": "dmd", "gan_weight": 0.1}])
def test_no_gradient_comes_through_pixels(method: dict[str, Any]) -> None:
    judge = {"name": "vlm", "model": "folder"}
    with pytest.raises(ValueError, match=r"discriminator\.name \(vlm\) must be conv or latent: the student learns"):
        RunConfig.model_validate({"method": {**method, "discriminator": judge}})
    RunConfig.model_validate({"method": {"name": "dmd", "discriminator": judge}})


@pytest.mark.parametrize("method", [{"name": "gan"}, {"name": "dmd", "gan_weight": 0.1}])
def test_only_afd_freezes_a_judge(method: dict[str, Any]) -> None:
    judge = {"name": "conv", "freeze_after": 3}
    with pytest.raises(ValueError, match=r"discriminator\.freeze_after \(3\) must be left out"):
        RunConfig.model_validate({"method": {**method, "discriminator": judge}})
    RunConfig.model_validate({"method": {"name": "afd", "discriminator": judge}})


@pytest.mark.parametrize(
    ("judge", "rule"),
    [
        ({"name": "conv"}, r"discriminator\.optimizer \(null\) must be given"),
        ({"name": "latent"}, r"discriminator\.optimizer \(null\) must be given"),
        ({"name": "vlm", "model": "m"}, r"discriminator\.optimizer \(null\) must be given"),
        ({"name": "vlm", "model": "m", "head": "pooled"}, r"discriminator\.optimizer \(null\) must be given"),
        ({"name": "vlm", "model": "m", "lora": {}}, r"discriminator\.optimizer \(null\) must be given"),
        ({"name": "vlm", "model": "m", "weights": "w", "lora": {}}, r"lora must be left out of a fixed judge"),
        ({"name": "vlm", "model": "m", "head": "yes_no", "warmup_steps": 1}, r"warmup_steps \(1\) must be left out"),
    ],
)
def test_a_fixed_judge_has_a_score_and_nothing_of_training(judge: dict[str, Any], rule: str) -> None:
    with pytest.raises(ValidationError) as error:
        RunConfig.model_validate({"method": {"name": "afd", "discriminator": {**judge, "optimizer": None}}})
    assert re.search(rule, first_problem(error.value)), first_problem(error.value)


def test_a_judge_of_words_is_asked_a_question() -> None:
    judge = {"name": "vlm", "model": "m", "head": "yes_no", "optimizer": None}
    found = RunConfig.model_validate({"method": {"name": "afd", "discriminator": judge}}).method.discriminator
    assert found.template == QUESTION_TEMPLATE
    assert found.template.endswith("<|im_start|>assistant\n")
    assert type(found).model_validate({**judge, "template": "{video}{prompt}?"}).template == "{video}{prompt}?"
    assert type(found).model_validate(found.model_dump(mode="json")) == found
