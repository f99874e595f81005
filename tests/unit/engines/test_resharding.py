"""Shards written by one number of ranks and read by another, in one process that plays all ranks."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from afd_scale.engines.resharding import SavedShards, save_shards


def shards_of(whole: torch.Tensor, ranks: int) -> list[torch.Tensor]:
    """As ZeRO-3 pads and cuts."""
    size = -(-len(whole) // ranks)
    padded = torch.cat([whole, torch.zeros(size * ranks - len(whole))])
    return list(padded.split(size))


def save(monkeypatch: pytest.MonkeyPatch, folder: Path, tensors: dict[str, torch.Tensor], ranks: int) -> None:
    monkeypatch.setattr(dist, "get_world_size", lambda: ranks)
    for rank in range(ranks):
        monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)
        save_shards(folder, {name: shards_of(whole, ranks)[rank] for name, whole in tensors.items()}, steps=7)


@pytest.mark.parametrize("theirs", range(1, 6))
@pytest.mark.parametrize("ours", range(1, 6))
def test_every_world_reads_every_world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, theirs: int, ours: int) -> None:
    tensors = {f"w{numel}": torch.arange(1.0, numel + 1) for numel in (1, 2, 3, 7, 20, 31)}
    save(monkeypatch, tmp_path / "saved", tensors, theirs)
    with SavedShards(tmp_path / "saved") as saved:
        assert saved.facts == {"ranks": theirs, "steps": 7}
        for name, whole in tensors.items():
            for rank, expected in enumerate(shards_of(whole, ours)):
                assert saved.part(name, len(whole), rank, ours).equal(expected), (name, rank)


def test_damage_and_other_networks_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "saved"
    save(monkeypatch, folder, {"w": torch.arange(10.0)}, 2)
    with SavedShards(folder) as saved:
        with pytest.raises(ValueError, match="must hold v: it is of another network"):
            saved.part("v", 10, 0, 1)
        with pytest.raises(ValueError, match=r"must hold w in shards of 6: they are of \[5\], of another network"):
            saved.part("w", 12, 0, 1)
    second = folder / "rank_00001.safetensors"
    second.write_bytes(second.read_bytes()[:-4])
    with pytest.raises(ValueError, match=r"^checkpoint \(.*\) must hold a file of every rank") as caught:
        SavedShards(folder).__enter__()
    assert "\n" not in str(caught.value)
    second.unlink()
    with pytest.raises(ValueError, match="must hold a file of every rank"):
        SavedShards(folder).__enter__()
