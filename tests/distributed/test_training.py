"""Whole runs through launch/train.py on real ranks: losses do not depend on the number of ranks, a resumed run goes on
exactly, every launcher starts the same file, bad input ends in one line."""

import json
import shutil
import signal
import sys
import time
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import torch

from afd_scale.checkpoint.load_student import load_student_state, read_lora, read_student
from afd_scale.config import load_config
from afd_scale.models.wan import CausalWan
from tests.distributed.processes import ROOT, TORCHRUN, deepspeed, on_ranks, run, run_fresh, start
from tests.distributed.small_run import SHAPE, check_resuming, write_small_run
from tests.students import read_folder

TRAIN = ROOT / "launch" / "train.py"
STEPS = 5
TIMING = "system/step_seconds"
MACHINE = (TIMING, "system/data_wait_share", "system/gathered_gib", "system/save_pause_seconds",
           "system/save_write_seconds")  # fmt: skip


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with afd.yaml: the toy config with a small random student, few clips and no pretraining."""
    folder = tmp_path_factory.mktemp("configs")
    write_small_run(folder, STEPS)
    return folder


def metrics(run_folder: Path) -> list[dict[str, Any]]:
    """What the steps behind the warm-up log."""
    lines = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["step"] > 0]


def succeed(result: CompletedProcess[str]) -> None:
    assert result.returncode == 0, result.stderr[-3000:]


@pytest.fixture(scope="module")
def one_rank(configs: Path) -> list[dict[str, Any]]:
    """The run that others are compared with, under plain python."""
    succeed(
        run_fresh(
            sys.executable,
            TRAIN,
            "--config",
            configs / "afd.yaml",
            "name=one",
            "train.save_every=1",
            "train.keep_checkpoints=5",
        )
    )
    return metrics(configs / "runs" / "one")


@pytest.fixture(scope="module")
def two_ranks(configs: Path) -> list[dict[str, Any]]:
    """The same run under the deepspeed launcher, which adds --local_rank."""
    succeed(deepspeed(2, TRAIN, "--config", configs / "afd.yaml", "name=two", "train.save_every=2"))
    return metrics(configs / "runs" / "two")


def test_losses_do_not_depend_on_ranks(one_rank: list[dict[str, Any]], two_ranks: list[dict[str, Any]]) -> None:
    assert [line["step"] for line in two_ranks] == [line["step"] for line in one_rank] == list(range(1, STEPS + 1))
    for one, two in zip(one_rank, two_ranks, strict=True):
        for name in one.keys() - {*MACHINE, "discriminator/accuracy"}:  # a count may tip over
            assert one[name] == pytest.approx(two[name], abs=1e-4), (one["step"], name)
    assert len({line["student/loss"] for line in one_rank}) == STEPS, "losses that never move compare nothing"


def test_the_warm_up_is_logged_too(configs: Path, one_rank: list[dict[str, Any]]) -> None:
    lines = [json.loads(line) for line in (configs / "runs" / "one" / "metrics.jsonl").read_text().splitlines()]
    warm_up = [line for line in lines if line["step"] < 1]
    assert [line["step"] for line in warm_up] == [-1, 0]
    assert all(line["discriminator/loss"] > 0 and "student/loss" not in line for line in warm_up)


def test_ranks_that_no_video_can_share_are_refused(configs: Path) -> None:
    options = ["name=bad", "parallel.sequence=2"]
    result = run(sys.executable, TRAIN, "--config", configs / "afd.yaml", *options)
    refused(result, "parallel.sequence (2) must divide the number of ranks (1)")


def test_adapters_train_resume_and_are_merged_when_read(configs: Path) -> None:
    """LoRA on student and discriminator; killed after step 2; what it saves loads as any student, or as adapters."""
    small = {"name": "latent", **SHAPE, "num_layers": 1, "lora": {"rank": 2}}
    options = [
        "student.lora={rank: 4, alpha: 8}",
        f"method.discriminator={small}",
        "method.optimizer.learning_rate=0.01",
        "evaluation.metrics=none",
    ]
    command = [TRAIN, "--config", configs / "afd.yaml", "name=lora", "train.save_every=2", *options]
    succeed(on_ranks(2, *command))
    folder = configs / "runs" / "lora"
    whole, source = metrics(folder), read_student(folder)
    assert {path.name for path in source.path.iterdir()} == {
        "student.json", "base.json", "adapter_config.json", "adapter_model.safetensors"
    }  # fmt: skip
    policy, state = source.config(), dict(source.state)
    assert policy.student.lora is None
    assert state.keys() == CausalWan(policy.student, policy.sampler).state_dict().keys()
    start = read_folder(configs / "start")[1]
    changed = {name for name in start if not torch.equal(start[name], state[name])}
    assert changed == {name for name in start if is_adapted(name)}, "adapters are merged, all else is the start's"

    (folder / "summary.json").unlink()
    shutil.rmtree(folder / "checkpoints" / f"step_{STEPS:08d}")
    succeed(on_ranks(2, *command))
    assert [without_time(line) for line in metrics(folder)] == [without_time(line) for line in whole]
    resumed = read_student(folder).state
    for name, weight in state.items():
        assert torch.equal(resumed[name], weight), name
    # Of the other networks there are the shards of two ranks.
    policies = {role: read_student(folder, role).state for role in ("student", "old_policy")}
    assert all(torch.equal(policies["student"][name], state[name]) for name in state)
    assert {name for name in state if not torch.equal(policies["old_policy"][name], state[name])} == changed

    # Adapters that go on from these, and do not move.
    onward = [*options, f"student.lora.weights={folder}", "method.optimizer.learning_rate=0", "train.steps=1"]
    succeed(on_ranks(2, TRAIN, "--config", configs / "afd.yaml", "name=lora-onward", *onward))
    (first,) = metrics(configs / "runs" / "lora-onward")
    assert first["student/reference_distance"] == 0, "the reference starts from them too"
    before, after = (read_lora(path).tensors for path in (folder, configs / "runs" / "lora-onward"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    # A run of adapters that are an average, from the merged student.
    sft = ["method={name: sft, ema_decay: 0.9}", "name=lora-sft", f"student.weights={folder}", "student.lora={rank: 2}"]
    sft.append("evaluation.metrics=none")
    succeed(on_ranks(2, TRAIN, "--config", configs / "afd.yaml", *sft, "train.steps=2", "parallel.sequence=2"))
    run_of_average = configs / "runs" / "lora-sft"
    exported, ema = (read_student(run_of_average, role).state for role in (None, "ema"))
    assert all(torch.equal(exported[name], ema[name]) for name in exported)
    trained = read_student(run_of_average, "student").state
    assert {name for name in exported if not torch.equal(exported[name], trained[name])} == changed
    # A base that goes away.
    (folder / "checkpoints" / f"step_{STEPS:08d}").rename(folder / "checkpoints" / "elsewhere")
    with pytest.raises(ValueError, match="must find the base of their adapters"):
        read_student(run_of_average)


def test_every_network_of_a_run_is_read_from_its_shards(configs: Path, two_ranks: list[dict[str, Any]]) -> None:
    run = configs / "runs" / "two"
    exported, student, old_policy = (read_student(run, role).state for role in (None, "student", "old_policy"))
    assert exported.keys() == student.keys() == old_policy.keys()
    assert all(torch.equal(exported[name], student[name]) for name in exported)
    assert all(not torch.equal(exported[name], old_policy[name]) for name in exported)
    assert all(torch.allclose(exported[name], old_policy[name], atol=0.1) for name in exported)
    with pytest.raises(ValueError, match="must hold ema: it is of a run without it, with discriminator, old_policy"):
        read_student(run, "ema")


def is_adapted(name: str) -> bool:
    return name.endswith(".weight") and (".ffn." in name or ("_attn." in name and ".norm" not in name))


def test_a_resumed_run_is_the_uninterrupted_one(configs: Path, two_ranks: list[dict[str, Any]]) -> None:
    """Killed after step 5 and before its checkpoint was complete, and before `latest` was moved."""
    folder = configs / "runs" / "two-resumed"
    shutil.copytree(configs / "runs" / "two", folder)
    (folder / "summary.json").unlink()
    checkpoints = folder / "checkpoints"
    (checkpoints / f"step_{STEPS:08d}").rename(checkpoints / f".step_{STEPS:08d}.partial")
    (checkpoints / "latest").unlink()
    config = (folder / "config.yaml").read_text().replace("name: two\n", f"name: {folder.name}\n")
    (folder / "config.yaml").write_text(config)
    resumed = on_ranks(2, TRAIN, "--config", configs / "afd.yaml", f"name={folder.name}", "train.save_every=2")
    succeed(resumed)
    assert "has its base's clips from an earlier start" in resumed.stderr
    evaluated = [json.loads((run / "summary.json").read_text())["metrics"] for run in (folder, folder.with_name("two"))]
    assert evaluated[0] == evaluated[1]
    assert [without_time(line) for line in metrics(folder)] == [without_time(line) for line in two_ranks]
    assert (checkpoints / "latest").read_text() == f"step_{STEPS:08d}"
    assert not list(checkpoints.glob(".*"))
    assert (folder / "report.html").is_file()


def test_a_steered_student_of_a_frozen_judge_resumes_to_the_same_bits(configs: Path) -> None:
    """Killed where the judge has just learned for the last time; the factor of the rate is in the checkpoint."""
    folder = configs / "runs" / "steered"
    last = check_resuming(
        folder, STEPS, "--config", configs / "afd.yaml", "name=steered", "train.save_every=2",
        "evaluation.metrics=none", "method.step_target=0.01", "method.taught=resampled",
        "method.discriminator.freeze_after=4",
    )  # fmt: skip
    lines = metrics(folder)
    assert lines[-1]["student/rate_factor"] != 1, "or nothing had to be kept"
    assert json.loads((last / "state.json").read_text())["method"].keys() == {"rate_factor"}
    assert ["discriminator/accuracy" in line for line in lines] == [line["step"] <= 4 for line in lines]


def test_a_run_resumes_on_any_number_of_ranks(configs: Path, one_rank: list[dict[str, Any]]) -> None:
    """One rank, then two, then four of which two share a video, in micro-batches and with gathered weights, then one
    again: the losses and the student of the lone rank."""
    folder = configs / "runs" / "elastic"
    shutil.copytree(configs / "runs" / "one", folder)
    config = (folder / "config.yaml").read_text().replace("name: one\n", "name: elastic\n")
    (folder / "config.yaml").write_text(config)
    command = [TRAIN, "--config", configs / "afd.yaml", "name=elastic", "train.save_every=1",
               "train.keep_checkpoints=5", "evaluation.metrics=none"]  # fmt: skip
    shared = ("parallel.sequence=2", "train.micro_batch=2", "rollout.weights=gathered")
    for resume_at, ranks, options in ((1, 2, ()), (2, 4, shared), (4, 1, ())):
        (folder / "summary.json").unlink()
        for step in range(resume_at + 1, STEPS + 1):
            shutil.rmtree(folder / "checkpoints" / f"step_{step:08d}")
        before = metrics(folder)[:resume_at]
        succeed(on_ranks(ranks, *command, *options))
        assert metrics(folder)[:resume_at] == before, "it went on from there"
        for one, elastic in zip(one_rank, metrics(folder), strict=True):
            for name in one.keys() - {*MACHINE, "discriminator/accuracy"}:  # a count may tip over
                assert one[name] == pytest.approx(elastic[name], abs=1e-4), (ranks, one["step"], name)
    weights = [read_student(configs / "runs" / run).state for run in ("one", "elastic")]
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, atol=1e-5, rtol=0, msg=lambda text, n=name: f"{n}: {text}")


def without_time(line: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in line.items() if name not in MACHINE}


def test_told_to_stop_a_run_saves_and_goes_on_later(configs: Path, two_ranks: list[dict[str, Any]]) -> None:
    """SIGTERM to the launcher reaches the ranks; all of them stop after the same step."""
    ended = configs / "ended"
    command = [TRAIN, "--ended", ended, "--config", configs / "afd.yaml", "name=stopped"]
    folder = configs / "runs" / "stopped"
    launcher = [sys.executable, *TORCHRUN, "2"]
    with start(*launcher, *command, "train.steps=100000", "train.keep_checkpoints=1") as process:
        deadline = time.monotonic() + 120
        while not (folder / "metrics.jsonl").is_file() or not metrics(folder):
            assert time.monotonic() < deadline, "the run never came to its first step"
            time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=60)
    assert ended.read_text() == "stopped\n"
    (checkpoint,) = (folder / "checkpoints").glob("step_*")
    saved = json.loads((checkpoint / "state.json").read_text())["step"]
    assert saved == metrics(folder)[-1]["step"]
    succeed(on_ranks(2, *command, f"train.steps={saved + 1}"))
    assert [line["step"] for line in metrics(folder)] == list(range(1, saved + 2))
    assert ended.read_text() == "done\n"
    assert on_ranks(2, *command, "student.num_layers=-7").returncode == 2
    assert ended.read_text() == "failed\n"


def test_the_other_ways_to_train(configs: Path) -> None:
    """bf16, the transformer discriminator with its penalties, recomputed activations, raw DeepSpeed keys; sft with an
    average of the weights, over more than one epoch, in micro-batches, states and shards offloaded."""
    options = ["evaluation.metrics=none", "train.steps=3", "precision=bf16", "student.activation_checkpointing=true"]
    small = {"name": "latent", **SHAPE, "num_layers": 1}
    succeed(
        on_ranks(
            2, TRAIN, "--config", configs / "afd.yaml", *options, "name=latent", f"method.discriminator={small}",
            "method.r1_weight=0.1", "method.r2_weight=0.1", "method.context_gradient=true",
            "engine.deepspeed={zero_optimization: {stage3_prefetch_bucket_size: 1000}}",
        )
    )  # fmt: skip
    assert all(line["discriminator/penalty"] > 0 for line in metrics(configs / "runs" / "latent"))
    sft = "method={name: sft, ema_decay: 0.9}"
    offload = ["engine.offload_optimizer=cpu", "engine.offload_parameters=cpu", "train.micro_batch=20"]
    options += [*offload, "data.global_batch=96"]
    succeed(on_ranks(2, TRAIN, "--config", configs / "afd.yaml", *options, "name=sft", sft))
    lines = metrics(configs / "runs" / "sft")
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert all(line["student/gradient_norm"] > 0 for line in lines)


def test_fp8_is_emulated_and_leaves_a_plain_student(configs: Path) -> None:
    """Student, old policy and discriminator; what is exported loads where FP8 is unknown."""
    small = {"name": "latent", **SHAPE, "num_layers": 1, "activation_checkpointing": True}
    result = on_ranks(
        2, TRAIN, "--config", configs / "afd.yaml", "evaluation.metrics=none", "train.steps=2", "precision=fp8",
        "student.activation_checkpointing=true", f"method.discriminator={small}", "name=fp8",
    )  # fmt: skip
    succeed(result)
    assert "emulated FP8, a numerical stand-in, no faster" in result.stderr
    assert all(line["student/gradient_norm"] > 0 for line in metrics(configs / "runs" / "fp8"))
    config = load_config(configs / "afd.yaml")
    state = load_student_state(configs / "runs" / "fp8", config.student)
    CausalWan(config.student, config.sampler).load_state_dict(state)


def test_delayed_fp8_scaling_is_refused_before_the_required_run(configs: Path) -> None:
    result = run(
        sys.executable, TRAIN, "--config", configs / "afd.yaml", "name=bad", "precision=fp8", "fp8_scaling=delayed",
        "student.activation_checkpointing=true", f"requires={configs / 'afd.yaml'}",
    )  # fmt: skip
    refused(result, "fp8_scaling (delayed) must be one of current, row, block, mxfp8 on a CPU")
    assert not (configs / "runs" / "bad").exists()
    assert not (configs / "runs" / "afd").exists()


def test_what_a_run_leaves(configs: Path, one_rank: list[dict[str, Any]]) -> None:
    folder = configs / "runs" / "one"
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["method"] == "afd"
    assert summary["steps"] == STEPS
    assert summary["metrics"].keys() == {"base", "student", "teacher"}
    assert load_config(folder / "config.yaml").student == load_config(configs / "afd.yaml").student
    assert (folder / "checkpoints" / "latest").read_text() == f"step_{STEPS:08d}"
    assert list((folder / "samples").rglob("*.mp4"))
    assert list((folder / "samples").rglob("grid.png"))
    assert not list(folder.rglob("*.partial"))
    assert not list(folder.rglob("*.py")), "DeepSpeed's script that unpickles is not left behind"


def test_a_complete_run_is_left_alone(configs: Path, one_rank: list[dict[str, Any]]) -> None:
    result = run(sys.executable, TRAIN, "--config", configs / "afd.yaml", "name=one", "train.save_every=2")
    succeed(result)
    assert "one is complete" in result.stderr
    assert "Prompt right" in result.stderr
    assert metrics(configs / "runs" / "one") == one_rank


def test_another_config_does_not_continue_a_run(configs: Path, one_rank: list[dict[str, Any]]) -> None:
    result = run(sys.executable, TRAIN, "--config", configs / "afd.yaml", "name=one", "method.policy_mix=0.5")
    refused(result, "method.policy_mix (0.5) must stay 1.0")


def refused(result: CompletedProcess[str], line: str) -> None:
    errors = [text for text in result.stderr.splitlines() if text.startswith("error: ")]
    assert len(errors) == 1, result.stderr[-3000:]
    assert line in errors[0]
    assert result.returncode == 2
    assert "Traceback" not in result.stderr


def test_without_a_config_the_embedded_default_runs_and_says_so() -> None:
    result = run(sys.executable, TRAIN, "--local_rank", "0", "train.stepz=3")
    assert "no --config: running the embedded default" in result.stderr
    assert "toy/afd.yaml" in result.stderr
    refused(result, "train.stepz (3) is not a known key")


def test_a_judge_that_diverges_in_the_warm_up_ends_the_run(configs: Path) -> None:
    result = run(sys.executable, TRAIN, "--config", configs / "afd.yaml", "name=judge", "evaluation.metrics=none",
                 "method.discriminator_optimizer.learning_rate=1e30")  # fmt: skip
    refused(result, "gradients of discriminator, student must be finite: those of 5 steps in a row to step 4 are not.")
    assert not list((configs / "runs" / "judge" / "checkpoints").glob("step_*"))


def test_a_diverged_run_ends_and_saves_no_more(configs: Path, one_rank: list[dict[str, Any]]) -> None:
    result = run(sys.executable, TRAIN, "--config", configs / "afd.yaml", "name=diverged", "train.save_every=1",
                 "method.optimizer.learning_rate=1e30")  # fmt: skip
    refused(result, "must be finite: those of the last 4 steps, to step 5, are not, and what came of it is not saved")
    saved = [path.name for path in (configs / "runs" / "diverged" / "checkpoints").glob("step_*")]
    assert saved == ["step_00000001"]


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("train.stepz=3", "train.stepz (3) is not a known key"),
        ("sampler.chunk_frames=3", "data.latent_frames (4) must be whole chunks of sampler.chunk_frames (3)"),
        ("parallel.sequence=3", "parallel.sequence (3) must divide student.num_heads (4)"),
    ],
)
def test_bad_config(configs: Path, override: str, line: str) -> None:
    refused(run(sys.executable, TRAIN, "--config", configs / "afd.yaml", "name=bad", override), line)
    assert not (configs / "runs" / "bad").exists()


def test_bad_files(configs: Path, one_rank: list[dict[str, Any]], tmp_path: Path) -> None:
    """A missing and a corrupt shard, weights that do not fit, a folder that cannot be written to."""
    corrupt = tmp_path / "corrupt"
    shutil.copytree(configs / "shards", corrupt)
    for shard in corrupt.glob("shard.*"):
        content = bytearray(shard.read_bytes())
        content[len(content) // 2] ^= 1
        shard.write_bytes(content)
    missing = tmp_path / "missing"
    shutil.copytree(configs / "shards", missing)
    for shard in missing.glob("shard.*"):
        shard.unlink()
    occupied = tmp_path / "file"
    occupied.write_text("")
    for overrides, line in (
        ([f"data.shards={corrupt}"], f"data.shards ({corrupt}"),
        ([f"data.shards={missing}"], f"data.shards ({missing}"),
        ([f"data.shards={tmp_path / 'nowhere'}", "data.source=null"], f"data.shards ({tmp_path / 'nowhere'})"),
        (["student.num_layers=3"], "student.weights"),
        ([f"requires={configs / 'afd.yaml'}", f"data.shards={tmp_path / 'nowhere'}", f"out={occupied}"], "out ("),
        (
            [f"requires={configs / 'afd.yaml'}", f"data.shards={tmp_path / 'nowhere'}", "data.source=null"],
            f"data.shards ({tmp_path / 'nowhere'})",
        ),
        ([f"out={occupied}"], f"out ({occupied})"),
    ):
        result = run(sys.executable, TRAIN, "--config", configs / "afd.yaml", "name=bad", *overrides)
        refused(result, line)
        assert not (configs / "runs" / "bad").exists()
        assert not (configs / "runs" / "afd").exists(), "the run that it requires was not begun"
