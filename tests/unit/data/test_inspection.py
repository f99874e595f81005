"""tools/inspect_shards.py on datasets that are as they were written, and on some that are not."""

import io
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from afd_scale.config import ConfigError
from afd_scale.config.run import ProceduralSource
from afd_scale.data import inspection
from afd_scale.data.check import check_files
from afd_scale.data.inspection import read_shard, samples_at, validate
from afd_scale.data.schema import DatasetFacts
from afd_scale.data.storage import Location
from afd_scale.data.writer import write_dataset
from tests.tools import Done, call_tool, load_tool
from tests.toy_datasets import procedural_samples

FACTS = DatasetFacts(
    latent_shape=(4, 48, 4, 4), text_shape=(16, 32), codec="identity:3x4x4", teacher="procedural:teacher",
    num_samples=0, provenance={},
)  # fmt: skip


REJECT = {"video": "a.mp4", "prompt": "a ball", "reason": "a.mp4 (truncated): has 3 frames"}


def inspect(folder: Path | str, *arguments: str) -> Done:
    return call_tool("inspect_shards", folder, *arguments)


def change_entry(dataset: Path, number: int, **changes: Any) -> None:
    """Change a shard's entry of the index; None takes a key out."""
    index = json.loads((dataset / "index.json").read_text())
    entry = index["shards"][number] | changes
    index["shards"][number] = {name: value for name, value in entry.items() if name not in changes or value is not None}
    (dataset / "index.json").write_text(json.dumps(index))


def change_facts(dataset: Path, **changes: Any) -> None:
    facts = json.loads((dataset / "dataset.json").read_text())
    (dataset / "dataset.json").write_text(json.dumps(facts | changes))


def truncate(dataset: Path) -> None:
    path = dataset / "shard.00001.mds.zstd"
    path.write_bytes(path.read_bytes()[:-100])


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
    change_facts(dataset, num_samples=101, teacher="another")
    corrupt = json.loads(inspect(dataset, "--validate", "--json").stdout)["corrupt"]
    assert sum("teacher (procedural:teacher) must be another" in line for line in corrupt) == 100
    assert any(f"prompt_id ({entry['prompt_id']}) must be listed" in line for line in corrupt)
    assert corrupt[-1] == "index.json: must have the 101 samples of dataset.json, it has 100"


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda dataset: change_entry(dataset, 1, samples=27), "must have the 27 samples of index.json, it has 20"),
        (lambda dataset: change_entry(dataset, 1, samples=13), "must have the 13 samples of index.json, it has 20"),
        (lambda dataset: change_entry(dataset, 1, column_sizes=None), "column_sizes"),
        (lambda dataset: change_entry(dataset, 1, column_sizes=[8]), "column_sizes"),
        (lambda dataset: change_entry(dataset, 1, column_sizes=[4] + [None] * 6), ""),
        (lambda dataset: change_entry(dataset, 1, compression="br"), "brotli"),
        (lambda dataset: change_entry(dataset, 1, format="csv"), ""),
        (lambda dataset: change_entry(dataset, 1, raw_data={"basename": "a", "hashes": {"xxh64": ""}}), "bytes"),
        (lambda dataset: (dataset / "shard.00001.mds.zstd").unlink(), "No such file"),
        (truncate, "bytes of index.json, it has"),
    ],
)  # fmt: skip
def test_a_damaged_shard_is_named_and_the_others_are_read(
    dataset: Path, damage: Callable[[Path], None], said: str
) -> None:
    damage(dataset)
    path = dataset / "shard.00003.mds.zstd"
    path.write_bytes(path.read_bytes() + b"more")
    done = inspect(dataset, "--validate", "--json")
    assert done.returncode == 2
    corrupt = [line for line in json.loads(done.stdout)["corrupt"] if line.startswith("shard.")]
    assert [line.partition(":")[0] for line in corrupt] == ["shard.00001.mds.zstd", "shard.00003.mds.zstd"]
    assert said in corrupt[0]
    with pytest.raises(ConfigError, match=r"out \(shard\.00001\.mds\.zstd\) cannot be shown: "):
        samples_at(Location(str(dataset), dataset, "out"), [30])


def test_samples_are_read_one_by_one(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = 0

    def counted(location: Location, shard: dict[str, Any]) -> Iterator[dict[str, Any]]:
        nonlocal read
        for sample in read_shard(location, shard):
            read += 1
            yield sample

    monkeypatch.setattr(inspection, "read_shard", counted)
    change_facts(dataset, teacher="another")
    next(validate(Location(str(dataset), dataset, "out")))
    assert read == 1


def test_progress_counts_shards(dataset: Path) -> None:
    (dataset / "shard.00001.mds.zstd").unlink()
    seen: list[tuple[int, int]] = []
    lines = validate(Location(str(dataset), dataset, "out"), lambda done, total: seen.append((done, total)))
    assert len(list(lines)) == 1
    assert seen == [(number, 5) for number in range(1, 6)]


def test_the_bar_is_on_a_terminal_only(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    assert inspect(dataset, "--validate").stderr == ""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("sys.stderr", terminal := Terminal())
    assert load_tool("inspect_shards").main([str(dataset), "--validate"]) == 0
    assert "5/5" in terminal.getvalue()


def test_rejects_are_counted_here_and_elsewhere(dataset: Path) -> None:
    (dataset / "rejects.jsonl").write_text(2 * (json.dumps(REJECT) + "\n"))
    for where in (str(dataset), f"file://{dataset}"):
        found = json.loads(inspect(where, "--json").stdout)
        assert found["rejects"] == 2
        assert found["reasons"] == {"a.mp4 (truncated)": 2}


def test_a_dataset_may_lack_its_rejects(dataset: Path) -> None:
    (dataset / "rejects.jsonl").unlink()
    for where in (str(dataset), f"file://{dataset}"):
        done = inspect(where, "--json")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["rejects"] is None


def test_no_prompts_are_said_and_not_refused(dataset: Path) -> None:
    (dataset / "prompts.jsonl").write_text("")
    done = inspect(dataset)
    assert done.returncode == 0, done.stderr
    assert "prompts              0\n" in done.stdout
    corrupt = json.loads(inspect(dataset, "--validate", "--json").stdout)["corrupt"]
    assert len(corrupt) == 100
    assert all("must be listed in prompts.jsonl" in line for line in corrupt)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rejects.jsonl", "{}\n"),
        ("rejects.jsonl", "[1]\n"),
        ("rejects.jsonl", json.dumps(REJECT | {"reason": 5})),
        ("rejects.jsonl", "{"),
        ("prompts.jsonl", '{"prompt_id": "a", "prompt": 5, "sample": 0}'),
        ("prompts.jsonl", '{"prompt_id": "a", "prompt": "a", "sample": 0, "split": []}'),
    ],
)
def test_a_damaged_file_beside_the_shards_is_one_line(dataset: Path, name: str, content: str) -> None:
    (dataset / name).write_text(content)
    done = inspect(dataset)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert re.match(rf"error: out \({dataset / name}(:1)?\) must ", done.stderr)


@pytest.mark.parametrize("fact", ["codec", "teacher"])
def test_facts_of_another_kind_are_one_line(dataset: Path, tmp_path: Path, fact: str) -> None:
    change_facts(dataset, **{fact: 5})
    done = inspect(dataset, "--pictures", str(tmp_path / "pictures"))
    assert done.returncode == 2
    said = f"must hold the facts of a dataset: {fact} (5): input should be a valid string"
    assert done.stderr == f"error: out ({dataset / 'dataset.json'}) {said}\n"


@pytest.mark.parametrize("folder", ["/dev/null/x", "/proc"])
def test_pictures_that_cannot_be_written_are_refused_first(dataset: Path, folder: str) -> None:
    done = inspect(dataset, "--validate", "--pictures", folder)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith(f"error: pictures ({folder}) must be a folder that can be written to: ")
    assert len(done.stderr.splitlines()) == 1


def test_a_full_disk_is_one_line(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda *_, **__: Path("/dev/full").write_text("png"))
    done = inspect(dataset, "--pictures", str(tmp_path))
    assert done.returncode == 2
    assert done.stderr == "error: [Errno 28] No space left on device\n"


def test_it_reads_well(dataset: Path) -> None:
    (dataset / "rejects.jsonl").write_text(json.dumps(REJECT) + "\n")
    source = {"name": "http", "request": {"seconds": 8}}
    change_facts(dataset, provenance={"source": source, "form": {"fps": 8.0}})
    lines = inspect(dataset).stdout.splitlines()
    size = sum(path.stat().st_size for path in dataset.glob("*.zstd")) / 1000
    for expected in (
        "samples_per_prompt   1.04167",
        "words_per_prompt     least 14, mean 14, most 14",
        "splits               -",
        "latent_shape         (4, 48, 4, 4)",
        f"bytes                {size:.1f} kB",
        "reasons              a.mp4 (truncated) 1",
        "provenance",
        "  source",
        "    name             http",
        "    request          seconds 8",
        "  form               fps 8",
    ):
        assert expected in lines


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
