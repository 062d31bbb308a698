"""Products of activations with quantised matrices.

api.py declares the implementations. Two of its kernels are for one case only, decoding a small
batch on one GPU, where the time is that of reading the weights:

- row_kernels.py: up to 64 bfloat16 rows times input-major int8, int4 or fp8 values. One request
  of the 7B decoded in 5.25 ms a step with int8 and 3.77 ms with int4, 1.03 and 1.44 times as fast
  as with bfloat16.
- packed_words_kernel.py with ptx.py: up to 8 rows times matrices in 32-bit packed words
  (`qwen_jax/quant/packed_words.py`). The same request decoded in 3.44 ms a step with int8 and
  2.38 ms with int4, 1.57 and 2.27 times as fast as with bfloat16. fp8 was not measured with the
  tuning that is set.

The tables are in docs/experiments/quantisation.md (NVIDIA H100 80GB HBM3).
"""
