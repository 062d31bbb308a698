"""Operations with several implementations each, chosen by platform, shape and dtype.

attention         attention over whole sequences; paged/ over pages of a KV cache
grouped_matmul    a matrix product whose rows belong to groups, for mixtures of experts
quantized_matmul  products with quantised matrices
top_k_top_p       the score thresholds of top-k, top-p and min-p sampling
registry.py       how an operation declares its implementations, and how one is chosen
"""
