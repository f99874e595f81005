"""Tables of prompts: columns, places and damage, the same in every format."""

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from afd_scale.config import ConfigError
from afd_scale.data.clips import Reject
from afd_scale.data.teachers.folder import FolderTeacher
from afd_scale.data.teachers.prompts import LONGEST_TEXT, PromptRow, PromptsAlone, parse_columns, prompt_id_of
from afd_scale.data.teachers.prompts import read_prompts as read
from tests.tools import call_tool

VIDEOS = ("prompt", "video")
FORMATS = (".jsonl", ".csv", ".json", ".parquet")


def write(path: Path, rows: list[dict[str, str | None]]) -> Path:
    """Rows of texts, all with the same columns, as the suffix says."""
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        path.write_text(
            "\n".join([",".join(rows[0]), *(",".join(str(v) for v in row.values()) for row in rows)]) + "\n"
        )
    return path


def refusal(path: Path, needs: tuple[str, ...] = VIDEOS, **options: object) -> str:
    """Why a table is not read, in one line."""
    with pytest.raises(ConfigError) as caught:
        read(path, needs=needs, **options)  # type: ignore[arg-type]
    (line,) = str(caught.value).splitlines()
    assert len(line) < 1000
    return line


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_table_without_a_column_is_refused_by_its_name(tmp_path: Path, suffix: str) -> None:
    table = write(tmp_path / f"a{suffix}", [{"clip": f"{i}.mp4", "caption": f"ball {i}"} for i in range(150)])
    assert refusal(table) == f"prompts ({table}) must have a column prompt: it has clip, caption"
    assert refusal(table, columns={}).endswith("; --columns prompt=NAME,video=NAME says which it is")
    assert refusal(table, columns={"prompt": "caption"}) == (
        f"prompts ({table}) must have a column video: it has clip, caption; --columns video=NAME says which it is"
    )
    assert refusal(table, ("prompt",), columns={"prompt": "captoin"}).endswith("a column captoin: it has clip, caption")
    named = read(table, needs=VIDEOS, columns={"prompt": "caption", "video": "clip"})
    assert named[149] == PromptRow("ball 149", prompt_id_of("ball 149"), "149.mp4")


@pytest.mark.parametrize("suffix", [*FORMATS, ".txt"])
def test_where_no_videos_are_read_prompt_alone_must_be_there(tmp_path: Path, suffix: str) -> None:
    table = tmp_path / f"a{suffix}"
    if suffix == ".txt":
        table.write_text("a ball\n")
    else:
        write(table, [{"prompt": "a ball", "more": "x"}])
    (clip,) = PromptsAlone(table).clips()
    assert clip.prompt == "a ball"
    with pytest.raises(ConfigError, match="must have a column video: it has prompt"):
        FolderTeacher(tmp_path, table).clips()


def test_a_video_column_that_is_not_needed_may_hold_anything(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "a ball", "video": {"bytes": null}}\n')
    pyarrow.parquet.write_table(
        pyarrow.table({"prompt": ["a ball"], "video": [{"bytes": b"0"}]}), tmp_path / "a.parquet"
    )
    for name in ("a.jsonl", "a.parquet"):
        assert read(tmp_path / name) == [PromptRow("a ball", prompt_id_of("a ball"))]
    assert read(tmp_path / "a.jsonl", needs=VIDEOS) == [
        Reject("a.jsonl:1", "", "video ({'bytes': None}) must be a text")
    ]


def test_a_single_row_without_prompt_is_its_own_reject(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"video": "a.mp4"}\n{"video": "b.mp4", "prompt": "a ball"}\n')
    first, second = read(tmp_path / "a.jsonl", needs=VIDEOS)
    assert first == Reject("a.mp4", "", "prompt must not be empty: the student reads it")
    assert isinstance(second, PromptRow)


def test_the_tool_refuses_a_table_of_other_columns_and_takes_their_names(tmp_path: Path) -> None:
    table = write(tmp_path / "a.csv", [{"image": "0.png", "caption": "a ball"}, {"image": "1.png", "caption": "a cat"}])
    flags = ("--teacher", "none", "--prompts", table, "--out", tmp_path / "out")
    done = call_tool("make_shards", *flags)
    assert done.returncode == 2
    assert done.stderr == (f"error: prompts ({table}) must have a column prompt: it has image, caption; "
                           "--columns prompt=NAME says which it is\n")  # fmt: skip
    assert not (tmp_path / "out").exists()
    done = call_tool("make_shards", *flags, "--columns", "prompt=caption,prompt_id=image")
    assert (done.returncode, done.stdout.startswith(f"{tmp_path / 'out'}: 2 prompts")) == (0, True), done.stderr


@pytest.mark.parametrize(
    ("items", "columns"),
    [
        ([], {}),
        (["prompt=text"], {"prompt": "text"}),
        (["prompt=a=b,video=file name", "split=s"], {"prompt": "a=b", "video": "file name", "split": "s"}),
        (["text"], None),
        (["text=prompt"], None),
        (["prompt="], None),
        (["prompt=a", "prompt=b"], None),
        (["prompt=a,"], None),
    ],
)
def test_columns_of_tables_are_named_so(items: list[str], columns: dict[str, str] | None) -> None:
    if columns is None:
        with pytest.raises(ConfigError, match="columns "):
            parse_columns(items)
    else:
        assert parse_columns(items) == columns


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", 'video,prompt\n\n"a\nb.mp4",one\nc.mp4,"say "hi" now"\n', "(PATH:5) must be CSV"),
        ("a.csv", 'video,prompt\na.mp4,"one\n\ntwo"\nb.mp4,"never closed\nc.mp4,x\n', "(PATH:5) must be CSV"),
        ("a.csv", 'video,"prompt" x\n', "(PATH:1) must be CSV"),
        ("a.csv", f"video,prompt\na.mp4,b\nb.mp4,{'x' * 140_000}\n", "(PATH:3) must be CSV: field larger"),
        ("a.csv", "prompt,video,prompt\na,b,c\n", "(PATH) must have one column prompt: it has 2"),
        ("a.csv", "", "(PATH) must have a column prompt: it has none"),
        ("a.csv", ",,\n1,2,3\n", "(PATH) must have a column prompt: it has '', '', ''"),
        ("a.csv", "video, prompt\na,b\n", "(PATH) must have a column prompt: it has video, ' prompt'"),
        ("a.csv", "\x1b[31m,a\x00b\n1,2\n", "(PATH) must have a column prompt: it has '\\x1b[31m', 'a\\x00b'"),
        ("a.csv", ",".join(f"c{i}" for i in range(500)) + "\n", "c18, c19 and 480 more"),
        ("a.csv", "video,prompt\n", "(PATH) must have at least one row"),
        ("a.csv", "video,prompt\na,b\n".encode("utf-16"), "(PATH) must be UTF-8: it is UTF-16"),
        ("a.txt", "ball".encode("utf-16-be").join([b"\xfe\xff", b""]), "(PATH) must be UTF-8: it is UTF-16"),
        ("a.jsonl", "ball\ncat\n", "the first, a.jsonl:1, must be a JSON object: Expecting value at character 1"),
        ("a.jsonl", "\n[" * 1 + "[" * 99_999, "the first, a.jsonl:2, must be a JSON object: it is nested too deeply"),
        ("a.jsonl", "9" * 5000, "must be a JSON object: Exceeds the limit"),
        ("a.json", '[\n{"path": "a.mp4",\n"cap": "x"},\n{"path": }]', "(PATH:4) must be JSON: Expecting value"),
        ("a.json", '[{"path": "a.mp4", "cap": "x"}\n{}]', "(PATH:1) must be JSON: neither a comma"),
        ("a.json", '[{"path": "a.mp4", "cap": "x"}', "(PATH:1) must be JSON: neither a comma"),
        ("a.json", '[{"path": "a.mp4", "cap": "x"}]]', "(PATH) must be JSON: something follows"),
        ("a.json", "[" * 100_000, "(PATH:1) must be JSON: it is nested too deeply"),
        ("a.json", '{"a.mp4": "x"}', "(PATH) must be a JSON list of objects: it begins with '{"),
        ("a.json", "", "(PATH) must be a JSON list of objects"),
        ("a.json", " [ ] ", "(PATH) must have at least one row"),
        ("a.json", "[1, 2]", "the first, a.json:1, must be a JSON object"),
    ],
)
def test_damaged_tables_are_told_in_one_line(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert message.replace("PATH", str(path)) in refusal(path)


def test_places_in_tables_are_lines_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b'video,prompt\r\n\r\na.mp4,"x\r\n\r\ny"\r\nb.mp4,\r\n,too,many\r\n')
    (tmp_path / "a.jsonl").write_text('\n\n{"prompt": "x"}\n{"prompt": ""}\n\n[1]\n')
    (tmp_path / "a.json").write_text('[\n {"prompt": "x"}, {"prompt": ""},\n\n {\n  "prompt": 3\n }, 4\n]\n')
    for name, expected in (("a.csv", ["b.mp4", "a.csv:7"]), ("a.jsonl", ["a.jsonl:4", "a.jsonl:6"]),
                           ("a.json", ["a.json:2", "a.json:4", "a.json:6"])):  # fmt: skip
        rows = read(tmp_path / name)
        assert isinstance(rows[0], PromptRow)
        assert [row.video for row in rows if isinstance(row, Reject)] == expected, name


def test_rows_of_tables_that_are_no_texts(tmp_path: Path) -> None:
    rows = ['{"prompt": "a ball"}', json.dumps({"prompt": "x" * (LONGEST_TEXT + 1)}), '{"prompt": []}',
            '{"prompt": [["a"]]}', '{"prompt": true}', '{"prompt": "b", "split": 1.5}', '{"prompt": "&nbsp;\\u0007"}',
            json.dumps({"prompt": "b", "prompt_id": "i" * 100_000})]  # fmt: skip
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    found = read(tmp_path / "a.jsonl")
    reasons = [row.reason for row in found if isinstance(row, Reject)]
    assert reasons[0].endswith(f"must be a text of at most {LONGEST_TEXT} characters: it has {LONGEST_TEXT + 1}")
    assert reasons[1:5] == ["prompt ([]) must be a text", "prompt (['a']) must be a text",
                            "prompt (True) must be a text", "split (1.5) must be a text"]  # fmt: skip
    assert reasons[5] == "prompt must not be empty: the student reads it"
    assert reasons[6].startswith("prompt_id ('iiii")
    assert max(map(len, reasons)) < 200


def test_fastvideos_table(tmp_path: Path) -> None:
    """A list of objects with these fields; of several captions the first is taken."""
    facts = {"resolution": {"width": 1920, "height": 1080}, "fps": 24.0, "duration": 3.4, "num_frames": 81}
    rows = [{"path": "a.mp4", "cap": ["a ball", "a sphere"], **facts}, {"path": "b.mp4", "cap": "a cat", **facts},
            {"path": "c.mp4", "cap": [], **facts}, {"path": "d.mp4", **facts}]  # fmt: skip
    table = tmp_path / "videos2caption.json"
    table.write_text("\ufeff" + json.dumps(rows, indent=2))
    ball, cat, empty, none = read(table, needs=VIDEOS)
    assert ball == PromptRow("a ball", prompt_id_of("a ball"), "a.mp4")
    assert cat == PromptRow("a cat", prompt_id_of("a cat"), "b.mp4")
    assert isinstance(empty, Reject)
    assert none == Reject("d.mp4", "", "prompt must not be empty: the student reads it")
    both = [{"path": "x.mp4", "cap": "other", "prompt": "a ball", "video": "a.mp4"}]
    table.write_text(json.dumps(both))
    assert read(table, needs=VIDEOS) == [ball]


def test_of_parquet_tables_only_what_is_needed_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = pyarrow.table({
        "frames": [b"0" * 1000] * 10_000,
        "text": pyarrow.array([f"ball {i}" for i in range(9_999)] + [None]).dictionary_encode(),
        "file": pyarrow.array([f"{i}.mp4" for i in range(10_000)], pyarrow.large_string()),
    })  # fmt: skip
    pyarrow.parquet.write_table(table, tmp_path / "a.PARQUET")
    asked: list[tuple[int, list[str]]] = []
    iterate = pyarrow.parquet.ParquetFile.iter_batches

    def iter_batches(self, batch_size, *, columns):  # type: ignore[no-untyped-def]
        asked.append((batch_size, columns))
        return iterate(self, batch_size, columns=columns)

    monkeypatch.setattr(pyarrow.parquet.ParquetFile, "iter_batches", iter_batches)
    rows = read(tmp_path / "a.PARQUET", needs=VIDEOS, columns={"prompt": "text", "video": "file"})
    assert asked == [(4096, ["text", "file"])]
    assert rows[9_998] == PromptRow("ball 9998", prompt_id_of("ball 9998"), "9998.mp4")
    assert rows[9_999] == Reject("9999.mp4", "", "prompt must not be empty: the student reads it")


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"prompt": [1], "video": ["a"]}, "must have texts in the column prompt: it holds int64"),
        ({"prompt": ["a"], "video": [{"bytes": b"0"}]}, "must have texts in the column video: it holds struct<bytes"),
        ({"prompt": [b"a"], "video": ["a"]}, "must have texts in the column prompt: it holds binary"),
        ({"prompt": pyarrow.array([], pyarrow.string()), "video": pyarrow.array([], pyarrow.string())},
         "must have at least one row"),
    ],
)  # fmt: skip
def test_parquet_tables_of_other_types(tmp_path: Path, table: dict[str, list[object]], message: str) -> None:
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "a.parquet")
    assert message in refusal(tmp_path / "a.parquet")


def test_parquet_tables_that_are_damaged(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", [{"prompt": f"ball {i}", "video": f"{i}.mp4"} for i in range(5000)])
    whole = path.read_bytes()
    for content in (b"", b"PAR1", whole[:-9], whole[: len(whole) // 2], b"PAR1" + b"\xff" * 5000 + whole[5004:]):
        path.write_bytes(content)
        assert refusal(path).startswith(f"prompts ({path}) must be whole parquet: ")
    twice = pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 3, names=["prompt", "video", "video"])
    pyarrow.parquet.write_table(twice, path)
    assert refusal(path) == f"prompts ({path}) must have one column video: it has 2"
    no_text = pyarrow.Array.from_buffers(
        pyarrow.string(), 1, [None, pyarrow.py_buffer(b"\0\0\0\0\2\0\0\0"), pyarrow.py_buffer(b"\xff\xfe")]
    )
    pyarrow.parquet.write_table(pyarrow.table({"prompt": no_text, "video": ["a"]}), path)
    assert refusal(path) == f"prompts ({path}) must be UTF-8: invalid start byte"
    assert "must be a readable file: No such file" in refusal(tmp_path / "absent.parquet")
