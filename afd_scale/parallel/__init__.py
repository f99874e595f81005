"""Everything that knows of ranks: start-up, the DeepSpeed engines, operations on sharded parameters."""
