"""Attention by segments against one dense call under the mask, and the masks against a rolling list of frames."""

from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from afd_scale.chunks import Chunks
from afd_scale.layers.attention import AttentionLayout, attend, attend_all, sdpa
from afd_scale.layers.attention.segmented import attend_segments

LAYOUTS = {
    "full": AttentionLayout.full(6),
    "cached": AttentionLayout.full(2, 6),
    "block_causal": AttentionLayout.block_causal(6, Chunks(2)),
    "frame_wise": AttentionLayout.block_causal(5, Chunks(1)),
    "window": AttentionLayout.block_causal(8, Chunks(2), window_frames=4),
    "window_sink": AttentionLayout.block_causal(12, Chunks(2), window_frames=6, sink_frames=2),
    "teacher_forcing": AttentionLayout.teacher_forcing(6, Chunks(2)),
    "teacher_forcing_3_states": AttentionLayout.teacher_forcing(6, Chunks(2), num_states=3),
    "teacher_forcing_window_sink": AttentionLayout.teacher_forcing(12, Chunks(2), 6, 2, num_states=2),
    "clean_and_noisy": AttentionLayout.clean_and_noisy(6, Chunks(2)),
    "clean_and_noisy_window_sink": AttentionLayout.clean_and_noisy(12, Chunks(2), 6, 2, num_states=2),
    "clean_and_noisy_gap": AttentionLayout.clean_and_noisy(
        20, Chunks(2), 6, 2, num_states=2, first_frame=14, gap=(2, 8)
    ),
}


# The CPU's kernel, called as flash-attn is: a call for each key range.
MERGING = replace(sdpa.CPU, merges_ranges=True)
WAYS = {"keys_copied": attend, "ranges_merged": partial(attend_segments, kernel=MERGING)}
both_ways = pytest.mark.parametrize("attend", WAYS.values(), ids=WAYS.keys())
every_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())


def inputs(layout, tokens, *, batch=2, heads=2, head_dim=8, dtype=torch.float32, device="cpu"):
    """q, k, v with gradient, and a gradient of the output."""
    generator = torch.Generator().manual_seed(0)
    frames = (layout.query_frames, layout.key_frames, layout.key_frames, layout.query_frames)
    q, k, v, grad_out = (
        torch.randn(batch, f * tokens, heads, head_dim, generator=generator, dtype=torch.float64).to(device, dtype)
        for f in frames
    )
    return [x.requires_grad_() for x in (q, k, v)], grad_out


def attend_dense(q, k, v, layout, tokens):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=layout.dense_mask(tokens)).transpose(1, 2)


def with_gradients(function, qkv, grad_out):
    out = function(*qkv)
    return [out.detach(), *torch.autograd.grad(out, qkv, grad_out)]


def assert_all_close(ours, reference, tolerance):
    for name, a, b in zip(("out", "grad_q", "grad_k", "grad_v"), ours, reference, strict=True):
        torch.testing.assert_close(a.to(b.dtype), b, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


@both_ways
@every_layout
@pytest.mark.parametrize(("tokens", "head_dim"), [(5, 24), (3, 10), (1, 7)])
def test_segments_equal_the_dense_mask(attend, layout, tokens, head_dim):
    qkv, grad_out = inputs(layout, tokens, head_dim=head_dim)
    ours = with_gradients(lambda *x: attend(*x, layout), qkv, grad_out)
    dense = with_gradients(lambda *x: attend_dense(*x, layout, tokens), qkv, grad_out)
    assert_all_close(ours, dense, 1e-5)


@both_ways
def test_chunks_that_straddle_the_kernels_tiles(attend):
    layout = AttentionLayout.block_causal(6, Chunks(2), window_frames=4, sink_frames=2)
    qkv, grad_out = inputs(layout, 67, batch=1)
    ours = with_gradients(lambda *x: attend(*x, layout), qkv, grad_out)
    dense = with_gradients(lambda *x: attend_dense(*x, layout, 67), qkv, grad_out)
    assert_all_close(ours, dense, 1e-5)


@both_ways
@every_layout
def test_gradients_against_finite_differences(attend, layout):
    qkv, _ = inputs(layout, 1, batch=1, heads=1, head_dim=2, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *x: attend(*x, layout), qkv)


@both_ways
@every_layout
def test_bfloat16(attend, layout):
    qkv, grad_out = inputs(layout, 3, dtype=torch.bfloat16)
    ours = with_gradients(lambda *x: attend(*x, layout), qkv, grad_out)
    assert all(x.dtype == torch.bfloat16 for x in ours)
    exact = [x.detach().float().requires_grad_() for x in qkv]
    assert_all_close(ours, with_gradients(lambda *x: attend_dense(*x, layout, 3), exact, grad_out.float()), 3e-2)


LONG = {
    "block_causal": AttentionLayout.block_causal(63, Chunks(1)),
    "teacher_forcing": AttentionLayout.teacher_forcing(63, Chunks(1)),
}


@both_ways
@pytest.mark.parametrize("layout", LONG.values(), ids=LONG.keys())
def test_gradients_of_many_chunks_in_bfloat16_are_as_exact_as_dense_ones(attend, layout):
    """A first key's gradients are sums over 63 chunks: relative errors of it and of all."""
    tokens = 4
    qkv, grad_out = inputs(layout, tokens, head_dim=16, dtype=torch.bfloat16)
    exact = [x.detach().double().requires_grad_() for x in qkv]
    expected = with_gradients(lambda *x: attend_dense(*x, layout, tokens), exact, grad_out.double())
    segments = with_gradients(lambda *x: attend(*x, layout), qkv, grad_out)
    dense = with_gradients(lambda *x: attend_dense(*x, layout, tokens), qkv, grad_out)
    for part in (slice(0, tokens), slice(None)):
        for name, ours, theirs, right in list(zip("oqkv", segments, dense, expected))[1:]:
            right = right[:, part]
            errors = [((x[:, part].double() - right).norm() / right.norm()).item() for x in (ours, theirs)]
            # dQ comes rounded from a kernel, as the dense one does; of merged ranges it is a sum of two such.
            allowed = 1.0 if name != "q" else 1.02 if attend is WAYS["keys_copied"] else 1.25
            assert errors[0] <= allowed * errors[1], (name, part, errors)


@both_ways
@every_layout
def test_an_activation_checkpoint_changes_no_gradient(attend, layout, monkeypatch):
    calls = []
    merges = attend is WAYS["ranges_merged"]
    counted = replace(sdpa.CPU, merges_ranges=merges, forward=lambda *x: calls.append(x) or MERGING.forward(*x))
    if merges:
        attend = partial(attend_segments, kernel=counted)
    monkeypatch.setattr(sdpa, "CPU", counted)
    qkv, grad_out = inputs(layout, 3)

    def run(q, k, v):
        return attend(2 * q, 3 * k, v.sin(), layout)

    plain = with_gradients(run, qkv, grad_out)
    without = len(calls)
    if merges:
        assert without == sum(len(segment.keys) for segment in layout.segments)
    else:
        assert without == (0 if layout.is_full else len(layout.segments))
    recomputed = with_gradients(lambda *x: checkpoint(run, *x, use_reentrant=False), qkv, grad_out)
    assert len(calls) == 3 * without, "the checkpoint must run it again"
    assert all(torch.equal(a, b) for a, b in zip(plain, recomputed, strict=True))


STRIDES = {
    "heads_first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "channels_before_heads": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "every_other_channel": lambda x: x.repeat_interleave(2, dim=-1)[..., ::2],
    "part_of_a_longer_sequence": lambda x: F.pad(x, (0, 0, 0, 0, 3, 2))[:, 3:-2],
    "qkv_side_by_side": lambda x: torch.cat([x, x], dim=-1).chunk(2, dim=-1)[1],
}


@both_ways
@pytest.mark.parametrize("strided", STRIDES.values(), ids=STRIDES.keys())
def test_strides_do_not_matter(strided, attend):
    layout, tokens = LAYOUTS["window_sink"], 3
    qkv, grad_out = inputs(layout, tokens)
    ours = with_gradients(lambda *x: attend(*map(strided, x), layout), qkv, strided(grad_out))
    assert_all_close(ours, with_gradients(lambda *x: attend_dense(*x, layout, tokens), qkv, grad_out), 1e-5)


@both_ways
def test_an_expanded_gradient(attend):
    layout = LAYOUTS["window_sink"]
    qkv, _ = inputs(layout, 3)
    one = torch.ones(())
    ours = torch.autograd.grad(attend(*qkv, layout).sum(), qkv, one)
    dense = torch.autograd.grad(attend_dense(*qkv, layout, 3).sum(), qkv, one)
    torch.testing.assert_close(ours, dense, rtol=1e-5, atol=1e-5)


@both_ways
def test_inputs_stay_as_they_were(attend):
    layout = LAYOUTS["clean_and_noisy_window_sink"]
    qkv, grad_out = inputs(layout, 3)
    before = [x.detach().clone() for x in (*qkv, grad_out)]
    with_gradients(lambda *x: attend(*x, layout), qkv, grad_out)
    assert all(torch.equal(a, b) for a, b in zip(before, (*qkv, grad_out), strict=True))


def test_merging_holds_where_one_range_outweighs_the_other_by_more_than_float32_can_say():
    layout = LAYOUTS["window_sink"]
    qkv, grad_out = inputs(layout, 3)
    exact = [(30 * x.detach().double()).requires_grad_() for x in qkv]
    large = [x.detach().float().requires_grad_() for x in exact]
    ours = with_gradients(lambda *x: WAYS["ranges_merged"](*x, layout), large, grad_out)
    dense = with_gradients(lambda *x: attend_dense(*x, layout, 3), exact, grad_out.double())
    assert all(x.isfinite().all() for x in ours)
    for a, b in zip(ours, dense, strict=True):
        assert (a.double() - b).abs().max() < 1e-3 * b.abs().max()


def test_merging_copies_no_key():
    layout = LAYOUTS["clean_and_noisy_window_sink"]
    qkv, grad_out = inputs(layout, 3)
    for name, copies in (("keys_copied", True), ("ranges_merged", False)):
        with CallLog() as log:
            with_gradients(lambda *x, a=WAYS[name]: a(*x, layout), qkv, grad_out)
        assert bool(log.of("cat")) == copies


def test_attend_all_is_softmax_attention():
    qkv, _ = inputs(AttentionLayout.full(2, 5), 3, head_dim=10)
    q, k, v = qkv
    weights = torch.einsum("bqnd,bknd->bnqk", q, k).div(10**0.5).softmax(-1)
    torch.testing.assert_close(attend_all(q, k, v), torch.einsum("bnqk,bknd->bqnd", weights, v))


def test_tokens_that_do_not_fit_the_layout_are_our_own_mistake():
    (q, k, v), _ = inputs(LAYOUTS["block_causal"], 3)
    with pytest.raises(AssertionError, match="queries"):
        attend(q[:, :-1], k, v, LAYOUTS["block_causal"])
    with pytest.raises(AssertionError, match="keys"):
        attend(q, k[:, :-3], v[:, :-3], LAYOUTS["block_causal"])


# The masks: what a frame sees is what is left in a list that drops its oldest frame after the sink when it is full.


def seen_by(frame, chunk_of, window_frames, sink_frames):
    """Frames that the chunk of `frame` sees, itself included."""
    kept = []
    for chunk in range(chunk_of[frame] + 1):
        kept += [other for other, its_chunk in enumerate(chunk_of) if its_chunk == chunk]
        while window_frames is not None and len(kept) > window_frames:
            del kept[sink_frames]
    return kept


def slow_mask(frames, chunks, window_frames, sink_frames, *, clean_queries, num_states):
    """Frame by frame: clean queries (if any), then the states; keys are the clean frames, then the states' (if any)."""
    mask = torch.zeros((clean_queries + num_states) * frames, (1 + num_states) * frames, dtype=torch.bool)
    first = chunks.first or chunks.size
    chunk_of = [0] * first + [1 + frame // chunks.size for frame in range(frames - first)]
    for query in range(frames):
        for key in seen_by(query, chunk_of, window_frames, sink_frames):
            if clean_queries:
                mask[query, key] = True
            for state in range(num_states):
                row = (clean_queries + state) * frames + query
                mask[row, key if chunk_of[key] < chunk_of[query] else (1 + state) * frames + key] = True
    return mask


# Frames, length of a chunk and of the first, window and sink.
WINDOWS = [
    (6, 2, None, None, 0), (5, 1, None, None, 0), (6, 3, None, None, 0), (6, 6, None, None, 0), (8, 2, None, 4, 0),
    (8, 2, None, 2, 0), (12, 2, None, 6, 2), (12, 2, None, 6, 4), (9, 1, None, 4, 1), (6, 2, None, 8, 2),
    (6, 2, None, 6, 2), (7, 3, 1, None, 0), (5, 1, 3, None, 0), (4, 3, 4, None, 0), (13, 3, 1, 7, 1), (9, 2, 1, 5, 3),
    (11, 2, 3, 7, 3),
]  # fmt: skip


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("case", WINDOWS, ids=str)
def test_masks(case, tokens):
    frames, size, first, *rest = case
    window = (frames, Chunks(size, first), *rest)

    def assert_mask(layout, **definition):
        expected = slow_mask(*window, **definition).repeat_interleave(tokens, 0).repeat_interleave(tokens, 1)
        assert torch.equal(layout.dense_mask(tokens), expected)
        assert layout.pairs(tokens) == expected.sum().item()

    assert_mask(AttentionLayout.block_causal(*window), clean_queries=1, num_states=0)
    for states in (1, 3):
        assert_mask(AttentionLayout.teacher_forcing(*window, num_states=states), clean_queries=0, num_states=states)
        assert_mask(AttentionLayout.clean_and_noisy(*window, num_states=states), clean_queries=1, num_states=states)


@every_layout
def test_segments_cover_the_queries_once_with_rising_separate_ranges(layout):
    starts = [segment.query[0] for segment in layout.segments]
    stops = [segment.query[1] for segment in layout.segments]
    assert [0, *stops] == [*starts, layout.query_frames]
    for segment in layout.segments:
        edges = [edge for key_range in segment.keys for edge in key_range]
        assert edges == sorted(set(edges)), "ranges that touch would cost a copy"
        assert edges[0] >= 0
        assert edges[-1] <= layout.key_frames


def test_only_a_layout_without_a_mask_is_full():
    for name, layout in LAYOUTS.items():
        assert layout.is_full == (name in ("full", "cached")), name
    assert AttentionLayout.block_causal(4, Chunks(4)).is_full


def test_frames_that_make_no_whole_chunks_are_refused():
    with pytest.raises(ValueError, match=r"frames \(7\) must be whole chunks of 2"):
        AttentionLayout.block_causal(7, Chunks(2))


# The CUDA branch without a GPU: shapes on the meta device, arguments by the names of the kernels' own schemas.


class CallLog(TorchDispatchMode):
    """Records each operator call with its arguments under their schema names."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        names = [argument.name for argument in operator._schema.arguments]
        self.calls.append((operator._schema.name, dict(zip(names, args)) | (kwargs or {}), result))
        return result

    def of(self, name):
        return [(arguments, result) for called, arguments, result in self.calls if called == f"aten::{name}"]


CUDA_KERNELS = {
    "flash": (torch.bfloat16, 1),
    "cudnn": (torch.bfloat16, 3),
    "efficient": (torch.float32, 2),
}


@pytest.mark.parametrize("layout", [LAYOUTS["window_sink"], LAYOUTS["clean_and_noisy"]], ids=["window_sink", "clean"])
@pytest.mark.parametrize("kernel", CUDA_KERNELS)
def test_the_kernels_of_a_gpu_are_called_by_their_schemas(layout, kernel, monkeypatch):
    dtype, choice = CUDA_KERNELS[kernel]
    monkeypatch.setattr(torch, "_fused_sdp_choice", lambda q, k, v: choice)
    kernel = f"_scaled_dot_product_{kernel}_attention"
    qkv, grad_out = inputs(layout, 5, heads=3, head_dim=24, dtype=dtype, device="meta")
    with CallLog() as log:
        out = attend(*qkv, layout)
        gradients = torch.autograd.grad(out, qkv, grad_out)
    for ours, given in zip((out, *gradients), (qkv[0], *qkv), strict=True):
        assert (ours.shape, ours.dtype, ours.device) == (given.shape, given.dtype, given.device)

    forward, backward = log.of(kernel), log.of(f"{kernel}_backward")
    assert len(forward) == len(backward) == len(layout.segments)
    for segment, (given, made), (taken, _) in zip(layout.token_segments(5), forward, backward, strict=True):
        num_queries, num_keys = segment.query[1] - segment.query[0], sum(b - a for a, b in segment.keys)
        assert given["query"].shape == taken["query"].shape == (2, 3, num_queries, 24)
        for arguments in (given, taken):
            assert arguments["key"].shape == arguments["value"].shape == (2, 3, num_keys, 24)
            assert arguments.get("dropout_p", 0.0) == 0.0
            assert arguments.get("is_causal", False) is False
            assert arguments.get("scale") is None
        assert taken["out"].shape == taken["query"].shape
        if dtype == torch.float32:
            assert given["attn_bias"] is taken["attn_bias"] is None
            assert given["compute_log_sumexp"] is True
            assert taken["grad_out_"].shape == taken["query"].shape
            assert taken["grad_input_mask"] == [True, True, True, False]
            statistics = {"logsumexp": made[1], "philox_seed": made[2], "philox_offset": made[3]}
        else:
            if "cudnn" in kernel:
                assert given["attn_bias"] is taken["attn_bias"] is None
                assert given["compute_log_sumexp"] is True
            assert taken["grad_out"].shape == taken["query"].shape
            assert (taken["cum_seq_q"], taken["cum_seq_k"]) == (made[2], made[3])
            assert (taken["max_q"], taken["max_k"]) == (num_queries, num_keys)
            statistics = {"logsumexp": made[1], "philox_seed": made[6], "philox_offset": made[7]}
        for name, tensor in statistics.items():
            assert taken[name].untyped_storage()._cdata == tensor.untyped_storage()._cdata, name
