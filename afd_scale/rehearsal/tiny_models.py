"""Tiny models with random weights in the layouts of the hub's folders: Wan's VAE and text encoder, and Qwen2-VL."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from afd_scale.torchvision_ops import define_torchvision_ops

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,&<>'-"
WORDS = ("a", "the", "ball", "cat", "falls", "red", "blue", "on", "of", "under", "moon", "water")

PADDING = "<|endoftext|>"
SPECIAL = (
    PADDING,
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% for part in message['content'] %}"
    "{% if part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
VLM_WIDTH = 32


def save_wan_models(folder: Path, vae: Mapping[str, Any], text_dim: int, seed: int = 0) -> None:
    """Save the parts of a WanPipeline but for its transformer.

    Args:
        folder: gets model_index.json, vae/, text_encoder/, tokenizer/ and scheduler/.
        vae: fields of AutoencoderKLWan; it has Wan 2.1's factors, 4 frames and 8 pixels, unless they say otherwise.
        text_dim: width of an embedding.
        seed: of the weights.
    """
    define_torchvision_ops()
    import diffusers
    import transformers

    tokenizer = _t5_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        autoencoder = diffusers.AutoencoderKLWan(**vae)
        text_encoder = transformers.UMT5EncoderModel(
            transformers.UMT5Config(
                vocab_size=len(tokenizer) + 3, d_model=text_dim, d_kv=8, d_ff=48, num_layers=2, num_heads=4
            )
        )
    diffusers.WanPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder.eval(),
        vae=autoencoder.eval(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    ).save_pretrained(folder)


def vae_fields(channels: int) -> dict[str, Any]:
    """Of a tiny AutoencoderKLWan with so many latent channels."""
    return {"base_dim": 8, "z_dim": channels, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1,
            "latents_mean": [0.0] * channels, "latents_std": [1.0] * channels}  # fmt: skip


def _t5_tokenizer() -> Any:
    import tokenizers
    import transformers

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -3.0)]
    pieces += [(f"▁{word}", -2.0) for word in WORDS if len(word) > 1] + [(letter, -4.0) for letter in LETTERS]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, unk_id=2))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    tokenizer.decoder = tokenizers.decoders.Metaspace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    return transformers.T5TokenizerFast(tokenizer_object=tokenizer, extra_ids=0)


def qwen2_tokenizer(words: Sequence[str]) -> Any:
    """Bytes, and a token for each of these words."""
    define_torchvision_ops()
    import tokenizers
    import transformers

    pieces, merges = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()), []
    for word in words:
        for end in range(1, len(word)):
            merges.append((word[:end], word[end]))
            pieces.append(word[: end + 1])
    made = tokenizers.Tokenizer(tokenizers.models.BPE({piece: at for at, piece in enumerate(pieces)}, merges))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    return transformers.Qwen2TokenizerFast(
        tokenizer_object=made, additional_special_tokens=list(SPECIAL), pad_token=PADDING, eos_token="<|im_end|>"
    )


def save_vlm(
    folder: Path, words: Sequence[str] = ("Yes", "No"), kind: str = "qwen2_vl",
    text_sizes: Mapping[str, Any] | None = None, vision_sizes: Mapping[str, Any] | None = None,
) -> Path:  # fmt: skip
    """Save a video-language model with its tokenizer.

    Args:
        words: that are a token each.
        kind: qwen2_vl or qwen2_5_vl.
        text_sizes, vision_sizes: other fields of its two configs.
    """
    text = qwen2_tokenizer(words)
    import transformers

    number = {name: text.convert_tokens_to_ids(name) for name in SPECIAL}
    vision: dict[str, Any]
    if kind == "qwen2_vl":
        family, model = transformers.Qwen2VLConfig, transformers.Qwen2VLForConditionalGeneration
        vision = {"depth": 1, "embed_dim": 32, "num_heads": 2, "hidden_size": VLM_WIDTH, "mlp_ratio": 2}
    else:
        family, model = transformers.Qwen2_5_VLConfig, transformers.Qwen2_5_VLForConditionalGeneration
        vision = {"depth": 2, "hidden_size": 32, "num_heads": 2, "out_hidden_size": VLM_WIDTH, "intermediate_size": 48,
                  "window_size": 28, "fullatt_block_indexes": [1], "tokens_per_second": 4}  # fmt: skip
    config = family(
        text_config={
            "vocab_size": -(-len(text) // 64) * 64, "hidden_size": VLM_WIDTH, "intermediate_size": 48,
            "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
            "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}, **(text_sizes or {}),
        },
        vision_config={**vision, **(vision_sizes or {})},
        vision_start_token_id=number["<|vision_start|>"], vision_end_token_id=number["<|vision_end|>"],
        image_token_id=number["<|image_pad|>"], video_token_id=number["<|video_pad|>"],
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model(config).save_pretrained(folder)
    size = {"shortest_edge": 28 * 28, "longest_edge": 56 * 56}
    processor = transformers.Qwen2VLProcessor if kind == "qwen2_vl" else transformers.Qwen2_5_VLProcessor
    processor(
        transformers.Qwen2VLImageProcessorFast(size=size), text, transformers.Qwen2VLVideoProcessor(size=size),
        chat_template=TEMPLATE,
    ).save_pretrained(folder)  # fmt: skip
    return folder
