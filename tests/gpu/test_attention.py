"""The segmented attention on a GPU's kernels against dense-masked attention in float64."""

import pytest
import torch
import torch.nn.functional as F

from afd_scale.layers.attention import AttentionLayout, attend

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

LAYOUTS = {
    "block_causal": AttentionLayout.block_causal(6, 2),
    "window_sink": AttentionLayout.block_causal(12, 2, window_frames=6, sink_frames=2),
    "teacher_forcing": AttentionLayout.teacher_forcing(6, 2, num_states=2),
    "clean_and_noisy": AttentionLayout.clean_and_noisy(6, 2),
}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("tokens_per_frame", [25, 64])
def test_outputs_and_gradients(name: str, dtype: torch.dtype, tolerance: float, tokens_per_frame: int) -> None:
    layout = LAYOUTS[name]
    generator = torch.Generator("cuda").manual_seed(0)

    def random(frames: int) -> torch.Tensor:
        shape = (2, frames * tokens_per_frame, 3, 64)
        return torch.randn(shape, generator=generator, device="cuda", dtype=torch.float64).requires_grad_()

    inputs = [random(layout.query_frames), random(layout.key_frames), random(layout.key_frames)]
    mask = layout.dense_mask(tokens_per_frame).cuda()
    expected = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in inputs), attn_mask=mask).transpose(1, 2)
    grad_out = torch.randn(expected.shape, generator=generator, device="cuda", dtype=torch.float64)
    expected_grads = torch.autograd.grad(expected, inputs, grad_out)
    lowered = [x.detach().to(dtype).requires_grad_() for x in inputs]
    out = attend(*lowered, layout)
    grads = torch.autograd.grad(out, lowered, grad_out.to(dtype))
    for ours, reference in zip((out, *grads), (expected, *expected_grads), strict=True):
        error = (ours.double() - reference).abs().max() / reference.abs().max()
        assert error.item() < tolerance
