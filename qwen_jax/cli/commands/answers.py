"""Commands that answer one prompt, a chat, or a file of prompts."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from configs.engine import EngineConfig
from qwen_jax.cli import compose
from qwen_jax.cli.apps import Dtype, Flat, Positional, app

_ENGINE = EngineConfig()
_ALONE = EngineConfig(num_slots=1)


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """The model, its dtype and mesh, and its draft model."""

    model: Annotated[str, tyro.conf.arg(aliases=["-m"])]
    """Hugging Face folder, native checkpoint, or a training run's output (its latest step)."""
    dtype: Dtype = "bfloat16"
    """Dtype of the weights and of the arithmetic."""
    mesh: str = ""
    """Axis sizes for several devices, for example tensor=4; by default one device."""
    draft: str = ""
    """A smaller model of the same tokenizer that drafts tokens, for --engine.speculation draft."""
    programs: str = "~/.cache/qwen_jax"
    """Keeps what a GPU or TPU's compiler made for the next start; "" keeps nothing. A folder in
    JAX_COMPILATION_CACHE_DIR goes before it."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Sampling settings. Those not given are taken from the model's generation_config.json."""

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


@app.command
def generate(
    prompt: Positional[str],
    *,
    model_options: Annotated[ModelOptions, Flat],
    sampling: Annotated[Sampling, Flat] = Sampling(),
    engine: EngineConfig = _ALONE,
) -> int:
    """Continue one prompt, printing text as it comes."""
    compose.generate(load_service(model_options, sampling, engine), prompt, write=_write)
    _write("\n")
    return 0


@app.command
def chat(
    *,
    model_options: Annotated[ModelOptions, Flat],
    sampling: Annotated[Sampling, Flat] = Sampling(),
    system: str | None = None,
    engine: EngineConfig = _ALONE,
) -> int:
    """Talk to an instruct model; an empty line or the end of input ends the talk.

    Args:
        system: The system message; by default the chat template's own.
    """

    def read() -> str | None:
        try:
            return input("> ") or None
        except EOFError:
            return None

    service = load_service(model_options, sampling, engine)
    compose.chat(service, system=system, read=read, write=_write)
    return 0


@app.command
def batch(
    input: Positional[str],
    output: Positional[str],
    *,
    model_options: Annotated[ModelOptions, Flat],
    sampling: Annotated[Sampling, Flat] = Sampling(),
    engine: EngineConfig = _ENGINE,
    share: str = "0/1",
    order: Literal["arrival", "input"] = "arrival",
    model_name: tuple[str, ...] = (),
) -> int:
    """Answer every line of a JSONL file; run again, it does only what is missing.

    Lines are OpenAI's batch format (chat, completions, embeddings); or they hold `prompt` or
    `messages`, with sampling settings of their own or `continuations` to be scored; or `input`, to
    be embedded.

    Args:
        input: JSONL to read.
        output: JSONL to write; a line that cannot be served gets an error, and the job goes on.
        sampling: For lines that do not say it themselves.
        share: For several processes: this one's number, from 0, of how many. Each writes its own
            file (out-00000-of-00004.jsonl); `qwen-jax merge` joins them.
        order: Answers as they come, or sorted like the input when all are there.
        model_name: More names that lines may call the model by; the first is written into answers.
    """
    service, summary = compose.batch(
        lambda: load_service(model_options, sampling, engine),
        input,
        output,
        models=(*model_name, Path(model_options.model).resolve().name, model_options.model),
        share=share,
        order=order,
        max_open=4 * engine.num_slots,
    )
    print(
        f"{summary.path}: {summary.answered} answered, {summary.failed} refused, {summary.skipped} "
        f"there already, {summary.generated_tokens} tokens in {summary.seconds:.1f} s"
        f"{_accepted_drafts(service.engine.stats())}"
    )
    return summary.exit_code


@app.command
def merge(input: Positional[str], output: Positional[str], *, shares: int) -> int:
    """Join the files that a batch's shares wrote, in the input's order.

    Args:
        input: The batch's input.
        output: The batch's output as it was given to each share.
        shares: How many there are.
    """
    print(compose.merge(input, output, count=shares))
    return 0


def load_service(
    model_options: ModelOptions, sampling: Sampling, engine: EngineConfig
) -> "compose.Service":
    """The model behind an engine of these settings, with its draft where one is named."""
    return compose.load_service(
        model_options.model,
        settings=engine,
        sampling={name: value for name, value in vars(sampling).items() if value is not None},
        dtype=model_options.dtype,
        mesh=model_options.mesh,
        draft=model_options.draft or None,
        programs=model_options.programs,
    )


def _accepted_drafts(stats: dict[str, float]) -> str:
    """Text of how many draft tokens were accepted; empty where there were none."""
    guessed, accepted = stats["guessed_tokens"], stats["accepted_tokens"]
    return f", {accepted} of {guessed} guessed tokens were right" if guessed else ""


def _write(text: str) -> None:
    print(text, end="", flush=True)
