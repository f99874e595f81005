"""A shrunk config is a valid one, and every choice of the run is still made."""

from pathlib import Path
from typing import Any

import pytest

from afd_scale.chunks import Chunks
from afd_scale.config import RunConfig, load_config, resolved_yaml
from afd_scale.config.cast import Load
from afd_scale.config.models import WanConfig
from afd_scale.planning.parameters import network_sizes
from afd_scale.planning.workload import workload
from afd_scale.rehearsal.machine import Machine, adapt, not_rehearsed
from afd_scale.rehearsal.shrink import Layout, shrink, small_layout

ROOT = Path(__file__).parents[3]
CONFIGS = ROOT / "configs"
YAMLS = sorted(path for path in CONFIGS.rglob("*.yaml") if path.parent.name != "studies")
CLUSTER = sorted(CONFIGS.glob("wan_*/*.yaml"))
AFD = CONFIGS / "wan_1_3b" / "self_forcing.yaml"
CPU = Machine(cores=2, gpus=0)


def layout_of(config: RunConfig) -> Layout:
    """Eight data ranks, or as many as have two prompts each."""
    batch = config.data.global_batch
    return Layout(
        max(data for data in range(1, 9) if batch % data == 0 and batch >= 2 * data), config.parallel.sequence
    )


def shrunk(config: RunConfig, ranks: int = 2, machine: Machine = CPU) -> RunConfig:
    full = layout_of(config)
    return adapt(shrink(config, full, small_layout(full, ranks)), machine)


def choices(config: RunConfig) -> dict[str, Any]:
    """Of a run, as plain data: all that is no number of a size, a length or a rank."""
    roles = [
        {
            "role": (role.name, role.section, role.of, role.follows, type(role.network)),
            "trained": role.optimizer and role.optimizer.model_copy(update={"warmup_steps": 0}),
            "heads": role.network.num_heads if isinstance(role.network, WanConfig) else None,
            "starts from": getattr(role.network, "weights", None) or getattr(role.network, "model", None),
            "recomputes": getattr(role.network, "activation_checkpointing", None),
            "adapters": role.lora and (role.lora.alpha / role.lora.rank, role.lora.weights),
        }
        for role in config.cast
    ]
    passes = [(each.phase, each.role, each.kind, each.gradient, each.states, each.frames is None)
              for each in config.method.passes(Load(prompts=2, micro_batch=config.train.micro_batch))]  # fmt: skip
    return {
        "method": (config.method.name, getattr(config.method, "rollouts_per_prompt", None)), "roles": roles,
        "passes": passes, "sampler": config.sampler, "precision": config.precision, "codec": config.codec,
        "micro_batch": config.train.micro_batch, "engine": config.engine, "rollout": config.rollout,
        "metrics": config.evaluation.metrics, "extra prompts": config.data.prompts, "seed": config.seed,
        "samples and diagnoses": (bool(config.train.sample_every), bool(config.train.diagnose_every)),
    }  # fmt: skip


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_every_config_shrinks_and_keeps_its_choices(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    for ranks in (1, 2, 4):
        small = shrunk(config, ranks)
        assert choices(small) == choices(config)
        load = workload(small, small_layout(layout_of(config), ranks).ranks)  # ranks and batch divide
        assert load.prompts <= 2
        chunks = config.sampler.chunks
        assert chunks.count(load.frames) >= min(3, chunks.count(config.data.latent_frames))
        written = tmp_path / "small.yaml"
        written.write_text(resolved_yaml(small))
        assert load_config(written) == small


@pytest.mark.parametrize("path", CLUSTER, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_what_is_for_a_cluster_becomes_small(path: Path) -> None:
    config = load_config(path)
    small = shrunk(config)
    wans = {
        name: size for name, size in network_sizes(small).items() if isinstance(small.role(name).network, WanConfig)
    }
    assert sum(size.total for size in wans.values()) < 30e6
    assert small.data.latent_height * small.data.latent_width < 30
    assert small.data.global_batch <= 4


@pytest.mark.parametrize(
    ("full", "most", "small"),
    [
        (Layout(8, 1), 2, Layout(2, 1)),
        (Layout(2, 4), 2, Layout(1, 2)),
        (Layout(2, 4), 4, Layout(2, 2)),
        (Layout(8, 8), 8, Layout(2, 4)),  # 8 x 1 and 1 x 8 have one axis
        (Layout(16, 3), 6, Layout(2, 3)),
        (Layout(1, 8), 6, Layout(1, 4)),
        (Layout(2, 1), 16, Layout(2, 1)),
        (Layout(4, 2), 1, Layout(1, 1)),
    ],
)
def test_the_nearest_layout(full: Layout, most: int, small: Layout) -> None:
    assert small_layout(full, most) == small


def test_a_video_is_long_enough_for_a_window_to_slide() -> None:
    longlive = load_config(CONFIGS / "wan_1_3b" / "longlive.yaml")
    assert (longlive.sampler.window_frames, longlive.sampler.sink_frames) == (12, 3)
    assert shrunk(longlive).data.latent_frames == 15
    assert shrunk(load_config(AFD)).data.latent_frames == 9


def test_long_rollouts_stay_as_many_times_as_long() -> None:
    small = shrunk(load_config(CONFIGS / "wan_1_3b" / "long.yaml"))
    long = small.method.long_rollouts  # type: ignore[attr-defined]
    assert small.data.latent_frames == 9
    assert (long.frames, long.from_frames, small.method.judged_frames) == (33, 9, 6)  # type: ignore[attr-defined]


def test_judged_frames_stay_a_part_of_whole_chunks() -> None:
    paper = load_config(CONFIGS / "wan_1_3b" / "paper_afd.yaml")
    small = shrunk(paper)
    assert paper.method.judged_frames == 15  # type: ignore[attr-defined]
    assert small.method.judged_frames == 6  # type: ignore[attr-defined]
    several = shrunk(load_config(CONFIGS / "wan_1_3b" / "paper_afd.yaml",
                                  ["method.judged_windows=3", "method.reuse_logits=false"]))  # fmt: skip
    assert several.method.judged_windows == 2  # type: ignore[attr-defined]


def test_starts_stay_a_part_and_less_than_what_is_judged() -> None:
    small = shrunk(
        load_config(CONFIGS / "wan_1_3b" / "paper_afd.yaml", ["data.start_frames=6", "method.judged_frames=9"])
    )
    assert (small.data.latent_frames, small.data.start_frames) == (9, 3)
    assert small.method.judged_frames == 6  # type: ignore[attr-defined]


def test_a_first_chunk_stays_what_it_is() -> None:
    overrides = ["sampler.first_chunk_frames=1", "data.latent_frames=22", "data.start_frames=4",
                 "evaluation.metrics=video", "evaluation.lengths=4", "method.judged_frames=null"]  # fmt: skip
    small = shrunk(load_config(CONFIGS / "wan_1_3b" / "paper_afd.yaml", overrides))
    assert small.sampler.chunks == Chunks(3, 1)
    assert (small.data.latent_frames, small.data.start_frames) == (7, 1)
    assert small.evaluation.lengths == 1, "two would end within a chunk"


def test_layers_are_enough_for_what_names_them() -> None:
    fp8 = shrunk(load_config(AFD, ["precision=fp8", "fp8_keep_blocks=2", "student.activation_checkpointing=full"]))
    assert fp8.student.num_layers == 5
    features = load_config(AFD, ["method.discriminator.lora=null", "method.discriminator.features=[7, 13, 22]"])
    judge = shrunk(features).method.discriminator  # type: ignore[attr-defined]
    assert (judge.num_layers, judge.features) == (3, (1, 2, 3))


def test_what_a_machine_lacks_is_left_out_and_named(tmp_path: Path) -> None:
    config = load_config(CONFIGS / "wan_1_3b" / "paper_sft.yaml", [
        "precision=fp8", "fp8_scaling=delayed", "student.activation_checkpointing=full", "attention=fa4",
        "compile=true", "method.ema_decay=0", "engine.offload_optimizer=nvme", f"engine.nvme_path={tmp_path}",
        "train.trackers=[wandb]",
        "train.stop_on_alarm=[collapsed]", "requires=other.yaml",
    ])  # fmt: skip
    small = shrunk(config)
    assert (small.precision, small.fp8_scaling, small.attention, small.compile) == ("fp8", "current", "auto", False)
    assert (small.engine.offload_optimizer, small.engine.nvme_path) == ("cpu", None)
    assert (small.train.trackers, small.train.stop_on_alarm, small.requires) == (("tensorboard",), (), None)
    lines = list(not_rehearsed(config, CPU, Layout(16, 4), Layout(1, 2)))
    for part in ("real sizes", "64 ranks, data 16 x sequence 4: 2 ranks, data 1 x sequence 2 here", "several machines",
                 "NCCL", "Transformer Engine's FP8 (delayed)", "fa4", "CUDA graphs", "compiled blocks", "nvme",
                 "other.yaml", "stop_on_alarm (collapsed)", "wandb"):  # fmt: skip
        assert sum(part in line for line in lines) == 1, part


def test_a_machine_with_gpus_keeps_what_needs_them() -> None:
    config = load_config(AFD, ["attention=flash", "compile=true", "rollout.graphs=true"])
    small = shrunk(config, machine=Machine(cores=2, gpus=2))
    assert (small.attention, small.compile, small.rollout.graphs) == ("flash", True, True)
    assert [*not_rehearsed(config, Machine(2, 2), Layout(2, 1), Layout(2, 1))][1:] == []
