"""Attention over pages of a KV cache, for decoding and for chunks of prompts.

kv_pages.py holds the pages; api.py declares the implementations: reference.py (every platform),
gpu.py (with triton_blocks.py, which the small-batch decode kernels use too) and tpu.py.
"""
