"""`launch/benchmark.py pipeline`, the data pipeline beside its peers; and `launch/pipeline_faults.py`."""
