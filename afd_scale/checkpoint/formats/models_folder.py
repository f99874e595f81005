"""What stands beside the transformer in a whole pipeline's folder: VAE, text encoder and tokenizer, copied as files."""

import json
import shutil
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from afd_scale.config.errors import shown
from afd_scale.config.models import WanConfig
from afd_scale.files import read_json

# Part -> library and class, as model_index.json names them.
PARTS = {
    "tokenizer": ("transformers", "T5TokenizerFast"),
    "text_encoder": ("transformers", "UMT5EncoderModel"),
    "vae": ("diffusers", "AutoencoderKLWan"),
}
VERSION = "0.39.0"  # of the diffusers whose layout is written

_OBJECT = TypeAdapter(dict[str, Any])
_NEEDED = ("vae/config.json", "vae/*.safetensors", "text_encoder/config.json", "text_encoder/*.safetensors",
           "tokenizer/tokenizer_config.json")  # fmt: skip
_COPIED = (".json", ".safetensors", ".model", ".txt")  # no pickles


def check_models(models: Path, student: WanConfig) -> None:
    """Hold a folder in diffusers' layout against a student, before anything is written.

    Raises:
        ValueError: a part is absent or of another kind, or its sizes are not the student's.
    """
    for pattern in _NEEDED:
        if not any(models.glob(pattern)):
            raise ValueError(f"--models ({models}) must hold vae/, text_encoder/ and tokenizer/ in diffusers' layout: "
                             f"it has no {pattern}")  # fmt: skip
    rules = (
        ("vae", "_class_name", "AutoencoderKLWan"), ("vae", "z_dim", student.latent_channels),
        ("text_encoder", "model_type", "umt5"), ("text_encoder", "d_model", student.text_dim),
    )  # fmt: skip
    for part, field, needed in rules:
        said = read_json(models / part / "config.json", "--models", "be a JSON object", _OBJECT).get(field, needed)
        if said != needed:
            raise ValueError(f"--models ({models}) must have {field} {needed} in {part}/, as the student needs: it has "
                             f"{shown(said)}")  # fmt: skip


def copy_models(models: Path, folder: Path) -> None:
    """Copy every part; what a link points to is copied, and no file that can run code is."""
    for part in PARTS:
        (folder / part).mkdir()
        for file in sorted((models / part).iterdir()):
            if file.suffix in _COPIED and file.is_file():
                shutil.copyfile(file, folder / part / file.name)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """One file, and its folder if it is not there."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n")
