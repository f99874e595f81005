"""YAML and JSON as plain values: None, bool, int, float, str, lists, and dicts by str, within limits.

What YAML has beyond them (tags, dates, sets, binary, keys that are no text) is refused, or stays text as dates do. An
alias counts as all that it stands for, so that a small text is never a large value.
"""

import json
import re
from typing import Any

import yaml

from afd_scale.config.errors import one_line, shown

MOST_YAML_BYTES = 2**17
MOST_JSON_BYTES = 2**28
MOST_DEPTH = 64
MOST_VALUES = 10_000  # of a YAML text, with what its aliases repeat
_LARGEST = 2**63
_TOO_MANY = f"it is too large: at most {MOST_VALUES} values are read, those of aliases too"
_TOO_DEEP = f"it is nested too deeply: at most {MOST_DEPTH} levels are read"
_SURROGATE = re.compile("[\ud800-\udfff]")

_TAG = "tag:yaml.org,2002:"
_SCALARS = frozenset(_TAG + kind for kind in ("null", "bool", "int", "float", "str"))


class UnreadableError(ValueError):
    """A text that is not what it should be; one line.

    Attributes:
        line: of the text, counted from 1, where that is known.
    """

    def __init__(self, reason: object, line: int | None = None):
        super().__init__(one_line(reason))
        self.line = line


def parse_json(content: str | bytes) -> Any:
    """The value of a JSON text; NaN and infinities are values here, and a schema's to refuse.

    Raises:
        UnreadableError: it is no JSON, names a key twice, or is beyond the limits.
    """
    text = _decoded(content, MOST_JSON_BYTES)
    try:
        value = json.loads(text, object_pairs_hook=_named_once)
    except UnreadableError:
        raise
    except RecursionError:
        raise UnreadableError(_TOO_DEEP) from None
    except json.JSONDecodeError as error:
        raise UnreadableError(error, error.lineno) from None
    except ValueError as error:  # a number of thousands of digits
        raise UnreadableError(error) from None
    _check(value)
    return value


def parse_yaml(content: str | bytes) -> Any:
    """The value of a YAML text.

    Raises:
        UnreadableError: it is no YAML, names a key twice, has more than plain values, or is beyond the limits.
    """
    text = _decoded(content, MOST_YAML_BYTES)
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        reason = " ".join(part for part in (error.context, error.problem) if part)
        mark = error.problem_mark or error.context_mark
        raise UnreadableError(reason, mark.line + 1 if mark else None) from None
    except yaml.YAMLError as error:
        raise UnreadableError(error) from None
    except UnreadableError:
        raise
    except (ValueError, LookupError, OverflowError) as error:  # PyYAML 6.0 of \U99999999 and the like
        raise UnreadableError(f"it is no YAML: {error}") from None
    return None if node is None else _Values(loader).of(node)


def _decoded(content: str | bytes, most: int) -> str:
    if len(content) > most:
        raise UnreadableError(f"it is too large: at most {most} bytes are read")
    try:
        return content if isinstance(content, str) else content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UnreadableError("it is no text") from None


def _named_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    named: dict[str, Any] = {}
    for name, value in pairs:
        if name in named:
            raise UnreadableError(f"{name} is given twice")
        named[name] = value
    return named


def _check(value: Any) -> None:
    """Hold the values of a JSON text against the limits."""
    level, depth = [value], 0
    while level:
        if depth > MOST_DEPTH:
            raise UnreadableError(_TOO_DEEP)
        below: list[Any] = []
        for one in level:
            if isinstance(one, dict):
                below += one.keys()
                below += one.values()
            elif isinstance(one, list):
                below += one
            elif problem := _scalar_problem(one):
                raise UnreadableError(problem)
        level, depth = below, depth + 1


def _scalar_problem(value: Any) -> str | None:
    """What no path, no tensor and no other program would take."""
    if isinstance(value, str) and ("\0" in value or (not value.isascii() and _SURROGATE.search(value))):
        return f"a text ({shown(value)}) holds a NUL or half a character (a surrogate)"
    if isinstance(value, int) and not -_LARGEST <= value < _LARGEST:
        return f"a number of {value.bit_length()} bits is larger than the 64 that are read"
    return None


class _Loader(yaml.SafeLoader):
    """Composes nodes, no deeper and no more than the limits; what looks like a date is text."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in rules if tag in _SCALARS]
        for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    depth = nodes = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.depth, self.nodes = self.depth + 1, self.nodes + 1
        if self.depth > MOST_DEPTH or self.nodes > MOST_VALUES:
            raise UnreadableError(_TOO_DEEP if self.depth > MOST_DEPTH else _TOO_MANY, self.line + 1)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


class _Values:
    """From nodes, which aliases share, to values, which they do not.

    Args:
        loader: of PyYAML, for scalars.
    """

    def __init__(self, loader: _Loader):
        self.loader, self.made = loader, 0

    def of(self, node: yaml.Node, depth: int = 0) -> Any:
        self.made += 1
        if self.made > MOST_VALUES:
            raise _refused(node, _TOO_MANY)
        if depth >= MOST_DEPTH:
            raise _refused(node, _TOO_DEEP)
        if node.tag == f"{_TAG}map" and isinstance(node, yaml.MappingNode):
            return self._mapping(node, depth + 1)
        if node.tag == f"{_TAG}seq" and isinstance(node, yaml.SequenceNode):
            return [self.of(item, depth + 1) for item in node.value]
        if node.tag in _SCALARS and isinstance(node, yaml.ScalarNode):
            return self._scalar(node)
        raise _refused(node, f"{node.tag.replace(_TAG, '!!')} is no plain value")

    def _scalar(self, node: yaml.ScalarNode) -> Any:
        try:
            value = self.loader.yaml_constructors[node.tag](self.loader, node)
        except (ValueError, LookupError, OverflowError):  # "0x_", !!int of a word
            raise _refused(node, f"{shown(node.value)} is no {node.tag.removeprefix(_TAG)}") from None
        if problem := _scalar_problem(value):
            raise _refused(node, problem)
        return value

    def _mapping(self, node: yaml.MappingNode, depth: int) -> dict[str, Any]:
        own: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key, value = self.of(key_node, depth), self.of(value_node, depth)
            if not isinstance(key, str):
                raise _refused(key_node, f"a key ({shown(key)}) is no text: put it in quotes")
            if key in own:
                raise _refused(key_node, f"{key} is given twice")
            if key != "<<":
                own[key] = value
                continue
            for given in value if isinstance(value, list) else [value]:
                if not isinstance(given, dict):
                    raise _refused(value_node, f"<< ({shown(given)}) merges what is no mapping")
                merged = {**given, **merged}
        return {**merged, **own}


def _refused(node: yaml.Node, reason: str) -> UnreadableError:
    return UnreadableError(reason, node.start_mark.line + 1)
