"""Triton kernels for one case: one row of Qwen2.5 0.5B in bfloat16 on one GPU.

A layer of so small a model is bound by the launches of its kernels, not by reading. Here a layer is
one kernel, and the last norm with the LM head and the argmax are two. One request is answered at
0.728 ms a token in place of 0.932 ms by XLA with the same output-major weights, and 1.14 ms with
input-major ones (H100; docs/experiments/decoding.md, "0.5B at batch 1").

Everything else is XLA's: at four rows it takes half the time of these kernels; larger models,
float32, meshes, experts, dual-chunk attention and int8 pages were not measured or are not served.
`support.unsupported` and `qwen_jax/decode/small_batch_step.py` say so to the programs. The kernels
themselves take up to eight rows.
"""
