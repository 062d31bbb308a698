"""Quantised weights for inference: fewer bytes a token, activations and arithmetic as they were.

array    the arrays: int8, int4, fp8 with scales; quantise and dequantise
product  the einsum that takes them in place of a kernel
kernels  products of a few rows on a GPU
tree     which parameters of a model are quantised; shardings of the pieces
"""
