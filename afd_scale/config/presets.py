"""Model sizes and samplers of published students as data; a config names one and may override any field of it.

Sources: Wan 2.1 (arXiv:2503.20314) for the sizes; for the families Self-Forcing (arXiv:2506.08009), Causal-Forcing,
Krea Realtime 14B (whose server lets the cache hold three frames) and LongLive (arXiv:2509.22622); Qwen2-VL
(arXiv:2409.12191).
"""

from typing import Any

from afd_scale.config.errors import shown

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

# Video-language models as transformers describes them, by the last part of a folder's or hub id's name: for plans,
# where the model itself need not be there.
VIDEO_LANGUAGE_MODELS: dict[str, dict[str, Any]] = {
    "Qwen2-VL-2B-Instruct": {
        "model_type": "qwen2_vl",
        "text_config": {
            "tie_word_embeddings": True,
            "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
            "num_key_value_heads": 2, "vocab_size": 151_936,
            "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        },
        "vision_config": {"depth": 32, "embed_dim": 1280, "num_heads": 16, "mlp_ratio": 4, "hidden_size": 1536},
    },
    "Qwen2-VL-7B-Instruct": {
        "model_type": "qwen2_vl",
        "text_config": {
            "hidden_size": 3584, "intermediate_size": 18_944, "num_hidden_layers": 28, "num_attention_heads": 28,
            "num_key_value_heads": 4, "vocab_size": 152_064,
            "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        },
        "vision_config": {"depth": 32, "embed_dim": 1280, "num_heads": 16, "mlp_ratio": 4, "hidden_size": 3584},
    },
}  # fmt: skip

# How the students of a family generate; what is not said is SamplerConfig's default.
FAMILIES: dict[str, dict[str, Any]] = {
    "toy": {},
    "self-forcing": {"chunk_frames": 3, "timesteps": [1000, 750, 500, 250], "timestep_shift": 5.0},
    "causal-forcing": {"chunk_frames": 3, "timesteps": [1000, 750, 500, 250], "timestep_shift": 5.0},
    "krea-realtime": {"chunk_frames": 3, "timesteps": [1000, 750, 500, 250], "timestep_shift": 5.0},
    "longlive": {
        "chunk_frames": 3, "timesteps": [1000, 750, 500, 250], "timestep_shift": 5.0, "window_frames": 12,
        "sink_frames": 3,
    },
    "causal-forcing-framewise": {"chunk_frames": 1, "timesteps": [1000, 750, 500, 250], "timestep_shift": 5.0},
}  # fmt: skip


def with_preset(values: Any, field: str, presets: dict[str, dict[str, Any]]) -> Any:
    """Put the named preset's values under the ones given explicitly."""
    if not isinstance(values, dict):
        return values
    name = values.get(field, "toy")
    if not isinstance(name, str) or name not in presets:
        raise ValueError(f"{field} ({shown(name)}) must be one of {', '.join(presets)}")
    return {**presets[name], **values}
