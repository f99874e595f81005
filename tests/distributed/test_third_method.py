"""A method that the package does not know: its section, cast, passes and step are in this file, and nothing else is.

Reward-weighted regression: a moving average of the student samples, a judge that is never trained scores, and the
student regresses the samples, each with the softmax of its score in its group.
"""

import json
import shutil
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import yaml

from afd_scale.config import ConfigError, RunConfig, load_config
from afd_scale.config.cast import Load, Pass, Role
from afd_scale.config.judges import LatentDiscriminatorConfig
from afd_scale.config.methods import MethodConfig
from afd_scale.config.models import OptimizerConfig, StudentConfig
from afd_scale.flow import losses
from afd_scale.flow.process import add_noise
from afd_scale.flow.randomness import Randomness
from afd_scale.flow.schedule import TIMESTEPS
from afd_scale.methods.updates import without_gradient
from afd_scale.rollout.sampler import Sampler
from afd_scale.types import Batch, Videos
from tests.distributed.processes import ROOT, on_ranks
from tests.distributed.small_run import SHAPE, write_small_run
from tests.tools import load_tool

TRAIN = ROOT / "launch" / "train.py"
GROUP, STEPS = 2, 3
NAME = "tests.distributed.test_third_method:RegressionConfig"


class RegressionConfig(MethodConfig):
    """Reward-weighted regression with a fixed judge."""

    step = "tests.distributed.test_third_method:Regression"
    name: Literal["tests.distributed.test_third_method:RegressionConfig"] = NAME
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=1e-3)
    judge: LatentDiscriminatorConfig

    def cast(self, student: StudentConfig) -> tuple[Role, ...]:
        trained = Role("student", "student", student, self.optimizer)
        return trained, trained.average("sampler"), Role("judge", "method.judge", self.judge)

    def passes(self, load: Load) -> tuple[Pass, ...]:
        videos = (load.prompts + load.extra_prompts) * GROUP
        at_once = min(load.micro_batch or videos, videos)
        return (
            Pass("rollout", "sampler", "rollout", videos, at_once, held=videos),
            Pass("judge", "judge", "score", videos, at_once, held=videos),
            Pass("student", "student", "velocity", videos, at_once, gradient=True, context_gradient=True, held=videos),
        )

    @property
    def exported(self) -> str:
        return "sampler"


class Regression:
    warmup_steps = 0

    def __init__(self, run: RunConfig, engines: Any, mean_over_ranks: Any):
        self.engines, self.randomness, self.sampler = engines, Randomness(run.seed), Sampler(run.sampler)
        self.optimizer, self.memory = run.method.optimizer, dict[str, torch.Tensor]()

    def train_step(self, batch: Batch, step: int) -> dict[str, torch.Tensor]:
        policy, judge, student = (self.engines[role] for role in ("sampler", "judge", "student"))
        prompts, latents = batch.prompts.repeat(GROUP), batch.teacher.latents

        def generate(rows: slice) -> torch.Tensor:
            keys, shape = prompts.keys[rows], tuple(latents.shape[1:])
            noise = self.sampler.draw(self.randomness, "third", step, keys, shape, latents.device)
            return self.sampler.rollout(policy, prompts.embeddings[rows], noise)

        videos = Videos(prompts, without_gradient(policy, len(prompts), generate))
        scores = without_gradient(judge, len(videos), lambda rows: judge(videos[rows]))
        weights = (GROUP * scores.unflatten(0, (-1, GROUP)).softmax(-1)).flatten()
        x0 = videos.latents
        noise = self.randomness.normal("third/noise", step, prompts.keys, tuple(x0.shape[1:]), x0.device)
        sigma = self.randomness.uniform("third/sigma", step, prompts.keys, (x0.shape[1],), x0.device)
        velocity = student(add_noise(x0, noise, sigma), sigma * TIMESTEPS, prompts.embeddings, clean=x0)
        loss = (weights * losses.flow_matching_loss(velocity, x0, noise, sigma, space="x0")).mean()
        student.backward(loss)
        norm = student.step(self.optimizer.learning_rate)
        policy.follow(student, 0.5)
        return {"student/loss": loss.detach(), "student/gradient_norm": norm, "judge/score": scores.mean()}


@pytest.fixture(scope="module")
def config_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_small_run(tmp_path_factory.mktemp("third"), STEPS)
    tree = yaml.safe_load(path.read_text())
    tree["method"] = {"name": NAME, "judge": {"name": "latent", **SHAPE, "num_layers": 1}}
    tree |= {"name": "third", "evaluation": {"metrics": "none"}}
    tree["train"] |= {"save_every": 1, "keep_checkpoints": STEPS}
    path.write_text(yaml.safe_dump(tree))
    return path


def test_a_third_method_trains_saves_and_resumes(config_file: Path) -> None:
    folder = config_file.parent / "runs" / "third"
    command = (TRAIN, "--config", config_file)
    result = on_ranks(2, *command)
    assert result.returncode == 0, result.stderr[-3000:]
    whole = losses_of(folder)
    assert len(set(whole)) == STEPS
    last = folder / "checkpoints" / f"step_{STEPS:08d}"
    assert sorted(path.name for path in (last / "networks").iterdir()) == ["sampler", "student"], "the judge stays"
    (folder / "summary.json").unlink()
    shutil.rmtree(last)
    result = on_ranks(2, *command)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "resumes after step 2" in result.stderr
    assert losses_of(folder) == whole


def losses_of(folder: Path) -> list[float]:
    return [json.loads(line)["student/loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_third_method_is_planned(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert load_tool("plan").main(["--config", str(config_file), "--gpus", "2", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert list(plan["phases"]) == ["rollout", "judge", "student"]
    assert plan["parameters"].keys() == {"student", "judge"}
    assert plan["parameters"]["judge"]["trained"] == 0
    assert "sampler parameters" in plan["shards_bytes"]
    assert "judge optimizer" not in plan["shards_bytes"]
    for phase in plan["phases"].values():
        assert phase["flops"]["total"] > 0
        assert phase["memory"]["peak"] > 0
    assert load_tool("plan").main(["--config", str(config_file), "--gpus", "2"]) == 0


@pytest.mark.parametrize("name", ["rollout", "update", "step"])
def test_a_third_method_is_benchmarked(config_file: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--json", "--repeats", "1", "--precision", "fp32", "--config", str(config_file), "student.weights=null"]
    assert load_tool("benchmark").main([name, *options]) == 0
    assert json.loads(capsys.readouterr().out)["seconds"][name] > 0


def test_the_rules_between_sections_hold_for_a_third_method(config_file: Path) -> None:
    load_config(config_file, ["data.prompts=x", "data.prompts_per_step=2"])  # it rolls out
    for overrides, line in (
        (["method.judge.text_dim=8"], "method.judge.text_dim (8) must equal student.text_dim (32)"),
        (["engine={offload_optimizer: nvme, nvme_path: x}"], "engine.offload_optimizer (nvme) must be none or cpu"),
        (
            ["precision=fp8", "student.activation_checkpointing=true"],
            "method.judge.activation_checkpointing (none) must be full",
        ),
    ):
        with pytest.raises(ConfigError) as caught:
            load_config(config_file, overrides)
        assert str(caught.value).startswith(line)
