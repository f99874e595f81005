"""Hostile configs and overrides: each is a run, or one line within seconds."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from afd_scale.config import ConfigError, RunConfig, load_config, resolved_yaml
from afd_scale.config.methods import METHODS
from tests.hostile import LIMIT_SECONDS, NUMBERS, TEXTS, VALUES, answer, changed, cut, fuzzed, places
from tests.tools import call_tool

ROOT = Path(__file__).parents[2]
CONFIGS = sorted(path for path in (ROOT / "configs").rglob("*.yaml") if path.parent.name != "studies")
TREES = [yaml.safe_load(path.read_text()) for path in CONFIGS]

BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n" for before, name in zip("abcdefgh", "bcdefghi")
)
MERGE_BOMB = "a: &a {k: 1}\n" + "".join(
    f"{name}: &{name} {{<<: [{', '.join([f'*{before}'] * 10)}]}}\n" for before, name in zip("abcdefgh", "bcdefghi")
)
SNIPPETS = (
    "[" * 2000, "{a: " * 2000, "- " * 2000, "? " * 500, "'", '"', "&a ", "*a ", "&a [*a]", "!!binary aGk=", "!!set {a}",
    "!!python/object/apply:os.system [ls]", "!!timestamp 2024-01-01", "!!int x", "!!bool x", "!!float ''", "!!null x",
    "!x y", "%YAML 9.9\n---\n", "---\n", "...\n", "\t", "\0", "\x07", "\r", "0x_", "0b_", "._", "1:2:3", ":1:1:1:1.",
    "2024-13-45", "2024-01-01T25:00:00Z", ".nan", "-.inf", '"\\ud800"', '"\\0"', '"\\U99999999"', "<<: 1\n",
    "<<: [a]\n", "\n<<: *a\n", "=", "? [a]\n: b\n", "1: 2\n", "null: 1\n", "on: off\n", "9" * 5000, "0x" + "f" * 5000,
    "\n" + BOMB, "\n" + MERGE_BOMB, "|\n x\n", ">9\n", "@", "`", "name: x\nname: y\n",
)  # fmt: skip


def field_names() -> set[str]:
    """Keys of all sections."""
    names: set[str] = set()
    waiting: list[type[BaseModel]] = [RunConfig, *METHODS.values()]
    seen: set[type[BaseModel]] = set()

    def models(annotation: Any) -> Iterator[type[BaseModel]]:
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            yield annotation
        for part in getattr(annotation, "__args__", ()):
            yield from models(part)

    while waiting:
        model = waiting.pop()
        if model not in seen:
            seen.add(model)
            names |= set(model.model_fields)
            waiting += [found for field in model.model_fields.values() for found in models(field.annotation)]
    return names


NAMES = tuple(sorted(field_names()))
DOTTED = sorted({".".join(map(str, place)) for tree in TREES for place in places(tree)})


def load(path: Path, overrides: tuple[str, ...] = ()) -> None:
    """A run of its own: what is read must also be written and read again."""
    resolved_yaml(load_config(path, overrides))


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hostile") / "run.yaml"


@fuzzed(120)
@given(st.integers(0, len(TREES) - 1).flatmap(lambda number: changed(TREES[number], NAMES)))
def test_changed_values(path: Path, tree: Any) -> None:
    path.write_bytes(yaml.dump(tree, allow_unicode=False).encode("utf-8", "surrogatepass"))
    answer(lambda: load(path), ConfigError)


@fuzzed(120)
@given(st.sampled_from(CONFIGS).flatmap(lambda config: cut(config.read_bytes(), tuple(s.encode() for s in SNIPPETS))))
def test_damaged_texts(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    answer(lambda: load(path), ConfigError)


@fuzzed(120)
@given(
    st.sampled_from(CONFIGS),
    st.lists(
        st.tuples(
            st.sampled_from(DOTTED) | st.sampled_from(NAMES) | st.sampled_from(TEXTS), st.sampled_from("======.: "),
            st.sampled_from(SNIPPETS) | st.sampled_from(TEXTS) | VALUES.map(yaml.dump),
        ),
        min_size=1, max_size=2,
    ),
)  # fmt: skip
def test_overrides(config: Path, overrides: list[tuple[str, str, str]]) -> None:
    answer(lambda: load(config, tuple(map("".join, overrides))), ConfigError)


@pytest.mark.parametrize("text", [BOMB, MERGE_BOMB])
def test_alias_bombs(path: Path, text: str) -> None:
    path.write_text(text)
    assert "too large" in str(answer(lambda: load(path), ConfigError))


@fuzzed(40)
@given(
    st.sampled_from([config for config in CONFIGS if "toy" in config.parts]),
    st.sampled_from(DOTTED),
    st.sampled_from(NUMBERS) | st.sampled_from(TEXTS),
    st.sampled_from((1, 2, 0, -1, 7, 10**6, 10**30)),
)
def test_plans(config: Path, field: str, value: float | str, gpus: int) -> None:
    """Whatever a config that loads may say, it can be planned, or is refused in one line."""
    begun = time.process_time()
    done = call_tool("plan", "--config", config, "--gpus", gpus, "--json", f"{field}={value}")
    assert time.process_time() - begun < 2 * LIMIT_SECONDS  # it builds the networks, without memory
    assert done.returncode in (0, 2)
    assert len(done.stderr.splitlines()) == done.returncode // 2
