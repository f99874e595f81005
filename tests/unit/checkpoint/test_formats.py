import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from afd_scale.checkpoint.formats.diffusers import diffusers_config, diffusers_key, from_diffusers
from afd_scale.checkpoint.formats.wan import METADATA_KEY, SIDECAR_NAME, WanSizes, weight_shapes
from afd_scale.checkpoint.load_student import load_student_state, read_student
from afd_scale.checkpoint.weights import save_weights
from afd_scale.config.models import PolicyConfig, StudentConfig
from afd_scale.config.sampler import SamplerConfig
from afd_scale.models.wan import CausalWan
from tests.networks import make_policy
from tests.tools import load_tool

TOOL = Path(__file__).parents[3] / "tools" / "convert_checkpoint.py"
CONFIG = PolicyConfig.model_validate({
    "student": {"dim": 24, "ffn_dim": 40, "num_heads": 2, "num_layers": 2, "freq_dim": 16, "text_dim": 8,
                "text_length": 4, "latent_channels": 4, "prediction": "velocity"},
    "sampler": {"family": "causal-forcing", "timestep_shift": 6.0},
})  # fmt: skip
Tool = Callable[..., int]


@pytest.fixture(scope="module")
def convert() -> Tool:
    """The conversion tool's main, with its arguments as they stand."""
    module = load_tool("convert_checkpoint")
    return lambda *arguments: module.main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return random_state(CONFIG.student)


def random_state(config: StudentConfig) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {name: torch.randn(tensor.shape) for name, tensor in state_on_meta(config).items()}


def state_on_meta(config: StudentConfig) -> dict[str, Tensor]:
    with torch.device("meta"):
        return CausalWan(config, SamplerConfig()).state_dict()


def named_as_diffusers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {diffusers_key(name): tensor for name, tensor in state.items()}


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) and ours[name].dtype == theirs[name].dtype for name in ours)


@pytest.mark.parametrize("fields", [{}, {"num_layers": 1, "patch": (1, 3, 2), "latent_channels": 5}])
def test_weight_shapes_are_those_of_the_student(fields: dict[str, Any]) -> None:
    model = make_policy({**CONFIG.student.model_dump(), **fields})
    own = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert weight_shapes(WanSizes.of_state(model.state_dict(), Path())) == own


@pytest.mark.parametrize("architecture", ["wan-1.3b", "wan-14b"])
def test_sizes_are_read_off_the_shapes(architecture: str) -> None:
    config = StudentConfig.model_validate({"architecture": architecture})
    sizes = WanSizes.of_state(state_on_meta(config), Path())
    assert asdict(sizes).items() <= config.model_dump().items()


# Layout of the published Wan 2.1 T2V 1.3B: 825 tensors, 1,418,996,800 parameters.
def test_the_published_size() -> None:
    state = state_on_meta(StudentConfig(architecture="wan-1.3b"))
    shapes = weight_shapes(WanSizes.of_state(state, Path())).values()
    assert len(shapes) == 825
    assert sum(torch.Size(shape).numel() for shape in shapes) == 1_418_996_800


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("blocks.7.norm3.weight", "blocks.7.norm2.weight"),
        ("blocks.7.self_attn.o.bias", "blocks.7.attn1.to_out.0.bias"),
        ("blocks.7.cross_attn.norm_k.weight", "blocks.7.attn2.norm_k.weight"),
        ("blocks.7.ffn.0.weight", "blocks.7.ffn.net.0.proj.weight"),
        ("blocks.7.modulation", "blocks.7.scale_shift_table"),
        ("head.modulation", "scale_shift_table"),
        ("head.head.weight", "proj_out.weight"),
        ("time_projection.1.weight", "condition_embedder.time_proj.weight"),
    ],
)
def test_diffusers_names(ours: str, theirs: str) -> None:
    assert diffusers_key(ours) == theirs
    assert list(from_diffusers({theirs: torch.empty(0)})) == [ours]


def test_every_name_has_one_name_there(state: dict[str, Tensor]) -> None:
    theirs = named_as_diffusers(state)
    assert len(theirs) == len(state)
    assert_equal(from_diffusers(theirs), state)


def test_a_name_of_another_model_stays() -> None:
    assert list(from_diffusers({"blocks.0.norm3.weight": torch.empty(0)})) == ["blocks.0.norm3.weight"]


@pytest.mark.parametrize(("architecture", "sizes"), [("wan-1.3b", (12, 8960, 30)), ("wan-14b", (40, 13824, 40))])
def test_config_as_published(architecture: str, sizes: tuple[int, int, int]) -> None:
    heads, ffn_dim, layers = sizes
    written = diffusers_config(StudentConfig.model_validate({"architecture": architecture}))
    assert written.pop("_diffusers_version")
    assert written == {
        "_class_name": "WanTransformer3DModel", "added_kv_proj_dim": None, "attention_head_dim": 128,
        "cross_attn_norm": True, "eps": 1e-6, "ffn_dim": ffn_dim, "freq_dim": 256, "image_dim": None,
        "in_channels": 16, "num_attention_heads": heads, "num_layers": layers, "out_channels": 16,
        "patch_size": [1, 2, 2], "pos_embed_seq_len": None, "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": 1024, "text_dim": 4096,
    }  # fmt: skip


@pytest.mark.parametrize("prefix", ["model.", "model._fsdp_wrapped_module."])
def test_self_forcing_checkpoint_prefers_the_ema(prefix: str, state: dict[str, Tensor], tmp_path: Path) -> None:
    ema = {f"{prefix}{key}": tensor for key, tensor in state.items()}
    raw = {f"model.{key}": tensor + 1 for key, tensor in state.items()}
    torch.save({"generator": raw, "generator_ema": ema, "step": 600}, tmp_path / "both.pt")
    torch.save({"generator": raw}, tmp_path / "raw.pt")
    assert_equal(read_student(tmp_path / "both.pt").state, state)
    assert_equal(load_student_state(tmp_path / "both.pt", CONFIG.student), state)
    one_more = {key: tensor + 1 for key, tensor in state.items()}
    assert_equal(read_student(tmp_path / "both.pt", weights="student").state, one_more)
    assert_equal(read_student(tmp_path / "raw.pt").state, one_more)


def test_round_trip_through_the_wan_layout(state: dict[str, Tensor], tmp_path: Path, convert: Tool) -> None:
    save_weights(state.items(), tmp_path / "student", CONFIG)
    assert convert(tmp_path / "student", tmp_path / "out.safetensors", "--to", "wan") == 0
    assert load_file(tmp_path / "out.safetensors").keys() == state.keys()
    assert convert(tmp_path / "out.safetensors", tmp_path / "back", "--to", "afd") == 0
    source = read_student(tmp_path / "back")
    assert source.config() == CONFIG
    assert_equal(source.state, state)


def test_a_run_is_exported_from_its_newest_complete_checkpoint(
    state: dict[str, Tensor], tmp_path: Path, convert: Tool, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoints = tmp_path / "run" / "checkpoints"
    for step, shift in (("step_00000001", 0), ("step_00000002", 1), (".step_00000003.partial", 2)):
        save_weights(((k, v + shift) for k, v in state.items()), checkpoints / step / "student", CONFIG)
    (checkpoints / "latest").write_text("step_00000002")
    assert convert(tmp_path / "run", tmp_path / "out", "--to", "diffusers", "--dtype", "bfloat16") == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith(f"wrote {tmp_path / 'out'} (diffusers, 2 layers, dim 24, 2 heads")
    assert "step_00000002" in line
    assert_equal(read_student(tmp_path / "out").state, {key: (tensor + 1).bfloat16() for key, tensor in state.items()})


def test_original_wan_folder(state: dict[str, Tensor], tmp_path: Path) -> None:
    save_file(state, tmp_path / "diffusion_pytorch_model.safetensors")
    said = {"_class_name": "WanModel", "dim": 24, "num_heads": 2, "eps": 1e-6, "text_len": 4, "model_type": "t2v"}
    (tmp_path / "config.json").write_text(json.dumps(said))
    source = read_student(tmp_path)
    student = source.config().student
    assert (source.kind, student.num_heads, student.text_length) == ("Wan folder", 2, 4)
    assert_equal(source.state, state)


def test_a_file_without_config_takes_the_preset_with_its_sizes(tmp_path: Path, convert: Tool) -> None:
    toy = PolicyConfig(student=StudentConfig())
    save_file(random_state(toy.student), tmp_path / "toy.safetensors")
    assert convert(tmp_path / "toy.safetensors", tmp_path / "out", "--to", "afd", "--family", "toy") == 0
    assert read_student(tmp_path / "out").config() == toy


def test_a_file_without_config_and_preset_has_heads_as_wide_as_wan_s(tmp_path: Path) -> None:
    config = StudentConfig.model_validate({**CONFIG.student.model_dump(), "dim": 256})
    save_file(random_state(config), tmp_path / "file.safetensors")
    found = read_student(tmp_path / "file.safetensors").config()
    assert (found.student.num_heads, found.student.text_length, found.student.prediction) == (2, 512, "velocity")
    assert found.sampler == SamplerConfig(family="self-forcing")


@pytest.mark.parametrize(
    ("fields", "rule"),
    [
        ({"dim": 96}, "must have dim 96 as student.dim says, it has 24"),
        ({"num_layers": 3}, "must have num_layers 3 as"),
        ({"num_heads": 3}, "must have num_heads 3 as"),
        ({"prediction": "x0"}, "must have prediction x0 as"),
        ({"text_length": 16}, "must have text_length 16 as"),
        ({"patch": (1, 1, 4)}, "must have patch"),
    ],
)
def test_weights_of_another_architecture_are_refused(
    fields: dict[str, Any], rule: str, state: dict[str, Tensor], tmp_path: Path
) -> None:
    save_weights(state.items(), tmp_path / "student", CONFIG)
    other = StudentConfig.model_validate({**CONFIG.student.model_dump(), **fields})
    with pytest.raises(ValueError, match=rule) as error:
        load_student_state(tmp_path, other)
    assert str(error.value).startswith(f"student.weights ({tmp_path})")


@pytest.mark.parametrize("form", ["diffusers", "wan"])
def test_older_exports_say_student_and_sampler_in_one(
    form: str, state: dict[str, Tensor], tmp_path: Path, convert: Tool
) -> None:
    save_weights(state.items(), tmp_path / "student", CONFIG)
    out = tmp_path / ("out.safetensors" if form == "wan" else "out")
    assert convert(tmp_path / "student", out, "--to", form) == 0
    flat = {**CONFIG.student.model_dump(mode="json"), **CONFIG.sampler.model_dump(mode="json")}
    del flat["first_chunk_timesteps"]  # newer than such files
    if form == "wan":
        save_file(load_file(out), out, metadata={METADATA_KEY: json.dumps(flat)})
    else:
        (out / SIDECAR_NAME).write_text(json.dumps(flat))
    source = read_student(out)
    assert source.stated == CONFIG.model_dump()
    assert source.config() == CONFIG
    assert convert(out, tmp_path / "back", "--to", "afd", "--family", "toy") == 2, "it states its own"


@pytest.mark.parametrize("form", ["diffusers", "wan"])
def test_exports_say_both_sections(form: str, state: dict[str, Tensor], tmp_path: Path, convert: Tool) -> None:
    save_weights(state.items(), tmp_path / "student", CONFIG)
    out = tmp_path / ("out.safetensors" if form == "wan" else "out")
    assert convert(tmp_path / "student", out, "--to", form) == 0
    if form == "wan":
        with safe_open(out, framework="pt") as file:
            said = file.metadata()[METADATA_KEY]
    else:
        said = (out / SIDECAR_NAME).read_text()
    assert json.loads(said) == CONFIG.model_dump(mode="json")


class NotATensor:
    """Something that only a pickle can hold."""


def spoil(state: dict[str, Tensor], path: Path, how: str) -> Path:
    """A source that must be refused."""
    state = dict(state)
    if how == "absent":
        return path / "nowhere"
    if how == "suffix":
        (path / "weights.ckpt").write_bytes(b"")
        return path / "weights.ckpt"
    if how == "missing key":
        del state["blocks.1.norm3.bias"]
    elif how == "unknown key":
        state |= {f"img_emb.proj.{i}.weight": torch.ones(1) for i in range(5)}
    elif how == "shape":
        state["blocks.1.ffn.0.bias"] = torch.ones(41)
    elif how == "other model":
        state = {"encoder.weight": torch.ones(2)}
    elif how == "two networks":
        state |= {"model.head.modulation": torch.ones(1, 2, 24)}
    elif how == "pickle":
        torch.save({"generator": state, "made_by": NotATensor()}, path / "file.pt")
        return path / "file.pt"
    elif how == "list":
        torch.save(list(state.values()), path / "file.pt")
        return path / "file.pt"
    elif how == "no torch file":
        (path / "file.pt").write_bytes(b"not a checkpoint")
        return path / "file.pt"
    elif how == "other class":
        (path / "config.json").write_text('{"_class_name": "UNet2DModel"}')
        return path
    elif how == "image to video":
        said = {**diffusers_config(CONFIG.student), "added_kv_proj_dim": 24}
        (path / "config.json").write_text(json.dumps(said))
        save_file(named_as_diffusers(state), path / "diffusion_pytorch_model.safetensors")
        return path
    elif how == "config of another size":
        (path / "config.json").write_text(json.dumps({**diffusers_config(CONFIG.student), "ffn_dim": 48}))
        save_file(named_as_diffusers(state), path / "diffusion_pytorch_model.safetensors")
        return path
    elif how == "config without a field":
        (path / "config.json").write_text('{"_class_name": "WanTransformer3DModel"}')
        return path
    save_file(state, path / "file.safetensors")
    return path / "file.safetensors"


@pytest.mark.parametrize(
    ("how", "rule"),
    [
        ("absent", "must exist"),
        ("suffix", "this is an empty file"),
        ("missing key", "must not lack blocks.1.norm3.bias"),
        (
            "unknown key",
            r"must not have img_emb.proj.0.weight, img_emb.proj.1.weight, img_emb.proj.2.weight and 2 more: this",
        ),
        ("shape", r"must have blocks.1.ffn.0.bias of shape \(40,\), it has \(41,\)"),
        ("other model", "must be of a Wan 2.1 transformer"),
        ("two networks", "must not have model.head.modulation"),
        ("pickle", "tensors alone: it holds objects of class tests.unit.checkpoint.test_formats.NotATensor,"),
        ("list", "must hold a dict of tensors, it holds list"),
        ("no torch file", "this is a text that begins 'not a checkpoint'"),
        ("other class", "it is of UNet2DModel"),
        ("image to video", "must have added_kv_proj_dim None, it has 24: this is an image-to-video Wan"),
        ("config of another size", "must have ffn_dim 48 as its config says, it has 40"),
        ("config without a field", "must be a transformer's config"),
        ("good", "must come with an architecture"),
    ],
)
def test_a_bad_source_is_refused_in_one_line(
    how: str, rule: str, state: dict[str, Tensor], tmp_path: Path, convert: Tool, capsys: pytest.CaptureFixture[str]
) -> None:
    source = spoil(state, tmp_path, how)
    assert convert(source, tmp_path / "out", "--to", "afd") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "weights (" in line
    with pytest.raises(ValueError, match=rule):
        raise ValueError(line)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        (["taken", "--to", "diffusers"], "must not exist"),
        (["out", "--to", "self-forcing"], "must end in .pt"),
        (["out", "--to", "comfyui-lora"], "must be of a run with adapters"),
        (["out", "--to", "peft", "--family", "toy"], "--family (toy) must not be given with --to peft"),
        (["out", "--to", "afd", "--weights", "ema"], "must hold ema"),
        (["out", "--to", "afd", "--family", "toy"], "family (toy) must not be given: "),
        (["out", "--to", "afd", "--architecture", "toy"], "architecture (toy) must not be given: "),
    ],
)
def test_bad_options_are_refused_in_one_line(
    arguments: list[str], rule: str, state: dict[str, Tensor], tmp_path: Path, convert: Tool,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (tmp_path / "taken").mkdir()
    save_weights(state.items(), tmp_path / "student", CONFIG)
    out, *options = arguments
    assert convert(tmp_path / "student", tmp_path / out, *options) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert rule in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["student", "taken"]


def test_an_architecture_that_does_not_fit_is_refused(
    state: dict[str, Tensor], tmp_path: Path, convert: Tool, capsys: pytest.CaptureFixture[str]
) -> None:
    save_file(state, tmp_path / "file.safetensors")
    assert convert(tmp_path / "file.safetensors", tmp_path / "out", "--to", "afd", "--architecture", "wan-14b") == 2
    assert "must have dim 5120 as architecture wan-14b says, it has 24" in capsys.readouterr().err
