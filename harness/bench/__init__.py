"""Benchmarks: each a command `python -m harness.bench.NAME`, all with figures of one form (`harness/bench/report.py`)."""
