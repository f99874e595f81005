"""A cached rollout on a GPU against the full block-causal pass: chunk by chunk the same velocities."""

import pytest
import torch

from afd_scale.config.models import PolicyConfig
from afd_scale.layers.attention import choose_backend
from afd_scale.layers.ops import ModelOps
from tests.networks import make_policy

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

# 195 tokens a frame, 585 a chunk: no multiple of a kernel's tile.
SHAPE = {"dim": 128, "ffn_dim": 256, "num_heads": 2, "num_layers": 3, "freq_dim": 32, "text_dim": 16, "text_length": 8,
         "latent_channels": 4, "prediction": "velocity", "chunk_frames": 3}  # fmt: skip
FRAMES, ROWS, COLUMNS = 12, 26, 30


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 5e-2)], ids=str)
@pytest.mark.parametrize("window", [{}, {"window_frames": 6, "sink_frames": 3}], ids=["whole past", "window"])
def test_cached_chunks_are_those_of_the_full_pass(dtype: torch.dtype, tolerance: float, window: dict[str, int]) -> None:
    device, network = torch.device("cuda"), PolicyConfig.model_validate(SHAPE).student
    backend = choose_backend("auto", device=device, dtype=dtype, head_dim=network.dim // network.num_heads)
    torch.manual_seed(0)
    model = make_policy({**SHAPE, **window}, ModelOps(attend=backend.attend))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0, 0.05)
    model = model.to(device, dtype)
    latents = torch.randn(2, FRAMES, 4, ROWS, COLUMNS, device=device)
    timestep = torch.zeros(2, FRAMES, device=device)  # clean latents leave the keys that a full pass sees
    text = torch.randn(2, 8, 16, device=device)
    with torch.no_grad():
        full = model(latents, timestep, text)
        cache = model.new_cache(FRAMES)
        for start in range(0, FRAMES, 3):
            here = slice(start, start + 3)
            velocity = model(latents[:, here], timestep[:, here], text, cache=cache)
            error = (velocity - full[:, here]).abs().max() / full.abs().max()
            assert error < tolerance, (start, error)
            if start + 3 < FRAMES:
                cache.advance()
