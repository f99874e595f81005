"""A tiny random Wan, text encoder, tokenizer and VAE, in diffusers' layout: what the hub's folders are, in 300 kB."""

import importlib
from pathlib import Path
from typing import Any

import torch

from afd_scale.checkpoint.weights import save_weights
from afd_scale.config import load_config
from afd_scale.config.models import PolicyConfig
from afd_scale.models.wan import CausalWan
from afd_scale.torchvision_ops import define_torchvision_ops

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,&<>'-"
WORDS = ["a", "the", "ball", "cat", "falls", "red", "blue", "on", "of", "under", "moon", "water"]
CHANNELS = 4
TEXT_DIM = 32
VAE_SIZES: dict[str, Any] = {
    "base_dim": 8, "z_dim": CHANNELS, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1,
    "latents_mean": [-0.4, 0.1, 0.3, -0.2], "latents_std": [0.5, 0.7, 1.6, 0.9],
}  # fmt: skip


def save_tiny_wan(folder: Path, seed: int = 0, **vae_fields: Any) -> None:
    """Save the parts of a WanPipeline but for its transformer.

    The VAE has Wan 2.1's factors, 4 frames and 8 pixels, and 4 channels; embeddings are of length 32.

    Args:
        folder: gets model_index.json, vae/, text_encoder/, tokenizer/ and scheduler/.
        seed: of the weights.
        vae_fields: other fields of AutoencoderKLWan.
    """
    define_torchvision_ops()
    diffusers = importlib.import_module("diffusers")
    transformers = importlib.import_module("transformers")
    tokenizer = _tokenizer(transformers)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = diffusers.AutoencoderKLWan(**{**VAE_SIZES, **vae_fields})
        text_encoder = transformers.UMT5EncoderModel(
            transformers.UMT5Config(
                vocab_size=len(tokenizer) + 3, d_model=TEXT_DIM, d_kv=8, d_ff=48, num_layers=2, num_heads=4
            )
        )
    diffusers.WanPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder.eval(),
        vae=vae.eval(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    ).save_pretrained(folder)


def save_tiny_student(folder: Path, config: Path) -> None:
    """Save random start weights of a config's student."""
    run = load_config(config)
    student = run.student.model_copy(update={"lora": None, "weights": None})
    generator = torch.Generator().manual_seed(1)
    weights = CausalWan(student, run.sampler).state_dict().items()
    randoms = ((name, torch.randn(weight.shape, generator=generator) / 10) for name, weight in weights)
    save_weights(randoms, folder, PolicyConfig(student=student, sampler=run.sampler))


def _tokenizer(transformers: Any) -> Any:
    tokenizers = importlib.import_module("tokenizers")
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -3.0)]
    pieces += [(f"▁{word}", -2.0) for word in WORDS if len(word) > 1] + [(letter, -4.0) for letter in LETTERS]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, unk_id=2))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    tokenizer.decoder = tokenizers.decoders.Metaspace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    return transformers.T5TokenizerFast(tokenizer_object=tokenizer, extra_ids=0)
