"""The benchmark's contract: one JSON object on the last line. What it measures is not judged here."""

import json
from pathlib import Path

import pytest
import torch

from afd_scale.config import load_config
from afd_scale.planning.flops import video_flops
from afd_scale.planning.workload import workload
from tests.tools import load_tool
from tests.wan_models import CHANNELS, save_tiny_wan

TOOL = Path(__file__).parents[2] / "tools" / "benchmark.py"
TINY = ["--chunks", "3", "--tokens-per-chunk", "4", "--heads", "1", "--head-dim", "8", "--repeats", "2",
        "--threads", "1"]  # fmt: skip


@pytest.fixture(scope="module")
def benchmark():
    threads = torch.get_num_threads()
    yield load_tool("benchmark")
    torch.set_num_threads(threads)


def test_attention_prints_one_json_object(benchmark, capsys):
    assert benchmark.main(["attention", "--json", *TINY]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    result = json.loads(line)
    assert result["name"] == "attention"
    assert result["shape"] == {"chunks": 3, "tokens_per_chunk": 4, "heads": 1, "head_dim": 8}
    assert result["flop_ratio"] == pytest.approx((3 + 1) / (2 * 3))
    assert result["device"]
    assert result["torch"]
    assert result["backend"].startswith("sdpa (torch")
    for phase in ("forward", "forward_backward"):
        seconds = result[f"{phase}_seconds"]
        assert min(seconds.values()) > 0
        assert result[f"{phase}_ratio"] == pytest.approx(seconds["segments"] / seconds["dense"])


def test_without_json_it_prints_a_line_for_each_figure(benchmark, capsys):
    assert benchmark.main(["attention", *TINY]) == 0
    printed = capsys.readouterr().out
    assert "forward_backward_ratio" in printed
    assert "{" not in printed.splitlines()[0]


def measure(benchmark, capsys, *arguments):
    assert benchmark.main([*arguments, "--json", "--repeats", "1"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    return json.loads(line)


@pytest.mark.parametrize("name", ["linear", "rollout", "update", "step"])
def test_networks_print_rates_over_the_measured_peak(benchmark, capsys, name):
    result = measure(benchmark, capsys, name)
    assert result["name"] == name
    assert result["precision"] == "fp32"
    assert result["matmul_tflops"] > 0
    assert result["seconds"].keys() == result["tflops"].keys() == result["mfu"].keys()
    for variant, share in result["mfu"].items():
        assert share == pytest.approx(result["tflops"][variant] / result["matmul_tflops"])
    assert "peak_memory_bytes" not in result, "a CPU has no such figure"


def test_rates_count_what_the_plan_counts(benchmark, capsys):
    """The shapes are those of the overrides, and the FLOPs do not count recomputation."""
    tiny = ["data.latent_height=8", "data.latent_width=8", "method.states_per_rollout=2", "train.micro_batch=2"]
    stored, again = (
        measure(benchmark, capsys, "update", *tiny, f"student.activation_checkpointing={word}")
        for word in ("false", "true")
    )
    config = load_config(benchmark.CONFIG, [*benchmark.ONE_DEVICE, *benchmark.SMALL, *tiny])
    load = workload(config, 1)
    (update,) = (each for each in load.passes if each.role == "student")
    needed = 2 * video_flops(config, load, update, recompute=False).total
    for result in (stored, again):
        assert result["tflops"]["update"] * result["seconds"]["update"] * 1e12 == pytest.approx(needed)
        assert result["videos"] == result["states"] == 2
    assert stored["planned_peak_bytes"] > again["planned_peak_bytes"]


def test_networks_with_adapters_and_in_bf16(benchmark, capsys):
    bf16 = ("step", "--precision", "bf16", "data.latent_height=8", "data.latent_width=8")
    lora = ("student.lora={rank: 4}", "method.discriminator.lora={rank: 4}")
    result = measure(benchmark, capsys, *bf16, *lora)
    assert result["precision"] == "bf16"
    assert result["shape"]["lora_rank"] == 4
    whole = measure(benchmark, capsys, *bf16)
    assert result["weight_bytes"] < whole["weight_bytes"]


def test_a_profile_names_the_largest_operators(benchmark, capsys):
    for name in ("rollout", "update"):
        largest = measure(benchmark, capsys, name, "--profile", "data.latent_height=8", "data.latent_width=8")[
            "profile"
        ]
        shares = [each["share"] for each in largest]
        assert len(largest) == 10
        assert shares == sorted(shares, reverse=True)
        assert 0.5 < sum(shares) < 1
        assert "aten::addmm" in [each["name"] for each in largest]
        assert all(each["calls"] > 0 for each in largest)


def test_frames_a_second_with_and_without_decoding(benchmark, capsys, tmp_path):
    plain = measure(benchmark, capsys, "rollout")
    assert plain["latent_frames_per_second"] == pytest.approx(6 / plain["seconds"]["rollout"])
    assert "frames_per_second" not in plain, "the default config's VAE is not there"
    assert "profile" not in plain, "nobody asked"
    save_tiny_wan(tmp_path)
    capsys.readouterr()  # what its imports log
    channels = [f"{network}.latent_channels={CHANNELS}" for network in ("student", "method.discriminator")]
    small = ["data.latent_height=8", "data.latent_width=8", *channels]
    decoded = measure(benchmark, capsys, "rollout", f"codec={{name: wan, models: {tmp_path}}}", *small)
    assert decoded["frames_per_second"] == pytest.approx(decoded["latent_frames_per_second"] * (1 + 4 * 5) / 6)
    assert 0 < decoded["frames_per_second_decoded"] < decoded["frames_per_second"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["nothing"], "invalid choice"), (["attention", "--chunks", "0"], "(0) must be at least 1")],
    ids=["name", "chunks"],
)
def test_a_wrong_command_line_exits_2(benchmark, capsys, arguments, message):
    with pytest.raises(SystemExit, match="2"):
        benchmark.main(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["attention", "--backend", "flex", *TINY], "attention (flex): FlexAttention needs "),
        (["attention", "student.dim=1"], "attention (student.dim=1) must be given shapes"),
        (["update", "student.dim=1"], "student.num_heads (4) must divide dim (1)"),
        (["rollout", "method=sft"], "method.name (sft) must have a rollout pass"),
        (
            ["step", "method.discriminator={name: motion}"],
            "method.discriminator.name (motion) must be of a judge of latents",
        ),
    ],
    ids=["backend", "config of kernels", "config", "method", "network"],
)
def test_bad_input_is_one_line(benchmark, capsys, arguments, message):
    assert benchmark.main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_data_reads_every_variant():
    from afd_scale.benchmarks.data import benchmark_data

    result = benchmark_data(12, 1, step_seconds=2.0, text_rows=3, latents=(2, 4, 6, 8), text=(8, 16))
    variants = {f"{where}, {how}" for where in ("local", "s3") for how in ("zstd", "none")}
    assert set(result["samples_per_second"]) == variants
    assert min(result["samples_per_second"].values()) > 0
    assert result["bytes_per_sample"]["none"] > 2 * (2 * 4 * 6 * 8 + 3 * 16)
    assert result["needed_by_job"]["samples_per_second"] == 128
    assert all(0 <= share < 0.5 for share in result["wait_share_of_step"].values())
