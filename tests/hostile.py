"""Damaged and hostile input, by hypothesis, and what every reader owes it: an answer within seconds, or one line.

Seeds are fixed. `--hypothesis-profile=many` gives every fuzz test so many more inputs that all have 10,000 together.
"""

import copy
import json
import time
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

LIMIT_SECONDS = 5.0


TEXTS = (
    "", " ", "~", "-", ".", "..", "/", "/dev/null", "a/../../b", "\0", "\ud800", "\U0001f600", "\x1b[31mred", "\u2028",
    "line\nline", "{}", "[]", "{video}", "%s", "{0.__class__}", "x" * 300, "y" * 20_000, "nan", "1e400", "0x_",
    "null", "true", "2024-01-01", "12:30:45", "json:loads", "os:system", ":", "a:b:c", "http://[", "http://a:99999/",
)  # fmt: skip
NUMBERS = (0, -1, 1, 2, 3, 7, 2**31, 2**53 + 1, 2**62, 2**63, -(2**63) - 1, 10**400, 0.5, -0.0, 1e-320, 1e308, 1e999,
           float("nan"), float("-inf"))  # fmt: skip


# Put anywhere into JSON.
SNIPPETS = (
    b"[" * 20_000, b'{"a":' * 2000, b"[" * 90 + b"]" * 90, b"{", b"}", b"]", b",", b'"', b"null", b"true", b"-",
    b"1e999", b"NaN", b"-Infinity", b"9" * 5000, b"0" * 30, b'"\\ud800"', b'"\\u0000"', b"\\", b"\xff", b"\x00",
    b"\xef\xbb\xbf", b"\n", b"\r", b"//", b"<html>", b"version https://git-lfs", b"PK\x03\x04", b"../../", b"/",
    b"\xe2\x80\xa8", b"\x1b[2J", b'"a": 1, "a": 2,',
)  # fmt: skip


def fuzzed(examples: int) -> settings:
    """Of a test: so many inputs, the same ones each time; the profile `many` has its own number."""
    if settings.get_current_profile_name() == "many":
        examples = settings().max_examples
    slow = (HealthCheck.too_slow, HealthCheck.data_too_large)
    return settings(max_examples=examples, derandomize=True, database=None, deadline=None, suppress_health_check=slow)


def nested(depth: int, value: Any = None, by: str | None = None) -> Any:
    """A value so many levels deep, in lists or in dicts of one key."""
    for _ in range(depth):
        value = [value] if by is None else {by: value}
    return value


SCALARS = st.sampled_from((None, True, False, *NUMBERS, *TEXTS)) | st.integers() | st.floats() | st.text(max_size=20)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(TEXTS) | st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=8,
) | st.sampled_from((nested(10), nested(90), nested(90, by="a"), [0] * 3000)).map(copy.deepcopy)


def places(tree: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where every value of a tree is, its root aside."""
    inside = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    found = []
    for key, value in inside:
        found += [(*at, key), *places(value, (*at, key))]
    return found


@st.composite
def changed(draw: st.DrawFn, tree: Any, names: tuple[str, ...] = ()) -> Any:
    """A tree of plain values with one to three of them replaced, removed or added.

    Args:
        names: of keys that may be added, beside any.
    """
    tree = copy.deepcopy(tree)
    for _ in range(draw(st.integers(1, 3))):
        all_places = places(tree)
        if not all_places or draw(st.integers(0, 30)) == 0:
            return draw(VALUES)
        *above, last = all_places[draw(st.integers(0, len(all_places) - 1))]
        node = tree
        for key in above:
            node = node[key]
        action = draw(st.sampled_from(("replace", "replace", "replace", "remove", "add")))
        if action == "remove":
            del node[last]
        elif action == "add" and isinstance(node, dict):
            key = draw(st.sampled_from(names) if names and draw(st.booleans()) else st.sampled_from(TEXTS))
            node[key] = draw(VALUES)
        else:
            node[last] = draw(VALUES)
    return tree


@st.composite
def cut(draw: st.DrawFn, content: bytes, snippets: tuple[bytes, ...]) -> bytes:
    """A content with one to four of: its end lost, bytes flipped, a part lost or doubled, a snippet put in."""
    for _ in range(draw(st.integers(1, 4))):
        low, high = sorted((draw(st.integers(0, len(content))), draw(st.integers(0, len(content)))))
        action = draw(st.sampled_from(("end", "flip", "lose", "double", "snippet", "snippet", "random")))
        if action == "end":
            content = content[:low]
        elif action == "flip" and low < len(content):
            content = content[:low] + bytes([content[low] ^ (1 << draw(st.integers(0, 7)))]) + content[low + 1 :]
        elif action == "lose":
            content = content[:low] + content[high:]
        elif action == "double":
            content = content[:high] + content[low:]
        elif action == "random":
            content = content[:low] + draw(st.binary(max_size=20)) + content[low:]
        else:
            content = content[:low] + draw(st.sampled_from(snippets)) + content[low:]
    return content


def as_json(value: Any) -> bytes:
    """The text that another program may have written of a value, whatever it holds."""
    return json.dumps(value).encode("utf-8", "surrogatepass")


def answer(read: Callable[[], object], error_class: type[ValueError] = ValueError) -> str | None:
    """What a reader says of an input that it refuses; None where it takes it.

    Args:
        error_class: that it refuses with.
    Raises:
        AssertionError: it took too long, or said more or less than one line.
    """
    begun, said = time.process_time(), None
    try:
        read()
    except error_class as error:
        said = str(error)
    took = time.process_time() - begun
    assert took < LIMIT_SECONDS, f"{took:.1f} s: {said}"
    if said is not None:
        assert said.isprintable(), repr(said)
        assert 3 < len(said) < 5000, repr(said)
    return said
