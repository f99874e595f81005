"""A tiny random Qwen2-VL with a home-made tokenizer, as the model that judges clips."""

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from afd_scale.torchvision_ops import define_torchvision_ops

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


def tokenizer(words: Sequence[str]) -> Any:
    """Bytes, and a token for each of these words."""
    define_torchvision_ops()
    tokenizers, transformers = (importlib.import_module(name) for name in ("tokenizers", "transformers"))
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


def save_tiny_judge(
    folder: Path, words: Sequence[str] = ("Yes", "No"), kind: str = "qwen2_vl",
    text_sizes: Mapping[str, Any] | None = None, vision_sizes: Mapping[str, Any] | None = None,
) -> Path:  # fmt: skip
    """Of Qwen2-VL or Qwen2.5-VL."""
    text = tokenizer(words)
    transformers = importlib.import_module("transformers")
    number = {name: text.convert_tokens_to_ids(name) for name in SPECIAL}
    if kind == "qwen2_vl":
        family, model = transformers.Qwen2VLConfig, transformers.Qwen2VLForConditionalGeneration
        vision = {"depth": 1, "embed_dim": 32, "num_heads": 2, "hidden_size": 32, "mlp_ratio": 2}
    else:
        family, model = transformers.Qwen2_5_VLConfig, transformers.Qwen2_5_VLForConditionalGeneration
        vision = {"depth": 2, "hidden_size": 32, "num_heads": 2, "out_hidden_size": 32, "intermediate_size": 48,
                  "window_size": 28, "fullatt_block_indexes": [1], "tokens_per_second": 4}  # fmt: skip
    config = family(
        text_config={
            "vocab_size": -(-len(text) // 64) * 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 1,
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
