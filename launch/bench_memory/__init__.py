"""`launch/benchmark.py memory`: peak memory of a training step, by length and by depth."""
