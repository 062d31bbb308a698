"""Attention over whole sequences, on one device, over heads and rows, and over spread sequences.

api.py declares the implementations: reference.py (every platform), cudnn.py (GPU) and splash.py
(TPU). sharded.py runs them on each device's heads; context_parallelism.py over the mesh's `context`
axis. paged/ is attention over pages of a KV cache.
"""
