"""Training methods: one file each, whose `train_step` reads top to bottom."""
