"""On-Policy Adversarial Flow Distillation of causal video diffusion students, at DeepSpeed scale."""

__version__ = "0.1.0"
