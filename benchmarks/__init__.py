"""Benchmarks: pytest-benchmark cases, and `python -m benchmarks.report` for the comparison."""
