"""The model card of an exported student: `README.md` with the front matter that model hubs read."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import jinja2
import yaml

from afd_scale.config import ConfigError
from afd_scale.config.models import PolicyConfig
from afd_scale.data.schema import DatasetFacts
from afd_scale.evaluation.report import header_facts, metric_table, newest_samples
from afd_scale.evaluation.run_files import CARD_SECTIONS, CONFIG, CardSections, Summary, read_sections, read_summary
from afd_scale.evaluation.runs import run_folder

CARD_NAME = "README.md"
SAMPLE_NAME = "sample.mp4"


@dataclass(frozen=True)
class Run:
    """What a training run left of a student.

    Attributes:
        config: the resolved `config.yaml`, and its head: date, commit, versions.
        summary: `summary.json`; None where the run is not finished.
        dataset: of `dataset.json`; None where the shards cannot be read here.
        sample: a sample video.
    """

    config: CardSections
    head: dict[str, str]
    summary: Summary | None
    dataset: DatasetFacts | None
    sample: Path | None


def find_run(source: Path) -> Run | None:
    """What is left of the run that `run_folder` finds."""
    folder = run_folder(source)
    return None if folder is None else _read_run(folder)


def model_card(
    target: str, config: PolicyConfig, source: Path, licence: str, run: Run | None, with_models: bool = True
) -> str:
    """The text of `README.md`: base, method, data, configuration, metrics, sample, how to load it, licence.

    Args:
        target: `diffusers`, `pipeline` or `served`.
        source: the checkpoint; a bare one tells nothing of base, method, data and metrics.
        licence: id of a licence, as hubs know it.
        with_models: a pipeline has a VAE and a text encoder.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("afd_scale.evaluation", "."), trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined, keep_trailing_newline=True,
    )  # fmt: skip
    return environment.get_template("model_card.md.j2").render(
        target=target,
        with_models=with_models,
        source=source,
        licence=licence,
        run=run,
        student=config.student,
        sampler=config.sampler,
        sections=yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False),
        run_config=yaml.safe_dump(dict(run.config), sort_keys=False) if run else "",
        metrics=metric_table(run.summary) if run and run.summary and run.summary.get("metrics") else "",
        sample_name=SAMPLE_NAME,
    )


def write_card(folder: Path, card: str, run: Run | None) -> None:
    """Put the card, and the run's sample video where there is one, into an export."""
    (folder / CARD_NAME).write_text(card)
    if run and run.sample:
        shutil.copyfile(run.sample, folder / SAMPLE_NAME)


def _read_run(folder: Path) -> Run:
    config = read_sections(folder, CARD_SECTIONS)
    try:
        dataset = DatasetFacts.load(Path(config["data"]["shards"]), "data.shards")
    except ConfigError:  # elsewhere, or made again since: an export does not need them
        dataset = None
    return Run(
        config=config,
        head=header_facts((folder / CONFIG).read_text()),
        summary=read_summary(folder),
        dataset=dataset,
        sample=next((path for path in newest_samples(folder / "samples") if path.suffix == ".mp4"), None),
    )
