"""What a run will cost, computed from its config alone: parameters, FLOPs, memory, traffic, time. Networks are
built without memory."""
