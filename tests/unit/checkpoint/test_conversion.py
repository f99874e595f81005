"""tools/convert_checkpoint.py: round trips to the bit, what a folder or file is told by, memory, a full disk."""

import json
import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from zipfile import ZIP_DEFLATED, ZipFile

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from afd_scale.checkpoint.formats.wan import SIDECAR_NAME, WanSizes, weight_shapes
from afd_scale.checkpoint.load_student import read_student
from afd_scale.checkpoint.weights import save_weights
from afd_scale.chunks import Chunks
from afd_scale.config.models import PolicyConfig
from tests.tools import ROOT, load_tool

GOLDEN = sorted((ROOT / "tests" / "golden").glob("*.safetensors"))
SIZES = WanSizes(24, 40, 2, 16, 8, 4, (1, 2, 2))
CONFIG = PolicyConfig.model_validate({
    "student": {"dim": 24, "ffn_dim": 40, "num_heads": 2, "num_layers": 2, "freq_dim": 16, "text_dim": 8,
                "text_length": 4, "latent_channels": 4, "prediction": "velocity"},
    "sampler": {"family": "self-forcing", "window_frames": 9, "sink_frames": 3, "at_prompt_change": "keep",
                "positions": "window"},
})  # fmt: skip
State = dict[str, Tensor]


@pytest.fixture(scope="module")
def convert() -> Callable[..., int]:
    main = load_tool("convert_checkpoint").main
    return lambda *arguments: main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def state() -> State:
    return {name: torch.randn(shape) for name, shape in weight_shapes(SIZES).items()}


def assert_same_bits(path: Path, state: State) -> None:
    read = read_student(path).state
    assert read.keys() == state.keys()
    assert all(torch.equal(read[name], state[name]) and read[name].dtype == state[name].dtype for name in state)


@pytest.mark.parametrize("golden", GOLDEN, ids=lambda path: path.stem)
def test_a_golden_student_comes_back_to_the_bit(
    golden: Path, tmp_path: Path, convert: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    """Self-Forcing's file, diffusers, original Wan, Self-Forcing's file."""
    tensors = {name: tensor for name, tensor in load_file(golden).items() if name.startswith("model.")}
    torch.save({"generator": tensors}, tmp_path / "start.pt")
    with safe_open(golden, "pt") as file:
        said = file.metadata()["config"]
    (tmp_path / "config.json").write_text(said)
    first = (
        tmp_path / "start.pt",
        tmp_path / "diffusers",
        "--to",
        "diffusers",
        "--model-config",
        tmp_path / "config.json",
    )
    assert convert(*first) == 0
    assert convert(tmp_path / "diffusers", tmp_path / "wan", "--to", "wan") == 0
    assert convert(tmp_path / "wan", tmp_path / "end.pt", "--to", "self-forcing") == 0
    assert capsys.readouterr().out.count("largest difference 0 ") == 3
    end = torch.load(tmp_path / "end.pt", weights_only=True)
    assert end.keys() == {"generator"}
    assert end["generator"].keys() == tensors.keys()
    assert all(torch.equal(end["generator"][name], tensors[name]) for name in tensors)
    config, fields = read_student(tmp_path / "wan").config(), json.loads(said)
    assert (config.student.num_heads, config.student.text_length) == (fields["num_heads"], fields["text_len"])
    window = None if fields["window_frames"] == -1 else fields["window_frames"]
    assert config.sampler.layout == (Chunks(fields["chunk_frames"]), window, fields["sink_frames"])
    assert config.sampler.timestep_shift == fields["timestep_shift"]


def test_original_wans_folder(state: State, tmp_path: Path, convert: Callable[..., int]) -> None:
    """No prefixes, original Wan's file names, its config; in shards where asked."""
    save_weights(state.items(), tmp_path / "student", CONFIG)
    assert convert(tmp_path / "student", tmp_path / "wan", "--to", "wan", "--max-shard-size", "0.02MB") == 0
    shards = sorted(path.name for path in (tmp_path / "wan").glob("*.safetensors"))
    assert shards[0] == f"diffusion_pytorch_model-00001-of-{len(shards):05d}.safetensors"
    assert len(shards) > 2
    index = json.loads((tmp_path / "wan" / "diffusion_pytorch_model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == state.keys()
    said = json.loads((tmp_path / "wan" / "config.json").read_text())
    assert (said["_class_name"], said["model_type"], said["in_dim"], said["out_dim"]) == ("WanModel", "t2v", 4, 4)
    assert read_student(tmp_path / "wan").config() == CONFIG
    (tmp_path / "wan" / SIDECAR_NAME).unlink()
    assert read_student(tmp_path / "wan").config().student.num_heads == 2
    assert_same_bits(tmp_path / "wan", state)


@pytest.mark.parametrize("to", ["afd", "diffusers", "wan"])
def test_where_a_run_started_from_is_not_carried_along(
    to: str, state: State, tmp_path: Path, convert: Callable[..., int]
) -> None:
    """It is a path of one machine, and the weights are there."""
    started = CONFIG.student.model_copy(update={"weights": tmp_path / "start"})
    save_weights(state.items(), tmp_path / "student", CONFIG.model_copy(update={"student": started}))
    assert convert(tmp_path / "student", tmp_path / "out", "--to", to) == 0
    (written,) = (
        tmp_path / "out" / name for name in ("student.json", SIDECAR_NAME) if (tmp_path / "out" / name).exists()
    )
    assert PolicyConfig.model_validate_json(written.read_text()) == CONFIG


@pytest.mark.parametrize(
    "prefix", ["model.diffusion_model.", "diffusion_model.", "pipe.dit.", "transformer.", "net.x."]
)
def test_a_prefix_that_all_names_have_is_no_part_of_them(prefix: str, state: State, tmp_path: Path) -> None:
    save_file({f"{prefix}{name}": tensor for name, tensor in state.items()}, tmp_path / "file.safetensors")
    assert_same_bits(tmp_path / "file.safetensors", state)


@pytest.mark.parametrize("around", [{"step": 5}, {"optimizer": {"lr": 0.1}}, {}])
@pytest.mark.parametrize("key", ["model", "state_dict", "module", "generator"])
def test_the_only_network_in_a_torch_file_is_read(
    key: str, around: dict[str, Any], state: State, tmp_path: Path
) -> None:
    torch.save({**around, key: state}, tmp_path / "file.pt")
    assert_same_bits(tmp_path / "file.pt", state)


def test_torch_files_of_old_compressed_ones_and_views_are_read(state: State, tmp_path: Path) -> None:
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert_same_bits(tmp_path / "old.pth", state)
    torch.save(state, tmp_path / "plain.pt")
    with ZipFile(tmp_path / "plain.pt") as plain, ZipFile(tmp_path / "small.pt", "w", ZIP_DEFLATED) as small:
        for name in plain.namelist():
            small.writestr(name, plain.read(name))
    assert_same_bits(tmp_path / "small.pt", state)
    views = {name: torch.cat([tensor, tensor])[: len(tensor)] for name, tensor in state.items()}
    views["blocks.0.self_attn.q.weight"] = state["blocks.0.self_attn.q.weight"].T.contiguous().T
    torch.save(views, tmp_path / "views.pt")
    assert_same_bits(tmp_path / "views.pt", state)


@pytest.mark.parametrize("name", ["", "any.safetensors.index.json", "any-00001-of-00002.safetensors"])
def test_shards_of_any_name_are_read_by_folder_index_or_shard(name: str, state: State, tmp_path: Path) -> None:
    weight_map = {}
    for number in (1, 2):
        shard = f"any-{number:05d}-of-00002.safetensors"
        names = list(state)[number - 1 :: 2]
        save_file({name: state[name] for name in names}, tmp_path / shard)
        weight_map |= dict.fromkeys(names, shard)
    (tmp_path / "any.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert_same_bits(tmp_path / name, state)


@pytest.mark.parametrize("class_name", ["CausalWanModel", "CausalWanTransformer3DModel"])
def test_a_causal_wans_folder_says_chunk_and_window(
    class_name: str, state: State, tmp_path: Path, convert: Callable[..., int]
) -> None:
    save_weights(state.items(), tmp_path / "student", CONFIG)
    to = "wan" if class_name == "CausalWanModel" else "diffusers"
    assert convert(tmp_path / "student", tmp_path / "out", "--to", to) == 0
    (tmp_path / "out" / SIDECAR_NAME).unlink()
    said = json.loads((tmp_path / "out" / "config.json").read_text())
    said |= {"_class_name": class_name, "local_attn_size": 12, "sink_size": 3, "num_frames_per_block": 3}
    (tmp_path / "out" / "config.json").write_text(json.dumps(said))
    assert read_student(tmp_path / "out").config().sampler.layout == (Chunks(3), 12, 3)
    (tmp_path / "out" / "config.json").write_text(json.dumps({**said, "local_attn_size": -1, "sink_size": 0}))
    assert read_student(tmp_path / "out").config().sampler.layout == (Chunks(3), None, 0)


def bad(how: str, state: State, folder: Path) -> tuple[Path, ...]:
    """A source that is refused, and further arguments."""
    path = folder / "file.safetensors"
    if how == "cut":
        save_file(state, path)
        path.write_bytes(path.read_bytes()[:-8])
    elif how == "cut torch file":
        path = folder / "file.pt"
        torch.save(state, path)
        path.write_bytes(path.read_bytes()[:-2000])
    elif how == "nested":
        path = folder / "file.pt"
        with ZipFile(path, "w") as file:  # 5000 dicts, each the value of "x" in the one around it
            file.writestr("a/data.pkl", b"\x80\x02" + b"}X\1\0\0\0x" * 5000 + b"}" + b"s" * 5000 + b".")
            file.writestr("a/version", "3\n")
            file.writestr("a/byteorder", "little")
    elif how == "fp8":
        save_file({n: t.to(torch.float8_e4m3fn) if t.ndim == 2 else t for n, t in state.items()}, path)
    elif how == "integers":
        save_file({n: t.int() if t.ndim == 2 else t for n, t in state.items()}, path)
    elif how == "nan":
        save_file({**state, "head.head.bias": torch.full((16,), float("nan"))}, path)
    elif how == "empty":
        save_file({name: torch.empty(0) for name in state}, path)
    elif how == "image to video":
        save_file({**state, "patch_embedding.weight": torch.ones(24, 9, 1, 2, 2)}, path)
    elif how == "two sets":
        save_file(state, path)
        save_file(state, folder / "other.safetensors")
        path = folder
    elif how == "other config":
        save_file(state, path, {"afd_scale": CONFIG.model_dump_json()})
        (folder / "config.json").write_text('{"num_heads": 4}')
        return path, Path("--model-config"), folder / "config.json"
    return (path,)


@pytest.mark.parametrize(
    ("how", "rule"),
    [
        ("cut", "must be a whole safetensors file"),
        ("cut torch file", "must be a torch file of tensors alone: it is damaged"),
        ("nested", "must be a torch file of tensors: it is nested too deeply"),
        ("fp8", "must not be quantised: the weights are FP8 without their scales"),
        ("integers", "must be floating-point numbers"),
        ("nan", "must be finite: head.head.bias holds NaN"),
        ("empty", "is empty, as ZeRO-3 leaves what is not gathered"),
        ("image to video", "they take 9 and give 4, this is an image-to-video Wan"),
        ("two sets", "must be one set of files: it holds file.safetensors and other.safetensors"),
        ("other config", "num_heads is 4 in the one and 2 in the other"),
    ],
)
@pytest.mark.parametrize("to", ["diffusers", "self-forcing"])
def test_bad_input_leaves_one_line_and_nothing_else(
    how: str, rule: str, to: str, state: State, tmp_path: Path, convert: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    source, *options = bad(how, state, tmp_path)
    if how != "other config":
        (tmp_path / "model.json").write_text(CONFIG.model_dump_json())
        options = [Path("--model-config"), tmp_path / "model.json"]
    before = sorted(tmp_path.iterdir())
    assert convert(source, tmp_path / "out.pt", "--to", to, *options) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert rule in line
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("to", "name"),
    [("afd", "out"), ("diffusers", "out"), ("wan", "out"), ("wan", "out.safetensors"), ("self-forcing", "out.pt")],
)
def test_a_full_disk_leaves_one_line_and_nothing_else(
    to: str, name: str, state: State, tmp_path: Path, convert: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    save_weights(state.items(), tmp_path / "student", CONFIG)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        assert convert(tmp_path / "student", tmp_path / name, "--to", to) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    (line,) = capsys.readouterr().err.splitlines()
    assert "must be writable" in line
    assert "File too large" in line
    assert [path.name for path in tmp_path.iterdir()] == ["student"]


def test_both_sides_are_run_where_they_are_small_or_it_is_asked(
    state: State, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = load_tool("convert_checkpoint")
    save_weights(((name, tensor / 8) for name, tensor in state.items()), tmp_path / "student", CONFIG)

    def difference(out: str, *options: str) -> float | None:
        assert tool.main([str(tmp_path / "student"), str(tmp_path / out), "--to", "diffusers", *options]) == 0
        found = re.search(r"largest difference (\S+) of", capsys.readouterr().out)
        return float(found[1]) if found else None

    assert difference("whole") == 0
    assert 1e-5 < (difference("rounded", "--dtype", "bfloat16") or 0) < 0.1
    assert difference("unasked", "--no-verify") is None
    monkeypatch.setattr(tool, "VERIFIED", 100)
    assert difference("large") is None
    assert difference("asked", "--verify") == 0


MEMORY = """
import sys
from pathlib import Path
import torch
from afd_scale.checkpoint.formats.wan import WanSizes, weight_shapes
from afd_scale.checkpoint.weights import save_weights
from afd_scale.config.models import PolicyConfig
from tests.tools import load_tool

def memory(field):
    return int(next(line for line in open("/proc/self/status") if line.startswith(field)).split()[1]) * 1024

folder, kind, *arguments = sys.argv[1:]
sizes = WanSizes(1024, 2752, 8, 256, 1024, 16, (1, 2, 2))
state = ((name, torch.full(shape, 0.01, dtype=torch.bfloat16)) for name, shape in weight_shapes(sizes).items())
source = Path(folder) / "student"
if kind == "sharded":
    config = PolicyConfig.model_validate({"student": {"architecture": "wan-1.3b", "dim": 1024, "ffn_dim": 2752,
        "num_layers": 8, "text_dim": 1024, "num_heads": 8}, "sampler": {"family": "self-forcing"}})
    save_weights(state, source, config, 120_000_000)
else:
    source = Path(folder) / "start.pt"
    torch.save({"generator": {"model." + name: tensor for name, tensor in state}}, source)
main = load_tool("convert_checkpoint").main
main(["nowhere", str(Path(folder) / "out"), "--to", "afd"])  # what is loaded once
Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
before = memory("VmRSS")
assert main([str(source), str(Path(folder) / "out"), "--no-verify", *arguments]) == 0
print(memory("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "dtype"), [("sharded", "float32"), ("torch file", "keep")])
def test_a_conversion_holds_a_shard_at_most(kind: str, dtype: str, tmp_path: Path) -> None:
    """Of 230 MB in bf16, or twice as much in float32, as shards of 120 MB: 1.3 times such a shard, and no more."""
    options = ["--to", "diffusers", "--max-shard-size", "120MB", "--dtype", dtype]
    command = [sys.executable, "-c", MEMORY, str(tmp_path), kind, *options]
    # As with the matrices of a real model, what is freed goes back to the system.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.splitlines()[-1]) < 1.3 * 120e6
    assert sum(path.stat().st_size for path in (tmp_path / "out").iterdir()) > 2e8
