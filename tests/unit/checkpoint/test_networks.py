"""Weights are found by structure, and what cannot be read is called by its name."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import numpy
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from afd_scale.checkpoint.formats.diffusers import diffusers_config, diffusers_key
from afd_scale.checkpoint.formats.wan import WanSizes, wan_config, weight_shapes
from afd_scale.checkpoint.load_student import read_lora, read_student
from afd_scale.chunks import Chunks
from afd_scale.config.models import PolicyConfig
from tests.tools import load_tool

SIZES = WanSizes(24, 40, 2, 16, 8, 4, (1, 2, 2))
CONFIG = PolicyConfig.model_validate({
    "student": {"dim": 24, "ffn_dim": 40, "num_heads": 2, "num_layers": 2, "freq_dim": 16, "text_dim": 8,
                "text_length": 4, "latent_channels": 4, "prediction": "velocity"},
    "sampler": {"family": "self-forcing"},
})  # fmt: skip
QUERY = "blocks.0.self_attn.q.weight"
State = dict[str, Tensor]


def network(seed: int = 0) -> State:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in weight_shapes(SIZES).items()}


def under(prefix: str, state: State) -> State:
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


def save(content: Any, path: Path, **options: Any) -> Path:
    """A safetensors or torch file, by its suffix; folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        save_file(content, path)
    else:
        torch.save(content, path, **options)
    return path


def assert_holds(path: Path, state: State, weights: str | None = None) -> None:
    read = read_student(path, weights).state
    assert read.keys() == state.keys()
    assert all(torch.equal(read[name], state[name]) for name in state)


def assert_refused(path: Path, *rules: str) -> None:
    """In one line by the tool too, and nothing is written."""
    with pytest.raises(ValueError, match=r"^weights ") as error:
        dict(read_student(path).state)
    assert "\n" not in str(error.value)
    for rule in rules:
        assert rule in str(error.value)


WRAPPED: dict[str, Callable[[State], Any]] = {
    "nested dicts of any names": lambda state: {"a": {"b": {"c.d": 1, "net": under("x.y.", state)}}, "step": 7},
    "Lightning with an optimizer": lambda state: {
        "state_dict": under("model.", state), "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(3)}}}],
    },
    "moments by the weights' names": lambda state: {
        "model": state, "optimizer": {"exp_avg": under("model.", state), "exp_avg_sq": under("model.", state)},
    },
    "FSDP, compile and checkpointing at once": lambda state: {
        f"_orig_mod.module.{name.replace('blocks.1.', 'blocks.1._fsdp_wrapped_module._checkpoint_wrapped_module.')}": t
        for name, t in state.items()
    },
    "an averaged model's counter": lambda state: {"n_averaged": torch.tensor(5), **under("module.", state)},
    "a pipeline in one file": lambda state: {
        **under("model.diffusion_model.", state), "first_stage_model.decoder.conv1.weight": torch.ones(2, 2),
        "text_encoders.umt5.shared.weight": torch.ones(3, 3),
    },
    "a list": lambda state: {"models": [under("model.", state)]},
    "numbers beside tensors": lambda state: {**state, "epoch": 3, "name": "mine"},
    "another model's dict": lambda state: {"student": state, "discriminator": {"head.weight": torch.ones(2, 2)}},
    "diffusers' names": lambda state: under("net.", {diffusers_key(name): t for name, t in state.items()}),
}  # fmt: skip


@pytest.mark.parametrize("how", WRAPPED)
@pytest.mark.parametrize("legacy", [False, True])
def test_the_only_wan_is_found_in_whatever_wraps_it(how: str, legacy: bool, tmp_path: Path) -> None:
    content = WRAPPED[how](network())
    options = {"_use_new_zipfile_serialization": False} if legacy else {}
    assert_holds(save(content, tmp_path / "file.ckpt", **options), network())


def test_what_is_left_out_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = save({"generator": network(1), "generator_ema": network(2), "critic": network(3)}, tmp_path / "file.pt")
    assert_holds(path, network(2))
    assert "reading generator_ema of it, and not critic, generator" in caplog.text
    assert_holds(path, network(1), "student")


def test_roles_inside_of_one_dict(tmp_path: Path) -> None:
    state = {**under("generator.model.", network(1)), **under("fake_score.model.", network(2))}
    assert_holds(save({"state_dict": state}, tmp_path / "file.pt"), network(1))


@pytest.mark.parametrize(
    ("content", "rules"),
    [
        ({"high": network(1), "low": network(2)}, ("it holds 2, high and low",)),
        ({"models": [network(1), network(2)]}, ("models.0 and models.1",)),
        ({**under("pipe.dit.", network(1)), **under("pipe.dit2.", network(2))}, ("pipe.dit and pipe.dit2",)),
        ({"model": network(1), "ema": network(2)}, ("ema and model",)),
        ({"critic": network(1)}, ("must hold the student: it holds critic alone",)),
        ({**under("dit.", network(1)), "motion.weight": torch.ones(2, 2)}, ("one network", "motion.weight")),
        ({"dit": {**network(1), "controller.weight": torch.ones(2, 2)}}, ("must not have controller.weight",)),
    ],
)
def test_one_part_of_several_is_never_taken_in_silence(content: Any, rules: tuple[str, ...], tmp_path: Path) -> None:
    assert_refused(save(content, tmp_path / "file.pt"), *rules)


def test_the_ema_is_no_student_s_weights(tmp_path: Path) -> None:
    path = save({"generator_ema": network()}, tmp_path / "file.pt")
    assert_holds(path, network(), "ema")
    with pytest.raises(ValueError, match="it holds generator_ema alone"):
        read_student(path, "student")


@pytest.mark.parametrize("parts", [("high_noise_model", "low_noise_model"), ("transformer", "transformer_2")])
def test_a_folder_of_two_networks_is_refused_by_both_names(
    parts: tuple[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for seed, part in enumerate(parts):
        save(network(seed), tmp_path / part / "diffusion_pytorch_model.safetensors")
    save({"x": torch.ones(2)}, tmp_path / "Wan2.1_VAE.pth")
    assert_refused(tmp_path, f"it holds 2, {parts[0]}/ and {parts[1]}/")
    assert_holds(tmp_path / parts[1], network(1))
    assert f"one network of several: {parts[0]} beside it is left out" in caplog.text


def test_the_only_subfolder_with_a_wan_is_read(tmp_path: Path) -> None:
    save(network(), tmp_path / "any" / "weights.safetensors")
    said = json.dumps({**wan_config(CONFIG.student), "_class_name": "CausalWanModel"})
    (tmp_path / "any" / "config.json").write_text(said)
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text('{"_class_name": "AutoencoderKLWan"}')
    assert_holds(tmp_path, network())
    assert_refused(tmp_path / "vae", "it is of AutoencoderKLWan")


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
@pytest.mark.parametrize("index", [True, False])
@pytest.mark.parametrize("named", ["", "w-00002-of-00003"])
def test_shards_are_put_together_with_an_index_or_by_their_numbers(
    suffix: str, index: bool, named: str, tmp_path: Path
) -> None:
    weight_map, items = {}, list(under("module.", network()).items())
    for number in range(3):
        shard = save(dict(items[number::3]), tmp_path / f"w-{number + 1:05d}-of-00003{suffix}")
        weight_map |= {name: shard.name for name, _ in items[number::3]}
    save({"step": 1}, tmp_path / "optimizer.bin")
    if index:
        (tmp_path / f"w{suffix}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    source = tmp_path / f"{named}{suffix}" if named else tmp_path
    assert_holds(source, network())
    (tmp_path / f"w-00003-of-00003{suffix}").unlink()
    assert_refused(source, f"w-00003-of-00003{suffix}", "is missing" if index else "it is one part of 3")


@pytest.mark.parametrize("names", [("a.pt", "b.bin"), ("a.safetensors", "w.safetensors.index.json")])
def test_a_folder_with_two_sets_is_refused(names: tuple[str, str], tmp_path: Path) -> None:
    for name in names:
        if name.endswith(".json"):
            save(network(), tmp_path / "w1.safetensors")
            (tmp_path / name).write_text(json.dumps({"weight_map": dict.fromkeys(network(), "w1.safetensors")}))
        else:
            save(network(), tmp_path / name)
    assert_refused(tmp_path, f"one set of files: it holds {names[0]} and {names[1]}")


def test_the_content_of_a_file_is_told_before_its_suffix(tmp_path: Path) -> None:
    save(network(), tmp_path / "a.safetensors").rename(tmp_path / "a.bin")
    assert_holds(tmp_path / "a.bin", network())
    save(network(), tmp_path / "b.pt").rename(tmp_path / "b.safetensors")
    assert_refused(tmp_path / "b.safetensors", "this is a torch file: rename it to end in .pt")


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"<!DOCTYPE html>\n<html><body>Log in</body></html>", "a web page (HTML)"),
        (b"\n  <HTML lang=en>", "a web page (HTML)"),
        (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "an XML text"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12\n", "a git-LFS pointer"),
        (b'{"error": "Repository not found"}', "a text that begins"),
        (b"Entry not found", "a text that begins 'Entry not found'"),
        (b"GGUF\x03\x00\x00\x00\x00", "a GGUF file"),
        (b"\x1f\x8b\x08\x00\x00", "a compressed archive"),
        (b"", "an empty file"),
    ],
)
@pytest.mark.parametrize("name", ["a.pt", "a.safetensors", "a.bin", "a-00001-of-00001.ckpt"])
def test_a_file_of_something_else_is_called_by_its_name(content: bytes, what: str, name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    assert_refused(tmp_path / name, f"this is {what}")
    assert_refused(tmp_path, f"this is {what}")


def test_a_config_that_is_a_web_page_is_called_so(tmp_path: Path) -> None:
    save(network(), tmp_path / "a.safetensors")
    (tmp_path / "config.json").write_text("<html>502</html>")
    with pytest.raises(ValueError, match=r"^config .* a web page"):
        read_student(tmp_path)


@pytest.mark.parametrize(
    ("thing", "name"),
    [
        (numpy.float32(0.5), "numpy._core.multiarray.scalar"),
        (argparse.Namespace(rate=1), "argparse.Namespace"),
        (torch.nn.Linear(2, 2), "torch.nn.modules.linear.Linear"),
        (Path("x"), "pathlib"),
    ],
)
@pytest.mark.parametrize("legacy", [False, True])
def test_objects_are_named_by_their_class(thing: Any, name: str, legacy: bool, tmp_path: Path) -> None:
    options = {"_use_new_zipfile_serialization": False} if legacy else {}
    path = save({"model": network(), "more": [thing]}, tmp_path / "file.pt", **options)
    assert_refused(path, "it holds objects of class", name, "save its tensors by themselves")


def test_a_program_and_a_zip_file_are_no_weights(tmp_path: Path) -> None:
    with ZipFile(tmp_path / "program.pt", "w") as program:
        for name in ("data.pkl", "constants.pkl", "code/__torch__.py"):
            program.writestr(f"program/{name}", b"")
    assert_refused(tmp_path / "program.pt", "it is a program (TorchScript)")
    numpy.savez(tmp_path / "arrays.npz", a=numpy.ones(2))
    (tmp_path / "arrays.npz").rename(tmp_path / "arrays.pt")
    assert_refused(tmp_path / "arrays.pt", "a zip file that torch.save did not write")


def scaled(state: State, scale: str, dtype: torch.dtype) -> State:
    """Matrices in 8 bits, a scale beside each."""
    matrices = {name: t.to(dtype) for name, t in state.items() if t.ndim == 2}
    scales = {name.removesuffix("weight") + scale: torch.ones(()) for name in matrices} if scale else {}
    return {**state, **matrices, **scales}


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize(
    ("scale", "dtype", "what"),
    [
        ("scale_weight", torch.float8_e4m3fn, "FP8 with scales"),
        ("weight_scale", torch.float8_e5m2, "FP8 with scales"),
        ("weight_scale_inv", torch.float8_e4m3fn, "FP8 with scales"),
        ("", torch.float8_e5m2, "FP8 without their scales"),
        ("weight.absmax", torch.uint8, "integers with scales"),
        ("", torch.int8, "integers without their scales"),
    ],
)
def test_quantised_weights_are_called_so(
    scale: str, dtype: torch.dtype, what: str, prefix: str, tmp_path: Path
) -> None:
    path = save(under(prefix, scaled(network(), scale, dtype)), tmp_path / "file.safetensors")
    assert_refused(path, f"the weights are {what}")


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (torch.full((24, 24), float("inf")), f"must be finite: {QUERY}"),
        (torch.full((24, 24), float("nan"), dtype=torch.bfloat16), f"must be finite: {QUERY}"),
        (torch.ones(24, 24, dtype=torch.int64), f"floating-point numbers: {QUERY} is of torch.int64"),
        (torch.ones(24, 24, dtype=torch.complex64), "floating-point numbers"),
        (torch.empty(0, 24), f"{QUERY} is empty"),
        (torch.ones(24, 24).to_sparse(), "sparse_coo"),
    ],
)
def test_values_are_checked(value: Tensor, reason: str, tmp_path: Path) -> None:
    assert_refused(save({**network(), QUERY: value}, tmp_path / "file.pt"), reason)


def test_an_adapter_s_values_are_checked(tmp_path: Path) -> None:
    down, up = torch.ones(2, 24), torch.full((24, 2), float("nan"))
    name = "diffusion_model.blocks.0.self_attn.q.lora_"
    path = save({f"{name}A.weight": down, f"{name}B.weight": up}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="must be finite"):
        dict(read_lora(path).tensors)
    path = save({f"{name}A.weight": down.int(), f"{name}B.weight": up}, tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match=r"^lora .* 16 bits or more"):
        read_lora(path)


LORA = {f"blocks.0.self_attn.q.lora_{side}.weight": torch.ones(2, 24).T if side == "B" else torch.ones(2, 24)
        for side in "AB"}  # fmt: skip


@pytest.mark.parametrize(
    ("content", "rule"),
    [
        ({"state_dict": under("base_model.model.", LORA)}, "adapters without their base"),
        ({"diffusion_model.blocks.1.ffn.0.lokr_w1": torch.ones(2, 2)}, "adapters without their base"),
        ({"lora_unet_blocks_0_ffn_0.hada_w1_a": torch.ones(2, 2)}, "adapters without their base"),
        ({"diffusion_model.blocks.0.ffn.0.diff": torch.ones(2, 2)}, "adapters without their base"),
        ({"generator": network(), "generator_lora": LORA}, "beside their base: merge"),
        ({**network(), **LORA}, "beside their base: merge"),
    ],
)
def test_a_lora_is_called_so(content: Any, rule: str, tmp_path: Path) -> None:
    assert_refused(save(content, tmp_path / "file.pt"), "this is a LoRA", rule)


def test_adapters_are_found_in_a_dict(tmp_path: Path) -> None:
    lora = read_lora(save({"state_dict": LORA, "step": 1}, tmp_path / "file.pt"))
    assert list(lora.scales) == ["blocks.0.self_attn.q"]


OTHERS: dict[str, State] = {
    "an image-to-video Wan": {**network(), "img_emb.proj.0.weight": torch.ones(3)},
    "a VACE": {**network(), "vace_blocks.0.self_attn.q.weight": torch.ones(3, 3)},
    "a Wan with control inputs": {**network(), "control_adapter.conv.weight": torch.ones(3, 3)},
    "a VAE": {"encoder.downsamples.0.residual.0.gamma": torch.ones(3)},
    "a T5 text encoder": {"token_embedding.weight": torch.ones(3, 3), "blocks.0.attn.q.weight": torch.ones(3, 3)},
    "a HunyuanVideo or Flux": {"double_blocks.0.img_attn.qkv.weight": torch.ones(3, 3)},
    "in shards of FSDP": {"_fsdp_wrapped_module._flat_param": torch.ones(9)},
}


@pytest.mark.parametrize("what", OTHERS)
def test_another_network_is_called_by_its_name(what: str, tmp_path: Path) -> None:
    assert_refused(save(OTHERS[what], tmp_path / "file.pt"), f"this is {what}")


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({"model_type": "i2v"}, "an image-to-video Wan"),
        ({"in_dim": 9}, "an image-to-video Wan"),
        ({"model_type": "vace"}, "a VACE"),
        ({"model_type": "x2v"}, "a Wan of model_type x2v"),
    ],
)
def test_a_wan_folder_of_another_task_is_called_so(fields: dict[str, Any], what: str, tmp_path: Path) -> None:
    save(network(), tmp_path / "a.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({**wan_config(CONFIG.student), **fields}))
    assert_refused(tmp_path, f"this is {what}")


def test_a_diffusers_folder_of_another_task_is_called_so(tmp_path: Path) -> None:
    save({diffusers_key(name): t for name, t in network().items()}, tmp_path / "a.safetensors")
    said = {**diffusers_config(CONFIG.student), "in_channels": 9, "out_channels": 4}
    (tmp_path / "config.json").write_text(json.dumps(said))
    assert_refused(tmp_path, "this is an image-to-video Wan")


@pytest.mark.parametrize(
    ("fields", "layout"),
    [
        ({"local_attn_size": 8, "sink_size": 2, "num_frame_per_block": 2}, (Chunks(2), 8, 2)),
        ({"local_attn_size": -1, "sink_size": 3}, (Chunks(3), None, 0)),
        ({"local_attn_size": 21}, (Chunks(3), 21, 0)),
        ({"independent_first_frame": True}, (Chunks(3, 1), None, 0)),
        ({"independent_first_frame": False}, (Chunks(3), None, 0)),
    ],
)
def test_a_causal_config_says_window_and_sink(
    fields: dict[str, int], layout: tuple[Chunks, int | None, int], tmp_path: Path
) -> None:
    save(network(), tmp_path / "a.safetensors")
    said = {**wan_config(CONFIG.student), "_class_name": "MyCausalWanModel", **fields}
    (tmp_path / "config.json").write_text(json.dumps(said))
    assert read_student(tmp_path).config().sampler.layout == layout


@pytest.mark.parametrize(
    ("files", "what"),
    [
        (("latest", "zero_to_fp32.py", "global_step5/zero_pp_rank_0_mp_rank_00_model_states.pt"), "a DeepSpeed ZeRO"),
        (
            ("zero_pp_rank_0_mp_rank_00_model_states.pt", "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"),
            "a DeepSpeed",
        ),
        (("__0_0.distcp", "__1_0.distcp", ".metadata"), "a torch.distributed checkpoint"),
    ],
)
def test_a_folder_in_parts_of_ranks_says_how_to_join_it(files: tuple[str, ...], what: str, tmp_path: Path) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"\x80\x02}q\x00.")
    assert_refused(tmp_path, f"must be whole: this is {what}")
    save(network(), tmp_path / "pytorch_model.bin")  # as zero_to_fp32.py leaves it there
    assert_holds(tmp_path, network())


def test_the_tool_answers_with_2_and_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = save({"high": network(1), "low": network(2)}, tmp_path / "file.pt")
    assert load_tool("convert_checkpoint").main([str(path), str(tmp_path / "out"), "--to", "afd"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "it holds 2, high and low" in line
    assert not (tmp_path / "out").exists()
