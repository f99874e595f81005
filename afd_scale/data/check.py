"""Before a run reads its datasets: the toy world's is made where it is absent, and what is not sound is refused."""

from pathlib import Path

from afd_scale.codecs.identity import IdentityCodec
from afd_scale.config import ConfigError, RunConfig
from afd_scale.config.run import DataConfig
from afd_scale.data.make_shards import ShardJob, make_shards
from afd_scale.data.schema import FACTS_FILE, INDEX_FILE, PROMPTS_FILE, DatasetFacts, load_prompts
from afd_scale.data.storage import Location, extra_prompts, fetch_facts, is_remote, locations, teacher_data
from afd_scale.data.teachers.procedural import FORM, ProceduralTeacher
from afd_scale.data.validate import KnownGood, check_shard, load_index


def ensure_dataset(config: DataConfig) -> None:
    """Make the dataset of `config.source` where there is none; call it on one rank.

    Raises:
        ConfigError: the folder cannot be made, or its dataset is of another source.
    """
    if is_remote(config.shards) or config.source is None:
        return
    folder = Path(config.shards)
    teacher = ProceduralTeacher(config.source)
    if folder.exists():
        made_from = DatasetFacts.load(folder, "data.shards").provenance.get("source")
        if made_from != teacher.provenance:
            raise ConfigError(f"data.source ({teacher.provenance}) must be what {folder} was made from, {made_from}: "
                              "to read the folder as it is, give data.source=null")  # fmt: skip
    else:
        make_shards(ShardJob(teacher, IdentityCodec.of_form(FORM), FORM, folder, field="data.shards"))


def is_to_be_made(config: DataConfig) -> bool:
    """Whether `ensure_dataset` will have something to do."""
    return config.source is not None and not is_remote(config.shards) and not Path(config.shards).exists()


def check_dataset(config: RunConfig) -> DatasetFacts:
    """Check that the run's datasets are complete, undamaged and of the run's shapes; call it on one rank.

    Every shard that is on this machine is hashed, for reading it again validates nothing, and local ones are unpacked
    here, where no other process does the same. A shard that was found good is not hashed again while its size and time
    of change stay. Remote shards are validated as they arrive.

    Returns:
        The facts of the teacher's.
    Raises:
        ConfigError: names the first thing that is wrong.
    """
    facts = {location: check_files(location) for location in locations(config)}
    for location, found in facts.items():
        _check_text(found, location, config)
    teacher, extra = teacher_data(config), extra_prompts(config)
    _check_latents(facts[teacher], config)
    _check_batch("data.global_batch", config.data.global_batch, facts[teacher])
    if extra is not None:
        if extra not in facts or facts[extra].latent_shape is not None:
            raise ConfigError(f"data.prompts ({extra.shards}) must hold prompts alone: it holds videos, which would be "
                              "the teacher's")  # fmt: skip
        _check_batch("data.prompts_per_step", config.data.prompts_per_step, facts[extra])
    return facts[teacher]


def check_copies(config: RunConfig) -> None:
    """Check a machine's copies of the run's remote datasets, and bring what lies beside their shards up to date; call
    it on one rank of each machine.

    Raises:
        ConfigError: names the first thing that is wrong.
    """
    for location in locations(config):
        if location.is_remote:
            check_files(location)


def check_files(location: Location) -> DatasetFacts:
    """Check that a dataset is complete and undamaged.

    Raises:
        ConfigError: names the first thing that is wrong.
    """
    fetch_facts(location)
    folder, field = location.folder, location.field
    if not folder.is_dir():
        raise _absent(location)
    facts = DatasetFacts.load(folder, field)
    prompts, shards = load_prompts(folder, field), load_index(location, facts)
    num_samples = sum(shard["samples"] for shard in shards)
    if num_samples != facts.num_samples:
        raise ConfigError(f"{field} ({folder}) must have the {facts.num_samples} samples of {FACTS_FILE}: "
                          f"{INDEX_FILE} has {num_samples}; make it again")  # fmt: skip
    for prompt in prompts:
        if not 0 <= prompt.sample < num_samples:
            raise ConfigError(f"{field} ({folder / PROMPTS_FILE}) must name samples from 0 to {num_samples - 1}: "
                              f"{prompt.prompt_id} names {prompt.sample}; make it again")  # fmt: skip
    with KnownGood(location) as known_good:
        for shard in shards:
            check_shard(location, shard, known_good)
    return facts


def _absent(location: Location) -> ConfigError:
    return ConfigError(f"{location.field} ({location.shards}) must be an MDS dataset with {FACTS_FILE}: nothing is "
                       "there; make it with tools/make_shards.py")  # fmt: skip


def _check_latents(facts: DatasetFacts, config: RunConfig) -> None:
    data, student = config.data, config.student
    latent_shape = (data.latent_frames, student.latent_channels, data.latent_height, data.latent_width)
    if facts.latent_shape != latent_shape:
        there = "prompts alone" if facts.latent_shape is None else facts.latent_shape
        raise ConfigError(f"data.shards ({data.shards}) must hold latents of shape {latent_shape} "
                          "(data.latent_frames, student.latent_channels, data.latent_height, data.latent_width): "
                          f"its {FACTS_FILE} says {there}")  # fmt: skip


def _check_text(facts: DatasetFacts, location: Location, config: RunConfig) -> None:
    text_shape = (config.student.text_length, config.student.text_dim)
    if facts.text_shape != text_shape:
        raise ConfigError(f"{location.field} ({location.shards}) must hold text embeddings of shape {text_shape} "
                          "(student.text_length, student.text_dim): "
                          f"its {FACTS_FILE} says {facts.text_shape}")  # fmt: skip


def _check_batch(field: str, batch: int, facts: DatasetFacts) -> None:
    if batch > facts.num_samples:
        raise ConfigError(f"{field} ({batch}) must be at most {facts.num_samples}, the samples of its dataset: "
                          "an epoch is at least one batch")  # fmt: skip
