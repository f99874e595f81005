"""The benchmark's contract: one JSON object on the last line. What it measures is not judged here."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

TOOL = Path(__file__).parents[2] / "tools" / "benchmark.py"
TINY = [
    "--chunks",
    "3",
    "--tokens-per-chunk",
    "4",
    "--heads",
    "1",
    "--head-dim",
    "8",
    "--repeats",
    "2",
    "--threads",
    "1",
]


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("benchmark", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    threads = torch.get_num_threads()
    yield module
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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "invalid choice"),
        (["attention", "--chunks", "0"], "(0) must be at least 1"),
        (["attention", "--backend", "flex", *TINY], "attention (flex): FlexAttention needs "),
    ],
    ids=["name", "chunks", "backend"],
)
def test_bad_input_exits_2(benchmark, capsys, arguments, message):
    with pytest.raises(SystemExit, match="2"):
        benchmark.main(arguments)
    assert message in capsys.readouterr().err
