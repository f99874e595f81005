"""LoRA files in every dialect, and adapters of a run over a base that moves or changes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from afd_scale.checkpoint.adapters import BASE_NAME, check_base, describe_base, merged, write_adapters
from afd_scale.checkpoint.formats.lora import LINEARS, open_lora
from afd_scale.checkpoint.lazy import in_memory
from afd_scale.checkpoint.load_student import load_lora_state, load_student_state, read_lora, read_student
from afd_scale.checkpoint.weights import save_weights
from afd_scale.config.cast import Role
from afd_scale.config.models import LoraConfig, PolicyConfig, StudentConfig
from afd_scale.models.wan import CausalWan
from afd_scale.training.build import read_start
from tests.tools import load_tool

FIELDS: dict[str, Any] = {"dim": 24, "ffn_dim": 40, "num_heads": 2, "num_layers": 2, "freq_dim": 16, "text_dim": 8,
                          "text_length": 4, "latent_channels": 4, "prediction": "velocity"}  # fmt: skip
CONFIG = PolicyConfig.model_validate({"student": FIELDS, "sampler": {"family": "self-forcing"}})
RANK, ALPHA = 2, 3.0
MODULES = [f"blocks.{layer}.{linear}" for layer in range(2) for linear in LINEARS]
DIFFUSERS = {"self_attn.q": "attn1.to_q", "self_attn.k": "attn1.to_k", "self_attn.v": "attn1.to_v",
             "self_attn.o": "attn1.to_out.0", "cross_attn.q": "attn2.to_q", "cross_attn.k": "attn2.to_k",
             "cross_attn.v": "attn2.to_v", "cross_attn.o": "attn2.to_out.0", "ffn.0": "ffn.net.0.proj",
             "ffn.2": "ffn.net.2"}  # fmt: skip
State = dict[str, Tensor]


@pytest.fixture(scope="module")
def convert() -> Callable[..., int]:
    main = load_tool("convert_checkpoint").main
    return lambda *arguments: main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def state() -> State:
    torch.manual_seed(0)
    with torch.device("meta"):
        shapes = CausalWan(CONFIG.student, CONFIG.sampler).state_dict()
    return {name: torch.randn(tensor.shape) for name, tensor in shapes.items()}


@pytest.fixture(scope="module")
def adapters(state: State) -> State:
    torch.manual_seed(1)
    made = {}
    for module in MODULES:
        outputs, inputs = state[f"{module}.weight"].shape
        made |= {f"{module}.down": torch.randn(RANK, inputs), f"{module}.up": torch.randn(outputs, RANK)}
    return made


def named(
    adapters: State, prefix: str, down: str, up: str, name: Callable[[str], str] = lambda module: module
) -> State:
    """The adapters under keys `PREFIX NAME SIDE`."""
    return {f"{prefix}{name(module)}.{theirs}.weight": adapters[f"{module}.{side}"]
            for module in MODULES for side, theirs in (("down", down), ("up", up))}  # fmt: skip


def in_diffusers(module: str) -> str:
    blocks, layer, linear = module.split(".", 2)
    return f"{blocks}.{layer}.{DIFFUSERS[linear]}"


def kohya(module: str) -> str:
    return module.replace(".", "_")


def alphas(prefix: str, name: Callable[[str], str] = lambda module: module) -> State:
    return {f"{prefix}{name(module)}.alpha": torch.tensor(ALPHA) for module in MODULES}


def write(dialect: str, adapters: State, folder: Path) -> tuple[Path, float]:
    """A file or folder as its makers write it, and the scale that it says."""
    path, scale = folder / "lora.safetensors", ALPHA / RANK
    if dialect == "comfyui":
        save_file(named(adapters, "diffusion_model.", "lora_A", "lora_B") | alphas("diffusion_model."), path)
    elif dialect == "kohya":
        save_file(named(adapters, "lora_unet_", "lora_down", "lora_up", kohya) | alphas("lora_unet_", kohya), path)
    elif dialect == "kohya without alpha":
        save_file(named(adapters, "lora_unet_", "lora_down", "lora_up", kohya), path)
        scale = 1.0
    elif dialect == "diffusers":
        said = {"transformer.r": RANK, "transformer.lora_alpha": ALPHA}
        tensors = named(adapters, "transformer.", "lora_A", "lora_B", in_diffusers)
        save_file(tensors, path, {"lora_adapter_metadata": json.dumps(said)})
    elif dialect == "diffusers of old":
        save_file(named(adapters, "transformer.", "lora.down", "lora.up", in_diffusers), path)
        scale = 1.0
    elif dialect == "peft of old":
        tensors = named(adapters, "base_model.model.", "lora_A", "lora_B", in_diffusers)
        torch.save(tensors, folder / "adapter_model.bin")
        (folder / "adapter_config.json").write_text(json.dumps({"r": RANK, "lora_alpha": ALPHA}))
        return folder, scale
    elif dialect == "peft":
        tensors = named(adapters, "base_model.model.", "lora_A", "lora_B")
        save_file(tensors, folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text(json.dumps({"r": RANK, "lora_alpha": ALPHA}))
        return folder, scale
    else:
        path = folder / "longlive.pt"
        tensors = named(adapters, "base_model.model.", "lora_A", "lora_B")
        torch.save({"generator_lora": tensors, "critic_lora": dict(tensors), "step": 100}, path)
        scale = 1.0
    return path, scale


DIALECTS = [
    "comfyui",
    "kohya",
    "kohya without alpha",
    "diffusers",
    "diffusers of old",
    "peft",
    "peft of old",
    "longlive",
]


@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_dialect_is_read(dialect: str, adapters: State, tmp_path: Path) -> None:
    path, scale = write(dialect, adapters, tmp_path)
    lora = open_lora(path)
    assert lora.scales == dict.fromkeys(MODULES, pytest.approx(scale))
    assert lora.tensors.keys() == adapters.keys()
    assert all(torch.equal(lora.tensors[name], adapters[name]) for name in adapters)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_out_and_in_again_are_the_same_bits(
    dialect: str, adapters: State, tmp_path: Path, convert: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    path, scale = write(dialect, adapters, tmp_path)
    assert convert(path, tmp_path / "out.safetensors", "--to", "comfyui-lora") == 0
    assert convert(tmp_path / "out.safetensors", tmp_path / "peft", "--to", "peft") == 0
    assert capsys.readouterr().out.count("largest difference 0 ") == 2
    written = load_file(tmp_path / "out.safetensors")
    assert all(written[f"diffusion_model.{module}.alpha"] == scale * RANK for module in MODULES)
    lora = open_lora(tmp_path / "peft")
    assert lora.scales == dict.fromkeys(MODULES, pytest.approx(scale))
    assert all(torch.equal(lora.tensors[name], adapters[name]) for name in adapters)


def test_a_base_takes_the_product_at_its_scale(state: State, adapters: State, tmp_path: Path) -> None:
    path, _ = write("kohya", adapters, tmp_path)
    whole = merged(in_memory(state), open_lora(path))
    for name, weight in state.items():
        module = name.removesuffix(".weight")
        if module in MODULES:
            weight = weight + 1.5 * adapters[f"{module}.up"] @ adapters[f"{module}.down"]
        torch.testing.assert_close(whole[name], weight)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_training_starts_from_every_dialect(
    dialect: str, state: State, adapters: State, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """With an alpha of its own: what the adapters compute is what the file does."""
    path, scale = write(dialect, adapters, tmp_path)
    base = tmp_path_factory.mktemp("base") / "student"
    save_weights(state.items(), base, CONFIG)
    lora = LoraConfig(rank=RANK, alpha=5.0, weights=path)
    section = StudentConfig.model_validate({**FIELDS, "weights": base, "lora": lora})
    start = read_start(Role("student", "student", section), section, ["student", "old_policy"])
    assert start is not None
    for module in MODULES:
        down, up = (start[f"{module}.adapters.old_policy.{side}"] for side in ("down", "up"))
        assert torch.equal(start[f"{module}.adapters.student.up"], up)
        expected = scale * adapters[f"{module}.up"] @ adapters[f"{module}.down"]
        torch.testing.assert_close(5.0 / RANK * up @ down, expected)
        assert torch.equal(start[f"{module}.weight"], state[f"{module}.weight"])


def spoiled(adapters: State, folder: Path, how: str) -> Path:
    tensors = named(adapters, "diffusion_model.", "lora_A", "lora_B")
    if how == "no lora":
        tensors = {"a": torch.ones(1)}
    elif how == "half":
        del tensors["diffusion_model.blocks.1.ffn.0.lora_B.weight"]
    elif how == "bias":
        tensors["diffusion_model.blocks.1.ffn.0.diff_b"] = torch.ones(40)
    elif how == "other linear":
        tensors["diffusion_model.time_projection.1.lora_A.weight"] = torch.ones(2, 24)
    elif how == "image":
        tensors["diffusion_model.blocks.1.cross_attn.k_img.lora_A.weight"] = torch.ones(2, 24)
    elif how == "two networks":
        other = named(adapters, "transformer_2.", "lora_A", "lora_B", in_diffusers)
        tensors |= {name: tensor.clone() for name, tensor in other.items()}
    save_file(tensors, folder / "lora.safetensors")
    if how == "cut":
        whole = (folder / "lora.safetensors").read_bytes()
        (folder / "lora.safetensors").write_bytes(whole[:-8])
    return folder / "lora.safetensors"


@pytest.mark.parametrize(
    ("how", "rule"),
    [
        ("no lora", "must be a LoRA file: it holds a"),
        ("half", "must hold two matrices of one rank for blocks.1.ffn.0"),
        ("bias", "must hold low-rank adapters alone: diffusion_model.blocks.1.ffn.0.diff_b is something else"),
        ("other linear", "alone: it adapts diffusion_model.time_projection.1"),
        ("image", "alone: it adapts diffusion_model.blocks.1.cross_attn.k_img"),
        ("two networks", "must be of one network: two adapters are of blocks"),
        ("cut", "must be a whole safetensors file"),
    ],
)
def test_a_bad_lora_is_refused_in_one_line(
    how: str, rule: str, adapters: State, tmp_path: Path, convert: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    path = spoiled(adapters, tmp_path, how)
    assert convert(path, tmp_path / "out", "--to", "peft") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert rule in line
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_lora_alone_is_no_student(
    adapters: State, tmp_path: Path, convert: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    path, _ = write("longlive", adapters, tmp_path)
    assert convert(path, tmp_path / "out", "--to", "diffusers") == 2
    assert (
        "this is a LoRA, adapters without their base; train from it as student.lora.weights" in capsys.readouterr().err
    )


def test_another_rank_or_base_is_refused(state: State, adapters: State, tmp_path: Path) -> None:
    path, _ = write("kohya", adapters, tmp_path)
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    with pytest.raises(ValueError, match=r"lora.rank \(4\) must be 2, as"):
        load_lora_state(path, LoraConfig(rank=4, alpha=1), shapes)
    shapes["blocks.0.ffn.0.weight"] = (48, 24)
    with pytest.raises(ValueError, match=r"blocks.0.ffn.0 is 24 to 40 there, and here \(48, 24\)"):
        load_lora_state(path, LoraConfig(rank=RANK, alpha=1), shapes)
    with pytest.raises(ValueError, match=r"lora.weights \(x\) must come with weights"):
        StudentConfig.model_validate({**FIELDS, "lora": {"rank": 2, "weights": "x"}})


def write_run(state: State, adapters: State, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """A base, and the student folder of a LoRA run over it."""
    save_weights(state.items(), folder / "base", CONFIG)
    lora = LoraConfig(rank=RANK, alpha=ALPHA)
    config = CONFIG.model_copy(update={"student": CONFIG.student.model_copy(update={"lora": lora})})
    base = describe_base(folder / "base", read_student(folder / "base").state, dtype)
    student = folder / "run" / "checkpoints" / "step_00000001" / "student"
    student.parent.mkdir(parents=True)
    write_adapters(adapters, student, config, base)
    return student


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_run_is_its_base_as_rounded_and_its_adapters(
    dtype: torch.dtype, state: State, adapters: State, tmp_path: Path
) -> None:
    write_run(state, adapters, tmp_path, dtype)
    read = read_student(tmp_path / "run")
    assert read.config() == CONFIG
    for name, weight in state.items():
        weight, module = weight.to(dtype).float(), name.removesuffix(".weight")
        if module in MODULES:
            change = 1.5 * (adapters[f"{module}.up"] @ adapters[f"{module}.down"])
            # Products of other shapes round otherwise on some processors.
            torch.testing.assert_close(read.state[name], weight + change, rtol=1e-6, atol=1e-5)
        else:
            assert torch.equal(read.state[name], weight), name
    assert load_student_state(tmp_path / "run", CONFIG.student).keys() == state.keys()
    assert read_lora(tmp_path / "run").tensors.keys() == adapters.keys()


def test_a_base_may_come_in_another_format_and_move(
    state: State, adapters: State, tmp_path: Path, convert: Callable[..., int]
) -> None:
    student = write_run(state, adapters, tmp_path)
    before = dict(read_student(student).state)
    assert convert(tmp_path / "base", tmp_path / "moved", "--to", "diffusers") == 0
    (tmp_path / "base").rename(tmp_path / "gone")
    said = json.loads((student / BASE_NAME).read_text())
    (student / BASE_NAME).write_text(json.dumps({**said, "path": str(tmp_path / "moved")}))
    after = read_student(student).state
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("how", ["gone", "changed", "of another size"])
def test_a_base_that_is_gone_or_changed_is_said_in_one_line(
    how: str, state: State, adapters: State, tmp_path: Path, convert: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    student = write_run(state, adapters, tmp_path)
    before = describe_base(tmp_path / "base", read_student(tmp_path / "base").state, torch.float32)
    check_base(student, before)
    (tmp_path / "base").rename(tmp_path / "elsewhere")
    changed = {name: tensor.clone() for name, tensor in state.items()}
    changed["blocks.1.cross_attn.v.weight"][0, 5] += 1e-3
    if how == "changed":
        save_weights(changed.items(), tmp_path / "base", CONFIG)
        now = describe_base(tmp_path / "base", read_student(tmp_path / "base").state, torch.float32)
        with pytest.raises(ValueError, match="must hold what they did when"):
            check_base(student, now)
    elif how == "of another size":
        wider = {name: torch.cat([t, t]) if ".ffn.0." in name else t for name, t in state.items()}
        wider = {name: torch.cat([t, t], 1) if name.endswith("ffn.2.weight") else t for name, t in wider.items()}
        section = CONFIG.student.model_copy(update={"ffn_dim": 80})
        save_weights(wider.items(), tmp_path / "base", CONFIG.model_copy(update={"student": section}))
    assert convert(tmp_path / "run", tmp_path / "out", "--to", "afd") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "must find the base of their adapters" in line
    assert str(tmp_path / "base") in line
    assert f"correct its path in {student / BASE_NAME}" in line
    assert convert(tmp_path / "run", tmp_path / "lora", "--to", "peft") == 0, "adapters alone need no base"
