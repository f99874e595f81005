"""Write a dataset of teacher videos: all of it, or nothing that reads."""

import shutil
import uuid
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from afd_scale.config import ConfigError
from afd_scale.data.schema import COLUMNS, HASH, DatasetFacts, PromptEntry, TeacherSample, save_prompts
from afd_scale.data.torchvision_ops import define_torchvision_ops

SHARD_BYTES = 1 << 26


def write_dataset(
    samples: Iterable[TeacherSample],
    facts: DatasetFacts,
    folder: Path,
    *,
    field: str = "out",
    shard_bytes: int = SHARD_BYTES,
) -> DatasetFacts:
    """Write samples as MDS shards, their prompts and the facts.

    The shards grow in a hidden sibling folder that is renamed when it is complete. A killed run leaves that sibling,
    which does not read as a dataset and may be deleted.

    Args:
        samples: of the facts' shapes and teacher.
        facts: `num_samples` is set to what was written.
        folder: does not exist yet.
        field: the user's setting that names the folder, for errors.
        shard_bytes: size of a shard before compression.
    Returns:
        The facts as written.
    Raises:
        ConfigError: the folder exists or cannot be made.
        ValueError: there is no sample, a sample contradicts the facts, or one prompt_id has two prompts.
    """
    check_new_folder(folder, field)
    growing = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.incomplete")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        growing.mkdir()
    except OSError as error:
        raise ConfigError(f"{field} ({folder}) must be in a writable folder: {error.strerror}") from error
    try:
        prompts, num_samples = _write_shards(samples, facts, growing, shard_bytes)
        written = replace(facts, num_samples=num_samples)
        save_prompts(growing, list(prompts.values()))
        written.save(growing)
        check_new_folder(folder, field)  # another run may have made it meanwhile; a rename replaces an empty folder
        growing.rename(folder)
    except BaseException:
        shutil.rmtree(growing, ignore_errors=True)
        raise
    return written


def check_new_folder(folder: Path, field: str) -> None:
    """Raise ConfigError if there is something at `folder`."""
    if folder.exists() or folder.is_symlink():
        raise ConfigError(
            f"{field} ({folder}) must not exist yet: a dataset is written once; delete it or name another"
        )


def _write_shards(
    samples: Iterable[TeacherSample], facts: DatasetFacts, folder: Path, shard_bytes: int
) -> tuple[dict[str, PromptEntry], int]:
    define_torchvision_ops()
    from streaming import MDSWriter

    prompts: dict[str, PromptEntry] = {}
    num_samples = 0
    with MDSWriter(
        out=str(folder), columns=COLUMNS, compression="zstd", hashes=[HASH], size_limit=shard_bytes
    ) as writer:
        for sample in samples:
            _check_sample(sample, facts, num_samples)
            first = prompts.setdefault(sample.prompt_id, PromptEntry(sample.prompt_id, sample.prompt, num_samples))
            if first.prompt != sample.prompt:
                raise ValueError(f"sample {num_samples}: prompt_id ({sample.prompt_id}) must name one prompt: "
                                 f"it names {first.prompt!r} and {sample.prompt!r}")  # fmt: skip
            writer.write(vars(sample))
            num_samples += 1
    if not num_samples:
        raise ValueError("samples must not be empty: a dataset of nothing trains nothing")
    return prompts, num_samples


def _check_sample(sample: TeacherSample, facts: DatasetFacts, position: int) -> None:
    for name, found, expected in (
        ("latents", sample.latents.shape, facts.latent_shape),
        ("text_embedding", sample.text_embedding.shape, facts.text_shape),
        ("teacher", sample.teacher, facts.teacher),
    ):
        if found != expected:
            raise ValueError(f"sample {position}: {name} ({found}) must be {expected} as in the dataset's facts")
