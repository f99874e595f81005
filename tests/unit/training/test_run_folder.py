"""What may change when a run goes on, and what makes it another run."""

import shutil

import pytest

from afd_scale.config import ConfigError, RunConfig
from afd_scale.training.run_folder import CONFIG, check_folder, write_config

FIELDS = {"method": {"name": "afd", "discriminator": {"name": "latent"}}, "name": "run"}


def folder_of(tmp_path):
    write_config(RunConfig.model_validate({**FIELDS, "out": tmp_path}), 1)
    (tmp_path / "run" / "checkpoints").mkdir()
    return {**FIELDS, "out": tmp_path}


@pytest.mark.parametrize(
    "changed",
    [
        {"compile": True},
        {"student": {"activation_checkpointing": "keep_attention"}},
        {"method": {"name": "afd", "discriminator": {"name": "latent", "activation_checkpointing": "full"}}},
        {"rollout": {"weights": "sharded", "graphs": False}},
        {"parallel": {"sequence": 1}, "train": {"micro_batch": 1}},
    ],
    ids=str,
)
def test_a_run_goes_on_in_another_layout(tmp_path, changed):
    check_folder(RunConfig.model_validate(folder_of(tmp_path) | changed))


@pytest.mark.parametrize("changed", [{"seed": 1}, {"precision": "bf16"}, {"student": {"num_layers": 2}}], ids=str)
def test_what_changes_the_numbers_makes_another_run(tmp_path, changed):
    (field,) = changed
    with pytest.raises(ConfigError, match=f"^{field}.*must stay"):
        check_folder(RunConfig.model_validate(folder_of(tmp_path) | changed))


def damaged(path, how):
    content = path.read_bytes()
    path.write_bytes({"cut": content[: len(content) // 2], "bytes": b"\xff\xfe" + content, "yaml": b"{" + content,
                      "empty": b""}[how])  # fmt: skip


@pytest.mark.parametrize("how", ["cut", "bytes", "yaml", "empty", "absent"])
def test_a_damaged_config_is_told_of_and_a_checkpoints_copy_is_gone_by(tmp_path, how, caplog):
    fields = folder_of(tmp_path)
    path, checkpoint = tmp_path / "run" / CONFIG, tmp_path / "run" / "checkpoints" / "step_00000003"
    checkpoint.mkdir()
    shutil.copy(path, checkpoint / CONFIG)
    (checkpoint / "state.json").write_text('{"step": 3, "format": 3}')
    path.unlink() if how == "absent" else damaged(path, how)
    check_folder(RunConfig.model_validate(fields))
    assert caplog.messages == [f"{path} is absent or damaged: the run goes on by {checkpoint / CONFIG}, and the file is "
                               "written anew"]  # fmt: skip
    with pytest.raises(ConfigError, match=r"^seed.*must stay"):
        check_folder(RunConfig.model_validate(fields | {"seed": 1}))


def test_without_a_whole_copy_nothing_says_which_run_is_there(tmp_path):
    fields = folder_of(tmp_path)
    damaged(tmp_path / "run" / CONFIG, "cut")
    with pytest.raises(ConfigError, match="^run config .* must be whole: .*remove it"):
        check_folder(RunConfig.model_validate(fields))
    (tmp_path / "run" / CONFIG).unlink()
    check_folder(RunConfig.model_validate(fields))
