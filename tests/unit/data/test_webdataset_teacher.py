"""Tars of videos and prompts: what is used, what is refused by name, and that nothing of a tar becomes a path."""

import io
import json
import os
import tarfile
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from afd_scale.codecs.codec import RejectedError, VideoForm
from afd_scale.codecs.identity import IdentityCodec
from afd_scale.config import ConfigError
from afd_scale.data.clips import Clip, Reject
from afd_scale.data.make_shards import ShardJob, make_shards
from afd_scale.data.teachers.webdataset import WebDatasetTeacher
from afd_scale.data.video import read_video
from tests.tools import call_tool
from tests.videos import moving_bar, write_video

FORM = VideoForm(frames=3, fps=8.0, height=16, width=16, colour="gray")


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write_video(tmp_path_factory.mktemp("video") / "bar.mp4", moving_bar(4, 16, 16)).read_bytes()


def write_tar(path: Path, members: Mapping[str, bytes | str] | list[tuple[str, bytes | str]]) -> Path:
    """A tar of these members, in their order."""
    pairs = members if isinstance(members, list) else list(members.items())
    with tarfile.open(path, "w") as tar:
        for name, content in pairs:
            data = content.encode() if isinstance(content, str) else content
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return path


def told(source: Path, **columns: str) -> tuple[list[Clip], dict[str, str]]:
    """What is used, and the reasons of the rest."""
    rows = WebDatasetTeacher(source, columns=columns).clips()
    return [row for row in rows if isinstance(row, Clip)], {r.video: r.reason for r in rows if isinstance(r, Reject)}


def test_a_txt_or_a_json_of_the_same_key_is_the_prompt(tmp_path: Path, video: bytes) -> None:
    write_tar(tmp_path / "b.tar", {"./c.mp4": video, "./c.txt": "a bar"})
    write_tar(
        tmp_path / "a.tar",
        {
            "x/0.json": '{"prompt": "told by json", "prompt_id": "seven", "split": "test"}',
            "x/0.mp4": video,
            "x/1.mp4": video,
            "x/1.txt": "a &amp; b\n",
            "x/1.json": '{"prompt": "not this", "video": "nor/this.mp4", "split": "test"}',
            "x/1.jpg": b"of no use",
            "x/2.MP4": video,
            "x/2.txt": "a bar",
        },
    )
    clips, reasons = told(tmp_path)
    assert reasons == {}
    assert [(clip.video, clip.prompt, clip.index, clip.split) for clip in clips] == [
        ("a.tar/x/0.mp4", "told by json", 0, "test"),
        ("a.tar/x/1.mp4", "a & b", 0, "test"),
        ("a.tar/x/2.MP4", "a bar", 0, None),
        ("b.tar/c.mp4", "a bar", 1, None),
    ]
    assert clips[0].prompt_id == "seven"


def test_a_member_is_read_as_a_file_of_it_would_be(tmp_path: Path, video: bytes) -> None:
    (tmp_path / "bar.mp4").write_bytes(video)
    tar = write_tar(tmp_path / "a.tar", {"0.mp4": b"no video", "0.txt": "one", "1.mp4": video, "1.txt": "two"})
    teacher = WebDatasetTeacher(tar)
    broken, clip = teacher.clips()
    assert isinstance(broken, Clip)
    assert isinstance(clip, Clip)
    before = set(os.listdir(tempfile.gettempdir()))
    np.testing.assert_array_equal(teacher.frames(clip, FORM), read_video(tmp_path / "bar.mp4", FORM))
    with pytest.raises(RejectedError, match="must be a readable video"):
        teacher.frames(broken, FORM)
    left = {name for name in set(os.listdir(tempfile.gettempdir())) - before if name.endswith(".mp4")}
    assert left == set()


def test_columns_of_json_members_are_checked_before_the_first_row(tmp_path: Path, video: bytes) -> None:
    tar = write_tar(tmp_path / "a.tar", {"0.mp4": video, "0.json": '{"caption": "a bar", "url": "u"}', "1.mp4": video,
                                         "1.json": '{"caption": "another"}'})  # fmt: skip
    message = r"must have a column prompt: it has caption, url, video; --columns prompt=NAME says which it is"
    with pytest.raises(ConfigError, match=message):
        WebDatasetTeacher(tar, columns={}).clips()
    clips, reasons = told(tar, prompt="caption")
    assert [clip.prompt for clip in clips] == ["a bar", "another"]
    assert reasons == {}
    with pytest.raises(ConfigError, match=r"columns \(video=url\) must not name video"):
        WebDatasetTeacher(tar, columns={"video": "url"})


def test_a_named_column_is_taken_before_the_txt(tmp_path: Path, video: bytes) -> None:
    told_twice = '{"long": "a long one", "prompt": "of the json"}'
    tar = write_tar(tmp_path / "a.tar", {"0.mp4": video, "0.txt": "short", "0.json": told_twice})
    assert told(tar)[0][0].prompt == "short"
    assert told(tar, prompt="long")[0][0].prompt == "a long one"
    assert told(tar, prompt="prompt")[0][0].prompt == "of the json"


def test_members_that_cannot_be_used_are_told_by_name(tmp_path: Path, video: bytes) -> None:
    tar = write_tar(
        tmp_path / "a.tar",
        [
            ("good.mp4", video),
            ("good.txt", "a bar"),
            ("good.txt", "another"),
            ("alone.mp4", video),
            ("word.txt", "of nothing"),
            ("list.mp4", video),
            ("list.json", "[1]"),
            ("cut.mp4", video),
            ("cut.json", '{"prompt": "a'),
            ("deep.mp4", video),
            ("deep.json", "[" * 100_000),
            ("wide.mp4", video),
            ("wide.txt", "a" * (1 << 20)),
            ("wrong.mp4", video),
            ("wrong.txt", b"\xff\xfea\0"),
            ("number.mp4", video),
            ("number.json", '{"prompt": 3}'),
            ("take.2.mp4", video),
            ("line\nend.mp4", video),
            ("line\nend.txt", "a bar"),
            (".hidden.mp4", video),
        ],
    )
    clips, reasons = told(tar)
    assert [clip.video for clip in clips] == ["a.tar/good.mp4", r"a.tar/line\nend.mp4"]
    expected = {
        "good.txt": "must be the only txt of its key: 'good.txt' is earlier",
        "alone.mp4": "prompt must lie beside it, in a txt or json of its key",
        "word.txt": "must have a video of its key beside it",
        "list.mp4": "its json must hold an object",
        "cut.mp4": "its json must be JSON: Unterminated string",
        "deep.mp4": "its json must be JSON: it is nested too deeply",
        "wide.mp4": "'wide.txt' must have at most",
        "wrong.mp4": "'wrong.txt' must be UTF-8",
        "number.mp4": "prompt (3) must be a text",
        "take.2.mp4": "must have no other dot in its name: the key would end there, 'take'",
    }
    assert reasons.keys() == {f"a.tar/{name}" for name in expected}
    for name, reason in expected.items():
        assert reasons[f"a.tar/{name}"].startswith(reason), name
        assert "\n" not in reasons[f"a.tar/{name}"]


def test_links_devices_and_sparse_files_are_refused(tmp_path: Path, video: bytes) -> None:
    secret = tmp_path / "secret.mp4"
    secret.write_bytes(video)
    path = write_tar(tmp_path / "a.tar", {"0.mp4": video, "0.txt": "a bar"})
    with tarfile.open(path, "a") as tar:
        for name, kind, target in (
            ("soft.mp4", tarfile.SYMTYPE, str(secret)),
            ("hard.mp4", tarfile.LNKTYPE, "0.mp4"),
            ("pipe.mp4", tarfile.FIFOTYPE, ""),
            ("disk.txt", tarfile.BLKTYPE, ""),
            ("holes.mp4", tarfile.GNUTYPE_SPARSE, ""),
            ("folder", tarfile.DIRTYPE, ""),
        ):
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = kind, target
            tar.addfile(entry)
    clips, reasons = told(path)
    assert [clip.video for clip in clips] == ["a.tar/0.mp4"]
    kinds = {"soft.mp4": "a link", "hard.mp4": "a link", "pipe.mp4": "a device", "disk.txt": "a device",
             "holes.mp4": "sparse"}  # fmt: skip
    assert reasons == {f"a.tar/{name}": f"must be a plain file: it is {kind}" for name, kind in kinds.items()}


@pytest.mark.parametrize("name", ["../../out.mp4", "/out.mp4", "a/../../../out.mp4", "..mp4/out.mp4"])
def test_names_of_members_are_never_paths(tmp_path: Path, video: bytes, name: str) -> None:
    (tmp_path / "deep").mkdir()
    tar = write_tar(tmp_path / "deep" / "a.tar", {name: video, name.replace("out.mp4", "out.txt"): "a bar"})
    teacher = WebDatasetTeacher(tar)
    (clip,) = teacher.clips()
    assert isinstance(clip, Clip)
    assert teacher.frames(clip, FORM).shape == (3, 16, 16, 1)
    assert {path.name for path in tmp_path.rglob("*")} == {"deep", "a.tar"}
    assert not Path("/out.mp4").exists()


def cut(tar: Path, size: int) -> None:
    tar.write_bytes(tar.read_bytes()[:size])


def test_of_a_damaged_tar_what_lies_before_is_used_and_one_line_names_it(tmp_path: Path, video: bytes) -> None:
    members = {name: content for i in range(3) for name, content in ((f"{i}.mp4", video), (f"{i}.txt", f"bar {i}"))}
    whole = write_tar(tmp_path / "a.tar", members)
    with tarfile.open(whole) as tar:
        at = {entry.name: (entry.offset, entry.offset_data) for entry in tar}
    content = whole.read_bytes()

    def damaged(data: bytes) -> tuple[int, str]:
        whole.write_bytes(data)
        clips, reasons = told(whole)
        reasons.pop("a.tar/1.mp4", None)  # whose txt is lost
        assert reasons.keys() == {"a.tar"}, reasons
        return len(clips), reasons["a.tar"]

    first, second = at["1.mp4"][0], at["1.txt"]
    rule = "must be a whole, uncompressed tar: "
    assert damaged(content[: second[1] + 2]) == (
        1, rule + f"'1.txt' reaches beyond its end, byte {second[1] + 2}; the 3 members before that can be used"
    )  # fmt: skip
    assert damaged(content[:first])[0] == 1
    assert damaged(content[:first])[1].startswith(f"{rule}it ends at byte {first} without its end mark")
    flipped = content[: first + 3] + b"\xff" + content[first + 4 :]
    assert damaged(flipped)[1].startswith(f"{rule}the header at byte {first} is damaged")
    number, why = damaged(content + content)
    assert (number, "as where tars were joined" in why) == (3, True)


@pytest.mark.parametrize("content", [b"", b"x" * 2000, b"\x1f\x8b" + b"\1" * 3000, b"\0" * 100])
def test_what_is_no_tar_is_told_in_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.tar").write_bytes(content)
    job = ShardJob(WebDatasetTeacher(tmp_path), IdentityCodec.of_form(FORM), FORM, tmp_path / "out")
    with pytest.raises(
        ConfigError, match=r"source \(webdataset:.* a\.tar: must be a whole, uncompressed tar"
    ) as caught:
        make_shards(job)
    assert "\n" not in str(caught.value)


def test_no_sequence_of_headers_ends_in_a_traceback(tmp_path: Path, video: bytes) -> None:
    """Every header field in turn is overwritten with things that tarfile stumbles over."""
    content = write_tar(tmp_path / "a.tar", {"0.mp4": video, "0.txt": "a", "1.mp4": video, "1.txt": "b"}).read_bytes()
    random = np.random.default_rng(0)
    for _ in range(150):
        data = bytearray(content)
        begin = int(random.integers(0, len(content) // 512)) * 512
        for _ in range(3):
            data[begin + int(random.integers(0, 512))] = int(random.integers(0, 256))
        header = data[begin : begin + 512]  # with a checksum that holds, it gets further
        data[begin + 148 : begin + 156] = b"%06o\0 " % (256 + sum(header[:148]) + sum(header[156:]))
        (tmp_path / "a.tar").write_bytes(data)
        with suppress(ConfigError):  # no row can be read, or no prompt is left
            clips, reasons = told(tmp_path / "a.tar")
            assert clips or reasons


def test_negative_sizes_and_endless_headers_end(tmp_path: Path, video: bytes) -> None:
    entry = tarfile.TarInfo("0.mp4")
    block = bytearray(entry.tobuf())
    block[124:136] = b"\xff" * 12  # -1, as GNU writes it
    block[148:156] = b"%06o\0 " % (256 + sum(block[:148]) + sum(block[156:]))
    pax = tarfile.TarInfo("x")
    pax.type, pax.size = tarfile.XHDTYPE, 0
    for data in (bytes(block) * 3, pax.tobuf(tarfile.GNU_FORMAT) * 5000):
        (tmp_path / "a.tar").write_bytes(data)
        clips, reasons = told(tmp_path / "a.tar")
        assert clips == []
        assert reasons["a.tar"].startswith("must be a whole, uncompressed tar")


def test_what_lies_beside_tars_is_none_of_them(tmp_path: Path, video: bytes) -> None:
    write_tar(tmp_path / "0.tar", {"a.mp4": video, "a.txt": "a red ball"})
    (tmp_path / "0.tar.idx").write_text("0 1 2")
    (tmp_path / "1.tar.gz").write_bytes(b"packed")
    clips, rejects = told(tmp_path)
    assert [clip.video for clip in clips] == ["0.tar/a.mp4"]
    assert list(rejects) == ["1.tar.gz"]


def test_names_with_a_range(tmp_path: Path, video: bytes) -> None:
    for number in (8, 9, 10):
        write_tar(tmp_path / f"v-{number:03d}.tar", {"0.mp4": video, "0.txt": f"bar {number}"})
    clips, _ = told(tmp_path / "v-{008..010}.tar")
    assert [clip.video for clip in clips] == ["v-008.tar/0.mp4", "v-009.tar/0.mp4", "v-010.tar/0.mp4"]
    with pytest.raises(ConfigError, match=r"1 are not, the first is .*v-011\.tar"):
        WebDatasetTeacher(tmp_path / "v-{008..011}.tar")
    with pytest.raises(ConfigError, match="must be a tar, a folder of them or names such as"):
        WebDatasetTeacher(tmp_path / "absent.tar")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="must be a tar or hold some"):
        WebDatasetTeacher(tmp_path / "empty")


def test_a_job_is_made_again_where_its_tar_has_changed(tmp_path: Path, video: bytes) -> None:
    tar = write_tar(tmp_path / "a.tar", {"0.mp4": b"damaged", "0.txt": "one", "1.mp4": b"damaged", "1.txt": "two"})

    def job(rejects: int) -> ShardJob:
        return ShardJob(WebDatasetTeacher(tar), IdentityCodec.of_form(FORM), FORM, tmp_path / "out", rejects)

    with pytest.raises(ConfigError, match="max_rejects"):
        make_shards(job(1))
    write_tar(tar, {"0.mp4": video, "0.txt": "one", "1.mp4": b"damaged", "1.txt": "two"})
    facts = make_shards(job(1))
    assert facts.num_samples == 1
    assert facts.provenance["source"] == {"name": "webdataset", "source": "a.tar"}
    (line,) = (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()
    assert json.loads(line)["video"] == "a.tar/1.mp4"


def test_prompts_in_a_table_are_refused_beside_tars(tmp_path: Path, video: bytes) -> None:
    tar = write_tar(tmp_path / "a.tar", {"0.mp4": video, "0.txt": "one"})
    flags = ("--source", tar, "--out", tmp_path / "out", "--size", "16x16", "--frames", "3", "--fps", "8")
    done = call_tool("make_shards", "--teacher", "webdataset", "--prompts", "p.csv", *flags)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "prompts (p.csv) must not be given with teacher webdataset" in done.stderr
    done = call_tool("make_shards", "--teacher", "folder", *flags)
    assert done.stderr.endswith("there is none; a .tar is read with --teacher webdataset\n")
    done = call_tool("make_shards", "--teacher", "webdataset", *flags)
    assert done.returncode == 0, done.stderr
