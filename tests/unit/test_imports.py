"""Direction of imports, the place of each optional library, no `print`: read from the source of every module."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "afd_scale"

# Package -> packages of ours that its modules may import, itself aside. The README's architecture section shows it.
MAY_IMPORT: dict[str, set[str]] = {
    "types": set(),
    "chunks": set(),
    "config": {"chunks"},
    "torchvision_ops": set(),
    "progress": set(),
    "mp4": set(),
    "files": {"config"},
    "vision": {"mp4"},
    "protocols": {"types"},
    "flow": {"types"},
    "layers": {"types", "chunks"},
    "models": {"types", "config", "layers", "torchvision_ops", "mp4", "vision", "codecs"},
    "rollout": {"types", "chunks", "protocols", "config", "flow"},
    "codecs": {"types", "config", "torchvision_ops"},
    "data": {"types", "protocols", "config", "files", "mp4", "flow", "codecs", "torchvision_ops"},
    "methods": {"types", "protocols", "config", "flow", "rollout"},
    "parallel": {"types", "protocols", "config", "layers"},
    "engines": {"types", "protocols", "config", "layers", "models", "parallel"},
    "checkpoint": {"types", "protocols", "config", "files", "layers", "engines"},
    "planning": {"types", "config", "layers", "models"},
    "health": {"config", "layers", "parallel", "data", "planning"},
    "benchmarks": {
        "types",
        "config",
        "flow",
        "layers",
        "models",
        "rollout",
        "methods",
        "engines",
        "planning",
        "data",
        "codecs",
        "parallel",
    },
    "evaluation": {"types", "progress", "config", "files", "mp4", "vision", "codecs", "data", "torchvision_ops"},
    "generation": {
        "types",
        "chunks",
        "progress",
        "protocols",
        "config",
        "files",
        "mp4",
        "flow",
        "layers",
        "models",
        "rollout",
        "codecs",
        "data",
        "parallel",
        "engines",
        "checkpoint",
        "evaluation",
    },
}
MAY_IMPORT["training"] = set(MAY_IMPORT)
MAY_IMPORT["serving"] = {
    "config",
    "files",
    "mp4",
    "vision",
    "flow",
    "rollout",
    "codecs",
    "data",
    "parallel",
    "engines",
    "generation",
}
MAY_IMPORT["rehearsal"] = {
    "config",
    "codecs",
    "layers",
    "models",
    "data",
    "planning",
    "checkpoint",
    "training",
    "torchvision_ops",
}

MAY_IMPORT["study"] = {
    "types",
    "progress",
    "config",
    "files",
    "mp4",
    "flow",
    "layers",
    "models",
    "rollout",
    "codecs",
    "data",
    "engines",
    "checkpoint",
    "planning",
    "evaluation",
    "training",
}

# Library -> packages that may import it. A library of which one file is allowed has it in ONE_FILE as well.
LIBRARIES: dict[str, set[str]] = {
    "transformer_engine": {"layers"},
    "flash_attn": {"layers"},
    "flash_attn_3": {"layers"},
    "triton": {"layers"},
    "deepspeed": {"parallel", "engines"},
    "streaming": {"data"},
    "torchvision": {"data", "models"},
    "httpx": {"data"},
    "pyarrow": {"data"},
    "ftfy": {"codecs"},
    "diffusers": {"checkpoint", "codecs", "rehearsal"},
    "transformers": {"models", "codecs", "evaluation", "rehearsal"},
    "cv2": {"vision"},
    "vbench": {"evaluation"},
    "pynvml": {"health"},
    "starlette": {"serving"},
    "uvicorn": {"serving"},
}
# flash-attn 4 lives inside flash-attn 2's package, and is a library of its own.
ONE_FILE = {
    "transformer_engine",
    "flash_attn",
    "flash_attn.cute",
    "flash_attn_3",
    "triton",
    "cv2",
    "vbench",
    "pyarrow",
    "ftfy",
    "pynvml",
    "uvicorn",
}

MODULES = sorted(PACKAGE.rglob("*.py"))


def imported_names(source: str) -> Iterator[str]:
    """Dotted names of all modules that a source imports, in functions too; `from a import b` gives a.b."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def forbidden_imports(package: str, source: str) -> list[str]:
    """Imports of a module of `package` that the two tables do not allow."""
    wrong = []
    for name in imported_names(source):
        top, *rest = name.split(".")
        if top == "afd_scale":
            # `from afd_scale import __version__` names no package.
            if rest and rest[0] in MAY_IMPORT and rest[0] != package and rest[0] not in MAY_IMPORT[package]:
                wrong.append(name)
        elif package not in LIBRARIES.get(top, {package}):
            wrong.append(name)
    return wrong


def library_of(name: str) -> str | None:
    """The library of ONE_FILE that a dotted name belongs to."""
    return max((x for x in ONE_FILE if f"{name}.".startswith(f"{x}.")), key=len, default=None)


def package_of(module: Path) -> str:
    return module.relative_to(PACKAGE).parts[0].removesuffix(".py")


def name_of(module: Path) -> str:
    return str(module.relative_to(PACKAGE))


def test_every_package_is_in_the_table() -> None:
    assert {package_of(module) for module in MODULES} - {"__init__"} <= set(MAY_IMPORT)


def test_the_table_has_no_cycle() -> None:
    left = {package: set(below) for package, below in MAY_IMPORT.items()}
    left["training"].discard("training")
    while leaves := [package for package, below in left.items() if not below]:
        for leaf in leaves:
            del left[leaf]
        for below in left.values():
            below.difference_update(leaves)
    assert not left


@pytest.mark.parametrize("module", [m for m in MODULES if package_of(m) != "__init__"], ids=name_of)
def test_imports_follow_the_table(module: Path) -> None:
    assert forbidden_imports(package_of(module), module.read_text()) == []


def test_the_package_itself_imports_nothing() -> None:
    assert list(imported_names((PACKAGE / "__init__.py").read_text())) == []


@pytest.mark.parametrize("library", sorted(ONE_FILE))
def test_optional_library_is_imported_in_one_file(library: str) -> None:
    files = [m for m in MODULES if library in map(library_of, imported_names(m.read_text()))]
    assert len(files) <= 1, files


@pytest.mark.parametrize(
    ("source", "library"),
    [
        ("from flash_attn import flash_attn_interface", "flash_attn"),
        ("from flash_attn.cute import interface", "flash_attn.cute"),
        ("from flash_attn import cute", "flash_attn.cute"),
        ("import flash_attn_3._C", "flash_attn_3"),
        ("import torch", None),
    ],
)
def test_flash_attn_4_is_not_flash_attn_2(source: str, library: str | None) -> None:
    assert {library_of(name) for name in imported_names(source)} == {library}


@pytest.mark.parametrize(
    ("package", "source"),
    [
        ("methods", "from afd_scale.parallel.mesh import Mesh"),
        ("methods", "def step():\n    import deepspeed"),
        ("parallel", "from afd_scale import models"),
        ("config", "import afd_scale.types"),
        ("models", "from transformer_engine.pytorch import Linear"),
    ],
)
def test_the_check_sees_a_wrong_import(package: str, source: str) -> None:
    assert len(forbidden_imports(package, source)) == 1


@pytest.mark.parametrize("module", MODULES, ids=name_of)
def test_the_package_logs_and_does_not_print(module: Path) -> None:
    calls = [node for node in ast.walk(ast.parse(module.read_text())) if isinstance(node, ast.Call)]
    assert [c.lineno for c in calls if isinstance(c.func, ast.Name) and c.func.id == "print"] == []


def test_config_needs_no_torch() -> None:
    code = "import sys, afd_scale.config; print(*{'torch', 'deepspeed', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
