"""Benchmarks from files, and lm-evaluation-harness, over whatever continues and scores tokens."""
