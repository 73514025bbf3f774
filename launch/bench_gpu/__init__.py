"""What `launch/gpu_check.py` times, how fast that could be, and what of it fits into the time that there is."""
