"""The judge that sees pixels under ZeRO-3 against plain torch, and whole runs of AFD judged by it.

Logits, gradients and steps of AFD on one rank and on two, float32, with all weights trained or adapters, activations
stored or recomputed; tests/distributed/test_parity.py has the other networks. Run as a script by torchrun this file is
one rank; as a test it starts them.
"""

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.distributed.processes import ROOT, leave, on_ranks
from tests.distributed.test_parity import (
    OF_ROWS,
    Results,
    compare,
    draw,
    plain_method,
    randomise_adapters,
    taken_gradients,
    whole_weights,
)
from tests.distributed.test_training import MACHINE, metrics, succeed, without_time
from tests.judges import save_tiny_judge

STEPS, PROMPTS, FRAMES, SIZE = 2, 2, 2, 4
SHAPE = {"dim": 32, "ffn_dim": 40, "num_heads": 2, "num_layers": 1, "freq_dim": 8, "text_dim": 6, "text_length": 5,
         "latent_channels": 48, "prediction": "velocity"}  # fmt: skip
OPTIMIZER = {"learning_rate": 0.003, "epsilon": 1e-3, "weight_decay": 0.1, "gradient_norm": 0.5}
LORA = {"rank": 3, "alpha": 6.0}
CELLS = {
    "all weights": {},
    "all weights, recomputed": {"activation_checkpointing": True},
    "adapters": {"lora": LORA},
    "adapters everywhere, recomputed": {"lora": LORA, "lora_vision": True, "activation_checkpointing": True},
}


def run_config(folder: Path, cell: str, number: int) -> Any:
    from afd_scale.config import RunConfig

    judge = {"name": "vlm", "model": str(folder / "judge"), "min_pixels": 28 * 28, "max_pixels": 28 * 28}
    return RunConfig.model_validate({
        "student": {**SHAPE, "weights": None},
        "sampler": {"timesteps": [1000, 500]},
        "data": {"latent_frames": FRAMES, "latent_height": SIZE, "latent_width": SIZE, "global_batch": PROMPTS},
        "evaluation": {"metrics": "none"},
        "train": {"micro_batch": 3 if number % 2 else None},
        "method": {
            "name": "afd", "optimizer": OPTIMIZER, "discriminator_optimizer": OPTIMIZER, "rollouts_per_prompt": 2,
            "discriminator": {**judge, **CELLS[cell]},
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


def results_of(method: Any, rows: slice, mean: Any) -> Results:
    judge, batch = method.discriminator, make_batch(9, rows)
    logits = judge(batch.teacher)
    judge.backward(logits.sin().mean())
    found: Results = {f"{OF_ROWS}logits": logits}
    found |= {f"gradient of {name}": gradient for name, gradient in taken_gradients(judge)}
    for step in range(1, STEPS + 1):
        metrics = method.train_step(make_batch(step, rows), step)
        for name in sorted(metrics.keys() - {"discriminator/accuracy"}):  # a count may tip over
            found[f"{name} of step {step}"] = mean(metrics[name])
    found |= {f"{name} at the end": weight for name, weight in whole_weights(judge)}
    return {name: value.detach().float().cpu() for name, value in found.items()}


def check_cells(folder: Path) -> None:
    """Every rank: each cell; one rank alone records the plain results first."""
    from afd_scale.parallel.launchers import launched_as
    from afd_scale.parallel.ranks import start_ranks
    from afd_scale.training.build import build_run

    with start_ranks(launched_as(os.environ), timeout_minutes=2) as processes:
        ranks = processes.sharing_videos(1, timeout_minutes=2)
        for number, cell in enumerate(CELLS):
            config = run_config(folder, cell, number)
            sharded = build_run(config, ranks).method
            check_start(sharded.discriminator, folder / "judge")
            randomise_adapters(sharded.discriminator)
            recorded = folder / f"{number}.safetensors"
            if ranks.size == 1:
                plain = results_of(plain_method(sharded, config), slice(0, PROMPTS), lambda x: x)
                save_file({name: value.contiguous() for name, value in plain.items()}, recorded)
            share = PROMPTS // ranks.size
            rows = slice(ranks.rank * share, (ranks.rank + 1) * share)
            compare(results_of(sharded, rows, ranks.mean), load_file(recorded), rows, f"{ranks.size} ranks, {cell}")


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
    for ranks in (1, 2):
        result = on_ranks(ranks, __file__, tmp_path, timeout=280)
        assert result.returncode == 0, result.stderr[-3000:]


def test_a_run_judged_from_pixels_resumes_to_the_same_bits(tmp_path: Path) -> None:
    model, clips, folder = save_tiny_judge(tmp_path / "judge"), 64, tmp_path / "runs" / "toy-afd-vlm"
    command = [
        ROOT / "launch" / "train.py", "--config", ROOT / "configs" / "toy" / "afd_vlm_tiny.yaml",
        f"method.discriminator.model={model}", f"data.shards={tmp_path / 'shards'}", f"data.source.clips={clips}",
        f"out={tmp_path / 'runs'}", "train.steps=4", "train.save_every=2", "evaluation.metrics=none",
        "evaluation.samples=0",
    ]  # fmt: skip
    succeed(on_ranks(2, *command))
    whole = [without_time(line) for line in metrics(folder)]
    assert [line["step"] for line in whole] == [1, 2, 3, 4]
    assert len({line["discriminator/loss"] for line in whole}) == 4
    last = folder / "checkpoints" / "step_00000004"
    student, judge = (load_file(last / name) for name in ("student/model.safetensors", shards_of(last)))
    assert all("adapters.discriminator" in name or "score.weight" in name for name in judge)
    (folder / "summary.json").unlink()
    shutil.rmtree(last)
    succeed(on_ranks(2, *command))
    assert [without_time(line) for line in metrics(folder)] == whole
    for name, before in (("student/model.safetensors", student), (shards_of(last), judge)):
        after = load_file(last / name)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before), name


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
    assert "weight/score.weight" in load_file(networks.parent / shards_of(networks.parent))
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


def shards_of(checkpoint: Path) -> str:
    """The first rank's file of the judge."""
    return str(min((checkpoint / "networks" / "discriminator").iterdir()).relative_to(checkpoint))


if __name__ == "__main__":
    check_cells(Path(sys.argv[1]))
    leave()
