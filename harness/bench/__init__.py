"""Benchmarks: each a command `python -m harness.bench.NAME`, its figures in the form of `harness/bench/report.py`."""
