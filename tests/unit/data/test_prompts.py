"""Prompts files: every kind, and rows that cannot be used beside those that can."""

import json
import os
from pathlib import Path

import pytest

from afd_scale.config import ConfigError
from afd_scale.data.clips import Reject
from afd_scale.data.teachers.prompts import PromptRow, prompt_id_of, read_prompts, read_sidecars


def rows(folder: Path, name: str, text: str) -> list[PromptRow | Reject]:
    (folder / name).write_text(text)
    return read_prompts(folder / name)


def test_jsonl_csv_and_txt_say_the_same(tmp_path: Path) -> None:
    jsonl = rows(tmp_path, "a.jsonl", '{"prompt": " a  ball ", "video": "x.mp4"}\n\n{"prompt": "two, balls"}\n')
    table = rows(tmp_path, "a.csv", '\ufeffvideo,prompt\nx.mp4,a ball\n,"two, balls"\n')
    assert jsonl == table == [
        PromptRow("a ball", prompt_id_of("a ball"), "x.mp4"), PromptRow("two, balls", prompt_id_of("two, balls"))
    ]  # fmt: skip
    assert rows(tmp_path, "a.txt", "a ball\n\ntwo, balls\n") == [
        PromptRow("a ball", prompt_id_of("a ball")), jsonl[1]
    ]  # fmt: skip


def test_ids_and_splits_are_kept(tmp_path: Path) -> None:
    (row,) = rows(tmp_path, "a.jsonl", '{"prompt": "a ball", "prompt_id": "ball.1", "split": "unseen", "more": 3}')
    assert row == PromptRow("a ball", "ball.1", split="unseen")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"prompt": " "}', "prompt must not be empty"),
        ('{"video": "x.mp4"}', "prompt must not be empty"),
        ('{"prompt": "a', "must be a JSON object"),
        ("[1]", "must be a JSON object with prompt"),
        ('"a text"', "must be a JSON object with prompt"),
        ("[" * 100_000, "must be a JSON object: it is nested too deeply"),
        (f'{{"prompt": {"[" * 100}{"]" * 100}}}', "prompt ([[[[[[[...]]]]]]]) must be a text"),
        (r'{"prompt": "\ud800"}', r"prompt ('\ud800') must be a text: it has NUL or a lone surrogate"),
        (r'{"prompt": "b", "video": "\ud800"}', "video ("),
        (r'{"prompt": "b", "video": "v.mp4\u0000"}', r"video ('v.mp4\x00') must be a text"),
        (r'{"prompt": "b", "prompt_id": "\ud800"}', "prompt_id ("),
        (r'{"prompt": "b", "split": "\ud800"}', "split ("),
        ('{"prompt": 3}', "prompt (3) must be a text"),
        ('{"prompt": "b", "prompt_id": "../b"}', "prompt_id ('../b') must be letters"),
        ('{"prompt": "b", "prompt_id": "ball"}', "prompt_id (ball) must name one prompt"),
        ('{"prompt": "a ball", "prompt_id": "ball", "video": "v.mp4"}', "video must occur once"),
        ('{"prompt": "b", "video": "./x/..//v.mp4"}', "video must occur once"),
    ],
)
def test_rows_that_cannot_be_used_are_rejects_in_their_place(tmp_path: Path, line: str, reason: str) -> None:
    first = '{"prompt": "a ball", "prompt_id": "ball", "video": "v.mp4"}'
    one, reject, other = rows(tmp_path, "a.jsonl", f'{first}\n{line}\n{{"prompt": "last"}}\n')
    assert isinstance(one, PromptRow)
    assert isinstance(other, PromptRow)
    assert isinstance(reject, Reject)
    assert reject.reason.startswith(reason)
    assert "\n" not in reject.reason
    "".join((reject.video, reject.prompt, reject.reason)).encode()


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\u0085", "\x0b", "\x0c", "\x1e"])
def test_rows_end_at_line_ends_only(tmp_path: Path, separator: str, end: str) -> None:
    ball = f"a{separator}ball"
    jsonl = [json.dumps({"prompt": ball if separator > "\x1f" else "a ball"}, ensure_ascii=False), '{"prompt": "two"}']
    for name, lines in (("a.jsonl", jsonl), ("a.csv", ["prompt", ball, "two"]), ("a.txt", [ball, "two"])):
        (tmp_path / name).write_bytes("".join(line + end for line in lines).encode())
        first, second = read_prompts(tmp_path / name)
        assert isinstance(first, PromptRow)
        # What Wan's cleaning makes of them: two are line ends, others are dropped, and one was an ellipsis once.
        kept = {"\x0b": "aball", "\x1e": "aball", "\u0085": "a\u2026ball"} if "a ball" not in lines[0] else {}
        assert first.prompt == kept.get(separator, "a ball"), name
        assert second == PromptRow("two", prompt_id_of("two"))


def test_line_ends_inside_csv_values_are_blanks(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b'prompt,video\r\n"a\r\nball",x.mp4\r\n')
    assert read_prompts(tmp_path / "a.csv") == [PromptRow("a ball", prompt_id_of("a ball"), "x.mp4")]


def test_csv_with_the_index_of_pandas(tmp_path: Path) -> None:
    row, reject = rows(tmp_path, "a.csv", ",video,prompt\n0,x.mp4,a ball\n1,y.mp4,two,balls\n")
    assert row == PromptRow("a ball", prompt_id_of("a ball"), "x.mp4")
    assert reject == Reject("a.csv:3", "", "must have as many values as the header")


def test_csv_row_of_too_many_values(tmp_path: Path) -> None:
    _, reject = rows(tmp_path, "a.csv", "prompt,video\na,b.mp4\none, two,c.mp4,d\n")
    assert isinstance(reject, Reject)
    assert reject.video == "a.csv:3"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.xlsx", b"", "must be one of .jsonl, .csv, .txt"),
        ("a.jsonl", b"\n", "must have at least one row"),
        ("a.csv", b"text\nx\n", "must have a column prompt"),
        ("a.csv", b'"text"x,prompt\n', "must be CSV"),
        ("a.txt", b"\xff\xfe\x00", "must be UTF-8"),
        (None, b"", "must be a readable file"),
    ],
)
def test_files_that_cannot_be_used(tmp_path: Path, name: str | None, content: bytes, message: str) -> None:
    path = tmp_path / (name or "absent.txt")
    if name:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        read_prompts(path)


def test_sidecars(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    for name in ("b.mp4", "deep/a.WEBM", "c.gif", "notes.pdf"):
        (tmp_path / name).touch()
    (tmp_path / "b.txt").write_text("a ball\n")
    (tmp_path / "deep" / "a.txt").write_text("another\n")
    first, missing, last = read_sidecars(tmp_path)
    assert first == PromptRow("a ball", prompt_id_of("a ball"), "b.mp4")
    assert missing == Reject("c.gif", "", "prompt must lie beside it, in a readable c.txt")
    assert last == PromptRow("another", prompt_id_of("another"), "deep/a.WEBM")
    with pytest.raises(ConfigError, match="must hold videos"):
        read_sidecars(tmp_path / "absent")


def test_sidecars_of_videos_whose_names_are_not_utf8(tmp_path: Path) -> None:
    for name in (b"\xff.mp4", b"\xff.txt", b"\xfe.mp4"):
        Path(os.fsdecode(bytes(tmp_path) + b"/" + name)).write_text("a ball")
    missing, reject = read_sidecars(tmp_path)
    assert missing == Reject(r"\udcfe.mp4", "", r"prompt must lie beside it, in a readable \udcfe.txt")
    assert reject == Reject(
        r"\udcff.mp4", "", r"video ('\udcff.mp4') must be a text: it has NUL or a lone surrogate"
    )  # fmt: skip
