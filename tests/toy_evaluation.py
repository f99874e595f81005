"""Evaluators of the toy world with a small student, without a dataset."""

from pathlib import Path
from typing import Any

import torch

from afd_scale.codecs.identity import IdentityCodec
from afd_scale.config import RunConfig
from afd_scale.data.worlds.drop import ToyPrompt
from afd_scale.engines.cast import build_cast
from afd_scale.engines.plain import Plain
from afd_scale.parallel.ranks import Ranks
from afd_scale.training.evaluator import Evaluator
from afd_scale.types import Prompts

PROMPTS = 5


def make_evaluator(folder: Path, ranks: Ranks, start_frames: int = 0, **evaluation: Any) -> Evaluator:
    start = folder / "start"
    start.mkdir(exist_ok=True)
    config = RunConfig.model_validate({
        "method": "sft", "out": folder, "evaluation": evaluation, "data": {"start_frames": start_frames},
        "student": {"dim": 16, "ffn_dim": 24, "num_heads": 2, "num_layers": 1, "weights": str(start)},
    })  # fmt: skip
    evaluator = Evaluator(config, ranks, IdentityCodec())
    student, texts = config.student, tuple(prompt.sentence for prompt in ToyPrompt.every()[::9][:PROMPTS])
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(PROMPTS, student.text_length, student.text_dim, generator=generator)
    evaluator.fps = 8.0
    evaluator.prompts = Prompts(texts, texts, tuple(range(PROMPTS)), embeddings)
    return evaluator


def make_policy(config: RunConfig) -> Any:
    """A plain student that starts at random."""
    policy = build_cast(config, Plain(config, torch.device("cpu")))[config.method.exported]
    generator = torch.Generator().manual_seed(1)
    for parameter in policy.network.parameters():
        parameter.data.normal_(0, 0.3, generator=generator)
    return policy
