"""What one device does with the networks of a config, measured: `tools/benchmark.py` prints it."""
