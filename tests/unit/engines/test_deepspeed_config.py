"""The generated DeepSpeed configuration."""

import pytest
from pydantic import ValidationError

from afd_scale.config import RunConfig
from afd_scale.engines.deepspeed_config import deepspeed_config, merge


def run_config(**fields: object) -> RunConfig:
    return RunConfig.model_validate({"method": "sft", **fields})


def test_defaults_that_deepspeed_would_choose_otherwise() -> None:
    generated = deepspeed_config(run_config(), gradient_norm=0.5)
    assert generated["zero_optimization"]["stage"] == 3
    assert generated["gradient_clipping"] == 0.5
    assert deepspeed_config(run_config())["gradient_clipping"] == 0.0
    assert generated["bf16"] == {"enabled": False, "check_grad_overflow": False}
    assert deepspeed_config(run_config(precision="bf16"))["bf16"]["enabled"]
    fp8 = run_config(precision="fp8", student={"activation_checkpointing": True})
    assert deepspeed_config(fp8)["bf16"]["enabled"]
    assert deepspeed_config(fp8)["communication_data_type"] == "fp32"


def test_raw_keys_go_over_the_generated_ones() -> None:
    raw = {"zero_optimization": {"stage3_prefetch_bucket_size": 7}, "wall_clock_breakdown": True}
    generated = deepspeed_config(run_config(engine={"deepspeed": raw}))
    assert generated["zero_optimization"]["stage3_prefetch_bucket_size"] == 7
    assert generated["zero_optimization"]["stage"] == 3
    assert generated["wall_clock_breakdown"] is True


def test_merge_leaves_its_arguments_alone() -> None:
    under, over = {"a": {"b": 1}, "c": 2}, {"a": {"d": 3}, "c": {"e": 4}}
    assert merge(under, over) == {"a": {"b": 1, "d": 3}, "c": {"e": 4}}
    assert (under, over) == ({"a": {"b": 1}, "c": 2}, {"a": {"d": 3}, "c": {"e": 4}})


@pytest.mark.parametrize(
    ("zero", "message"),
    [
        (3, r"zero_optimization \(3\) must be a section of keys"),
        ({"stage": 2}, r"zero_optimization\.stage \(2\) must be 3: policies are averaged"),
        ({"zero_hpz_partition_size": 8}, r"zero_hpz_partition_size \(8\) must be 1: .* secondary copies"),
        ({"zero_quantized_weights": True}, r"zero_quantized_weights \(True\) must be false: .* 8 bits"),
        (
            {"zero_quantized_nontrainable_weights": True},
            r"zero_quantized_nontrainable_weights \(True\) must be false: .* 8-bit integers",
        ),
        ({"zero_quantized_gradients": True}, r"zero_quantized_gradients \(True\) must be false: .* 4 bits"),
    ],
)
def test_raw_keys_that_break_the_work_on_shards_are_refused(zero: object, message: str) -> None:
    with pytest.raises(ValidationError, match=message) as caught:
        run_config(engine={"deepspeed": {"zero_optimization": zero}})
    assert "engine.deepspeed.zero_optimization" in str(caught.value)


def test_raw_keys_may_say_what_is_so_anyway() -> None:
    off = {"stage": 3, "zero_hpz_partition_size": 1, "zero_quantized_weights": False, "zero_quantized_gradients": False}
    assert run_config(engine={"deepspeed": {"zero_optimization": off}})


def test_a_frozen_network_keeps_no_whole_copies() -> None:
    config = run_config(engine={"parameter_persistence": 1000})
    key = "stage3_param_persistence_threshold"
    assert deepspeed_config(config)["zero_optimization"][key] == 1000
    assert deepspeed_config(config, frozen=True)["zero_optimization"][key] == 0


def test_many_ranks_gather_one_by_one_and_keep_small_parameters_where_all_is_trained() -> None:
    def settings(ranks: int, persistence: int | None = None, **options: bool) -> tuple[bool, int]:
        config = run_config(engine={"parameter_persistence": persistence})
        zero = deepspeed_config(config, ranks=ranks, **options)["zero_optimization"]
        return zero["stage3_allgather_sequential"], zero["stage3_param_persistence_threshold"]

    assert settings(63) == (False, 0)
    assert settings(64) == (True, 50_000)
    assert settings(64, edited=True) == settings(64, frozen=True) == (True, 0), "their shards are edited"
    assert settings(64, persistence=0) == (True, 0)
