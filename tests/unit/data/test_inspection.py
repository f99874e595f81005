"""tools/inspect_shards.py on datasets that are as they were written, and on some that are not."""

import json
from pathlib import Path
from typing import Any

import pytest

from afd_scale.config.run import ProceduralSource
from afd_scale.data.reader import check_files
from afd_scale.data.schema import DatasetFacts
from afd_scale.data.storage import Location
from afd_scale.data.writer import write_dataset
from tests.tools import Done, call_tool
from tests.toy_datasets import procedural_samples

TOOL = Path(__file__).parents[3] / "tools" / "inspect_shards.py"
FACTS = DatasetFacts(
    latent_shape=(4, 48, 4, 4), text_shape=(16, 32), codec="space_time_to_depth:3x4x4", teacher="procedural:teacher",
    num_samples=0, provenance={},
)  # fmt: skip


def inspect(folder: Path | str, *arguments: str) -> Done:
    return call_tool("inspect_shards", folder, *arguments)


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """100 clips in five shards."""
    samples = procedural_samples(ProceduralSource(clips=100, seed=1))
    write_dataset(samples, FACTS, tmp_path / "teacher", shard_bytes=150_000)
    return tmp_path / "teacher"


def test_json_says_what_is_there(dataset: Path) -> None:
    done = inspect(dataset, "--json")
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    shards = sorted(dataset.glob("*.zstd"))
    expected = {
        "samples": 100, "prompts": 96, "shards": len(shards), "rejects": 0, "schema_version": 2,
        "latent_shape": [4, 48, 4, 4], "bytes": sum(path.stat().st_size for path in shards),
        "words_per_prompt": {"least": 14, "mean": 14.0, "most": 14},
    }  # fmt: skip
    assert {name: found[name] for name in expected} == expected


def test_pictures_and_validation_leave_the_dataset_alone(dataset: Path, tmp_path: Path) -> None:
    before = sorted(dataset.iterdir())
    done = inspect(dataset, "--validate", "--pictures", str(tmp_path / "pictures"), "--videos", "2")
    assert done.returncode == 0, done.stderr
    assert "everything was read and is as it was written" in done.stdout
    assert sorted(dataset.iterdir()) == before
    assert (tmp_path / "pictures" / "contact_sheet.png").stat().st_size > 1000
    assert len(list((tmp_path / "pictures").glob("*.mp4"))) == 2


def test_each_corrupt_shard_is_named(dataset: Path) -> None:
    for name in ("shard.00001.mds.zstd", "shard.00003.mds.zstd"):
        content = bytearray((dataset / name).read_bytes())
        content[len(content) // 2] ^= 1
        (dataset / name).write_bytes(content)
    (dataset / "shard.00004.mds.zstd").unlink()
    done = inspect(dataset, "--validate", "--json")
    assert done.returncode == 2
    corrupt = json.loads(done.stdout)["corrupt"]
    assert [line.partition(":")[0] for line in corrupt] == [f"shard.{n:05d}.mds.zstd" for n in (1, 3, 4)]
    assert len(done.stderr.splitlines()) == 1


def test_samples_that_contradict_the_facts_are_named(dataset: Path) -> None:
    lines = (dataset / "prompts.jsonl").read_text().splitlines()
    entry = json.loads(lines[0])
    (dataset / "prompts.jsonl").write_text("\n".join([json.dumps({**entry, "prompt": "another"}), *lines[1:]]) + "\n")
    facts = json.loads((dataset / "dataset.json").read_text())
    (dataset / "dataset.json").write_text(json.dumps({**facts, "num_samples": 101, "teacher": "another"}))
    corrupt = json.loads(inspect(dataset, "--validate", "--json").stdout)["corrupt"]
    assert sum("teacher (procedural:teacher) must be another" in line for line in corrupt) == 100
    assert any(f"prompt_id ({entry['prompt_id']}) must be listed" in line for line in corrupt)
    assert corrupt[-1] == "dataset.json: num_samples is 101, the shards have 100"


@pytest.mark.parametrize("arguments", [["--samples", "0", "--pictures", "x"], ["--models"]])
def test_bad_input_is_one_line(dataset: Path, arguments: list[str]) -> None:
    done = inspect(dataset, *arguments)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1


def test_what_is_not_there(tmp_path: Path) -> None:
    done = inspect(tmp_path / "absent")
    assert done.returncode == 2
    assert done.stderr.startswith("error: out (")


def test_it_reads_what_training_reads(dataset: Path, tmp_path: Path) -> None:
    check_files(Location(str(dataset), tmp_path / "cache", "out"))  # unpacks
    assert inspect(dataset, "--validate").returncode == 0
