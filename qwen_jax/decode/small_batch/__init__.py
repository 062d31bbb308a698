"""Decoding a few rows on a GPU: whole layers as one kernel each, and the output projection."""
