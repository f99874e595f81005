"""Shards written by one number of ranks and read by another, in one process that plays all ranks."""

from pathlib import Path

import pytest
import torch

from afd_scale.engines import resharding
from afd_scale.engines.resharding import SavedShards, snapshot


def shards_of(whole: torch.Tensor, ranks: int) -> list[torch.Tensor]:
    """As ZeRO-3 pads and cuts."""
    size = -(-len(whole) // ranks)
    padded = torch.cat([whole, torch.zeros(size * ranks - len(whole))])
    return list(padded.split(size))


def save(folder: Path, tensors: dict[str, torch.Tensor], ranks: int) -> None:
    for rank in range(ranks):
        shards = ((name, shards_of(whole, ranks)[rank]) for name, whole in tensors.items())
        snapshot(shards, steps=7).write(folder, rank, ranks)


@pytest.mark.parametrize("theirs", range(1, 6))
@pytest.mark.parametrize("ours", range(1, 6))
def test_every_world_reads_every_world(tmp_path: Path, theirs: int, ours: int) -> None:
    tensors = {f"w{numel}": torch.arange(1.0, numel + 1) for numel in (1, 2, 3, 7, 20, 31)}
    save(tmp_path / "saved", tensors, theirs)
    with SavedShards(tmp_path / "saved") as saved:
        assert saved.facts == {"ranks": theirs, "steps": 7}
        for name, whole in tensors.items():
            for rank, expected in enumerate(shards_of(whole, ours)):
                assert saved.part(name, len(whole), rank, ours).equal(expected), (name, rank)


def test_damage_and_other_networks_are_one_line(tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    save(folder, {"w": torch.arange(10.0)}, 2)
    with SavedShards(folder) as saved:
        with pytest.raises(ValueError, match="must hold v: it is of another network"):
            saved.part("v", 10, 0, 1)
        with pytest.raises(ValueError, match=r"must hold w in shards of 6: they are of \[5\], of another network"):
            saved.part("w", 12, 0, 1)
    second = folder / "rank_00001.safetensors"
    second.write_bytes(second.read_bytes()[:-4])
    with (
        SavedShards(folder) as saved,
        pytest.raises(ValueError, match=r"^checkpoint \(.*\) must hold a file") as caught,
    ):
        saved.part("w", 10, 1, 2)
    assert "\n" not in str(caught.value)
    second.unlink()
    with SavedShards(folder) as saved, pytest.raises(ValueError, match="must hold a file of every rank"):
        saved.part("w", 10, 1, 2)
    (folder / "rank_00000.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="must hold a file of every rank"):
        SavedShards(folder).__enter__()


@pytest.mark.parametrize(
    ("ours", "opened"),
    [(4, [[0], [1], [2], [3]]), (2, [[0, 1], [1, 2, 3]]), (8, [[0], [0, 1], [1, 2], [1, 3]])],
)
def test_a_rank_opens_the_files_that_overlap_its_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ours: int, opened: list[list[int]]
) -> None:
    """With as many ranks, its own alone."""
    save(tmp_path / "saved", {"w": torch.arange(32.0)}, 4)
    files: list[str] = []
    real = resharding.safe_open
    monkeypatch.setattr(resharding, "safe_open", lambda path, kind: (files.append(path.name), real(path, kind))[1])
    for rank, expected in enumerate(opened):
        with SavedShards(tmp_path / "saved", first=rank) as saved:
            saved.part("w", 32, rank, ours)
        assert sorted(files) == [f"rank_{number:05d}.safetensors" for number in expected]
        files.clear()


def test_a_snapshot_is_a_copy(tmp_path: Path) -> None:
    """What is trained on while it is written does not show."""
    weight = torch.ones(3)
    shards = snapshot([("w", weight)])
    weight += 1
    shards.write(tmp_path / "saved", 0, 1)
    with SavedShards(tmp_path / "saved") as saved:
        assert saved.part("w", 3, 0, 1).tolist() == [1, 1, 1]
