"""Benchmarks from files and lm-evaluation-harness, run on any evaluation backend."""
