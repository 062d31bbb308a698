"""`python -m qwen_jax.cli`: the same as `qwen-jax`."""

from qwen_jax import cli

cli.main()
