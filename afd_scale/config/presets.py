"""Model sizes and student families as data; a config names one and may override any field of it.

Sources: Wan 2.1 (arXiv:2503.20314) for the sizes, Self-Forcing (arXiv:2506.08009) and Causal-Forcing for the families.
"""

from typing import Any

# The same fields serve the student and the `latent` discriminator.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "toy": {
        "dim": 96, "ffn_dim": 384, "num_heads": 4, "num_layers": 3, "freq_dim": 64,
        "text_dim": 32, "text_length": 16, "latent_channels": 48, "prediction": "x0",
    },
    "wan-1.3b": {
        "dim": 1536, "ffn_dim": 8960, "num_heads": 12, "num_layers": 30, "freq_dim": 256,
        "text_dim": 4096, "text_length": 512, "latent_channels": 16, "prediction": "velocity",
    },
    "wan-14b": {
        "dim": 5120, "ffn_dim": 13824, "num_heads": 40, "num_layers": 40, "freq_dim": 256,
        "text_dim": 4096, "text_length": 512, "latent_channels": 16, "prediction": "velocity",
    },
}  # fmt: skip

# How a student generates: chunk, denoising steps (model timesteps before the warp), warp, KV window.
FAMILIES: dict[str, dict[str, Any]] = {
    "toy": {"chunk_frames": 1, "timesteps": [1000, 750, 500, 250], "timestep_shift": 3.0},
    "self-forcing": {"chunk_frames": 3, "timesteps": [1000, 750, 500, 250], "timestep_shift": 5.0},
    "causal-forcing": {"chunk_frames": 3, "timesteps": [1000, 750, 500, 250], "timestep_shift": 5.0},
    "causal-forcing-framewise": {"chunk_frames": 1, "timesteps": [1000, 750, 500, 250], "timestep_shift": 5.0},
}
