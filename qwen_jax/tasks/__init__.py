"""Benchmarks: one `Task` each, with prompts, grades and rewards; `registry` names them."""
