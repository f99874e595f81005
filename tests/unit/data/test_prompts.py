"""Prompts files: every kind, and rows that cannot be used beside those that can."""

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
        ("[1]", "must be a JSON object"),
        ('{"prompt": 3}', "prompt (3) must be a text"),
        ('{"prompt": "b", "prompt_id": "../b"}', "prompt_id ('../b') must be letters"),
        ('{"prompt": "b", "prompt_id": "ball"}', "prompt_id (ball) must name one prompt"),
        ('{"prompt": "a ball", "prompt_id": "ball", "video": "v.mp4"}', "video must occur once"),
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
