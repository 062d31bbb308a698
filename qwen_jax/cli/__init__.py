"""`qwen-jax`: the composition root. Commands import what they need when they run.

Exit codes: 0 done, 1 done but for records that were refused (each is named), 2 a user's error, 3
training diverged, 75 interrupted or without one of its processes: start it again, 130 stopped from
the keyboard.
"""

import os
import sys

from qwen_jax.cli.apps import app, checkpoint_app, convert_app, registry, tokenizer_app, train_app

# Each adds its commands.
from qwen_jax.cli.commands import answers, evaluation, files, runs, serving  # noqa: F401

app.command(train_app, name="train", help="Train a recipe; any field: --data.paths ...")
app.command(convert_app, name="convert", help="Hugging Face folders to and fro.")
app.command(checkpoint_app, name="checkpoint", help="List and verify checkpoints.")
app.command(tokenizer_app, name="tokenizer", help="Train tokenizers.")


def main() -> None:
    """Entry point of the console script."""
    try:
        code = app.cli(
            prog="qwen-jax",
            description="Qwen2.5 in JAX: train, convert, infer.",
            registry=registry(),
        )
    except BrokenPipeError:  # the reader of our output left; nothing is left to say to it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except Exception as error:  # a user's error, or one with a code of its own, is one message
        if not isinstance(error, ValueError | OSError) and not hasattr(error, "exit_code"):
            raise
        print(f"qwen-jax: {error}", file=sys.stderr)
        code = getattr(error, "exit_code", 2)
    except KeyboardInterrupt:
        print("qwen-jax: stopped", file=sys.stderr)
        code = 130
    sys.exit(code)
