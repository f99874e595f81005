"""Which backend a run gets, how each library is called, and FlexAttention's mask.

The libraries are not here: a plain softmax in float64 stands in for their kernels, behind the signatures of their
releases. What the kernels themselves compute is for tests/gpu.
"""

import logging
import sys
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

from afd_scale.chunks import Chunks
from afd_scale.layers.attention import AttentionLayout, choose_backend, fa4, flash, flex, sdpa
from afd_scale.layers.attention.backends import find_backend

LAYOUTS = {
    "full": AttentionLayout.full(2, 6),
    "block_causal": AttentionLayout.block_causal(6, Chunks(2)),
    "window_sink": AttentionLayout.block_causal(12, Chunks(2), window_frames=6, sink_frames=2),
    "clean_and_noisy_window_sink": AttentionLayout.clean_and_noisy(12, Chunks(2), 6, 2, num_states=2),
}
every_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
CPU = torch.device("cpu")


# The kernels of flash-attn, written as softmax.


def plain_forward(q, k, v, scale):
    """(B, L, N, D) output and (B, N, L) log-sum-exp."""
    scores = torch.einsum("bqnd,bknd->bnqk", q, k) * scale
    return torch.einsum("bnqk,bknd->bqnd", scores.softmax(-1), v), scores.logsumexp(-1)


def plain_backward(grad_out, q, k, v, out, lse, scale):
    """As the kernels do it: from the output and the log-sum-exp that they are handed."""
    assert lse.is_contiguous(), "they read it by its address"
    assert all(x.stride(-1) == 1 for x in (grad_out, q, k, v, out))
    probability = (torch.einsum("bqnd,bknd->bnqk", q, k) * scale - lse[..., None]).exp()
    correction = (grad_out * out).sum(-1).transpose(1, 2)[..., None]
    grad_scores = probability * (torch.einsum("bqnd,bknd->bnqk", grad_out, v) - correction) * scale
    return (
        torch.einsum("bnqk,bknd->bqnd", grad_scores, k),
        torch.einsum("bnqk,bqnd->bknd", grad_scores, q),
        torch.einsum("bnqk,bqnd->bknd", probability, grad_out),
    )


def write(targets, values):
    for target, value in zip(targets, values, strict=True):
        target.copy_(value)


@pytest.fixture
def flash_attn_2(monkeypatch):
    """flash-attn 2.8.3: private functions of flash_attn.flash_attn_interface."""
    package, interface = ModuleType("flash_attn"), ModuleType("flash_attn.flash_attn_interface")
    package.__version__, package.flash_attn_interface = "2.8.3", interface

    def _flash_attn_forward(
        q, k, v, dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes,
        return_softmax,
    ):  # fmt: skip
        assert (dropout_p, causal, window_size_left, window_size_right, softcap) == (0.0, False, -1, -1, 0.0)
        assert alibi_slopes is None
        assert not return_softmax
        return *plain_forward(q, k, v, softmax_scale), torch.empty(0), torch.empty(2)

    def _flash_attn_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal, window_size_left,
        window_size_right, softcap, alibi_slopes, deterministic, rng_state=None,
    ):  # fmt: skip
        assert (dropout_p, causal, window_size_left, window_size_right, softcap) == (0.0, False, -1, -1, 0.0)
        write((dq, dk, dv), plain_backward(dout, q, k, v, out, softmax_lse, softmax_scale))

    interface._flash_attn_forward, interface._flash_attn_backward = _flash_attn_forward, _flash_attn_backward
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setitem(sys.modules, "flash_attn.flash_attn_interface", interface)
    return flash.load_2


# Of hopper/flash_api.cpp.
FORWARD_3 = (
    "fwd(Tensor q, Tensor k, Tensor v, Tensor(k_new!)? k_new = None, Tensor(v_new!)? v_new = None, Tensor? q_v = None, "
    "Tensor(out!)? out = None, Tensor? cu_seqlens_q = None, Tensor? cu_seqlens_k = None, "
    "Tensor? cu_seqlens_k_new = None, Tensor? seqused_q = None, Tensor? seqused_k = None, int? max_seqlen_q = None, "
    "int? max_seqlen_k = None, Tensor? page_table = None, Tensor? kv_batch_idx = None, Tensor? leftpad_k = None, "
    "Tensor? rotary_cos = None, Tensor? rotary_sin = None, Tensor? seqlens_rotary = None, Tensor? q_descale = None, "
    "Tensor? k_descale = None, Tensor? v_descale = None, float? softmax_scale = None, bool is_causal = False, "
    "int window_size_left = -1, int window_size_right = -1, int attention_chunk = 0, float softcap = 0.0, "
    "bool is_rotary_interleaved = False, Tensor? scheduler_metadata = None, int num_splits = 0, "
    "bool? pack_gqa = None, int sm_margin = 0) -> (Tensor(out!), Tensor, Tensor, Tensor)"
)
BACKWARD_3 = (
    "bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse, Tensor(dq!)? dq = None, "
    "Tensor(dk!)? dk = None, Tensor(dv!)? dv = None, Tensor? cu_seqlens_q = None, Tensor? cu_seqlens_k = None, "
    "Tensor? seqused_q = None, Tensor? seqused_k = None, int? max_seqlen_q = None, int? max_seqlen_k = None, "
    "float? softmax_scale = None, bool is_causal = False, int window_size_left = -1, int window_size_right = -1, "
    "float softcap = 0.0, bool deterministic = False, int sm_margin = 0) "
    "-> (Tensor(dq!), Tensor(dk!), Tensor(dv!), Tensor, Tensor, Tensor, Tensor, Tensor)"
)


@pytest.fixture
def flash_attn_3(monkeypatch):
    """flash-attn 3: operators that importing flash_attn_3._C registers."""
    library = torch.library.Library("flash_attn_3", "DEF")
    library.define(FORWARD_3)
    library.define(BACKWARD_3)

    def fwd(*arguments):
        return *plain_forward(*arguments[:3], scale=arguments[23]), torch.empty(0), torch.empty(0)

    def bwd(*arguments):
        write(arguments[6:9], plain_backward(*arguments[:6], scale=arguments[15]))
        return *arguments[6:9], *(torch.empty(0) for _ in range(5))

    library.impl("fwd", fwd, "CPU")
    library.impl("bwd", bwd, "CPU")
    monkeypatch.setitem(sys.modules, "flash_attn_3", ModuleType("flash_attn_3"))
    monkeypatch.setitem(sys.modules, "flash_attn_3._C", ModuleType("flash_attn_3._C"))
    yield flash.load_3
    library._destroy()


@pytest.fixture
def flash_attn_4(monkeypatch):
    """flash-attn-4 4.0.0b36: private functions of flash_attn.cute.interface, cut to their first arguments."""
    package, cute, interface = (ModuleType(f"flash_attn{x}") for x in ("", ".cute", ".cute.interface"))
    package.cute, cute.interface = cute, interface

    def _flash_attn_fwd(q, k, v, qv=None, *, softmax_scale=None, causal=False, return_lse=False):
        out, lse = plain_forward(q, k, v, softmax_scale)
        return out, lse if return_lse else None, None, None, None

    def _flash_attn_bwd(q, k, v, out, dout, lse, softmax_scale=None, causal=False):
        return plain_backward(dout, q, k, v, out, lse, softmax_scale)

    interface._flash_attn_fwd, interface._flash_attn_bwd = _flash_attn_fwd, _flash_attn_bwd
    for module in (package, cute, interface):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return fa4.load


def inputs(layout, tokens, head_dim=8, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    frames = (layout.query_frames, layout.key_frames, layout.key_frames, layout.query_frames)
    *qkv, grad_out = (torch.randn(2, f * tokens, 2, head_dim, generator=generator, dtype=dtype) for f in frames)
    return [x.requires_grad_() for x in qkv], grad_out


def attend_dense(q, k, v, layout, tokens):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=layout.dense_mask(tokens)).transpose(1, 2)


@every_layout
@pytest.mark.parametrize("library", ["flash_attn_2", "flash_attn_3", "flash_attn_4"])
def test_each_library_is_called_by_its_signature(library, layout, request):
    attend = request.getfixturevalue(library)()
    qkv, grad_out = inputs(layout, 3)
    # The kernels want a head's channels side by side, and autograd may hand over anything.
    grad_out = grad_out.transpose(2, 3).contiguous().transpose(2, 3)
    out, expected = attend(*qkv, layout), attend_dense(*qkv, layout, 3)
    torch.testing.assert_close(out, expected)
    ours, dense = (torch.autograd.grad(x, qkv, grad_out) for x in (out, expected))
    torch.testing.assert_close(ours, dense)


# Which one is chosen. No GPU is asked: its compute capability is given.

AMPERE, HOPPER = (8, 0), (9, 0)


def found(name, device_type="cuda", dtype=torch.bfloat16, head_dim=128, capability=HOPPER):
    """Name and kernels of the backend."""
    backend, _ = find_backend(name, device_type, dtype, head_dim, capability)
    return backend.name, backend.kernels


def test_auto_on_a_cpu_says_what_it_took_and_why_nothing_else(caplog):
    with caplog.at_level(logging.INFO):
        backend = choose_backend("auto", device=CPU, dtype=torch.float32, head_dim=7)
    assert backend.name == "sdpa"
    (line,) = caplog.messages
    assert line == (
        f"attention: sdpa (torch {torch.__version__}, CPU flash kernel) on cpu; "
        "flash-attn 3 needs cuda, not cpu: it has no kernels there"
    )


@pytest.mark.parametrize(
    ("capability", "cudnn", "loaded"),
    [
        (HOPPER, 91002, "cuDNN 9.10.2 is"),
        (HOPPER, 91500, "cuDNN 9.15.0 is"),
        ((10, 0), 90905, "cuDNN 9.9.5 is"),
        (HOPPER, None, "no cuDNN is"),
        (HOPPER, 91501, None),
        (HOPPER, 91900, None),
        (AMPERE, 91002, None),
        ((12, 0), 91002, None),
    ],
)
def test_an_old_cudnn_is_told_where_torch_would_take_a_newer_one(capability, cudnn, loaded):
    warning = sdpa.slower_than_cudnn(capability, cudnn)
    assert warning is None if loaded is None else f"because {loaded} loaded" in warning


def test_auto_on_hopper_takes_flash_attn_3_where_it_is_installed(request):
    assert found("auto")[0] == "sdpa"
    request.getfixturevalue("flash_attn_3")
    assert found("auto") == ("flash", "flash-attn 3")
    assert found("auto", dtype=torch.float32)[0] == "sdpa"


@pytest.mark.usefixtures("flash_attn_2")
def test_flash_takes_flash_attn_2_where_3_is_missing_or_does_not_fit(request):
    assert found("flash") == ("flash", "flash-attn 2")
    request.getfixturevalue("flash_attn_3")
    assert found("flash") == ("flash", "flash-attn 3")
    assert found("flash", capability=AMPERE) == ("flash", "flash-attn 2")


REFUSED = [
    ("flash", "cpu", torch.bfloat16, 64, "flash-attn 2 needs cuda, not cpu"),
    ("flex", "cpu", torch.float32, 64, "FlexAttention needs cuda, not cpu: FlexAttention has no backward"),
    ("fa4", "cuda", torch.bfloat16, 64, r"needs flash-attn-4 \(No module named 'flash_attn'\)"),
    ("flash", "cuda", torch.bfloat16, 64, r"flash-attn 3 needs .*; flash-attn 2 needs flash-attn>=2.7,<3 \(No module"),
    ("flash", "cuda", torch.float32, 64, "needs bfloat16 or float16 here, not float32"),
    ("flash", "cuda", torch.bfloat16, 260, "needs a head width of 8 to 256 in steps of 8, not 260"),
    ("flash", "cuda", torch.bfloat16, 264, "needs a head width of 8 to 256 in steps of 8, not 264"),
    ("flex", "cuda", torch.bfloat16, 8, "needs a head width of 16 to 256 in steps of 8, not 8"),
    ("sdpa", "cuda", torch.float64, 64, "needs float32 or bfloat16 or float16 here, not float64"),
    ("auto", "cuda", torch.float64, 64, "torch .* not float64; flash-attn 2 needs"),
]


@pytest.mark.parametrize(("name", "device_type", "dtype", "head_dim", "reason"), REFUSED)
def test_one_that_cannot_work_here_is_refused_in_one_line(name, device_type, dtype, head_dim, reason):
    with pytest.raises(ValueError, match=rf"^attention \({name}\): .*{reason}") as error:
        found(name, device_type, dtype, head_dim)
    assert "\n" not in str(error.value)


@pytest.mark.usefixtures("flash_attn_4")
@pytest.mark.parametrize(("capability", "fits"), [((8, 9), False), ((9, 0), True), ((10, 0), True), ((12, 0), False)])
def test_an_old_or_untried_gpu_is_refused(capability, fits):
    if fits:
        assert found("fa4", capability=capability) == ("fa4", "flash-attn 4")
    else:
        with pytest.raises(ValueError, match=r"capability 9.x to 10.x, not (8.9|12.0)$"):
            found("fa4", capability=capability)


def test_versions_that_are_called_otherwise_are_refused(monkeypatch, flash_attn_2, flash_attn_4):
    sys.modules["flash_attn.cute.interface"]._flash_attn_fwd = lambda q, k, v, softmax_scale=None: None
    with pytest.raises(ValueError, match="only the draft inside flash-attn 2"):
        found("fa4")

    package = ModuleType("flash_attn")
    package.__version__, package.flash_attn_interface = "2.6.3", sys.modules["flash_attn.flash_attn_interface"]
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    with pytest.raises(ValueError, match=r"needs flash-attn>=2.7,<3 \(2.6.3 is installed\)"):
        found("flash")

    library = torch.library.Library("flash_attn_3", "DEF")
    library.define("fwd(Tensor q, Tensor k, Tensor v, Tensor(k_new!)? k_new, float softmax_scale) -> Tensor")
    monkeypatch.setitem(sys.modules, "flash_attn_3", ModuleType("flash_attn_3"))
    monkeypatch.setitem(sys.modules, "flash_attn_3._C", ModuleType("flash_attn_3._C"))
    with pytest.raises(ImportError, match="before summer 2025"):
        flash.load_3()
    library._destroy()


# FlexAttention: its mask against torch's own, its output where it runs without a GPU.

TILED = {
    "block_causal": AttentionLayout.block_causal(9, Chunks(3)),
    "window_sink": AttentionLayout.block_causal(12, Chunks(3), window_frames=6, sink_frames=3),
    "clean_and_noisy": AttentionLayout.clean_and_noisy(6, Chunks(3)),
}


@pytest.mark.parametrize("tokens", [65, 128, 40])
@pytest.mark.parametrize("layout", TILED.values(), ids=TILED.keys())
def test_the_block_mask_is_the_one_that_torch_makes_of_all_pairs(layout, tokens):
    from torch.nn.attention.flex_attention import create_block_mask

    dense = layout.dense_mask(tokens)
    expected = create_block_mask(lambda b, h, q, k: dense[q, k], None, None, *dense.shape, device="cpu", BLOCK_SIZE=128)
    ours = flex.block_mask(layout, tokens, CPU)
    assert ours.shape == expected.shape
    for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
        assert torch.equal(getattr(ours, name), getattr(expected, name)), name
    for numbers, columns in (("kv_num_blocks", "kv_indices"), ("full_kv_num_blocks", "full_kv_indices")):
        for row, number in enumerate(getattr(expected, numbers)[0, 0].tolist()):
            assert torch.equal(*(getattr(m, columns)[0, 0, row, :number] for m in (ours, expected)))
    queries, keys = (torch.arange(n) for n in dense.shape)
    assert torch.equal(ours.mask_mod(None, None, queries[:, None], keys[None]), dense)


# Uncompiled, it says that it is slow.
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("tokens", [65, 7])
@pytest.mark.parametrize("layout", [*TILED.values(), LAYOUTS["full"]], ids=[*TILED, "full"])
def test_flex_attention_forward_without_a_gpu(layout, tokens):
    from torch.nn.attention.flex_attention import flex_attention

    attend = flex.FlexAttention(flex_attention)
    qkv, _ = inputs(layout, tokens, head_dim=16, dtype=torch.float32)
    with torch.no_grad():
        out = attend(*(x.detach() for x in qkv), layout)
    torch.testing.assert_close(out, attend_dense(*qkv, layout, tokens).detach(), rtol=1e-5, atol=1e-5)


def test_flex_attention_makes_a_mask_once_for_each_layout_and_length():
    masks = []
    attend = flex.FlexAttention(lambda q, k, v, block_mask: masks.append(block_mask) or q)
    for name, tokens in (("block_causal", 3), ("window_sink", 3), ("block_causal", 3), ("block_causal", 4)):
        attend(*inputs(LAYOUTS[name], tokens)[0], LAYOUTS[name])
    assert masks[0] is masks[2]
    assert len({id(mask) for mask in masks}) == 3
