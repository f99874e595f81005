"""Every network of configs/ and of the tests that a GPU may run has heads of a width that GPU kernels take.

A test module says its network's sizes once, in a literal SHAPE: a network that says them elsewhere is found here.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from afd_scale.config import load_config
from afd_scale.config.models import PolicyConfig, WanConfig
from afd_scale.layers.attention.backends import FASTEST_FIRST
from tests.gpu.test_attention import HEAD_DIM, OTHER_HEAD_DIMS, TOLERANCE

ROOT = Path(__file__).parents[2]
MODULES = sorted(path for folder in ("gpu", "distributed") for path in (ROOT / "tests" / folder).glob("*.py"))
CONFIGS = sorted(path for path in (ROOT / "configs").rglob("*.yaml") if path.parent.name != "studies")
CAPABILITIES = ((8, 0), (9, 0))


def shape_of(tree: ast.Module) -> ast.expr | None:
    """What a module assigns to SHAPE."""
    for statement in tree.body:
        if isinstance(statement, ast.Assign) and [ast.unparse(x) for x in statement.targets] == ["SHAPE"]:
            return statement.value
    return None


def said_elsewhere(tree: ast.Module) -> list[int]:
    """Lines that give a network's width or heads outside of SHAPE: as a key, an override or an argument."""
    shape = shape_of(tree)
    allowed = set() if shape is None else set(ast.walk(shape))
    found = []
    for node in ast.walk(tree):
        text = node.value if isinstance(node, ast.Constant) else f"{node.arg}=" if isinstance(node, ast.keyword) else ""
        if node not in allowed and isinstance(text, str) and re.fullmatch(r"(.*\b)?(dim|num_heads)(=.*)?", text):
            found.append(node.lineno)
    return found


def network_shapes() -> Iterator[tuple[str, int, tuple[torch.dtype, ...]]]:
    """Where, head width, and the dtypes that it is computed in."""
    for path in MODULES:
        if shape := shape_of(ast.parse(path.read_text())):
            network = PolicyConfig.model_validate(ast.literal_eval(shape)).student
            yield path.stem, network.dim // network.num_heads, (torch.float32, torch.bfloat16)
    for path in CONFIGS:
        config = load_config(path)
        dtype = torch.float32 if config.precision == "fp32" else torch.bfloat16
        for network in (role.network for role in config.cast if role.of is None):
            if isinstance(network, WanConfig):
                yield f"{path.relative_to(ROOT)}", network.dim // network.num_heads, (dtype,)
    for width in (HEAD_DIM, *OTHER_HEAD_DIMS):
        yield "test_attention", width, tuple(TOLERANCE)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_a_module_says_the_sizes_of_its_network_in_one_place(path):
    assert said_elsewhere(ast.parse(path.read_text())) == []


@pytest.mark.parametrize(("where", "head_dim", "dtypes"), list(network_shapes()))
def test_every_backend_takes_the_head_width(where, head_dim, dtypes):
    for dtype in dtypes:
        for capability in CAPABILITIES:
            # One that has no kernels for any width is not meant: 128 fits all.
            able = [c for c in FASTEST_FIRST if c.refusal("cuda", dtype, 128, capability) is None]
            assert able
            assert [c.refusal("cuda", dtype, head_dim, capability) for c in able] == [None] * len(able)


@pytest.mark.parametrize(
    "line", ['shape = {"dim": 24}', 'options = ["student.num_heads=2"]', "WanConfig(num_heads=2)", 'f"x.dim={1}"']
)
def test_a_network_outside_of_shape_is_found(line):
    source = 'SHAPE = {"dim": 32, "num_heads": 2}\nmessage = "must divide student.num_heads (4)"\n'
    assert said_elsewhere(ast.parse(source)) == []
    assert said_elsewhere(ast.parse(source + line)) == [3]
