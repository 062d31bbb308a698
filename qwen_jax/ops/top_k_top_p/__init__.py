"""The score thresholds of top-k, top-p and min-p sampling, found without sorting.

api.py declares the implementations: reference.py (every platform, eight passes over the scores)
and gpu.py (a Triton kernel). fixed_point.py has the weights that both sum.
"""
