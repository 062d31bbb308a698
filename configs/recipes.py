"""Training recipes: whole runs by name, to be given data and an output, and changed field by field.

Batch and learning rate of the larger runs follow the public recipes of models of their size
(Llama 2, arXiv 2307.09288, section 2.2: 4 million tokens a step, peak 3e-4, cosine to a tenth).
None of them has been run to its end here; `quickstart` has.
"""

from collections.abc import Callable

from configs import schema


def quickstart() -> schema.Train:
    """A tiny model on any folder of text: minutes on two CPU cores."""
    return schema.Train(
        model="tiny",
        num_steps=300,
        batch_size=16,
        compute_dtype="float32",
        remat="none",
        loss_chunk=256,
        log_every_steps=10,
        eval_every_steps=50,
        eval_batches=4,
        data=schema.Data(sequence_length=256),
        optimizer=schema.Optimizer(
            peak_learning_rate=3e-3, schedule="wsd", warmup_steps=20, decay_steps=60
        ),
        checkpoint=schema.Checkpoint(every_steps=50, keep=2),
    )


def pretrain_0_5b() -> schema.Train:
    """Qwen2.5-0.5B from random weights: 0.5 million tokens a step, 10.5 billion in all.

    6 x 0.5e9 x 10.5e9 operations and attention: about a day on one H100 at 400 TFLOP/s.
    """
    return schema.Train(
        model="qwen2.5-0.5b",
        num_steps=20_000,
        batch_size=128,
        accumulate_steps=16,
        eval_every_steps=500,
        data=schema.Data(sequence_length=4096, worker_count=4, prefetch=64),
        optimizer=schema.Optimizer(
            peak_learning_rate=6e-4, schedule="wsd", warmup_steps=500, decay_steps=4000
        ),
        checkpoint=schema.Checkpoint(every_steps=500, keep=3, keep_every_steps=5000),
    )


def pretrain_7b() -> schema.Train:
    """Qwen2.5-7B from random weights on a pod: 4 million tokens a step, 1 trillion in all."""
    return schema.Train(
        model="qwen2.5-7b",
        num_steps=240_000,
        batch_size=1024,
        eval_every_steps=1000,
        data=schema.Data(sequence_length=4096, worker_count=4, prefetch=64),
        optimizer=schema.Optimizer(peak_learning_rate=3e-4, schedule="cosine", warmup_steps=2000),
        mesh=schema.Mesh(fsdp=-1),
        checkpoint=schema.Checkpoint(every_steps=1000, keep=3, keep_every_steps=20_000),
    )


def finetune() -> schema.Train:
    """Go on training a pretrained model (`init_from`) on text of one's own, gently."""
    return schema.Train(
        model="qwen2.5-0.5b",
        num_steps=1000,
        batch_size=32,
        accumulate_steps=8,
        eval_every_steps=100,
        data=schema.Data(sequence_length=4096),
        optimizer=schema.Optimizer(
            peak_learning_rate=1e-5, schedule="cosine", warmup_steps=50, weight_decay=0.0
        ),
        checkpoint=schema.Checkpoint(every_steps=200, keep=2),
    )


def long_context() -> schema.Train:
    """The last stage of pre-training at 32,768 tokens a row (`init_from`), RoPE base 1e6.

    The Qwen2.5 report (arXiv 2412.15115, section 3.3) goes from 4,096 to 32,768 this way.
    """
    return schema.Train(
        model="qwen2.5-0.5b",
        num_steps=2000,
        batch_size=16,
        accumulate_steps=16,
        eval_every_steps=200,
        eval_batches=8,
        data=schema.Data(sequence_length=32_768, worker_count=4, prefetch=32),
        optimizer=schema.Optimizer(peak_learning_rate=5e-5, schedule="cosine", warmup_steps=100),
        checkpoint=schema.Checkpoint(every_steps=200, keep=2),
    )


RECIPES: dict[str, Callable[[], schema.Train]] = {
    "quickstart": quickstart,
    "pretrain-0.5b": pretrain_0_5b,
    "pretrain-7b": pretrain_7b,
    "finetune": finetune,
    "long-context": long_context,
}


def recipe(name: str) -> schema.Train:
    """The recipe called `name`. Raises `ValueError` with the known names."""
    if name not in RECIPES:
        raise ValueError(f"unknown recipe {name!r}; recipes are {', '.join(RECIPES)}")
    return RECIPES[name]()


def check_complete(config: schema.Train) -> None:
    """Raises `ValueError` where a run lacks data that no recipe names, or has it in a bucket."""
    for name, value, meaning in (
        ("output", config.output, "the folder where the run lives"),
        ("data.paths", config.data.paths, "the text to train on"),
        ("data.tokenizer", config.data.tokenizer, "a folder or file with a tokenizer"),
    ):
        if not value:
            raise ValueError(f"{name} is empty; give {meaning}")
    if remote := [path for path in (*config.data.paths, *config.data.eval_paths) if "://" in path]:
        raise ValueError(
            f"data.paths {remote[0]} is in a bucket; text is read from disks: copy it, or mount "
            f"the bucket (gcsfuse)"
        )
