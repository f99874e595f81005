"""Beside Self-Forcing: the floor, the errors, and where AFD_SCALE_PEER names a checkout, the same figures as it."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from afd_scale.benchmarks.floor import record
from afd_scale.benchmarks.self_forcing import USED, check, check_training, load_modules
from afd_scale.config import RunConfig
from afd_scale.engines.plain import PlainNetwork
from afd_scale.rollout.sampler import Noise, Sampler
from tests.networks import make_policy
from tests.tools import load_tool

PEER = os.environ.get("AFD_SCALE_PEER")
TINY = ["data.latent_frames=6", "data.latent_height=4", "data.latent_width=6", "student.num_layers=2"]
SHAPE = {"dim": 16, "ffn_dim": 24, "num_heads": 2, "num_layers": 2, "freq_dim": 8, "text_dim": 6, "text_length": 5,
         "latent_channels": 3, "prediction": "velocity", "chunk_frames": 1}  # fmt: skip


@pytest.fixture(scope="module")
def benchmark():
    threads = torch.get_num_threads()
    yield load_tool("benchmark")
    torch.set_num_threads(threads)


def test_the_floor_is_the_products_and_the_attention_forward_and_backward() -> None:
    linear, x = nn.Linear(8, 12), torch.randn(2, 5, 8, requires_grad=True)

    def run() -> None:
        heads = F.gelu(linear(x)).unflatten(2, (2, 6)).transpose(1, 2)
        F.scaled_dot_product_attention(heads, heads, heads).square().mean().backward()

    floor = record(run, linear.parameters())
    assert floor.products() == [(10, 8, 12), (10, 12, 8), (12, 10, 8)]
    names = [operator.overloadpacket.__name__ for operator, _, _ in floor.calls]
    assert names[0] == "addmm"
    assert all("attention" in name for name in names[1:3])
    assert names[2].endswith("backward")
    assert len(names) == 5
    weight = floor.calls[0][1][2]
    assert weight.data_ptr() == linear.weight.data_ptr(), "weights are read where they are"


@pytest.mark.parametrize("gradient", [False, True], ids=["rollout", "update"])
def test_the_floor_multiplies_as_much_as_the_pass(gradient: bool) -> None:
    model = make_policy(SHAPE)
    nn.init.normal_(model.head.head.weight)
    text, latents = torch.randn(1, 5, 6), torch.randn(1, 3, 3, 4, 4)

    def run() -> None:
        if gradient:
            model(latents, torch.full((1, 3), 500.0), text, clean=latents).square().mean().backward()
        else:
            Sampler(model.sampler).rollout(policy, text, Noise(latents, torch.randn(3, *latents.shape)))

    policy = PlainNetwork(model)
    counted = []
    floor = record(run, model.parameters())
    for each in (run, floor):
        with FlopCounterMode(display=False) as counter:
            each()
        counted.append(counter.get_total_flops())
    assert counted[0] == counted[1] > 0


def checkout(folder: Path, **sources: str) -> Path:
    for name in USED:
        path = folder.joinpath(*name.split(".")).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(sources.get(name.rpartition(".")[2], ""))
    return folder


def test_a_checkout_is_imported_and_leaves_no_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = object()
    monkeypatch.setitem(sys.modules, "utils", ours)
    (tmp_path / "wan").mkdir()
    (tmp_path / "wan" / "__init__.py").write_text("import nothing_like_it")
    sources = {"wan_wrapper": "from utils.scheduler import answer\nfrom wan.modules.t5 import umt5_xxl\nprint(1)"}
    modules = load_modules(checkout(tmp_path, scheduler="answer = 42", **sources))
    assert modules["utils.wan_wrapper"].answer == 42
    assert sys.modules["utils"] is ours
    assert not [name for name in sys.modules if name.startswith(("wan.", "utils.", "pipeline"))]


def test_what_is_no_checkout_is_said_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"^--peer \(.*\) must be a checkout of Self-Forcing: wan/modules/.* not there"
    ):
        load_modules(tmp_path)
    with pytest.raises(ValueError, match=r"^--peer \(.*\) cannot be imported: No module named 'nothing_like_it'$"):
        load_modules(checkout(tmp_path, causal_model="import nothing_like_it"))
    assert "wan" not in sys.modules


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rollout", "--against", "self-forcing"], "--against (self-forcing) must come with --peer DIR"),
        (["rollout", "--peer", "there"], "--peer (there) must come with --against"),
        (["step", "--against", "self-forcing", "--peer", "there"], "must be given with rollout or update, not with st"),
        (["rollout", "--against", "self-forcing", "--peer", "/nowhere"], "--peer (/nowhere) must be a checkout"),
        (["linear", "--profile"], "--profile must be given with rollout, update, step, not with linear"),
        (["attention", "--shape", "large"], "attention (large) must be given shapes"),
        (
            ["update", "--against", "self-forcing", "--peer", "there", "--backend", "flex"],
            "attention (flex) must be auto, sdpa or flash",
        ),
    ],
)  # fmt: skip
def test_bad_options_are_one_line(benchmark, capsys, arguments, message):
    assert benchmark.main([*arguments, *(TINY if arguments[0] in ("rollout", "update") else [])]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


@pytest.mark.parametrize(
    ("student", "sampler", "message"),
    [
        ({"prediction": "x0"}, {}, "student.prediction (x0) must be velocity"),
        ({"lora": {"rank": 2}}, {}, "student.lora (2) must be null"),
        ({}, {"first_chunk_timesteps": [1000]}, "sampler.first_chunk_timesteps ((1000,)) must be null"),
        ({}, {"first_chunk_frames": 2}, "sampler.first_chunk_frames (2) must be null"),
        ({}, {"window_frames": 2}, "sampler.window_frames (2) must be null"),
        ({}, {"chunk_frames": 2}, "tokens of a video (64) must be no multiple of 64"),
    ],
)
def test_what_theirs_has_not_is_refused(student, sampler, message):
    frames, rows = (4, 8) if "chunk_frames" in sampler else (3, 6)
    config = RunConfig.model_validate({
        "student": {"prediction": "velocity", **student}, "sampler": sampler, "method": {"name": "sft"},
        "data": {"latent_frames": frames, "latent_height": rows, "latent_width": 8}, "evaluation": {"metrics": "none"},
    })  # fmt: skip
    with pytest.raises(ValueError) as raised:
        check_training(config)
    assert message in str(raised.value)
    if sampler.keys() & {"window_frames", "chunk_frames"}:
        check(config)


def test_shapes_are_what_the_tool_says(benchmark):
    for name, tokens in (("large", 216), ("host-bound", 60)):
        options = benchmark.parse(["rollout", "--shape", name], torch.device("cpu"))
        config = benchmark._config(options, torch.device("cpu"))
        assert config.sampler.chunk_frames * config.data.latent_height * config.data.latent_width // 4 == tokens
        check_training(config)
        assert config.precision == "fp32"


@pytest.mark.skipif(PEER is None, reason="needs a checkout of Self-Forcing named by AFD_SCALE_PEER")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("rollout", []),
        ("rollout", ["data.latent_frames=12", "sampler.window_frames=6", "sampler.sink_frames=3"]),
        ("update", []),
        ("update", ["method.states_per_rollout=2", "student.activation_checkpointing=false"]),
    ],
    ids=["rollout", "window", "update", "states"],
)
def test_theirs_computes_the_same(benchmark, capsys, name, overrides):
    options = ["--against", "self-forcing", "--peer", PEER, "--json", "--repeats", "1"]
    assert benchmark.main([name, *options, *TINY, *overrides]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    result = json.loads(line)
    assert 0 < result["max_difference"] < 1e-5
    seconds = result["seconds"]
    assert result["ratio"] == pytest.approx(seconds["ours"] / seconds["theirs"])
    assert result["floor_ratio"] == pytest.approx(seconds["ours"] / seconds["floor"])
    assert ("sharded_ratio" in result) == (name == "rollout")
    assert ("note" in result) == (name == "update" and not torch.cuda.is_available())
