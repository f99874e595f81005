"""The model card says what is known of a student, and no more."""

import json
import re
import resource
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from afd_scale.checkpoint.weights import save_weights
from afd_scale.config import load_config, resolved_yaml
from afd_scale.config.models import PolicyConfig
from afd_scale.data.schema import DatasetFacts
from afd_scale.evaluation.model_card import find_run, model_card
from afd_scale.evaluation.video import write_mp4
from afd_scale.models.wan import CausalWan
from tests.tools import call_tool

ROOT = Path(__file__).parents[3]
CONFIG = PolicyConfig.model_validate({
    "student": {"dim": 24, "ffn_dim": 40, "num_heads": 2, "num_layers": 2, "freq_dim": 16, "text_dim": 8,
                "text_length": 512, "latent_channels": 4, "prediction": "velocity"},
    "sampler": {"family": "self-forcing", "timesteps": (1000, 500)},
})  # fmt: skip
HEADINGS = ["Load it", "Base", "Method", "Data", "Metrics", "Configuration", "Licence"]


def read_front_matter(card: str) -> dict[str, Any]:
    found = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
    assert found is not None
    return dict(yaml.safe_load(found[1]))


def sections(card: str) -> dict[str, str]:
    """Text by heading."""
    _, *parts = re.split(r"^## (.+)\n", card, flags=re.MULTILINE)
    return dict(zip(parts[::2], parts[1::2], strict=True))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run."""
    folder, shards = tmp_path / "run", tmp_path / "shards"
    shards.mkdir()
    facts = DatasetFacts((3, 4, 4, 6), (512, 8), "wan:4x8x8", "a-teacher", 7, {"source": "where <it> is"})
    (shards / "dataset.json").write_text(json.dumps(asdict(facts)))
    state = CausalWan(CONFIG.student, CONFIG.sampler).state_dict()
    save_weights(state.items(), folder / "checkpoints" / "step_00000004" / "student", CONFIG)
    overrides = ["name=my-run", f"data.shards={shards}", "student.weights=weights/base.pt", "method.advantage.clip=1.5"]
    config = load_config(ROOT / "configs" / "toy" / "afd.yaml", overrides)
    (folder / "config.yaml").write_text("# date: 2026-05-01\n# git_commit: 0123abc\n" + resolved_yaml(config))
    metrics = {"base": {"trajectory_fd": 104.2}, "student": {"trajectory_fd": 15.1}}
    (folder / "summary.json").write_text(json.dumps({"method": "afd", "steps": 4, "metrics": metrics, "seconds": {}}))
    write_mp4(np.zeros((3, 16, 16), np.uint8), folder / "samples" / "00_a.mp4", 8)
    return folder


@pytest.mark.parametrize("place", [".", "checkpoints/step_00000004", "checkpoints/step_00000004/student"])
def test_a_runs_card_says_all(place: str, run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = call_tool("convert_checkpoint", run / place, out, "--to", "diffusers", "--license", "apache-2.0")
    assert done.returncode == 0, done.stderr
    card = (out / "README.md").read_text()
    assert read_front_matter(card)["license"] == "apache-2.0"
    assert read_front_matter(card)["pipeline_tag"] == "text-to-video"
    assert "# my-run" in card
    assert '<video src="sample.mp4"' in card
    assert (out / "sample.mp4").read_bytes() == (run / "samples" / "00_a.mp4").read_bytes()
    text = sections(card)
    assert list(text) == HEADINGS
    for heading, said in (
        ("Load it", 'WanTransformer3DModel.from_pretrained("path/to/this/folder")'), ("Base", "weights/base.pt"),
        ("Method", "`afd`, 4 steps: On-Policy Adversarial Flow Distillation"), ("Method", "- git_commit: 0123abc"),
        ("Data", "7 videos of the teacher `a-teacher`, codec `wan:4x8x8`"), ("Data", "where"),
        ("Configuration", "- 1000\n"), ("Configuration", "clip: 1.5"), ("Licence", "`apache-2.0`, set by"),
    ):  # fmt: skip
        assert said in text[heading]
    assert re.search(r"base +student\n.* 104\.\d +15\.1", text["Metrics"])
    blocks = re.findall(r"```yaml\n(.*?)```", text["Configuration"], re.DOTALL)
    assert PolicyConfig.model_validate(yaml.safe_load(blocks[0])) == CONFIG


def test_an_unfinished_run_elsewhere(run: Path) -> None:
    (run / "summary.json").unlink()
    (run / "samples" / "00_a.mp4").unlink()
    (Path(yaml.safe_load((run / "config.yaml").read_text())["data"]["shards"]) / "dataset.json").unlink()
    text = sections(model_card("diffusers", CONFIG, run, "other", find_run(run)))
    assert "not finished, of 160 steps" in text["Method"]
    assert "could not be read" in text["Data"]
    assert "None were measured" in text["Metrics"]


@pytest.mark.parametrize("target", ["diffusers", "pipeline", "served"])
def test_a_bare_checkpoint_says_what_is_known(target: str, tmp_path: Path) -> None:
    source = tmp_path / "self_forcing.pt"
    assert find_run(source) is None
    card = model_card(target, CONFIG, source, "other", None)
    text = sections(card)
    assert list(text) == HEADINGS
    assert read_front_matter(card)["license"] == "other"
    assert "**Not set.**" in text["Licence"]
    assert "self_forcing.pt" in text["Base"]
    assert [text[heading].strip() for heading in ("Method", "Data")] == ["Not known."] * 2
    assert "<video" not in card
    (code,) = re.findall(r"```python\n(.*?)```", text["Load it"], re.DOTALL)
    assert len(code.splitlines()) == 3
    assert ("1000, 500 for this student" in text["Load it"]) == (target == "served")
    assert "\n\n\n" not in card


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        (["--to", "diffusers", "--license", "a b"], "--license (a b) must be an id"),
        (["--to", "diffusers", "--models", "models"], "--models (models) must not be given with --to diffusers"),
        (["--to", "pipeline"], "--models must name a folder with VAE and text encoder with --to pipeline; none leaves"),
        (["--to", "served", "--models", "none"], "--models (none) must name a folder"),
        (
            ["--to", "pipeline", "--models", "{tmp}"],
            "must hold vae/, text_encoder/ and tokenizer/ in diffusers' layout",
        ),
        (["--to", "served", "--models", "{tmp}"], "it has no vae/config.json"),
    ],
)
def test_wrong_options_leave_nothing(arguments: list[str], rule: str, run: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    arguments = [argument.format(tmp=tmp_path) for argument in arguments]
    done = call_tool("convert_checkpoint", run, tmp_path / "out", *arguments)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert rule in line
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("target", ["diffusers", "pipeline", "afd"])
def test_a_full_disk_leaves_nothing(target: str, run: Path, tmp_path: Path) -> None:
    """As when a quota or a file system's limit is met while the weights are written."""
    before = sorted(tmp_path.rglob("*"))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limits[1]))
    try:
        models = ["--models", "none"] if target == "pipeline" else []
        done = call_tool("convert_checkpoint", run, tmp_path / "out", "--to", target, *models)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert re.search(rf"output \({tmp_path}/out\) must be writable: .*File too large", line)
    assert sorted(tmp_path.rglob("*")) == before
