"""Commands on files: tokenizers, conversion, checkpoints."""

import re
from typing import Literal

from configs.data import DataConfig
from qwen_jax.cli import compose
from qwen_jax.cli.apps import Dtype, Positional, app, checkpoint_app, convert_app, tokenizer_app


@tokenizer_app.command(name="train")
def tokenizer_train(
    paths: Positional[tuple[str, ...]],
    *,
    output: str,
    kind: Literal["bpe", "sentencepiece"] = "bpe",
    vocab_size: int = 32768,
    text_field: str = "text",
) -> int:
    """Train a tokenizer with Qwen's 22 control tokens on text files, JSONL or parquet.

    Args:
        paths: Files and folders of text.
        output: Folder to write; transformers' AutoTokenizer loads it.
        kind: Byte-level BPE as Qwen's, or SentencePiece.
        vocab_size: Tokens in all, control tokens included.
        text_field: The field of JSONL and parquet rows that holds the text.
    """
    from qwen_jax.text import tokenizer_training as training

    texts = compose.texts(DataConfig(paths=tuple(paths), text_field=text_field, eval_fraction=0.0))
    train = {"bpe": training.train_bpe, "sentencepiece": training.train_sentencepiece}[kind]
    tokenizer = train(texts, vocab_size=vocab_size)
    tokenizer.save(output)
    print(f"{output}: {kind}, {tokenizer.vocab_size} tokens, fingerprint {tokenizer.fingerprint}")
    return 0


@convert_app.command(name="import")
def convert_import(
    source: Positional[str], output: Positional[str], *, max_memory: str | None = None
) -> int:
    """Convert a Hugging Face folder into a native checkpoint, a slice of a tensor at a time.

    Run again after an interruption, it goes on where it was.

    Args:
        source: Folder with config.json and safetensors (or pytorch_model.bin, where torch is).
        output: The checkpoint to write.
        max_memory: Bound on resident memory, for example 2GB or 1500MiB.
    """
    from qwen_jax.checkpoint.huggingface import importer
    from qwen_jax.cli import conversion_progress

    with conversion_progress.progress_bar() as bar:
        importer.import_checkpoint(
            source,
            output,
            max_memory=_bytes(max_memory),
            on_plan=bar.on_plan,
            on_progress=bar.on_progress,
        )
    print(f"{output}: imported from {source}")
    return 0


@convert_app.command(name="export")
def convert_export(
    source: Positional[str],
    output: Positional[str],
    *,
    dtype: Dtype | None = None,
    max_shard: str = "5GB",
    max_memory: str | None = None,
) -> int:
    """Convert a native checkpoint or a training output into a Hugging Face folder.

    Args:
        source: Native checkpoint, or a training run's output (its latest step).
        output: The folder to write; transformers loads it.
        dtype: Dtype of the tensors; by default the one they are stored in.
        max_shard: Largest safetensors file.
        max_memory: Bound on resident memory, for example 2GB or 1500MiB.
    """
    from qwen_jax.checkpoint.huggingface import exporter
    from qwen_jax.cli import conversion_progress

    with conversion_progress.progress_bar() as bar:
        exporter.export_checkpoint(
            source,
            output,
            dtype=dtype,
            max_shard_bytes=_bytes(max_shard),
            max_memory=_bytes(max_memory),
            on_plan=bar.on_plan,
            on_progress=bar.on_progress,
        )
    print(f"{output}: exported from {source}")
    return 0


@app.command(name="quantize")
def quantize(
    model: Positional[str],
    output: Positional[str],
    *,
    weights: Literal["int8", "int4", "fp8"] = "int8",
    group_size: int | None = None,
    output_layer: Literal["int8", "keep"] = "int8",
    text: str | None = None,
    dtype: Dtype = "bfloat16",
) -> int:
    """Round a checkpoint's weights to fewer bits for inference, and measure the loss it costs.

    Args:
        model: Hugging Face folder, native checkpoint, or a training run's output.
        output: The native checkpoint to write; every command that answers loads it.
        weights: Format of the layers' kernels: one byte, half a byte, or 8-bit floating point.
        group_size: Inputs that share a scale, 32, 64 or 128; by default all (a scale a channel).
        output_layer: The projection to the vocabulary, the embedding where tied: int8, or kept.
        text: A file of text: its cross-entropy is printed before and after.
        dtype: Dtype of the arithmetic in which the loss is measured.
    """
    from qwen_jax.analysis import quantisation
    from qwen_jax.checkpoint.quantised import quantised_params
    from qwen_jax.cli import conversion_progress

    settings = quantised_params.Settings(
        weights=weights, group_size=group_size, output=output_layer
    )
    with conversion_progress.progress_bar() as bar:
        summary = quantisation.quantise_checkpoint(
            model, output, settings, text=text, dtype=dtype, on_progress=bar.on_progress
        )
    print(f"{output}: {model} in {weights}, {summary}")
    return 0


@checkpoint_app.command(name="verify")
def checkpoint_verify(path: Positional[str]) -> int:
    """Read a checkpoint from end to end and name what is damaged; 0 whole, 2 not.

    Args:
        path: Native checkpoint, a step of a training run, or the run's output (its newest step).
    """
    from qwen_jax.cli import checkpoint_tables

    return checkpoint_tables.show_verification(path)


@checkpoint_app.command(name="list")
def checkpoint_list(output: Positional[str]) -> int:
    """List the checkpoints of a training run; 2 where the newest is not whole.

    Args:
        output: The run's output.
    """
    from qwen_jax.cli import checkpoint_tables

    return checkpoint_tables.show_steps(output)


def _bytes(text: str | None) -> int | None:
    """`2GB` (10^9), `1500MiB` (2^20) or a plain number of bytes."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([KMGT])(i?)B?)?B?", text, re.IGNORECASE)
    if match is None:
        raise ValueError(f"{text!r} is not a size; write for example 2GB, 1500MiB or 2000000000")
    number, unit, binary = match.groups()
    base = 1024 if binary else 1000
    return int(float(number) * base ** (" KMGT".index(unit.upper()) if unit else 0))
