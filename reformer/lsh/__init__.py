"""LSH attention: hashing, the oracle, the portable fast path, and the one door, `lsh_attention`."""

from reformer.lsh.dispatch import lsh_attention

__all__ = ["lsh_attention"]
