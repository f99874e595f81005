"""Plans: shares and traffic worked by hand, what fits and what would, and the tool around them."""

import collections
import importlib
import json
import time
import weakref
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode

from afd_scale.config import ConfigError, load_config
from afd_scale.config.cast import Pass
from afd_scale.layers.attention.layout import AttentionLayout
from afd_scale.planning import vae as planned
from afd_scale.planning.communication import step_traffic
from afd_scale.planning.flops import forward_flops
from afd_scale.planning.gpus import GIB, GPUS
from afd_scale.planning.memory import rank_memory, tokens_of
from afd_scale.planning.parameters import network_sizes
from afd_scale.planning.plan import fit_on, make_plan, remedies
from afd_scale.planning.stopping import plan_stopping
from afd_scale.planning.workload import workload
from afd_scale.torchvision_ops import define_torchvision_ops
from tests.tools import load_tool

ROOT = Path(__file__).parents[3]
CONFIGS = ROOT / "configs"
LARGE = sorted(path for folder in ("wan_1_3b", "wan_14b") for path in (CONFIGS / folder).glob("*.yaml"))
AFD_14B = CONFIGS / "wan_14b" / "afd.yaml"
FULL_1_3B = CONFIGS / "wan_1_3b" / "self_forcing_full.yaml"


NODE = ("parallel.sequence=8", "train.micro_batch=4")  # a layout of the 14B run for what is worked by hand


def load_node(*overrides: str):
    return load_config(AFD_14B, [*NODE, *overrides])


def own_gpus(path: Path) -> int:
    """As the comment at the head of each file says."""
    return 64 if path.parent.name == "wan_14b" else 8


@pytest.mark.parametrize("gpu", ["h100", "h200"])
@pytest.mark.parametrize("path", LARGE, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_the_large_configs_fit(path, gpu):
    gpus = own_gpus(path)
    assert f"# For {gpus} H100 as it is" in path.read_text()
    plan = make_plan(load_config(path), gpus, GPUS[gpu])
    assert plan.fits
    assert plan.notes == ()
    assert plan.step_seconds > 0


def test_long_rollouts_cost_time_and_no_memory():
    def plan(name, *overrides):
        return make_plan(load_config(CONFIGS / "wan_1_3b" / name, overrides), 8, GPUS["h100"])

    short, long = plan("self_forcing.yaml"), plan("long.yaml")
    longer = plan("long.yaml", "method.long_rollouts.frames=162")
    assert long.memory.peak == pytest.approx(short.memory.peak, rel=0.05)
    assert {name: phase.peak for name, phase in longer.memory.phases.items()} == {
        name: phase.peak for name, phase in long.memory.phases.items()
    }  # fmt: skip
    # 27 chunks more of 16 videos, each four steps and a clean pass on 3 of the window's 21 frames.
    config = long.config
    rank, tokens = config.student.lora.rank, 60 // 2 * 104 // 2
    chunk = forward_flops(config.student, AttentionLayout.full(3, 21), tokens, 16 * 4, rank)
    more = longer.flops["rollout"].total - long.flops["rollout"].total
    assert more == pytest.approx(16 * 27 * 5 * chunk.total)
    assert longer.flops["student"] == long.flops["student"]
    # 18 frames of a window behind 18 that its first chunk sees, four of a prompt: 3 and 1 at once.
    (student,) = [each for each in long.load.passes if each.phase == "student"]
    seen = tokens_of(long.load, student, 3)
    assert (student.runs, seen.own, seen.past) == (8, 3 * 18 * tokens, 3 * 36 * tokens)
    window = long.load.window_of(student)
    assert (window.first_frame, window.end, window.gap) == (63, 81, (0, 45))
    assert longer.step_seconds > long.step_seconds > 1.5 * short.step_seconds


@pytest.mark.parametrize("path", LARGE, ids=lambda path: path.stem)
def test_sample_videos_take_at_most_two_percent_of_the_time(path):
    samples = make_plan(load_config(path), own_gpus(path), GPUS["h100"]).samples
    assert 0 < samples.share < 0.02


def test_sample_videos_worked_by_hand():
    config = load_node("evaluation.samples=10", "evaluation.batch=1", "train.sample_every=3")
    plan = make_plan(config, 64, GPUS["h100"])  # 8 data ranks: two videos on one
    samples = plan.samples
    pixels = 2 * 81 * 480 * 832
    assert samples.decoding == pytest.approx(pixels * 8.51e6 / 70e12)
    assert samples.writing == 45
    rollout = plan.seconds["rollout"]
    assert 0.999 * rollout.compute * 2 / plan.load.videos <= samples.generating < rollout.total
    assert samples.share == pytest.approx(samples.seconds / (samples.seconds + 3 * plan.step_seconds))
    at_end = make_plan(load_node("train.sample_every=null"), 64, GPUS["h100"]).samples
    assert at_end.share is None
    assert make_plan(load_node("codec={name: identity}"), 64, GPUS["h100"]).samples is None


class LiveBytes(TorchDispatchMode):
    """Of the tensors that operations have made."""

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.seen = 0, 0, {}

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        output = function(*arguments, **(options or {}))
        for tensor in tree_iter(output):
            if isinstance(tensor, torch.Tensor) and (key := tensor.untyped_storage()._cdata) not in self.seen:
                self.seen[key] = tensor.untyped_storage().nbytes()
                self.now += self.seen[key]
                self.peak = max(self.peak, self.now)
                weakref.finalize(tensor.untyped_storage(), self._free, key)
        return output

    def _free(self, key):
        self.now -= self.seen.pop(key, 0)


@pytest.fixture(scope="module")
def real_vae():
    define_torchvision_ops()
    with torch.device("meta"):
        return importlib.import_module("diffusers").AutoencoderKLWan().eval()


def test_the_vae_s_operations_are_torch_s_count(real_vae):
    with torch.no_grad(), FlopCounterMode(display=False) as counted:
        pixels = real_vae.decode(torch.empty(1, 16, 21, 8, 8, device="meta")).sample[0, 0].numel()
    assert counted.get_total_flops() / pixels == pytest.approx(planned.DECODE_FLOPS_PER_PIXEL, rel=0.01)


def test_the_vae_s_memory_is_what_its_tensors_take(real_vae):
    memory, latent = collections.defaultdict(lambda: None), torch.empty(1, 16, 1, 16, 16, device="meta")
    with torch.no_grad(), LiveBytes() as live:
        for _ in range(3):
            real_vae.decoder(real_vae.post_quant_conv(latent), feat_cache=memory, feat_idx=[0], first_chunk=not memory)
    assert live.peak / (16 * 16 * 64) == pytest.approx(planned.DECODE_BYTES_PER_PIXEL, rel=0.01)
    assert sum(parameter.numel() for parameter in real_vae.parameters()) * 4 == planned.WEIGHT_BYTES


def test_sample_videos_take_memory_beside_the_shards():
    shown = memory_of(load_node(), 64)
    blind = memory_of(load_node("codec={name: identity}"), 64)
    assert blind.samples is None
    assert shown.shards == blind.shards
    assert shown.samples.parts["VAE"] == planned.WEIGHT_BYTES
    assert shown.samples.parts["VAE decoding"] == 480 * 832 * planned.DECODE_BYTES_PER_PIXEL
    assert shown.samples.peak == sum(shown.shards.values()) + sum(shown.samples.parts.values())


def test_there_are_the_large_configs():
    assert len(LARGE) == 16


def test_a_plan_takes_seconds():
    config, before = load_node(), time.process_time()
    make_plan(config, 64, GPUS["h100"])
    assert time.process_time() - before < 5


def test_shares_of_a_step():
    config = load_node("parallel.sequence=8", "train.micro_batch=3")
    load = workload(config, 64)
    assert (load.data_ranks, load.prompts, load.videos) == (8, 4, 16)
    assert load.together == 3
    runs = {(each.role, each.gradient): (each.at_once, each.runs) for each in load.passes}
    assert runs["old_policy", False] == runs["student", True] == (3, 6)
    assert runs["discriminator", True] == (5, 4)  # a prompt: one teacher video, four rollouts
    assert (load.tokens_per_frame, load.local_tokens_per_frame) == (1560, 195)
    for micro_batch, judged in ((9, 5), (10, 10)):
        passes = workload(load_node(f"train.micro_batch={micro_batch}"), 64).passes
        assert [each.at_once for each in passes if each.kind == "score" and each.gradient] == [judged]
    odd = workload(load_config(FULL_1_3B, ["parallel.sequence=1", "data.latent_width=102"]), 1)
    assert odd.tokens_per_frame == 30 * 51
    shared = workload(load_config(FULL_1_3B, ["parallel.sequence=4", "data.latent_width=102"]), 4)
    assert shared.local_tokens_per_frame == 383  # 1530 / 4, padded


def memory_of(config, gpus, usable_bytes=0):
    return rank_memory(config, workload(config, gpus), network_sizes(config), usable_bytes)


def test_zero_shards_by_ranks_and_adapters_replace_copies():
    full, lora = (
        memory_of(load_config(CONFIGS / "wan_1_3b" / name), 8)
        for name in ("self_forcing_full.yaml", "self_forcing.yaml")
    )
    size = network_sizes(load_config(FULL_1_3B))["student"].total
    assert full.shards["student parameters"] == size / 8 * 2
    assert full.shards["student optimizer"] == size / 8 * 12
    assert full.shards["student gradients"] == size / 8 * 4, "micro-batches add up in float32"
    at_once = load_config(FULL_1_3B, ["train.micro_batch=null"])
    assert memory_of(at_once, 8).shards["student gradients"] == size / 8 * 2
    assert full.shards["old policy float32 average"] == size / 8 * 4
    assert full.shards["reference parameters"] == full.shards["old policy parameters"] == size / 8 * 2
    assert "reference parameters" not in lora.shards
    assert "old policy parameters" not in lora.shards
    assert lora.shards["student optimizer"] < full.shards["student optimizer"] / 3


def test_offloaded_states_leave_the_gpu():
    here = load_config(FULL_1_3B)
    away = load_config(FULL_1_3B, ["engine.offload_optimizer=cpu"])
    on, off = (memory_of(config, 8) for config in (here, away))
    moved = {name: held for name, held in on.shards.items() if name not in off.shards}
    assert moved == off.host
    assert sum(moved.values()) > 0
    assert on.host == {}


def test_a_checkpoint_being_written_is_a_copy_on_the_host():
    sizes = network_sizes(load_config(FULL_1_3B))
    held = memory_of(load_config(FULL_1_3B), 8)
    student, judge = sizes["student"].total, sizes["discriminator"].trained
    assert held.snapshot == pytest.approx((12 * student + 4 * student + 12 * judge) / 8, abs=100), "old policy: 4"
    lora = load_config(CONFIGS / "wan_1_3b" / "self_forcing.yaml")
    adapted = network_sizes(lora)["student"]
    judge = network_sizes(lora)["discriminator"].trained
    assert memory_of(lora, 8).snapshot == pytest.approx((16 * adapted.adapter + 12 * judge) / 8, abs=100)
    assert memory_of(lora, 8).kept == pytest.approx(12 * judge / 8, abs=100), "a step that is given up gives it back"


def test_stopping_takes_two_micro_batches_of_the_longest_and_the_writing():
    """Of 4 videos, 1 at once, 8 s: 2 s each. The other phase runs 3 pieces in every other step, 6 s: 4 s each."""
    short = [Pass("a", "student", "rollout", videos=4, at_once=1)]
    long = [Pass("b", "judge", "score", videos=3, at_once=1, every=2)]
    stop = plan_stopping({"a": 8.0, "b": 6.0}, {"a": short, "b": long}, 10**9)
    assert (stop.stretch, stop.writing) == (4.0, 2.0)
    assert stop.seconds == 10.0
    assert stop.lead == 30
    assert plan_stopping({"a": 50.0}, {"a": short[:1] * 2}, 0).lead == 30  # 12.5 + 10
    assert plan_stopping({"a": 50.0}, {"a": short[:1]}, 0).lead == 60  # 25 + 10


def test_graphs_take_memory_of_their_own():
    config = load_config(FULL_1_3B, ["parallel.sequence=1", "train.micro_batch=3", "rollout.weights=gathered"])
    parts = memory_of(config, 8).phases["rollout"].parts  # 16 rollouts: five times three, and one
    assert parts["graphs"] == parts["activations"] + parts["KV cache"] // 3
    for overrides in ({"graphs": False}, {"weights": "sharded"}):
        without = config.model_copy(update={"rollout": config.rollout.model_copy(update=overrides)})
        assert "graphs" not in memory_of(without, 8).phases["rollout"].parts
    shared = load_config(FULL_1_3B, ["parallel.sequence=2", "rollout.weights=gathered"])
    assert "graphs" not in memory_of(shared, 8).phases["rollout"].parts


def test_auto_gathers_where_the_weights_fit():
    config = load_node()
    roomy, tight = (memory_of(config, 64, gib * GIB) for gib in (70, 40))
    assert roomy.gathered_rollout
    assert not tight.gathered_rollout
    saved = roomy.phases["rollout"].peak - tight.phases["rollout"].peak
    assert (
        saved == roomy.phases["rollout"].parts["gathered weights"] - tight.phases["rollout"].parts["gathered weights"]
    )


@pytest.mark.parametrize(("first", "drawn"), [("null", 4), ("[1000, 800, 600, 400, 200]", 5), ("[1000]", 4)])
def test_noise_is_drawn_for_the_chunk_of_the_most_steps(first, drawn):
    config = load_node("train.micro_batch=2", f"sampler.first_chunk_timesteps={first}")
    video = 21 * 16 * 60 * 104 * 4
    held = 4 * (1 + 4)  # on one of 8 data ranks: teacher's videos and rollouts
    assert memory_of(config, 64).phases["rollout"].parts["latents"] == (held + 2 * (1 + drawn)) * video


def test_only_roles_that_take_turns_in_a_network_lose_its_trace():
    def overlaps(*overrides):
        return make_plan(load_node(*overrides), 64, GPUS["h100"]).seconds["student"].overlaps

    assert not overlaps()
    assert overlaps("method=sft")
    assert overlaps("method={name: sft, ema_decay: 0.9}"), "the average runs no pass"


def test_traffic_worked_by_hand():
    layout = ["parallel.sequence=4", "train.micro_batch=4", "student.activation_checkpointing=full",
              "method.discriminator.activation_checkpointing=full"]  # fmt: skip
    config = load_config(FULL_1_3B, layout)
    load = workload(config, 64)  # 16 data ranks: 2 prompts, 8 videos, in 2 micro-batches; 390 tokens a frame
    sizes = network_sizes(config)
    traffic = step_traffic(config, load, sizes, gathered_rollout=False)
    whole = sizes["student"].total * 2 * 63 / 64
    assert traffic["rollout"].gather == pytest.approx(2 * 28 * whole)
    once = step_traffic(config, load, sizes, gathered_rollout=True)
    assert once["rollout"].gather == pytest.approx(whole)
    assert once["velocities"].gather == pytest.approx(2 * whole)
    # Old policy and reference: context and states; the student: context, and states with a backward pass.
    assert traffic["velocities"].gather == pytest.approx(2 * (2 + 2) * whole)
    assert traffic["student"].gather == once["student"].gather == pytest.approx(2 * 3 * whole)
    assert traffic["student"].reduce == pytest.approx(2 * 2 * whole)  # gradients in float32
    raw = "engine.deepspeed={communication_data_type: bf16}"
    in_bf16 = load_config(FULL_1_3B, [*layout, raw])
    assert step_traffic(in_bf16, load, sizes, False)["student"].reduce == pytest.approx(2 * whole)
    video = 4 * (21 * 390) * 1536 * 2 * 30 * 3 / 4  # q, k, v, o of a video in all blocks, three quarters from elsewhere
    assert traffic["velocities"].exchange == pytest.approx(8 * (2 + 2) * video)
    assert traffic["student"].exchange == pytest.approx(8 * 4 * video)
    assert traffic["rollout"].exchange == pytest.approx(8 * 34 / 7 * video)
    assert traffic["discriminator"].exchange == pytest.approx((3 * 10 + 8) * video)
    stored = load_config(FULL_1_3B, [*layout, "student.activation_checkpointing=none"])
    assert step_traffic(stored, load, sizes, False)["student"].exchange == pytest.approx(8 * 3 * video)
    alone = load_config(FULL_1_3B, ["parallel.sequence=1"])
    traffic = step_traffic(alone, workload(alone, 1), network_sizes(alone), gathered_rollout=False)
    assert all(phase.total == 0 for phase in traffic.values())


def test_what_would_fit_fits_and_nothing_smaller_does():
    config = load_node()
    assert not make_plan(config, 1, GPUS["h100"]).fits
    found = remedies(config, 1, GPUS["h100"])
    assert found["here"] is None
    assert make_plan(config, found["as_configured"].gpus, GPUS["h100"]).fits
    smallest = found["smallest"]
    assert make_plan(load_node(*smallest.overrides), smallest.gpus, GPUS["h100"]).fits
    networks = network_sizes(config)
    for gpus in range(1, smallest.gpus):
        assert fit_on(config, networks, gpus, GPUS["h100"], overrides=True) is None


def test_overrides_are_suggested_for_the_same_gpus():
    config = load_node("train.micro_batch=null")
    plan = make_plan(config, 8, GPUS["h100"])
    assert not plan.fits
    here = remedies(config, 8, GPUS["h100"])["here"]
    assert make_plan(load_node(*here.overrides), 8, GPUS["h100"]).fits
    assert len(here.overrides) == 1


@pytest.fixture(scope="module")
def tool():
    return load_tool("plan")


def test_the_tool_prints_one_json_object(tool, capsys):
    assert tool.main(["--config", str(AFD_14B), *NODE, "--gpus", "64", "--gpu", "h100", "--json"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    plan = json.loads(line)
    assert plan["fits"] is True
    assert set(plan["phases"]) == {"rollout", "discriminator", "velocities", "student"}
    assert plan["valid_sequence_degrees"] == [1, 2, 4, 8]
    for phase in plan["phases"].values():
        assert phase["memory"]["peak"] <= plan["peak_bytes"] <= plan["usable_bytes"]
        assert phase["seconds"]["total"] > 0
    assert any("not measured" in line for line in plan["assumptions"])
    assert plan["would_fit"] == {}


def test_the_tool_says_what_would_fit(tool, capsys):
    assert tool.main(["--config", str(AFD_14B), *NODE, "--gpus", "1"]) == 0
    printed = capsys.readouterr().out
    assert "does not fit" in printed
    assert "smallest number of GPUs as configured: 8" in printed
    assert "planned with parallel.sequence=1" in printed
    tool.main(["--config", str(AFD_14B), *NODE, "--gpus", "1", "--json"])
    assert json.loads(capsys.readouterr().out)["would_fit"]["as_configured"]["gpus"] == 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus", "0"], "gpus (0) must be at least 1"),
        (["--gpus", "24"], "data.global_batch (32) must divide among 3 data ranks"),
        (
            ["--gpus", "8", "sampler.chunk_frames=2"],
            "data.latent_frames (21) must be whole chunks of sampler.chunk_frames (2)",
        ),
        (["--gpus", "8", "parallel.sequence=3"], "parallel.sequence (3) must divide student.num_heads (40)"),
    ],
)
def test_bad_input_is_one_line(tool, capsys, arguments, message):
    assert tool.main(["--config", str(AFD_14B), *NODE, *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_a_batch_that_divides_is_named():
    with pytest.raises(ConfigError, match=r"data\.global_batch=64 would do"):
        make_plan(load_config(FULL_1_3B, ["parallel.sequence=4"]), 256, GPUS["h100"])


@pytest.mark.parametrize(("gpus", "degree"), [(7, 8), (12, 8), (4, 4), (2, 2)])
def test_another_degree_is_planned_only_where_the_batch_divides_too(tool, capsys, gpus, degree):
    code = tool.main(["--config", str(AFD_14B), *NODE, "--gpus", str(gpus), "--gpu", "h100", "--json"])
    printed = capsys.readouterr()
    if degree == 8:
        assert code == 2
        assert f"parallel.sequence (8) must divide the number of ranks ({gpus})" in printed.err
    else:
        assert json.loads(printed.out)["sequence"] == degree


def test_extra_prompts_are_rolled_out_and_do_not_train_the_discriminator():
    overrides = ["data.prompts=x", "data.prompts_per_step=32"]
    without, with_extra = (workload(load_node(*more), 32) for more in ([], overrides))
    assert with_extra.prompts == without.prompts
    assert with_extra.videos == 2 * without.videos
    judged = [[each.videos for each in load.passes if each.kind == "score"] for load in (without, with_extra)]
    assert judged == [[5 * 8, 4 * 8], [5 * 8, 2 * 4 * 8]], (
        "trained on teacher videos and their rollouts, then all scored"
    )
    with pytest.raises(ConfigError, match=r"data\.prompts_per_step \(33\) must divide .*data\.prompts_per_step="):
        workload(load_node("data.prompts=x", "data.prompts_per_step=33"), 32)
