"""Every attention backend that is installed, on its own kernels, against dense-masked attention in float64.

Chunks are cut to the shape of Wan's at 832x480 (3 frames x 1,560 tokens, no multiple of 64): 3 x 65 tokens straddle the
kernels' tiles in the same way, 3 x 64 do in another, and a chunk of 3 x 25 is smaller than a tile.
"""

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from afd_scale.chunks import Chunks
from afd_scale.layers.attention import AttentionLayout, attend_all, choose_backend, sdpa
from afd_scale.layers.attention.backends import FASTEST_FIRST, Candidate

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
    # The compilers behind FlexAttention and flash-attn 4 warn of their own affairs.
    pytest.mark.filterwarnings("default"),
]

LAYOUTS = {
    "full": AttentionLayout.full(3, 9),
    "block_causal": AttentionLayout.block_causal(9, Chunks(3)),
    "window": AttentionLayout.block_causal(12, Chunks(3), window_frames=6),
    "window_sink": AttentionLayout.block_causal(15, Chunks(3), window_frames=9, sink_frames=3),
    "teacher_forcing": AttentionLayout.teacher_forcing(9, Chunks(3), num_states=2),
    "teacher_forcing_window_sink": AttentionLayout.teacher_forcing(15, Chunks(3), 9, 3),
    "clean_and_noisy": AttentionLayout.clean_and_noisy(6, Chunks(3)),
}
every_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
every_backend = pytest.mark.parametrize("candidate", FASTEST_FIRST, ids=lambda c: c.kernels.replace(" ", "_"))

# Largest error, relative to the largest value. bfloat16 rounds by up to 0.4 %, and gradients sum what was rounded.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 4e-3, torch.bfloat16: 3e-2}
GPU = torch.device("cuda")
HEAD_DIM, OTHER_HEAD_DIMS = 128, (64, 96)


@pytest.fixture(autouse=True)
def _forget_what_was_compiled():
    """A run has one or two layouts; all of these together are more than torch keeps compiled."""
    yield
    torch._dynamo.reset()


def load(candidate: Candidate, dtype: torch.dtype, head_dim: int):
    """Its attention, or a skip that says what is missing."""
    if reason := candidate.refusal("cuda", dtype, head_dim, torch.cuda.get_device_capability()):
        pytest.skip(f"{candidate.kernels} {reason}")
    try:
        return candidate.load()
    except ImportError as error:
        pytest.skip(f"{candidate.kernels} needs {candidate.package} ({error})")


def inputs(layout: AttentionLayout, tokens: int, head_dim: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    """q, k, v and a gradient of the output, in float64."""
    generator = torch.Generator(GPU).manual_seed(0)
    frames = (layout.query_frames, layout.key_frames, layout.key_frames, layout.query_frames)
    *qkv, grad_out = (
        torch.randn(2, f * tokens, 3, head_dim, generator=generator, device=GPU, dtype=torch.float64) for f in frames
    )
    return qkv, grad_out


def attend_dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def check(attend, layout: AttentionLayout, tokens: int, dtype: torch.dtype, head_dim: int) -> None:
    qkv, grad_out = inputs(layout, tokens, head_dim)
    # Rounded first: what the kernel adds is measured, not what its inputs lost.
    lowered = [x.to(dtype).requires_grad_() for x in qkv]
    exact = [x.detach().double().requires_grad_() for x in lowered]
    grad_out = grad_out.to(dtype)
    expected = attend_dense(*exact, layout.dense_mask(tokens).to(GPU))
    expected_grads = torch.autograd.grad(expected, exact, grad_out.double())
    out = attend(*lowered, layout)
    grads = torch.autograd.grad(out, lowered, grad_out)
    for name, ours, reference in zip("oqkv", (out, *grads), (expected, *expected_grads), strict=True):
        assert ours.dtype == dtype
        error = (ours.double() - reference).abs().max() / reference.abs().max()
        assert error.item() < TOLERANCE[dtype], name
    assert all(torch.equal(a.double(), b) for a, b in zip(lowered, exact, strict=True)), "an input was written to"


@every_backend
@every_layout
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_outputs_and_gradients(candidate: Candidate, layout: AttentionLayout, dtype: torch.dtype) -> None:
    check(load(candidate, dtype, HEAD_DIM), layout, 65, dtype, HEAD_DIM)


@every_backend
@pytest.mark.parametrize("tokens", [25, 64, 130])
@pytest.mark.parametrize("head_dim", OTHER_HEAD_DIMS)
def test_other_chunks_and_head_widths(candidate: Candidate, tokens: int, head_dim: int) -> None:
    attend = load(candidate, torch.bfloat16, head_dim)
    check(attend, LAYOUTS["window_sink"], tokens, torch.bfloat16, head_dim)


@every_layout
@pytest.mark.parametrize("kernel", [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION], ids=lambda k: k.name)
def test_both_kernels_that_torch_may_choose(kernel: SDPBackend, layout: AttentionLayout) -> None:
    def attend(*arguments):
        with sdpa_kernel([kernel, SDPBackend.MATH]):
            q, k, v = (x.transpose(1, 2) for x in arguments[:3])
            if torch._fused_sdp_choice(q, k, v) != kernel.value:
                pytest.skip(f"torch has no {kernel.name} for this GPU")
            return sdpa.attend(*arguments)

    check(attend, layout, 65, torch.bfloat16, HEAD_DIM)


@pytest.mark.parametrize(
    ("dtype", "names"), [(torch.float32, ["memory-efficient"]), (torch.bfloat16, ["cuDNN", "flash"])]
)
def test_the_log_names_the_kernel_that_torch_takes(dtype: torch.dtype, names: list[str], caplog) -> None:
    with caplog.at_level("INFO"):
        choose_backend("sdpa", device=GPU, dtype=dtype, head_dim=HEAD_DIM)
    line = caplog.messages[-1]
    assert any(f"{name} kernel, cuDNN " in line for name in names)


@every_backend
def test_a_cached_pass_without_gradient(candidate: Candidate) -> None:
    """Keys are a part of a longer buffer, as `LayerCache` hands them out."""
    attend = load(candidate, torch.bfloat16, HEAD_DIM)
    (q, k, v), _ = inputs(LAYOUTS["full"], 65, HEAD_DIM)
    q, k, v = (x.bfloat16() for x in (q, k, v))
    buffers = [F.pad(x, (0, 0, 0, 0, 0, 195), value=float("nan")) for x in (k, v)]
    with torch.no_grad():
        out = attend(q, *(x[:, : 9 * 65] for x in buffers), LAYOUTS["full"])
    expected = attend_all(*(x.double() for x in (q, k, v)))
    assert ((out.double() - expected).abs().max() / expected.abs().max()).item() < TOLERANCE[torch.bfloat16]
