"""What of a run at its full size needs no device: its plan, and the files that it names, by their headers.

Each check gives a row; a file that is not here is no failure, for a rehearsal may take place elsewhere.
"""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from afd_scale.checkpoint.formats.models_folder import check_models
from afd_scale.checkpoint.load_student import load_student_state, read_lora
from afd_scale.config import ConfigError, RunConfig, load_config, one_line
from afd_scale.config.judges import HttpJudgeConfig, MotionDiscriminatorConfig, VlmDiscriminatorConfig
from afd_scale.config.models import WanConfig
from afd_scale.data.check import check_facts
from afd_scale.data.schema import DatasetFacts
from afd_scale.data.storage import Location, locations, teacher_data
from afd_scale.data.validate import contradictions, load_beside
from afd_scale.models.http_judge import read_key
from afd_scale.models.vlm import VlmDiscriminator
from afd_scale.planning.gpus import GIB, Gpu
from afd_scale.planning.parameters import network_sizes
from afd_scale.planning.plan import SEARCH, Suggestion, fit_on, make_plan, remedies
from afd_scale.planning.workload import workload
from afd_scale.rehearsal.outcome import Outcome
from afd_scale.training.run_folder import check_folder
from afd_scale.training.trackers import check_trackers

GRACE_SECONDS = 30  # of torchrun
Check = Callable[[], str | None]  # what was found; None where the file is not here


def fewest_gpus(config: RunConfig, gpu: Gpu) -> int | None:
    """GPUs that hold a run as it is; None where no number does."""
    networks = network_sizes(config)
    return next((gpus for gpus in SEARCH if fit_on(config, networks, gpus, gpu, overrides=False)), None)


def stops_too_late(config: RunConfig, gpus: int, gpu: Gpu) -> str | None:
    """A line where being told to stop is predicted to take longer than launchers wait."""
    try:
        stopping = make_plan(config, gpus, gpu).stopping
    except ConfigError:  # the plan's row says why
        return None
    if stopping.seconds < GRACE_SECONDS:
        return None
    return (f"a SIGTERM in time: it is predicted to take {stopping.seconds:.0f} s, two micro-batches and a checkpoint; "
            f"torchrun waits {GRACE_SECONDS} s unless TORCH_ELASTIC_SHUTDOWN_TIMEOUT says more, as here; a scheduler's "
            f"signal should come {stopping.lead} s before it kills")  # fmt: skip


def check_full_size(config: RunConfig, gpus: int, gpu: Gpu) -> Iterator[Outcome]:
    """A row for each thing that can be looked at here.

    Args:
        gpus: ranks of the run.
    """
    yield _row("plan", lambda: _plan(config, gpus, gpu), "")
    yield _row("run folder", lambda: _run_folder(config), "")
    for name in config.train.trackers:
        yield _row("train.trackers", lambda name=name: _tracker(name), f"({name}) is not installed here")  # type: ignore[misc]
    if config.requires is not None:
        requires = config.requires
        yield _row("requires", lambda: f"{load_config(requires).name}: its config loads", f"({requires})")
    for field, path, check in _files(config):
        yield _row(field, check, f"({path}) is not here: not looked at")
    found: dict[Location, DatasetFacts] = {}
    for location in locations(config):
        where = f"({location.shards}) is {'remote' if location.is_remote else 'not here'}: not looked at"
        yield _row(location.field, lambda location=location: _dataset(location, config, found), where)  # type: ignore[misc]
    if teacher_data(config) in found and len(found) == len(locations(config)):
        yield _row("data", lambda: _facts(config, found), "")


def _row(stage: str, check: Check, absent: str) -> Outcome:
    began = time.monotonic()
    try:
        said = check()
    except (ValueError, OSError) as error:
        return Outcome(stage, one_line(error), "failed", time.monotonic() - began)
    seconds = time.monotonic() - began
    return Outcome(stage, absent, "not here", seconds) if said is None else Outcome(stage, said, "ok", seconds)


def _plan(config: RunConfig, gpus: int, gpu: Gpu) -> str:
    load = workload(config, gpus)  # refuses ranks and batches that do not divide
    plan = make_plan(config, gpus, gpu)
    on, peak, usable = f"{gpus} {gpu.name}", plan.memory.peak / GIB, gpu.usable_bytes / GIB
    if not plan.fits:
        would = _named(remedies(config, gpus, gpu))
        raise ConfigError(f"gpus ({gpus}) must hold the run: it takes {peak:.1f} GiB of {usable:.1f} on {gpu.name}"
                          f"{would}")  # fmt: skip
    return (f"fits on {on}: {peak:.1f} of {usable:.1f} GiB at its peak; data {load.data_ranks} x sequence "
            f"{load.sequence}, {load.prompts} prompts a data rank and step")  # fmt: skip


def _named(fits: dict[str, Suggestion | None]) -> str:
    for fit in fits.values():
        if fit is not None:
            return f"; it would fit on {fit.gpus} with {' '.join(fit.overrides) or 'the config as it is'}"
    return ""


def _run_folder(config: RunConfig) -> str:
    check_folder(config)
    return f"{config.folder} can be made or gone on with"


def _tracker(name: str) -> str | None:
    try:
        check_trackers([name])
    except ConfigError:
        return None
    return f"{name}: is installed"


def _files(config: RunConfig) -> Iterator[tuple[str, str, Check]]:
    """Field, what it names, and how that is looked at."""
    for role in config.cast:
        network, field = role.network, role.section
        if role.of is not None:
            continue
        if isinstance(network, WanConfig) and network.weights is not None:
            yield f"{field}.weights", str(network.weights), _weights(network, field)
            if network.lora is not None and network.lora.weights is not None:
                yield f"{field}.lora.weights", str(network.lora.weights), _lora(network, field)
        if isinstance(network, VlmDiscriminatorConfig):
            yield f"{field}.model", network.model, _vlm(network)
        if isinstance(network, HttpJudgeConfig) and network.key_file is not None:
            yield f"{field}.key_file", str(network.key_file), _key(network)
        if isinstance(network, MotionDiscriminatorConfig) and network.raft_weights is not None:
            yield f"{field}.raft_weights", str(network.raft_weights), _there(network.raft_weights)
    if config.codec.models is not None:
        yield "codec.models", config.codec.models, _codec(config, Path(config.codec.models))


def _weights(network: WanConfig, field: str) -> Check:
    def check() -> str | None:
        assert network.weights is not None
        if not network.weights.exists():
            return None
        state = load_student_state(network.weights, network, field)
        return f"{network.weights}: names and shapes of {state.numel / 1e9:.3g}e9 numbers are this network's"

    return check


def _lora(network: WanConfig, field: str) -> Check:
    def check() -> str | None:
        assert network.lora is not None
        assert network.lora.weights is not None
        if not network.lora.weights.exists():
            return None
        lora = read_lora(network.lora.weights)
        for module in lora.scales:
            if lora.rank(module) != network.lora.rank:
                raise ConfigError(f"{field}.lora.rank ({network.lora.rank}) must be {lora.rank(module)}, as {module} "
                                  f"has it in {network.lora.weights}")  # fmt: skip
        return f"{network.lora.weights}: adapters of {len(lora.scales)} linears, rank {network.lora.rank}"

    return check


def _vlm(network: VlmDiscriminatorConfig) -> Check:
    def check() -> str | None:
        if not Path(network.model).exists():  # the hub's cache is a cluster's own
            return None
        with torch.device("meta"):
            judge = VlmDiscriminator(network)
        return f"{network.model}: config and tokenizer, {len(judge.tokens.tokenizer)} tokens"

    return check


def _key(network: HttpJudgeConfig) -> Check:
    def check() -> str | None:
        assert network.key_file is not None
        return f"{network.key_file}: a line" if network.key_file.exists() and read_key(network) else None

    return check


def _there(path: Path) -> Check:
    return lambda: f"{path}: is here" if path.is_file() else None


def _codec(config: RunConfig, models: Path) -> Check:
    def check() -> str | None:
        if not models.is_dir():
            return None
        try:
            check_models(models, config.student)
        except ValueError as error:
            raise ConfigError(str(error).replace("--models", "codec.models", 1)) from error
        return f"{models}: sizes of VAE and text encoder are the student's"

    return check


def _dataset(location: Location, config: RunConfig, found: dict[Location, DatasetFacts]) -> str | None:
    """What lies beside its shards, and whether all of their files are there; they are not read."""
    if location.is_remote or not Path(location.shards).exists():
        return None
    facts, prompts, shards = load_beside(location)
    for wrong in contradictions(facts, prompts, shards):
        raise ConfigError(f"{location.field} ({location.folder}) must be as it was written: {wrong}")
    for shard in shards:
        parts = [part for part in (shard["raw_data"], shard["zip_data"]) if part]
        there = [part for part in parts if (location.folder / part["basename"]).is_file()]
        if not there:
            raise ConfigError(f"{location.field} ({location.folder}) must hold {parts[-1]['basename']}: it does not")
        for part in there:
            size = (location.folder / part["basename"]).stat().st_size
            if size != part["bytes"]:
                raise ConfigError(f"{location.field} ({location.folder / part['basename']}) must have {part['bytes']} "
                                  f"bytes, it has {size}")  # fmt: skip
    found[location] = facts
    return f"{location.shards}: {facts.num_samples} samples, {len(prompts)} prompts, {len(shards)} shards are there"


def _facts(config: RunConfig, found: dict[Location, DatasetFacts]) -> str:
    facts = check_facts(config, found)
    if not facts.codec.startswith(config.codec.name) and config.codec.models is not None:
        raise ConfigError(f"codec.name ({config.codec.name}) must be {facts.codec.partition(':')[0]}, of whose latents "
                          "the data is")  # fmt: skip
    return f"latents {facts.latent_shape} and text {facts.text_shape} are the config's; codec {facts.codec}"
