"""`launch/benchmark.py pipeline`, the data pipeline beside its peers; and `pipeline-faults`, what it survives."""
