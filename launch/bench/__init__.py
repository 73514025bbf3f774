"""What all benchmarks share: a measurement in a process of its own, and the peers that ours is measured against."""
