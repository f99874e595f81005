"""Datasets on disk: written whole or not at all, checked before training, read back as written."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from importlib import import_module
from itertools import islice
from multiprocessing import get_context, resource_tracker
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest

from afd_scale.config import ConfigError, LostInputError, RunConfig
from afd_scale.config.run import DataConfig, EvaluationConfig, ProceduralSource
from afd_scale.data import reader, validate
from afd_scale.data.check import check_copies, check_dataset, ensure_dataset, hash_share
from afd_scale.data.reader import Ahead, TeacherStream
from afd_scale.data.schema import DatasetFacts, TeacherSample
from afd_scale.data.storage import teacher_data
from afd_scale.data.writer import write_dataset
from afd_scale.torchvision_ops import define_torchvision_ops
from afd_scale.types import Prompts, Videos
from tests import toy_datasets
from tests.distributed.processes import forking
from tests.tools import call_tool
from tests.toy_datasets import make_procedural_shards, procedural_samples

define_torchvision_ops()
from streaming import Stream  # noqa: E402
from streaming.base import compression  # noqa: E402
from streaming.base.shared import memory  # noqa: E402

SOURCE = ProceduralSource(clips=100, seed=1)
SHARD_BYTES = 1 << 18
FACTS = DatasetFacts(
    latent_shape=(4, 48, 4, 4), text_shape=(16, 32), codec="test", teacher="procedural:teacher", num_samples=0,
    provenance={},
)  # fmt: skip

# streaming 0.13 opens shards that it unpacks and lets the garbage collector close them.
leaves_files_open = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def run_config(shards: Path | str, **data: Any) -> RunConfig:
    cache = Path(str(shards).removeprefix("file://")).parent / "cache"
    section = {"shards": str(shards), "global_batch": 16, "cache": cache, **data}
    return RunConfig.model_validate({"method": "sft", "data": section})


def read_videos(config: RunConfig, samples: Sequence[int]) -> Videos:
    return toy_datasets.read_videos(teacher_data(config), samples, config.student.text_length)


@pytest.mark.parametrize("change", [{"latent_shape": (2, 48, 4, 4)}, {"codec": "another"}])
def test_videos_to_evaluate_on_are_of_the_data_s_form(dataset: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    facts = replace(FACTS, **change)
    samples = [
        replace(sample, latents=sample.latents[: facts.latent_shape[0]]) for sample in procedural_samples(SOURCE)
    ]
    write_dataset(samples, facts, tmp_path / "other")
    config = run_config(dataset).model_copy(update={"evaluation": EvaluationConfig(prompts=str(tmp_path / "other"))})
    with pytest.raises(ConfigError, match=r"^evaluation\.prompts \(.*other\) must "):
        check_dataset(config)


def distinct_prompts(config: RunConfig) -> Prompts:
    return reader.distinct_prompts(teacher_data(config), config.student.text_length)


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """Of 100 clips in several shards."""
    folder = tmp_path / "teacher"
    write_dataset(procedural_samples(SOURCE), FACTS, folder, shard_bytes=SHARD_BYTES)
    assert len(list(folder.glob("*.zstd"))) > 2
    return folder


@pytest.fixture
def checked(dataset: Path) -> Path:
    """The same, as training finds it: checked and unpacked."""
    check_dataset(run_config(dataset))
    return dataset


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def one_line(caught: pytest.ExceptionInfo[ConfigError]) -> str:
    message = str(caught.value)
    assert "\n" not in message
    return message


# --- writing


def test_same_seed_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "other"):
        make_procedural_shards(SOURCE, tmp_path / name)
    make_procedural_shards(SOURCE.model_copy(update={"seed": 2}), tmp_path / "third")
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert files == ["dataset.json", "index.json", "prompts.jsonl", "rejects.jsonl", "shard.00000.mds.zstd"]
    for file in files:
        one = (tmp_path / "one" / file).read_bytes()
        assert one == (tmp_path / "other" / file).read_bytes()
        assert one != (tmp_path / "third" / file).read_bytes() or file == "rejects.jsonl"


def test_existing_folder_and_unwritable_parent_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"out \(.*empty\) must not exist") as caught:
        make_procedural_shards(SOURCE, tmp_path / "empty")
    one_line(caught)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"out \(.*file/x\) must be in a writable folder") as caught:
        make_procedural_shards(SOURCE, tmp_path / "file" / "x")
    one_line(caught)


def test_failing_source_leaves_nothing(tmp_path: Path) -> None:
    def failing() -> Iterator[TeacherSample]:
        yield from islice(procedural_samples(SOURCE), 20)
        raise RuntimeError("the API went away")

    with pytest.raises(RuntimeError, match="the API went away"):
        write_dataset(failing(), FACTS, tmp_path / "out", shard_bytes=1 << 16)
    assert list(tmp_path.iterdir()) == []


def test_killed_writer_leaves_nothing_that_reads(tmp_path: Path) -> None:
    code = """
import itertools, sys, time
from pathlib import Path
from tests_shards import FACTS, SOURCE
from tests.toy_datasets import procedural_samples
from afd_scale.data.writer import write_dataset

def slow():
    yield from itertools.islice(procedural_samples(SOURCE), 60)
    print("half", flush=True)
    time.sleep(60)

write_dataset(slow(), FACTS, Path(sys.argv[1]), shard_bytes=1 << 16)
"""
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "tests_shards.py").symlink_to(__file__)
    folder = tmp_path / "data" / "teacher"
    paths = f"{tmp_path / 'path'}:{Path(__file__).parents[3]}"
    with forking("-c", code, folder, PYTHONPATH=paths) as (writer, printed):
        assert printed.readline() == b"half\n"
        writer.kill()
    assert not folder.exists()
    (left,) = folder.parent.iterdir()
    assert len(list(left.glob("*.zstd"))) > 1, "it was killed while it wrote"
    for config in (run_config(folder), run_config(left)):
        with pytest.raises(ConfigError, match=r"dataset\.json"):
            check_dataset(config)
    make_procedural_shards(SOURCE, folder)
    check_dataset(run_config(folder))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latents": np.zeros((4, 48, 4, 5), np.float16)}, r"sample 1: latents .* must be \(4, 48, 4, 4\)"),
        (
            {"text_embedding": np.zeros((17, 32), np.float16)},
            "sample 1: text_embedding .* at most 16 rows of 32",
        ),
        ({"teacher": "another"}, "sample 1: teacher"),
        ({"prompt": "something else"}, "prompt_id .* must name one prompt"),
    ],
)
def test_sample_that_contradicts_the_facts_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    sample = next(procedural_samples(SOURCE))
    with pytest.raises(ValueError, match=message):
        write_dataset([sample, replace(sample, **change)], FACTS, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_empty_source_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must not be empty"):
        write_dataset([], FACTS, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# --- checking


def test_sound_dataset_passes_and_says_what_it_is(dataset: Path) -> None:
    assert check_dataset(run_config(dataset)) == replace(FACTS, num_samples=100)
    check_dataset(run_config(dataset))  # again, now unpacked


def flip_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("damage", [flip_byte, truncate])
def test_damaged_shard(dataset: Path, damage: Any) -> None:
    damage(dataset / "shard.00001.mds.zstd")
    with pytest.raises(
        ConfigError, match=r"^data\.shards \(.*shard\.00001\.mds\.zstd\) must have xxh64 .* make"
    ) as caught:
        check_dataset(run_config(dataset))
    one_line(caught)


@pytest.mark.parametrize("damage", [flip_byte, truncate])
def test_damaged_unpacked_shard(dataset: Path, damage: Any) -> None:
    check_dataset(run_config(dataset))
    damage(dataset / "shard.00001.mds")
    with pytest.raises(ConfigError, match=r"shard\.00001\.mds\) must have xxh64 .*; delete it"):
        check_dataset(run_config(dataset))
    (dataset / "shard.00001.mds").unlink()
    check_dataset(run_config(dataset))


@pytest.mark.parametrize("name", ["index.json", "dataset.json", "prompts.jsonl", "shard.00001.mds.zstd"])
def test_missing_file(dataset: Path, name: str) -> None:
    (dataset / name).unlink()
    with pytest.raises(ConfigError, match=r"^data\.shards") as caught:
        check_dataset(run_config(dataset))
    assert name in one_line(caught)


@pytest.mark.parametrize("name", ["index.json", "dataset.json", "prompts.jsonl"])
@pytest.mark.parametrize("content", ["", "{", "[1]", '{"shards": 3}'])
def test_nonsense_in_a_file(dataset: Path, name: str, content: str) -> None:
    if (name, content) == ("prompts.jsonl", ""):
        content = "\n"
    (dataset / name).write_text(content)
    with pytest.raises(ConfigError, match=r"^data\.shards") as caught:
        check_dataset(run_config(dataset))
    assert name in one_line(caught)


def test_columns_that_would_be_unpickled_are_refused(dataset: Path) -> None:
    index = json.loads((dataset / "index.json").read_text())
    encodings = index["shards"][1]["column_encodings"]
    encodings[encodings.index("json")] = "pkl"
    (dataset / "index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigError, match=r"a shard has the columns .*'pkl'") as caught:
        check_dataset(run_config(dataset))
    one_line(caught)


@pytest.mark.parametrize("change", [{"samples": None}, {"samples": "9"}, {"raw_data": None}])
def test_index_entries_that_say_nothing(dataset: Path, change: dict[str, Any]) -> None:
    index = json.loads((dataset / "index.json").read_text())
    index["shards"][1] |= change
    (dataset / "index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigError, match=r"must be an MDS index .*: shards\.1\.(samples|raw_data) \(") as caught:
        check_dataset(run_config(dataset))
    one_line(caught)


def test_prompts_that_name_samples_which_are_not_there(dataset: Path) -> None:
    path = dataset / "prompts.jsonl"
    path.write_text(path.read_text().replace('"sample": 3,', '"sample": 103,'))
    with pytest.raises(ConfigError, match=r"prompts\.jsonl: must name samples from 0 to 99, \S+ names 103") as caught:
        check_dataset(run_config(dataset))
    one_line(caught)


def test_files_known_to_be_good_are_not_hashed_again(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[str] = []
    check = validate.hash_of
    monkeypatch.setattr(validate, "hash_of", lambda path: hashed.append(path.name) or check(path))
    check_dataset(run_config(dataset))
    assert len(hashed) == 2 * len(list(dataset.glob("*.zstd"))), "packed and unpacked"
    hashed.clear()
    os.utime(dataset / "shard.00002.mds", ns=(0, 0))
    check_dataset(run_config(dataset))
    assert hashed == ["shard.00002.mds"]
    hashed.clear()
    check_dataset(run_config(dataset, cache=Path("/dev/null/cache")))  # cannot remember, and says so in the log
    assert len(hashed) == 2 * len(list(dataset.glob("*.zstd")))


def test_extra_prompts_with_videos_are_refused(dataset: Path, tmp_path: Path) -> None:
    shutil.copytree(dataset, tmp_path / "videos")
    for prompts in (dataset, tmp_path / "videos"):
        data = {"shards": str(dataset), "prompts": str(prompts), "prompts_per_step": 4, "cache": tmp_path / "cache"}
        config = RunConfig.model_validate({"method": "afd", "data": data})
        with pytest.raises(
            ConfigError, match=r"^data\.prompts \(.*\) must hold prompts alone: it holds videos"
        ) as caught:
            check_dataset(config)
        one_line(caught)


def test_newer_schema(dataset: Path) -> None:
    edit(dataset / "dataset.json", schema_version=3, something_new=1)
    with pytest.raises(ConfigError, match=r"must have schema_version 2: it has 3; a newer version"):
        check_dataset(run_config(dataset))


def test_number_of_samples_must_agree(dataset: Path) -> None:
    edit(dataset / "dataset.json", num_samples=101)
    with pytest.raises(ConfigError, match=r"index\.json: must have the 101 samples of dataset\.json, it has 100"):
        check_dataset(run_config(dataset))


def test_shapes_must_be_the_runs(dataset: Path) -> None:
    with pytest.raises(ConfigError, match=r"must hold latents of shape \(4, 48, 8, 4\)"):
        check_dataset(run_config(dataset, latent_height=8))
    edit(dataset / "dataset.json", text_shape=[16, 64])
    with pytest.raises(ConfigError, match=r"must hold text embeddings of shape \(16, 32\)"):
        check_dataset(run_config(dataset))


def test_global_batch_must_fit(dataset: Path) -> None:
    check_dataset(run_config(dataset, global_batch=100))
    with pytest.raises(ConfigError, match=r"^data\.global_batch \(101\) must be at most 100"):
        check_dataset(run_config(dataset, global_batch=101))


# --- making what is absent


def test_absent_dataset_is_made_from_its_source_once(tmp_path: Path) -> None:
    config = DataConfig(shards=str(tmp_path / "made"), source=SOURCE)
    ensure_dataset(config)
    before = (tmp_path / "made" / "dataset.json").stat().st_mtime_ns
    ensure_dataset(config)
    assert (tmp_path / "made" / "dataset.json").stat().st_mtime_ns == before
    other = config.model_copy(update={"source": SOURCE.model_copy(update={"seed": 2})})
    with pytest.raises(ConfigError, match=r"^data\.source .*'seed': 2.* must be what .* was made from") as caught:
        ensure_dataset(other)
    one_line(caught)


def test_absent_dataset_without_source(tmp_path: Path) -> None:
    config = run_config(tmp_path / "absent")
    ensure_dataset(config.data)
    with pytest.raises(ConfigError, match=r"must be an MDS dataset with dataset\.json: nothing is there; make it"):
        check_dataset(config)


# --- looking samples up


def test_samples_read_back_as_written(checked: Path) -> None:
    written = list(procedural_samples(SOURCE))
    backwards = tuple(reversed(range(100)))
    videos = read_videos(run_config(checked), backwards)
    assert videos.prompts.keys == backwards
    for row, sample in enumerate(backwards):
        assert videos.prompts.texts[row] == written[sample].prompt
        text = written[sample].text_embedding
        np.testing.assert_array_equal(videos.prompts.embeddings[row, : len(text)].numpy(), text)
        assert not videos.prompts.embeddings[row, len(text) :].any(), "padding is zero"
        np.testing.assert_array_equal(videos.latents[row].numpy(), written[sample].latents)


def test_distinct_prompts_are_sorted_and_under_their_first_position(checked: Path) -> None:
    written = list(procedural_samples(SOURCE))
    prompts = distinct_prompts(run_config(checked))
    assert prompts.ids == tuple(sorted({sample.prompt_id for sample in written}))
    first = [next(i for i, s in enumerate(written) if s.prompt_id == prompt_id) for prompt_id in prompts.ids]
    assert list(prompts.keys) == first
    assert prompts.texts == tuple(written[sample].prompt for sample in first)
    assert prompts.embeddings.equal(read_videos(run_config(checked), first).prompts.embeddings)
    assert prompts.embeddings.shape == (96, 16, 32)


def test_distinct_prompts_keep_no_video(checked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither in what is returned nor until all rows are read."""
    alive: list[weakref.ref[np.ndarray]] = []
    most = 0

    def followed(location: Any, samples: Sequence[int]) -> Iterator[dict[str, Any]]:
        nonlocal most
        for row in read_rows(location, samples):
            alive.append(weakref.ref(row["latents"]))
            most = max(most, sum(video() is not None for video in alive))
            yield row
            del row

    read_rows = reader.read_rows
    monkeypatch.setattr(reader, "read_rows", followed)
    prompts = distinct_prompts(run_config(checked))
    assert (len(alive), len(prompts)) == (96, 96)
    assert most <= 2, "the one that is read, and the one before it"
    assert all(video() is None for video in alive)


# --- the stream in one process; tests/distributed has more


def draw(stream: TeacherStream, steps: int) -> list[tuple[int, ...]]:
    return [batch.prompts.keys for batch in islice(stream, steps)]


def test_epochs_hold_each_sample_once_and_drop_the_rest(checked: Path) -> None:
    stream = TeacherStream(run_config(checked))
    assert stream.steps_per_epoch == 6
    steps = draw(stream, 13)
    for epoch in (steps[:6], steps[6:12]):
        samples = [sample for step in epoch for sample in step]
        assert len(set(samples)) == 96
    assert steps[:6] != steps[6:12], "each epoch has its own order"
    assert steps != draw(TeacherStream(run_config(checked).model_copy(update={"seed": 1})), 13)


def test_batches_hold_what_their_samples_hold(checked: Path) -> None:
    config = run_config(checked)
    stream = TeacherStream(config)
    for batch in islice(stream, 3):
        looked_up = read_videos(config, batch.prompts.keys)
        assert len(batch.extra) == 0
        assert batch.prompts.texts == looked_up.prompts.texts
        assert batch.prompts.ids == looked_up.prompts.ids
        assert batch.teacher.latents.equal(looked_up.latents)
        assert batch.prompts.embeddings.equal(looked_up.prompts.embeddings)


@pytest.mark.parametrize("at", [0, 4, 6, 9, 12])
def test_resumed_equals_uninterrupted(checked: Path, at: int) -> None:
    expected = draw(TeacherStream(run_config(checked)), 15)
    first = TeacherStream(run_config(checked))
    assert draw(first, at) == expected[:at]
    state = json.loads(json.dumps(first.state_dict()))
    resumed = TeacherStream(run_config(checked))
    resumed.load_state_dict(state)
    assert draw(resumed, 15 - at) == expected[at:]
    draw(first, 3)
    first.load_state_dict(state)  # backwards, in the same process
    assert draw(first, 15 - at) == expected[at:]


def test_position_in_other_samples_is_refused(checked: Path, tmp_path: Path) -> None:
    state = TeacherStream(run_config(checked)).state_dict()
    other = SOURCE.model_copy(update={"seed": 2})
    write_dataset(procedural_samples(other), FACTS, tmp_path / "other", shard_bytes=SHARD_BYTES)
    check_dataset(run_config(tmp_path / "other"))
    with pytest.raises(ConfigError, match=r"^data\.shards \(.*\) must be .*, the hash of its shards in the checkpoint"):
        TeacherStream(run_config(tmp_path / "other")).load_state_dict(state)


@pytest.mark.parametrize("change", [{"global_batch": 8}, {"canonical_nodes": 2}])
def test_position_in_another_order_is_refused(checked: Path, change: dict[str, int]) -> None:
    state = TeacherStream(run_config(checked)).state_dict()
    (name,) = change
    with pytest.raises(ConfigError, match=rf"^data\.{name} \({change[name]}\) must be "):
        TeacherStream(run_config(checked, **change)).load_state_dict(state)


def test_two_datasets_in_turn(checked: Path, tmp_path: Path) -> None:
    second = procedural_samples(SOURCE.model_copy(update={"seed": 9}))
    write_dataset(second, FACTS, tmp_path / "second", shard_bytes=SHARD_BYTES)
    check_dataset(run_config(tmp_path / "second"))
    one, other = TeacherStream(run_config(checked)), TeacherStream(run_config(tmp_path / "second"))
    for _ in range(8):
        a, b = next(one), next(other)
        assert a.prompts.keys == b.prompts.keys
        assert a.prompts.texts != b.prompts.texts


def test_drawing_ahead_changes_no_batch_and_no_position(checked: Path) -> None:
    expected = draw(TeacherStream(run_config(checked)), 9)
    ahead = Ahead(TeacherStream(run_config(checked)), pinned=False)
    assert [next(ahead).prompts.keys for _ in range(5)] == expected[:5]
    state = json.loads(json.dumps(ahead.state_dict()))
    assert state["step_in_epoch"] == 5, "of the last batch that was handed out, not of the last one drawn"
    assert next(ahead).prompts.keys == expected[5]
    ahead.load_state_dict(state)
    assert [next(ahead).prompts.keys for _ in range(4)] == expected[5:]
    ahead.close()
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("data")]


# --- remote datasets: file:// goes the way of s3://, through the cache


@leaves_files_open
def test_remote_dataset_reads_as_the_local_one(dataset: Path, tmp_path: Path) -> None:
    local, remote = run_config(dataset), run_config(f"file://{dataset}", cache=tmp_path / "cache")
    assert check_dataset(remote) == check_dataset(local)
    expected = draw(TeacherStream(local), 8)
    assert draw(TeacherStream(remote), 8) == expected
    assert draw(TeacherStream(remote), 8) == expected  # the first stream's claim on the cache is released
    assert distinct_prompts(remote).embeddings.equal(distinct_prompts(local).embeddings)
    assert read_videos(remote, range(100)).latents.equal(read_videos(local, range(100)).latents)
    (cached,) = (tmp_path / "cache").glob("*/shard.00001.mds")
    flip_byte(cached)
    check_dataset(remote)
    assert not cached.exists(), "it is downloaded again"
    assert draw(TeacherStream(remote), 8) == expected


def test_remote_dataset_of_a_killed_run_opens_again(dataset: Path, tmp_path: Path) -> None:
    code = """
import sys, time
from afd_scale.config import RunConfig
from afd_scale.data.check import check_dataset
from afd_scale.data.reader import TeacherStream

config = RunConfig.model_validate_json(sys.argv[1])
check_dataset(config)
stream = TeacherStream(config)
next(stream)
print("reading", flush=True)
time.sleep(60)
"""
    config = run_config(f"file://{dataset}", cache=tmp_path / "cache")
    for job in (
        "first",
        "second",
    ):  # each with its own TMPDIR, as SLURM gives, or streaming's files there hide the claim
        (tmp_path / job).mkdir()
        settings = {"TMPDIR": str(tmp_path / job)}
        with forking("-c", code, config.model_dump_json(), leads=True, **settings) as (reader, printed):
            assert printed.readline() == b"reading\n"
            os.killpg(reader.pid, signal.SIGKILL)  # its resource tracker too, or that cleans up
    for claim in Path("/dev/shm").glob("[0-9]*_locals"):
        if str(tmp_path).encode() in claim.read_bytes():
            for left in claim.parent.glob(claim.name.removesuffix("locals") + "*"):
                left.unlink()


def test_copies_are_a_machines_own_and_what_is_known_of_local_shards_is_everybodys(tmp_path: Path) -> None:
    def cache(shards: str, **data: Any) -> Path:
        section = {"method": "sft", "out": tmp_path, "data": {"shards": shards, **data}}
        return teacher_data(RunConfig.model_validate(section)).cache

    assert cache("s3://bucket/x") == tmp_path / "shard_cache" / socket.gethostname()
    assert cache("folder") == tmp_path / "shard_cache"
    assert cache("s3://bucket/x", cache="/local") == Path("/local")


def test_absent_remote_dataset(tmp_path: Path) -> None:
    config = run_config(f"file://{tmp_path}/absent", cache=tmp_path / "cache")
    with pytest.raises(
        ConfigError, match=r"^data\.shards .* must be a readable MDS dataset with index\.json: "
    ) as caught:
        check_dataset(config)
    one_line(caught)


@leaves_files_open
@pytest.mark.parametrize("how", ["zstd", "none"])
def test_damaged_remote_shard_never_reads(tmp_path: Path, how: str) -> None:
    folder = tmp_path / "teacher"
    write_dataset(procedural_samples(SOURCE), FACTS, folder, shard_bytes=SHARD_BYTES, compression=how)
    (damaged,) = folder.glob("shard.00001.*")
    flip_byte(damaged)
    config = run_config(f"file://{folder}", cache=tmp_path / "cache")
    line = r"^data\.shards \(file://.*\) must have its shard shard\.00001\.mds as it was written: ValueError: Checksum"
    check_dataset(config)
    for _ in range(2):  # the first time must not leave it where it passes for good
        with pytest.raises(LostInputError, match=line):
            read_videos(config, range(100))
        stream = TeacherStream(config)
        for _ in range(2):
            with pytest.raises(LostInputError, match=line):
                draw(stream, 6)
        stream.close()
    assert not list((tmp_path / "cache").rglob("shard.00001*"))


@leaves_files_open
def test_a_stream_whose_thread_failed_closes(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread that reads ahead fails while nobody draws."""
    from afd_scale.data.streams import NumberedDataset

    prepare, down, failed = NumberedDataset.prepare_shard, threading.Event(), threading.Event()

    def prepare_while_up(numbered: NumberedDataset, shard: int, blocking: bool = True) -> None:
        if down.is_set():
            failed.set()
            raise LostInputError("the store is down")
        prepare(numbered, shard, blocking)

    monkeypatch.setattr(NumberedDataset, "prepare_shard", prepare_while_up)
    stream = TeacherStream(run_config(f"file://{dataset}", cache=tmp_path / "cache", global_batch=1))
    draw(stream, 3)
    down.set()
    draw(stream, 1)
    assert failed.wait(10)
    time.sleep(0.1)
    stream.close()
    with pytest.raises(LostInputError, match="the store is down"):
        draw(stream, 100)


@leaves_files_open
def test_jobs_of_a_machine_share_a_cache(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = draw(TeacherStream(run_config(f"file://{dataset}", cache=tmp_path / "other")), 8)
    prepare, busy, both = Stream.prepare_shard, set[str](), list[str]()

    def prepare_slowly(stream: Stream, shard: Any) -> int:
        name = shard.file_pairs[0][0].basename
        both.extend({name} & busy)
        busy.add(name)
        time.sleep(0.1)
        size = prepare(stream, shard)
        busy.discard(name)
        return size

    monkeypatch.setattr(Stream, "prepare_shard", prepare_slowly)
    config = run_config(f"file://{dataset}", cache=tmp_path / "cache")
    streams = [TeacherStream(config) for _ in range(3)]
    with ThreadPoolExecutor() as pool:
        assert list(pool.map(lambda stream: draw(stream, 8), streams)) == [expected] * 3
    assert not both, "one process at a time prepares a shard"


def test_jobs_that_start_at_once_unpack_once(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unpacked, decompress = [], compression.decompress

    def decompress_slowly(name: str, content: bytes) -> bytes:
        unpacked.append(len(content))
        time.sleep(0.1)
        return decompress(name, content)

    monkeypatch.setattr(compression, "decompress", decompress_slowly)
    config = run_config(dataset)
    with ThreadPoolExecutor() as pool:
        facts = list(pool.map(check_dataset, [config] * 6))
    assert facts == [facts[0]] * 6
    assert len(unpacked) == len(list(dataset.glob("*.zstd")))
    assert not list(dataset.glob("*.partial"))


@leaves_files_open
def test_copies_of_a_remote_dataset_that_was_made_anew_are_replaced(dataset: Path, tmp_path: Path) -> None:
    """On a machine whose first rank is not the run's."""
    config = run_config(f"file://{dataset}", cache=tmp_path / "cache")
    check_copies(config)
    old = read_videos(config, range(100))
    shutil.rmtree(dataset)
    other = SOURCE.model_copy(update={"seed": 7})
    write_dataset(procedural_samples(other), FACTS, dataset, shard_bytes=SHARD_BYTES)
    check_copies(config)
    new = read_videos(config, range(100))
    assert not new.latents.equal(old.latents)
    assert new.latents.equal(read_videos(run_config(f"file://{dataset}", cache=tmp_path / "new"), range(100)).latents)


# --- importing


def test_importing_the_reader_does_not_import_streaming() -> None:
    code = "import sys, afd_scale.data.reader; sys.exit('streaming' in sys.modules or 'torchvision' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- the tool


def test_tool_writes_a_dataset(tmp_path: Path) -> None:
    done = call_tool(
        "make_shards", "--teacher", "procedural", "--out", f"{tmp_path}/out", "--clips", "20", "--physics", "wrong"
    )
    assert done.returncode == 0, done.stderr
    assert f"{tmp_path}/out: 20 clips of procedural:wrong" in done.stdout
    assert check_dataset(run_config(tmp_path / "out")).num_samples == 20


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--teacher", "oracle"], "argument --teacher: invalid choice: 'oracle'"),
        (["--codec", "wan"], "models must be given with codec wan"),
        (["--size", "32x32"], "size (32x32) must be 16x16"),
        (["--teacher", "folder"], "size must be given"),
        (["--clips", "0"], "clips (0)"),
        (["--clips", "many"], "'many'"),
        (["--out", "/dev/null/x"], "out (/dev/null/x) must be in a writable folder"),
    ],
)
def test_tool_refuses_bad_input_in_one_line(tmp_path: Path, arguments: list[str], message: str) -> None:
    done = call_tool("make_shards", "--out", str(tmp_path / "out"), *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_jobs_that_start_together_open_their_datasets_one_after_the_other(dataset: Path, tmp_path: Path) -> None:
    """Streaming finds a number in shared memory first and takes it later: here much later."""
    code = """
import sys, time
from afd_scale.data import streams
from streaming.base.shared import prefix
find = prefix._check_and_find_retrying
def slowly(*arguments, **options):
    number = find(*arguments, **options)
    time.sleep(0.3)
    return number
prefix._check_and_find_retrying = slowly
from tests.unit.data.test_shards import TeacherStream, run_config
stream = TeacherStream(run_config(sys.argv[1]))
print("open", flush=True)
stream.close()
"""
    shutil.copytree(dataset, tmp_path / "other")
    with ExitStack() as stack:
        jobs = [stack.enter_context(forking("-c", code, folder)) for folder in (dataset, tmp_path / "other")]
        assert [printed.read() for _, printed in jobs] == [b"open\n", b"open\n"]


def test_threads_share_memory_at_once_and_start_processes_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    import_module("afd_scale.data.streams")
    functions = resource_tracker.register, resource_tracker.unregister
    first_in, second_in, first_out = Event(), Event(), Event()

    class Held(memory.BuiltinSharedMemory):
        """The first thread to share stays until the second comes, and the second until the first has left."""

        def __init__(self, name: str, create: bool, size: int):
            super().__init__(name, create, size)
            self._hold()

        def close(self) -> None:
            super().close()
            self._hold()

        def _hold(self) -> None:
            if first_in.is_set():
                second_in.set()
                first_out.wait(20)
            else:
                first_in.set()
                second_in.wait(0.3)

    def at_once(*tasks: Callable[[], Any]) -> list[Any]:
        for event in (first_in, second_in, first_out):
            event.clear()
        with ThreadPoolExecutor(2) as pool:
            first = pool.submit(tasks[0])
            assert first_in.wait(20)
            get_context("spawn").Lock()
            second = pool.submit(tasks[1])
            wait([first])
            first_out.set()
            return [first.result(), second.result()]

    block = memory.SharedMemory(f"afd_scale_{os.getpid()}", True, 8)
    monkeypatch.setattr(memory, "BuiltinSharedMemory", Held)
    attach = partial(memory.SharedMemory, block.shm.name, False)
    attached = at_once(attach, attach)
    assert (resource_tracker.register, resource_tracker.unregister) == functions
    at_once(attached[0].cleanup, attached[1].cleanup)
    assert (resource_tracker.register, resource_tracker.unregister) == functions
    block.cleanup()


def test_ranks_hash_their_shares_in_pieces_and_keep_what_they_did(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, hashed, hash_of = tmp_path / "shards", list[str](), validate.hash_of
    shutil.copytree(dataset, folder)

    def hash_and_note(path: Path) -> str:
        hashed.append(path.name)
        return hash_of(path)

    monkeypatch.setattr(validate, "hash_of", hash_and_note)
    config, packed = run_config(folder), sorted(path.name for path in folder.glob("*.mds.zstd"))
    assert len(packed) == 3
    assert not hash_share(config, 0, 2, seconds=0.0), "time is over after the first"
    assert hashed == [packed[0], packed[0].removesuffix(".zstd")]
    assert not hash_share(config, 0, 2, seconds=0.0)
    assert hash_share(config, 0, 2, seconds=0.0)
    assert not hash_share(config, 1, 2, seconds=0.0)
    assert hash_share(config, 1, 2, seconds=0.0)
    assert sorted(hashed) == sorted(packed + [name.removesuffix(".zstd") for name in packed]), "each once"
    check_dataset(config)
    assert len(hashed) == 6, "what all ranks noted counts"


def test_a_kill_costs_a_while_of_hashing_at_most(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(validate, "_NOTED_SECONDS", 0.0)
    location = replace(teacher_data(run_config(dataset)), cache=tmp_path)
    known = validate.KnownGood(location)
    known.files["shard.00000.mds"] = [1, 2, "3"]
    known.now_and_then()  # and then it is killed
    assert validate.KnownGood(location).files == known.files
