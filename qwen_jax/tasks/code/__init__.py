"""Benchmarks whose answers are programs, graded by running tests in the sandbox."""
