"""Prompts as Wan's tokenizer code cleans them, the same text on every way to an encoder; of teachers and tables."""

import html
import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ftfy
import numpy as np
import pytest

from afd_scale.codecs.cleaning import CLEANING, clean_prompt
from afd_scale.codecs.identity import IdentityCodec
from afd_scale.config import ConfigError
from afd_scale.config.models import StudentConfig
from afd_scale.data.clips import Clip
from afd_scale.data.make_shards import ShardJob, make_shards
from afd_scale.data.schema import DatasetFacts
from afd_scale.data.teachers.exchange import Endpoint
from afd_scale.data.teachers.http import HttpTeacher
from afd_scale.data.teachers.journal import HAVE, Journal
from afd_scale.data.teachers.prompts import PromptRow, PromptsAlone, prompt_id_of, read_prompts, read_sidecars
from afd_scale.generation.requests import embedded
from afd_scale.torchvision_ops import define_torchvision_ops

CLEANED = {  # written: what Wan makes of it
    "a red ball falls": "a red ball falls",
    "  a\tred \n ball\u3000falls ": "a red ball falls",
    "ein sch\u00c3\u00b6ner Ball, d\u00c3\u00a9j\u00c3  vu": "ein sch\u00f6ner Ball, d\u00e9j\u00e0 vu",
    "the ball\u00e2\u20ac\u2122s bounce \u00e2\u20ac\u201d twice": "the ball's bounce \u2014 twice",
    "it\u2019s a \u201cball\u201d": 'it\'s a "ball"',
    "salt &amp; pepper &lt;3": "salt & pepper <3",
    "salt &amp;amp; pepper": "salt & pepper",
    "\uff22\uff21\uff2c\uff2c\u3000\uff12 \uff4e\uff4f\uff4f\uff4e": "BALL 2 noon",
    "e\ufb03cient \ufb01re": "efficient fire",
    "cat\u0301 e\u0301clair": "cat\u0301 \u00e9clair",
    "\u4e00\u53ea\u732b\uff0c\u5954\u8dd1\u3002": "\u4e00\u53ea\u732b,\u5954\u8dd1\u3002",
    "\ufeffa\u0007 ball\x7f": "a ball",
    "a&nbsp;ball": "a ball",
    "\U0001f3c0 bounces": "\U0001f3c0 bounces",
    "": "",
}


@pytest.fixture(scope="module")
def exported() -> Callable[[str], str]:
    """How an exported pipeline cleans a prompt, with diffusers alone."""
    define_torchvision_ops()
    found: Callable[[str], str] = importlib.import_module("afd_scale.checkpoint.formats.causal_wan_pipeline").cleaned
    return found


@pytest.mark.parametrize("written", CLEANED, ids=ascii)
def test_prompts_of_tables_are_cleaned_as_wan_cleans_them(written: str) -> None:
    once = " ".join(html.unescape(html.unescape(ftfy.fix_text(written))).split())  # the formula, read in Wan's code
    assert clean_prompt(written) == CLEANED[written] == once


@pytest.mark.parametrize("written", [*CLEANED, "<b>&ldquo;ball&rdquo;</b>", "a < &amp;amp;amp;lt; b"], ids=ascii)
def test_a_prompt_of_a_table_that_was_cleaned_stays_as_it_is(written: str, exported: Callable[[str], str]) -> None:
    first = clean_prompt(written)
    assert clean_prompt(first) == first
    assert exported(written) == exported(first) == first, "an exported pipeline gives its encoder the same text"


def test_every_table_gives_the_same_prompt(tmp_path: Path) -> None:
    """And the prompt_id of one that cleaning does not change is the one it always had."""
    for written, prompt in CLEANED.items():
        if not prompt or "\n" in written or "\ufeff" in written:
            continue
        (tmp_path / "a.txt").write_text(written)
        (tmp_path / "a.mp4").touch()
        (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": written, "video": "a.mp4"}))
        (beside,) = read_sidecars(tmp_path)
        for row in (beside, *read_prompts(tmp_path / "a.txt"), *read_prompts(tmp_path / "a.jsonl")):
            assert isinstance(row, PromptRow)
            assert (row.prompt, row.prompt_id) == (prompt, prompt_id_of(prompt))
            assert row.written == (None if prompt == " ".join(written.split()) else " ".join(written.split()))
    assert prompt_id_of("a red ball falls") == "c053a9cfe32541c7"


def test_two_spellings_in_a_table_are_one_prompt(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("it's a ball\nit\u2019s a ball\n")
    first, second = PromptsAlone(tmp_path / "a.txt").clips()
    assert isinstance(first, Clip)
    assert second.reason == "prompt must occur once: an earlier row has it"  # type: ignore[union-attr]


class Listening(IdentityCodec):
    """Notes what it is given to embed."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.heard: list[str] = []

    def embed(self, prompt: str) -> np.ndarray:
        self.heard.append(prompt)
        return super().embed(prompt)


def job(folder: Path) -> ShardJob:
    return ShardJob(PromptsAlone(folder / "a.txt"), Listening(), None, folder / "out", max_rejects=0)


def test_a_teachers_dataset_holds_cleaned_prompts_and_says_how(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("schÃ¶n &amp; gut\n")
    making = job(tmp_path)
    facts = make_shards(making)
    assert facts.provenance["prompts"] == CLEANING == {"cleaned": "wan", "ftfy": ftfy.__version__}
    assert making.codec.heard == ["schön & gut"]  # type: ignore[attr-defined]
    listed = json.loads((tmp_path / "out" / "prompts.jsonl").read_text())
    assert (listed["prompt"], listed["prompt_id"]) == ("schön & gut", prompt_id_of("schön & gut"))


def test_a_teachers_dataset_from_before_there_was_cleaning_goes_on(tmp_path: Path) -> None:
    """Begun, or finished, without a record of how prompts are cleaned; one whose prompts are others now is refused."""
    (tmp_path / "a.txt").write_text("a red ball\n\x00\n")
    with pytest.raises(ConfigError, match="max_rejects"):
        make_shards(job(tmp_path))
    record = tmp_path / ".out.records" / "job.json"
    begun = json.loads(record.read_text())
    begun["provenance"].pop("prompts", None)
    record.write_text(json.dumps(begun))
    (tmp_path / "a.txt").write_text("a red ball\na cat\n")
    assert make_shards(job(tmp_path)).num_samples == 2
    path = tmp_path / "out" / "dataset.json"
    facts = json.loads(path.read_text())
    del facts["provenance"]["prompts"]
    path.write_text(json.dumps(facts))
    assert make_shards(job(tmp_path)) == DatasetFacts.load(tmp_path / "out", "out")
    (tmp_path / "a.txt").write_text("a red ball\na \u201ccat\u201d\n")
    with pytest.raises(ConfigError, match=r"out \(.*\) must not exist yet"):
        make_shards(job(tmp_path))


def test_what_a_teachers_students_are_asked_for_is_cleaned() -> None:
    student = StudentConfig()
    codec = Listening(text_shape=(student.text_length, student.text_dim))
    prompts = embedded(["it\u2019s &lt;a&gt; ball", "a  cat"], codec, student)
    assert prompts.texts == ("it's <a> ball", "a cat")
    assert tuple(codec.heard) == prompts.texts
    assert prompts.ids == tuple(map(prompt_id_of, prompts.texts))


def test_what_was_paid_for_before_prompts_were_cleaned_stays_the_teachers(tmp_path: Path) -> None:
    """A prompt that cleaning changes keeps the id that it was asked under, and is not asked for again."""
    (tmp_path / "a.txt").write_text("it\u2019s a ball\na cat\nit\u2019s new\n")
    old = prompt_id_of("it\u2019s a ball")
    (tmp_path / "paid").mkdir()
    Journal(tmp_path / "paid" / "journal.jsonl").write((old, 0), HAVE, id="video_1")
    teacher = HttpTeacher(Endpoint("http://localhost:1/v1", "m"), tmp_path / "a.txt", tmp_path / "paid")
    had, _, new = teacher.clips()
    assert had == Clip(f"{old}-0.mp4", "it's a ball", old, 0)
    assert new.video == prompt_id_of("it's new") + "-0.mp4"
    assert "3 videos at 0: 0; 1 are asked for already, the other 2 cost 0" in teacher.plan()
