"""Grouped matrix products, whose rows are multiplied with their own group's matrix.

api.py declares the implementations: reference.py (every platform), megablox.py (TPU), and
hopper.py with hopper_kernels.py (GPUs of compute capability 9.0).
"""
