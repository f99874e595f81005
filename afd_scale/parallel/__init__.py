"""Everything that knows of ranks: start-up, launchers, sequence parallelism."""
