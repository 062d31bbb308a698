"""`qwen-jax`: the composition root. Commands import what they need when they run.

Exit codes: 0 done, 1 done but for records that were refused (each is named), 2 a user's error, 3
training diverged, 75 interrupted or without one of its processes: start it again, 130 stopped from
the keyboard.
"""

import json
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from configs import launch as launch_configs
from configs import recipes, schema, topologies, xla_flags

if TYPE_CHECKING:
    from infer import generate as generate_lib

Positional = tyro.conf.Positional
Dtype = Literal["float32", "bfloat16"]

app = tyro.extras.SubcommandApp()
tokenizer_app = tyro.extras.SubcommandApp()
convert_app = tyro.extras.SubcommandApp()
train_app = tyro.extras.SubcommandApp()
checkpoint_app = tyro.extras.SubcommandApp()


@app.command
def models() -> int:
    """List the presets: parameters, memory and legal tensor-parallel sizes."""
    from qwen_jax import tables

    tables.show_models()
    return 0


@app.command
def shardings(
    model: Positional[str],
    *,
    mesh: str,
    rules: Literal["train", "decode"] = "train",
) -> int:
    """Show where every parameter goes on a mesh, and what one device holds.

    Args:
        model: A preset's name (`qwen-jax models`).
        mesh: Axis sizes, for example fsdp=4,tensor=2; kv_heads=replicated is understood too.
        rules: Whose rules: training's, or decoding's (weights whole along their width).
    """
    from qwen_jax import tables

    tables.show_shardings(model, mesh=mesh, rules=rules)
    return 0


@app.command
def plan(
    *,
    model: str | None = None,
    recipe: str | None = None,
    topology: str = "any",
    mesh: str = "",
    length: int | None = None,
    rows: int | None = None,
    batch: int | None = None,
    remat: str | None = None,
    purpose: Literal["train", "eval", "decode"] = "train",
    picture: str | None = None,
    compile: bool = False,
    save: str | None = None,
) -> int:
    """Say what a run needs: which slice to rent, mesh, memory and time of a step.

    Args:
        model: A preset's name (`qwen-jax models`); by default the recipe's.
        recipe: A recipe's name (`qwen-jax train --help`): its length, batch and optimizer.
        topology: A slice, such as v5p-128, v6e-256, 2xv5e-256, h100-8 or cpu-8; any ranks slices.
        mesh: Axis sizes, for example fsdp=16,tensor=4; by default every legal one is tried.
        length: Tokens of a row; in decoding, positions of the cache.
        rows: Sequences that a device works on at one time; by default several are tried.
        batch: Sequences of a whole step; by default the recipe's, or what is fastest.
        remat: Rematerialisation policy; by default those without offloading are tried.
        purpose: What runs: a training step, an evaluation, or the decoding of a token.
        picture: File for a picture of memory and sharding, for example plan.png.
        compile: Compile what is recommended for the slice, which need not be here.
        save: Folder for the compiled programs, which `train --executables` then runs.
    """
    if topology == "any" or topologies.parse(topology).chip.platform == "tpu":
        for name, value in xla_flags.WITHOUT_TPU.items():
            os.environ.setdefault(name, value)
    from qwen_jax.plan import command

    request = command.Request(
        model=model, recipe=recipe, topology=topology, mesh=mesh, length=length, rows=rows,
        batch=batch, remat=remat, purpose=purpose,
    )  # fmt: skip
    compiles = compile or save is not None
    if compiles and topology == "any":
        raise ValueError("--compile and --save need a --topology to compile for")
    chosen = command.run(request, picture=picture)
    if compiles:
        from train import ahead_of_time

        ahead_of_time.check(chosen.job, save=save)
    return 0


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
    from qwen_jax import tokenizer_train as training
    from train.data import mixture

    data = schema.Data(paths=tuple(paths), text_field=text_field, eval_fraction=0.0)
    corpora = mixture.open_splits(data).train
    texts = (corpus[number].text for corpus in corpora for number in range(len(corpus)))
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
    from qwen_jax.convert import console, importer

    with console.progress_bar() as bar:
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
    from qwen_jax.convert import console, exporter

    with console.progress_bar() as bar:
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


@checkpoint_app.command(name="verify")
def checkpoint_verify(path: Positional[str]) -> int:
    """Read a checkpoint from end to end and name what is damaged; 0 whole, 2 not.

    Args:
        path: Native checkpoint, a step of a training run, or the run's output (its newest step).
    """
    from qwen_jax import verify

    return verify.show_verification(path)


@checkpoint_app.command(name="list")
def checkpoint_list(output: Positional[str]) -> int:
    """List the checkpoints of a training run; 2 where the newest is not whole.

    Args:
        output: The run's output.
    """
    from qwen_jax import verify

    return verify.show_steps(output)


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """Which model, and how it is held."""

    model: Annotated[str, tyro.conf.arg(aliases=["-m"])]
    """Hugging Face folder, native checkpoint, or a training run's output (its latest step)."""
    dtype: Dtype = "bfloat16"
    """Of the weights held and of the arithmetic."""
    mesh: str = ""
    """Axis sizes for several devices, for example tensor=4; by default one device."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn. What is not given is taken from the model's generation_config.json."""

    max_tokens: int | None = None
    """Most tokens to generate."""
    temperature: float | None = None
    """0 is greedy."""
    top_k: int | None = None
    """Keep the k likeliest tokens; 0 keeps all."""
    top_p: float | None = None
    """Keep the likeliest tokens that together reach this probability."""
    min_p: float | None = None
    """Keep tokens at least this fraction as likely as the likeliest."""
    repetition_penalty: float | None = None
    """Divides the scores of tokens already seen."""
    seed: int | None = None
    """Same seed, same request: same answer, whatever else is in the batch."""


Flat = tyro.conf.arg(name="")  # flags without a prefix


@app.command
def generate(
    prompt: Positional[str],
    *,
    loaded: Annotated[Loaded, Flat],
    sampling: Annotated[Sampling, Flat] = Sampling(),
) -> int:
    """Continue one prompt, printing text as it comes."""
    from infer import generate as generate_lib

    generator, settings = _generator(loaded, sampling)
    request = generate_lib.prompt_request(generator, prompt, settings=settings)
    generate_lib.stream(generator, request, write=_write)
    _write("\n")
    return 0


@app.command
def chat(
    *,
    loaded: Annotated[Loaded, Flat],
    sampling: Annotated[Sampling, Flat] = Sampling(),
    system: str | None = None,
) -> int:
    """Talk to an instruct model; an empty line or the end of input ends the talk.

    Args:
        system: The system message; by default the chat template's own.
    """
    from infer import generate as generate_lib

    generator, settings = _generator(loaded, sampling)

    def read() -> str | None:
        try:
            return input("> ") or None
        except EOFError:
            return None

    generate_lib.chat(generator, settings=settings, system=system, read=read, write=_write)
    return 0


@app.command
def batch(
    input: Positional[str],
    output: Positional[str],
    *,
    loaded: Annotated[Loaded, Flat],
    sampling: Annotated[Sampling, Flat] = Sampling(),
    max_rows: int = 64,
) -> int:
    """Answer every line of a JSONL file; run again, it does only what is missing.

    Lines hold `prompt` or `messages`, and may hold `custom_id` and sampling settings of their own.

    Args:
        input: JSONL to read.
        output: JSONL to write: custom_id, text, token_ids, finish_reason.
        max_rows: Most requests decoded at one time.
    """
    from infer import batch as batch_lib

    generator, settings = _generator(loaded, sampling)
    summary = batch_lib.run(generator, input, output, settings=settings, max_rows=max_rows)
    print(
        f"{output}: {summary.answered} answered, {summary.failed} refused, {summary.skipped} there "
        f"already, {summary.generated_tokens} tokens"
    )
    return summary.exit_code


@app.command
def quickstart(*, output: str = "runs/quickstart", num_steps: int = 300) -> int:
    """All three jobs in minutes on a CPU, with this machine's Python sources for text.

    Args:
        output: Folder for everything that is made.
        num_steps: Training steps.
    """
    from qwen_jax import quickstart as quickstart_lib

    quickstart_lib.run(Path(output), num_steps=num_steps)
    return 0


@app.command
def launch(
    target: Positional[launch_configs.Target],
    *,
    job: Annotated[launch_configs.Launch, tyro.conf.arg(name="")],
    files: str = "launch",
) -> int:
    """Write checked files that start a training run on Cloud TPUs; nothing is contacted.

    Args:
        target: queued-resource (gcloud alone), xpk, or gke (a JobSet).
        files: Folder to write to; the job's name is added.
    """
    from qwen_jax.launch import check, render

    recipe, *flags = job.train_words  # a wrong flag stops here, not after hours in a queue
    tyro.cli(
        schema.Train,
        prog=f"qwen-jax train {recipe}",
        args=[*flags, "--output", job.output],
        default=recipes.recipe(recipe),
        registry=_registry(),
    )
    texts = render.render(job, target=target)
    check.check(texts, job)
    print(render.write(texts, job, folder=Path(files) / job.name))
    return 0


def _train_command(name: str) -> None:
    default = recipes.recipe(name)

    def command(
        config: Annotated[schema.Train, tyro.conf.arg(name="")] = default,
    ) -> int:
        from partitioning import distributed
        from train import pretrain

        with distributed.joined(config.cluster):
            result = pretrain.run(config)
        print(f"{config.output}: {result.status} at step {result.step}")
        return result.exit_code

    command.__doc__ = recipes.RECIPES[name].__doc__
    train_app.command(command, name=name)


def _generator(
    loaded: Loaded, sampling: Sampling
) -> "tuple[generate_lib.Generator, schema.Sampling]":
    from infer import generate as generate_lib
    from partitioning import mesh as mesh_lib

    mesh = mesh_lib.parse(loaded.mesh) if loaded.mesh else None
    generator = generate_lib.load(loaded.model, dtype=loaded.dtype, mesh=mesh)
    given = {name: value for name, value in vars(sampling).items() if value is not None}
    return generator, generate_lib.with_overrides(generator.defaults, given)


def _write(text: str) -> None:
    print(text, end="", flush=True)


def _registry() -> tyro.constructors.ConstructorRegistry:
    """Teaches tyro that a model is written as a preset's name or as a path to a config.json."""
    registry = tyro.constructors.ConstructorRegistry()

    def read(arguments: list[str]) -> str | schema.Model:
        (text,) = arguments
        if not text.endswith(".json"):
            return text
        from configs import huggingface

        values = json.loads(Path(text).read_text(encoding="utf-8"))
        return huggingface.read_model(values, name=Path(text).parent.name)

    @registry.primitive_rule
    def model(info: tyro.constructors.PrimitiveTypeInfo):
        if info.type != str | schema.Model:
            return None
        return tyro.constructors.PrimitiveConstructorSpec(
            nargs=1,
            metavar="PRESET|CONFIG.JSON",
            instance_from_str=read,
            is_instance=lambda value: isinstance(value, str | schema.Model),
            str_from_instance=lambda value: [value if isinstance(value, str) else value.name],
        )

    return registry


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


for _name in recipes.RECIPES:
    _train_command(_name)
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
            registry=_registry(),
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


if __name__ == "__main__":
    main()
