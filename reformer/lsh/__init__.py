"""LSH attention: hashing, the oracle, the portable fast path, the fused one, and the one door, dispatch.py."""
