"""The judge that sees pixels under ZeRO-3 against plain torch, and whole runs of AFD judged by it.

Logits, gradients and steps of AFD on one rank and on two, which have videos of their own or share the same ones,
float32, with all weights trained or adapters, activations stored or recomputed; tests/distributed/test_parity.py has
the other networks. Run as a script by torchrun this file is one rank; as a test it starts them.
"""

import json
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.meshes import (
    OF_ROWS,
    Results,
    check_cells,
    draw,
    randomise_adapters,
    run_mesh,
    steps_of,
    taken_gradients,
    weights_of,
)
from tests.distributed.processes import ROOT, leave, on_ranks
from tests.distributed.small_run import check_resuming
from tests.distributed.test_training import MACHINE, metrics, succeed
from tests.judges import save_tiny_judge

STEPS, PROMPTS, FRAMES, SIZE = 2, 4, 2, 4
SHAPE = {"dim": 32, "ffn_dim": 40, "num_heads": 2, "num_layers": 1, "freq_dim": 8, "text_dim": 6, "text_length": 5,
         "latent_channels": 48, "prediction": "velocity"}  # fmt: skip
OPTIMIZER = {"learning_rate": 0.003, "epsilon": 1e-3, "weight_decay": 0.1, "gradient_norm": 0.5}
LORA = {"rank": 3, "alpha": 6.0}
CELLS = {
    "all weights": {},
    "all weights, recomputed": {"activation_checkpointing": True},
    "adapters everywhere, recomputed": {"lora": LORA, "lora_vision": True, "activation_checkpointing": True},
    "all that a lesson may have": {
        "lora": LORA, "mismatch_weight": 0.3, "augment": ["mirror", "brightness", "shift"], "r1_weight": 0.1,
        "r2_weight": 0.2,
    },
}  # fmt: skip


def run_config(judge: Mapping[str, Any], number: int, sequence: int) -> Any:
    """AFD with a judge, of which this is the section."""
    from afd_scale.config import RunConfig

    return RunConfig.model_validate({
        "student": {**SHAPE, "weights": None},
        "sampler": {"timesteps": [1000, 500]},
        "data": {"latent_frames": FRAMES, "latent_height": SIZE, "latent_width": SIZE, "global_batch": PROMPTS},
        "evaluation": {"metrics": "none"},
        "parallel": {"sequence": sequence},
        "train": {"micro_batch": 3 if number % 2 else None},
        "method": {
            "name": "afd", "optimizer": OPTIMIZER, "discriminator_optimizer": OPTIMIZER, "rollouts_per_prompt": 2,
            "discriminator": judge,
        },
    })  # fmt: skip


def make_batch(step: int, rows: slice) -> Any:
    from afd_scale.codecs.identity import IdentityCodec
    from afd_scale.types import Batch, Videos
    from tests.networks import make_prompts

    keys = tuple(range(PROMPTS * step, PROMPTS * (step + 1)))
    prompts = make_prompts(draw(PROMPTS, 5, SHAPE["text_dim"], seed=20 + step), keys)[rows]
    latents = draw(PROMPTS, FRAMES, SHAPE["latent_channels"], SIZE, SIZE, seed=10 + step)[rows].tanh()
    return Batch(Videos(prompts, latents, 8.0, IdentityCodec(device=latents.device).decode), prompts[:0])


def results_of(method: Any, engines: Any, rows: slice, mean: Any) -> Results:
    judge, batch = engines["discriminator"], make_batch(9, rows)
    logits = judge(batch.teacher)
    judge.backward(logits.sin().mean())
    found: Results = {f"{OF_ROWS}logits": logits}
    found |= {f"gradient of {name}": gradient for name, gradient in taken_gradients(judge)}
    found |= steps_of(method, {step: make_batch(step, rows) for step in range(1, STEPS + 1)}, mean)
    return found | weights_of({"discriminator": judge})


def check_mesh(folder: Path, sequence: int) -> None:
    def ready(engines: Any) -> None:
        check_start(engines["discriminator"], folder / "judge")
        randomise_adapters(engines["discriminator"])

    judge = {"name": "vlm", "model": str(folder / "judge"), "min_pixels": 28 * 28, "max_pixels": 28 * 28}
    cells = {cell: partial(run_config, {**judge, **fields}, number, sequence)
             for number, (cell, fields) in enumerate(CELLS.items())}  # fmt: skip
    check_cells(folder, sequence, cells, results_of, ready)


def check_start(judge: Any, folder: Path) -> None:
    """Weights are the model's, under the names of today."""
    ours, theirs = dict(judge.full_weights()), load_file(folder / "model.safetensors")
    for name in ("visual.patch_embed.proj.weight", "visual.blocks.0.attn.qkv.weight", "visual.merger.mlp.2.weight"):
        assert torch.equal(ours[f"model.{name}"].cpu(), theirs[name]), name
    for name in ("embed_tokens.weight", "layers.1.self_attn.k_proj.weight", "layers.1.mlp.down_proj.weight"):
        assert torch.equal(ours[f"model.language_model.{name}"].cpu(), theirs[f"model.{name}"]), name


@pytest.mark.timeout(600)
def test_one_and_two_ranks_equal_plain_torch(tmp_path: Path) -> None:
    save_tiny_judge(tmp_path / "judge")
    for data, sequence in ((1, 1), (2, 1), (1, 2)):
        run_mesh(__file__, tmp_path, data, sequence)


def test_a_run_judged_from_pixels_resumes_to_the_same_bits(tmp_path: Path) -> None:
    model = save_tiny_judge(tmp_path / "judge")
    last = check_resuming(
        tmp_path / "runs" / "toy-afd-vlm", 4, "--config", ROOT / "configs" / "toy" / "afd_vlm_tiny.yaml",
        f"method.discriminator.model={model}", f"data.shards={tmp_path / 'shards'}", "data.source.clips=64",
        f"out={tmp_path / 'runs'}", "train.steps=4", "train.save_every=2", "evaluation.metrics=none",
        "evaluation.samples=0",
    )  # fmt: skip
    names = load_file(min((last / "networks" / "discriminator").iterdir()))
    assert all("adapters.discriminator" in name or "score.weight" in name for name in names)


def test_judges_in_words_one_trained_and_one_fixed(tmp_path: Path) -> None:
    """The same on one rank and on two; a checkpoint holds what changes."""
    model, found = save_tiny_judge(tmp_path / "judge"), []
    fixed = f"{{name: vlm, model: '{model}', head: yes_no, optimizer: null, min_pixels: 784, max_pixels: 784}}"
    for ranks in (1, 2):
        succeed(on_ranks(
            ranks, ROOT / "launch" / "train.py", "--config", ROOT / "configs" / "toy" / "afd_vlm_tiny.yaml",
            f"name=on-{ranks}", f"method.discriminator.model={model}", "method.discriminator.head=yes_no",
            f"method.judges.words={fixed}", f"data.shards={tmp_path / 'shards'}", "data.source.clips=16",
            f"out={tmp_path}", "train.steps=2", "evaluation.metrics=none", "evaluation.samples=0",
        ))  # fmt: skip
        found.append(metrics(tmp_path / f"on-{ranks}"))
    for one, two in zip(*found, strict=True):
        for name in one.keys() - {*MACHINE, "discriminator/accuracy"}:  # a count may tip over
            assert one[name] == pytest.approx(two[name], abs=1e-4), (one["step"], name)
    networks = tmp_path / "on-2" / "checkpoints" / "step_00000002" / "networks"
    assert {path.name for path in networks.iterdir()} == {"student", "old_policy", "discriminator"}
    assert "weight/score.weight" in load_file(min((networks / "discriminator").iterdir()))
    assert len({line["discriminator/words/reward_mean"] for line in found[0]}) == 2


def test_a_judge_of_pixels_is_given_a_codec(tmp_path: Path) -> None:
    """Latents of a VAE, and no VAE: the run ends before it begins."""
    model, shards = save_tiny_judge(tmp_path / "judge"), tmp_path / "shards"
    command = [
        ROOT / "launch" / "train.py", "--config", ROOT / "configs" / "toy" / "afd_vlm_tiny.yaml", f"out={tmp_path}",
        f"method.discriminator.model={model}", f"data.shards={shards}", "data.source.clips=16", "train.steps=1",
        "evaluation.metrics=none", "evaluation.samples=0",
    ]  # fmt: skip
    succeed(on_ranks(1, *command))
    facts = json.loads((shards / "dataset.json").read_text())
    (shards / "dataset.json").write_text(json.dumps({**facts, "codec": "wan:4x8x8"}))
    refused = on_ranks(1, *command, "name=other")
    assert refused.returncode == 2
    (line,) = [line for line in refused.stderr.splitlines() if "codec" in line]
    assert "codec.name (identity) must be wan, with its models: method.discriminator sees pixels" in line


if __name__ == "__main__":
    check_mesh(Path(sys.argv[1]), int(sys.argv[2]))
    leave()
