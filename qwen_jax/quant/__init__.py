"""Formats of quantised weights for inference: int8, int4 and fp8 values with scales.

array.py is the array type: quantise, dequantise, pack, shard. `qwen_jax/ops/quantized_matmul`
multiplies with it.

packed_words.py is for one case only: decoding up to 8 rows on one GPU. It packs a matrix into
32-bit words, outputs first, in the order in which a GPU's matrix units take them. With it, one
request of the 7B was measured to decode in 3.44 ms a step with int8 and 2.38 ms with int4, against
5.25 and 3.77 ms with input-major values (docs/experiments/quantisation.md, NVIDIA H100).
"""
