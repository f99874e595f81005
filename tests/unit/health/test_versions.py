"""Versions that fit each other, from made-up environments."""

from collections.abc import Mapping
from pathlib import Path

import pytest

from afd_scale.health.findings import Finding
from afd_scale.health.nvml import Driver
from afd_scale.health.versions import (
    check_cuda,
    check_cudnn,
    check_extensions,
    check_requirements,
    check_same,
    requirements,
)

DRIVER = Driver("580.95", (13, 0))


def of(findings: list[Finding], what: str) -> Finding:
    (found,) = (finding for finding in findings if finding.what == what)
    return found


def environment(**versions: str) -> "Mapping[str, str].get":  # type: ignore[valid-type]
    return {name.replace("_", "-"): version for name, version in versions.items()}.get


ASKED = ["torch<2.14,>=2.11", "numpy<2.2,>=2.0", "psutil>=5.9", 'transformer-engine[pytorch]<3,>=2.9; extra == "te"',
         'pytest>=8; extra == "dev"']  # fmt: skip


def test_requirements_are_held_against_what_is_installed() -> None:
    found = check_requirements(ASKED, environment(torch="2.13.0+cu130", numpy="2.2.1"))
    assert [(each.what, each.state) for each in found] == [
        ("torch", "ok"), ("numpy", "wrong"), ("psutil", "wrong"), ("transformer-engine", "absent"),
    ]  # fmt: skip
    assert of(found, "numpy").value == "2.2.1, and setup.py asks for <2.2,>=2.0"
    assert of(found, "psutil").remedy == "pip install 'psutil>=5.9'"


def test_an_extra_that_is_too_old_is_wrong() -> None:
    old = environment(torch="2.13.0", numpy="2.1", psutil="7", transformer_engine="2.8.0")
    assert of(check_requirements(ASKED, old), "transformer-engine").state == "wrong"


def test_a_package_that_runs_without_being_installed_is_absent() -> None:
    assert [each.state for each in check_requirements(None)] == ["absent"]


def test_what_is_installed_here_is_as_setup_py_asks() -> None:
    assert [each for each in check_requirements(requirements()) if each.state == "wrong"] == []


@pytest.mark.parametrize(
    ("torch_cuda", "driver", "usable", "state"),
    [
        (None, None, False, "absent"),
        ("13.0", None, False, "absent"),
        ("13.0", DRIVER, True, "ok"),
        ("12.8", DRIVER, True, "ok"),
        ("12.8", Driver("525", (12, 0)), True, "ok"),
        ("13.0", Driver("570", (12, 8)), True, "wrong"),
        (None, DRIVER, False, "wrong"),
        ("13.0", DRIVER, False, "wrong"),
    ],
)
def test_torch_and_driver(torch_cuda: str | None, driver: Driver | None, usable: bool, state: str) -> None:
    (found,) = check_cuda(torch_cuda, driver, usable)
    assert found.state == state
    assert bool(found.remedy) == (state == "wrong")


@pytest.mark.parametrize(
    ("capability", "loaded", "bundled", "faster", "state"),
    [
        (None, None, None, False, "absent"),
        ((9, 0), 91900, "9.19.0.56", False, "ok"),
        ((9, 0), 91500, None, False, "wrong"),
        ((9, 0), 91500, None, True, "warning"),
        ((9, 0), 91501, None, False, "ok"),
        ((8, 0), 91500, None, False, "ok"),
        ((8, 0), 91002, "9.19.0.56", False, "wrong"),
    ],
)
def test_cudnn_that_attention_gets(
    capability: tuple[int, int] | None, loaded: int | None, bundled: str | None, faster: bool, state: str
) -> None:
    (found,) = check_cudnn(capability, loaded, bundled, "", faster)
    assert found.state == state


def test_an_old_cudnn_of_the_system_is_found_on_the_path(tmp_path: Path) -> None:
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "libcudnn.so.9").touch()
    (found,) = check_cudnn((9, 0), 91002, "9.19.0.56", f"/absent:{tmp_path}/lib:", False)
    assert found.value == "9.10.2 is loaded, torch brought 9.19.0.56"
    assert found.remedy.endswith(f"(there is one in {tmp_path}/lib)")


def test_extensions_of_another_cuda() -> None:
    te = environment(transformer_engine="2.9.0", transformer_engine_cu12="2.9.0")
    assert of(check_extensions("13.0", "bf16", te), "Transformer Engine").state == "wrong"
    assert [each.state for each in check_extensions("12.8", "bf16", te)] == ["absent"] * 3
    halves = environment(transformer_engine="2.10.0", transformer_engine_cu13="2.9.0")
    assert of(check_extensions("13.0", None, halves), "Transformer Engine").state == "wrong"


def test_fp8_needs_transformer_engine_on_a_gpu_alone() -> None:
    assert of(check_extensions("13.0", "fp8", environment()), "Transformer Engine").state == "wrong"
    assert [each.state for each in check_extensions(None, "fp8", environment())] == ["absent"] * 3


def test_flash_attn_is_of_its_second_version() -> None:
    assert of(check_extensions("13.0", None, environment(flash_attn="2.8.3")), "flash-attn").state == "ok"
    assert of(check_extensions("13.0", None, environment(flash_attn="2.6.1")), "flash-attn").state == "wrong"


def test_machines_have_the_same_versions() -> None:
    one, other = {"torch": "2.13.0", "NCCL": "2.27.3"}, {"torch": "2.13.0", "NCCL": "2.26.2"}
    assert [each.state for each in check_same({"a": one, "b": one})] == ["ok"]
    (found,) = check_same({"a": one, "b": other, "c": one})
    assert (found.what, found.value, found.state) == ("NCCL", "2.27.3 on a, c; 2.26.2 on b", "wrong")
    (found,) = check_same({"a": one, "b": {"torch": "2.13.0"}})
    assert found.value == "2.27.3 on a; none on b"
    (found,) = check_same({"a": {"driver": "1"}, "b": {"driver": "2"}})
    assert found.state == "warning"
