"""Side files damaged in every way: each is read, or refused in one line within seconds."""

import json
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from afd_scale.checkpoint.adapters import Base, read_base
from afd_scale.checkpoint.formats.diffusers import fill_diffusers_folder
from afd_scale.checkpoint.formats.lora import DIFFUSERS_METADATA, LINEARS, Lora, open_lora, write_peft_folder
from afd_scale.checkpoint.formats.models_folder import check_models
from afd_scale.checkpoint.formats.vlm import _Checkpoint
from afd_scale.checkpoint.formats.wan import METADATA_KEY, write_wan
from afd_scale.checkpoint.lazy import LazyState, in_memory, open_weights
from afd_scale.checkpoint.load_student import read_student
from afd_scale.checkpoint.weights import read_config, save_weights
from afd_scale.config.models import PolicyConfig
from afd_scale.config.plain import parse_json
from afd_scale.data.inspection import describe
from afd_scale.data.schema import HASH, VIDEO_COLUMNS, DatasetFacts
from afd_scale.data.storage import Location
from afd_scale.data.teachers.journal import ASKED, ASKING, Journal
from afd_scale.data.validate import KnownGood, shards_digest
from afd_scale.evaluation.model_card import find_run, model_card
from afd_scale.evaluation.report import write_report
from afd_scale.models.wan import CausalWan
from tests.hostile import SNIPPETS, answer, as_json, changed, cut, fuzzed, nested

FIELDS: dict[str, Any] = {"dim": 24, "ffn_dim": 40, "num_heads": 2, "num_layers": 1, "freq_dim": 16, "text_dim": 8,
                          "text_length": 4, "latent_channels": 4, "prediction": "velocity"}  # fmt: skip
CONFIG = PolicyConfig.model_validate({"student": FIELDS, "sampler": {"family": "self-forcing"}})
CARD = ("pipeline", CONFIG, Path("student"), "apache-2.0")


@dataclass(frozen=True)
class Case:
    """A file, and who reads it."""

    path: Path
    read: Callable[[], object] = field(repr=False)
    original: bytes = field(repr=False)

    def holding(self, content: bytes) -> str | None:
        """What the reader says with another content of the file, which is put back."""
        self.path.write_bytes(content)
        try:
            return answer(self.read)
        finally:
            self.path.write_bytes(self.original)


def student_cases(folder: Path) -> dict[str, tuple[Path, Callable[[], object]]]:
    """Students and adapters in every form."""
    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        shapes = CausalWan(CONFIG.student, CONFIG.sampler).state_dict()
    state = {name: torch.randn(tensor.shape, generator=generator) for name, tensor in shapes.items()}
    ours, theirs, wan, file = (folder / name for name in ("ours", "diffusers", "wan", "wan.safetensors"))
    theirs.mkdir()
    save_weights(state.items(), ours, CONFIG, max_shard_bytes=20_000)
    fill_diffusers_folder(state.items(), theirs, CONFIG)
    (theirs / "afd_scale.json").unlink()  # its own config counts then
    write_wan(state.items(), wan, CONFIG)
    write_wan(state.items(), file, CONFIG)
    (ours / "base.json").write_text(Base(path=wan, dtype="float32", fingerprint="0" * 64).model_dump_json())
    adapters = {f"blocks.0.{linear}.{side}": torch.ones(2, 2) for linear in LINEARS for side in ("down", "up")}
    lora = Lora(in_memory(adapters), {f"blocks.0.{linear}": 1.0 for linear in LINEARS})
    write_peft_folder(lora, folder / "peft")
    videoalign = folder / "videoalign"
    (videoalign / "checkpoint-10").mkdir(parents=True)
    save_file({"score.weight": torch.ones(1, 2)}, videoalign / "checkpoint-10" / "adapter_model.safetensors")
    (videoalign / "model_config.json").write_text(json.dumps({"peft_lora_config": {"lora_r": 2, "lora_alpha": 4}}))
    models = folder / "models"
    for part, said in {"vae": {"_class_name": "AutoencoderKLWan", "z_dim": 4}, "tokenizer": {},
                       "text_encoder": {"model_type": "umt5", "d_model": 8}}.items():  # fmt: skip
        (models / part).mkdir(parents=True)
        (models / part / ("tokenizer_config.json" if part == "tokenizer" else "config.json")).write_text(
            json.dumps(said)
        )
        (models / part / "model.safetensors").touch()
    index = ours / "model.safetensors.index.json"
    return {
        "index": (index, lambda: LazyState(open_weights(ours))["head.head.weight"]),
        "index of a shard": (index, lambda: open_weights(next(ours.glob("model-00001-of-*")))),
        "student.json": (ours / "student.json", lambda: read_config(ours / "student.json")),
        "base.json": (ours / "base.json", lambda: read_base(ours)),
        "diffusers": (theirs / "config.json", lambda: read_student(theirs).config()),
        "wan": (wan / "config.json", lambda: read_student(wan).config()),
        "sidecar": (wan / "afd_scale.json", lambda: read_student(wan).config()),
        "file": (file, lambda: read_student(file).config()),
        "peft": (folder / "peft" / "adapter_config.json", lambda: open_lora(folder / "peft")),
        "peft file": (folder / "peft" / "adapter_model.safetensors", lambda: open_lora(folder / "peft")),
        "VideoAlign": (videoalign / "model_config.json", lambda: _Checkpoint(videoalign, "weights").scale()),
        "VAE": (models / "vae" / "config.json", lambda: check_models(models, CONFIG.student)),
    }


def data_cases(folder: Path) -> dict[str, tuple[Path, Callable[[], object]]]:
    """What lies beside shards, and a paid teacher's journal."""
    location = Location(str(folder), folder / "cache", "data.shards")
    part = {"basename": "shard.00000.mds", "bytes": 9, "hashes": {HASH: "00"}}
    shard = {"column_names": list(VIDEO_COLUMNS), "column_encodings": list(VIDEO_COLUMNS.values()), "samples": 2,
             "compression": None, "raw_data": part, "zip_data": None, "format": "mds"}  # fmt: skip
    facts = DatasetFacts((4, 4, 4, 4), (16, 32), "identity", "toy", 2, {"clips": 2, "seed": 0})
    (folder / "index.json").write_text(json.dumps({"version": 2, "shards": [shard]}))
    (folder / "dataset.json").write_text(json.dumps(asdict(facts)))
    rows = [{"prompt_id": name, "prompt": name, "sample": n, "split": None} for n, name in enumerate("ab")]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "rejects.jsonl").write_text(json.dumps({"video": "v", "prompt": "p", "reason": "r: s"}) + "\n")
    known = folder / "cache" / f"validated.{location.digest}.json"
    known.parent.mkdir()
    known.write_text(json.dumps({"shard.00000.mds": [9, 123456789, "00"]}))
    journal = Journal(folder / "journal.jsonl")
    journal.write(("a", 0), ASKING, asks="x")
    journal.write(("a", 0), ASKED, id="video-1")

    def known_files() -> None:
        with KnownGood(location):
            pass

    return {
        "dataset": (folder / "dataset.json", lambda: describe(location)),
        "index.json": (folder / "index.json", lambda: (describe(location), shards_digest(location))),
        "prompts": (folder / "prompts.jsonl", lambda: describe(location)),
        "rejects": (folder / "rejects.jsonl", lambda: describe(location)),
        "known": (known, known_files),
        "journal": (folder / "journal.jsonl", lambda: Journal(folder / "journal.jsonl").last(("a", 0))),
    }


def run_cases(run: Path) -> dict[str, tuple[Path, Callable[[], object]]]:
    """What a run leaves, read for its report and for a model card."""
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.yaml").write_text(
        "# date: today\nname: r\nmethod: {name: afd}\nstudent: {weights: null}\ntrain: {steps: 9}\n"
        "data: {shards: s}\nevaluation: {metrics: toy}\n"
    )
    metrics = {"student": {"all_in_one": 0.5, "mass_error": None}, "base": {"all_in_one": 0.25}}
    summary = {"method": "afd", "steps": 9, "suite": "toy", "metrics": metrics, "seconds": {"training": 61.5}}
    summary["metrics_by_length"] = {"student": {"0-1x": {"sharpness": 1.0}, "1-2x": {"sharpness": 0.5}}}
    (run / "summary.json").write_text(json.dumps(summary))
    draw = random.Random(0)
    rows = [{"step": step, "compute/pflop": step / 7, "student/loss": draw.random(), "discriminator/accuracy": 0.5,
             "system/step_seconds": 0.1, "alarm/saturated": step > 1} for step in range(3)]  # fmt: skip
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run / "diagnostics.json").write_text(json.dumps({"dataset": "s", "held_out": True, "prompts": 8, "rollouts": 4}))
    reads = {
        "report": (lambda: write_report(run), ("config.yaml", "summary.json", "metrics.jsonl", "diagnostics.json")),
        "card": (lambda: model_card(*CARD, find_run(run)), ("config.yaml", "summary.json")),
    }
    return {f"{what} of {name}": (run / name, read) for what, (read, names) in reads.items() for name in names}


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> list[Case]:
    folder = tmp_path_factory.mktemp("hostile")
    (folder / "data").mkdir()
    found = student_cases(folder) | data_cases(folder / "data") | run_cases(folder / "run")
    return [Case(path, read, path.read_bytes()) for path, read in found.values()]


def test_whole_files_are_read(cases: list[Case]) -> None:
    for case in cases:
        assert case.holding(case.original) is None


def damaged(draw: st.DrawFn, path: Path, original: bytes) -> bytes:
    """Another content of a file: another value in it where it is JSON, or other bytes."""
    if path.suffix not in (".json", ".jsonl") or draw(st.booleans()):
        return draw(cut(original, SNIPPETS))
    if path.suffix == ".json":
        return as_json(draw(changed(json.loads(original))))
    lines = draw(changed([json.loads(line) for line in original.splitlines()]))
    return b"".join(as_json(line) + b"\n" for line in (lines if isinstance(lines, list) else [lines]))


@fuzzed(200)
@given(st.data())
def test_damaged_files(cases: list[Case], data: st.DataObject) -> None:
    case = data.draw(st.sampled_from(cases), label="case")
    case.holding(data.draw(st.composite(damaged)(case.path, case.original), label="content"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[" * 100_000, "nested too deeply"),
        (json.dumps(nested(90, by="a")), "nested too deeply"),
        ('{"a": 1, "a": 2}', "a is given twice"),
        ('"\\ud800"', "half a character"),
        ('"\\u0000"', "NUL"),
        ("1" + "0" * 30, "larger than the 64"),
        ("9" * 5000, "digits"),
        ("{", "Expecting"),
        (b"\xff\xfe{", "no text"),
    ],
)
def test_limits_of_json(text: str | bytes, said: str) -> None:
    refusal = answer(lambda: parse_json(text))
    assert refusal is not None
    assert said in refusal


def test_a_header_says_what_it_should(cases: list[Case], tmp_path: Path) -> None:
    tensors = {"x": torch.ones(1)}
    for key, text in ((METADATA_KEY, "[" * 9000), (METADATA_KEY, '{"student": []}'), (DIFFUSERS_METADATA, "1")):
        save_file(tensors, tmp_path / "x.safetensors", {key: text})
        assert answer(lambda: read_student(tmp_path / "x.safetensors")) is not None
