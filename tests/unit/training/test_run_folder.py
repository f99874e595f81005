"""What may change when a run goes on, and what makes it another run."""

import pytest

from afd_scale.config import ConfigError, RunConfig
from afd_scale.training.run_folder import check_folder, write_config

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
