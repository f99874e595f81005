"""Pure maths on tensors: noise schedule, forward process, advantage, losses."""
