"""`launch/benchmark.py faults`: what the trainer survives, and what that costs."""
