"""A dataset of prompts alone: to roll out beside the teacher's, or held out for evaluation in named splits."""

from collections.abc import Iterator
from pathlib import Path

from afd_scale.codecs.codec import Codec, RejectedError
from afd_scale.config import ConfigError
from afd_scale.data.clips import Reject
from afd_scale.data.schema import DatasetFacts, PromptSample
from afd_scale.data.teachers.prompts import PromptRow, read_prompts
from afd_scale.data.writer import full_disk_explained, write_dataset

NOBODY = "none"  # the teacher of prompts alone


def make_prompt_shards(
    prompts: Path, codec: Codec, out: Path, *, max_rejects: int = 100, compression: str = "zstd", field: str = "out"
) -> DatasetFacts:
    """Embed prompts and write them.

    Args:
        prompts: see `read_prompts`; each prompt once, with the name of its split where it has one.
        out: does not exist yet.
        max_rejects: rows that may be unusable.
        compression: of the shards.
        field: the user's setting that names `out`, for errors.
    Raises:
        ConfigError: bad input; nothing is left behind.
    """
    facts = DatasetFacts(
        latent_shape=None, text_shape=codec.text_shape, codec=codec.name, teacher=NOBODY, num_samples=0,
        provenance={"source": {"name": NOBODY, "prompts": prompts.name}, "codec": codec.provenance},
    )  # fmt: skip
    rejects: list[Reject] = []
    seen: set[str] = set()

    def sample(row: PromptRow | Reject) -> PromptSample | Reject:
        if isinstance(row, Reject):
            return row
        if row.prompt_id in seen:
            return Reject(row.prompt_id, row.prompt, "prompt must occur once: an earlier row has it")
        try:
            embedding = codec.embed(row.prompt)
        except RejectedError as error:
            return Reject(row.prompt_id, row.prompt, str(error))
        seen.add(row.prompt_id)
        return PromptSample(row.prompt, row.prompt_id, embedding, {} if row.split is None else {"split": row.split})

    def samples() -> Iterator[PromptSample]:
        for row in read_prompts(prompts):
            found = sample(row)
            if isinstance(found, PromptSample):
                yield found
                continue
            rejects.append(found)
            if len(rejects) > max_rejects:
                raise ConfigError(f"max_rejects ({max_rejects}) must be at least {len(rejects)}, the rows that could "
                                  f"not be used so far, the last is {found.video}: {found.reason}")  # fmt: skip
        if not seen:
            raise ConfigError(f"prompts ({prompts}) must have a row that can be used: all {len(rejects)} were "
                              f"rejected, the first, {rejects[0].video}: {rejects[0].reason}")  # fmt: skip

    with full_disk_explained(out, field):
        return write_dataset(samples(), facts, out, field=field, compression=compression, rejects=rejects)
