"""Whether a machine, its GPUs and its network are fit for a run: findings, each with what to do (tools/doctor.py)."""
