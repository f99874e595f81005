"""Rates of ranks: who is named, and what is said of them."""

from collections.abc import Mapping
from itertools import chain
from typing import Any

import pytest

from afd_scale.config import RunConfig
from afd_scale.health.checks import Machine, check_layout, of_all_machines
from afd_scale.health.findings import Finding
from afd_scale.health.links import Measured, judge, known_gpu, pairs_in_turns

H100 = "NVIDIA H100 80GB HBM3"


def measured(**changes: Any) -> Measured:
    """Eight ranks on two machines, as fast as an H100 can be; with changes."""
    pairs = {(rank, (rank + 1) % 8): 300e9 for rank in range(8)} | {(3, 4): 45e9, (7, 0): 45e9}
    values = {
        "hosts": ("a",) * 4 + ("b",) * 4, "tflops": (720.0,) * 8, "pairs": pairs, "all_reduce": 200e9,
        "all_to_all": 300e9, "sequence": 2, "clocks": (0.0,) * 8,
    }  # fmt: skip
    return Measured(**values | changes)


def by_what(findings: list[Finding]) -> Mapping[str, Finding]:
    return {finding.what: finding for finding in findings}


def test_ranks_that_are_as_they_should_be() -> None:
    found = by_what(judge(measured(), H100))
    assert {each.state for each in found.values()} == {"ok"}
    assert list(found) == ["matrix product", "neighbours of a machine", "neighbours of two machines",
                           "all-reduce of 8", "all-to-all of 2", "clocks"]  # fmt: skip
    assert "300 GB/s each way at the median" in found["neighbours of a machine"].value
    assert "45 GB/s" in found["neighbours of two machines"].value


@pytest.mark.parametrize(
    ("rate", "gpu", "state"),
    [(700.0, H100, "ok"), (500.0, H100, "warning"), (100.0, H100, "wrong"), (0.1, None, "warning")],
)
def test_the_slowest_rank_is_named(rate: float, gpu: str | None, state: str) -> None:
    tflops = (720.0,) * 5 + (rate,) + (720.0,) * 2
    found = by_what(judge(measured(tflops=tflops), gpu))["matrix product"]
    assert found.state == state
    assert f"slowest rank 5 (b): {rate:.3g}" in found.value


def test_a_slow_link_is_named_by_its_ends() -> None:
    pairs = {**measured().pairs, (1, 2): 20e9}
    found = by_what(judge(measured(pairs=pairs), H100))["neighbours of a machine"]
    assert found.state == "wrong"
    assert "slowest rank 1 (a) and rank 2 (a): 20" in found.value
    assert "common" not in found.value


def test_a_rank_that_is_slow_to_both_sides_is_named() -> None:
    pairs = {**measured().pairs, (4, 5): 30e9, (5, 6): 25e9}
    found = by_what(judge(measured(pairs=pairs), H100))["neighbours of a machine"]
    assert found.value.endswith("common to all slow pairs: rank 5 (b)")


def test_pairs_of_two_machines_are_not_held_against_nvlink() -> None:
    pairs = {**measured().pairs, (7, 0): 5e9}
    found = by_what(judge(measured(pairs=pairs), H100))
    assert found["neighbours of a machine"].state == "ok"
    assert found["neighbours of two machines"].state == "wrong"
    assert "rank 7 (b) and rank 0 (a): 5" in found["neighbours of two machines"].value


@pytest.mark.parametrize(("rate", "state"), [(200e9, "ok"), (80e9, "warning"), (10e9, "wrong")])
def test_collectives_are_held_against_what_is_known(rate: float, state: str) -> None:
    # Two machines with 4 GPUs: 4 x 50 GB/s of network, 60 % of it.
    found = by_what(judge(measured(all_reduce=rate), H100))["all-reduce of 8"]
    assert found.state == state
    assert "120 are to be expected" in found.value
    unknown = by_what(judge(measured(all_reduce=rate), "NVIDIA A100-SXM4-80GB"))["all-reduce of 8"]
    assert unknown.state == "ok"
    assert "no figure is known" in unknown.value


def test_a_machine_of_slow_gpus_is_told_though_all_are_alike() -> None:
    found = by_what(judge(measured(tflops=(300.0,) * 8), H100))
    assert found["matrix product"].state == "ok"
    assert found["matrix product, by figure"].state == "warning"


@pytest.mark.parametrize(
    ("name", "key"),
    [(H100, "h100"), ("NVIDIA H200", "h200"), ("NVIDIA H100 PCIe", None), ("NVIDIA H100 NVL", None), (None, None),
     ("NVIDIA GeForce RTX 4090", None)],
)  # fmt: skip
def test_gpus_of_known_figures(name: str | None, key: str | None) -> None:
    gpu = known_gpu(name)
    assert (None if gpu is None else gpu.name) == key


@pytest.mark.parametrize(("ahead", "state"), [(0.2, "ok"), (-3.0, "warning"), (90.0, "wrong")])
def test_clocks(ahead: float, state: str) -> None:
    found = by_what(judge(measured(clocks=(0.0,) * 4 + (ahead,) * 4), None))["clocks"]
    assert found.state == state
    assert "(b)" in found.value


@pytest.mark.parametrize("size", [2, 3, 4, 5, 8])
def test_in_a_turn_a_rank_is_in_one_pair_and_in_all_with_both_neighbours(size: int) -> None:
    turns = pairs_in_turns(size)
    for turn in turns:
        ranks = list(chain(*turn))
        assert len(set(ranks)) == len(ranks)
    pairs = [frozenset(pair) for turn in turns for pair in turn]
    assert len(pairs) == len(set(pairs))
    assert set(pairs) == {frozenset({rank, (rank + 1) % size}) for rank in range(size)}


def layout(machines: list[int], **overrides: Any) -> Finding:
    config = RunConfig.model_validate({"method": "sft", **overrides})
    (found,) = check_layout(config, machines)
    return found


def test_a_layout_that_fits() -> None:
    assert layout([8, 8]).value == "16 ranks on 2 machines, 16 shares of a batch, 1 to a video"
    assert check_layout(None, [8])[0].state == "ok"
    assert check_layout(None, [])[0].state == "absent"


@pytest.mark.parametrize(
    ("machines", "overrides", "state", "words"),
    [
        ([8, 4], {}, "wrong", "as many ranks on each"),
        ([3], {}, "wrong", "data.global_batch (16) must divide"),
        ([8, 8], {"data": {"canonical_nodes": 3}}, "wrong", "data.canonical_nodes (3)"),
        ([1, 1], {"parallel": {"sequence": 2}}, "warning", "over the network"),
        ([2, 2], {"parallel": {"sequence": 2}}, "ok", ""),
    ],
)
def test_a_layout_that_does_not(machines: list[int], overrides: dict[str, Any], state: str, words: str) -> None:
    found = layout(machines, **overrides)
    assert found.state == state
    assert words in found.remedy


def test_findings_of_several_machines_say_whose_they_are() -> None:
    machines = [Machine(host, [Finding("disks", "out", "1 GiB")], {"torch": "2.13.0"}, None) for host in ("a", "b")]
    assert of_all_machines(machines[:1]) == machines[0].findings
    found = of_all_machines(machines)
    assert [(each.where, each.what) for each in found] == [("a", "out"), ("b", "out"), ("", "of all machines")]
