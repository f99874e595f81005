"""Networks in plain torch, one file a family; they know nothing of ranks, DeepSpeed or FP8."""
