"""Commands that measure a model on benchmarks."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from configs.engine import EngineConfig
from configs.sampling import SamplingParams
from qwen_jax.cli import compose
from qwen_jax.cli.apps import Flat, Positional, app
from qwen_jax.cli.commands.answers import ModelOptions, Sampling, load_service


@dataclass(frozen=True, kw_only=True)
class BenchmarkOptions:
    """Prompts of benchmarks."""

    style: Literal["plain", "chat"] = "plain"
    """As text to go on with, or as a conversation, by the model's chat template."""
    shots: int | None = None
    """Worked examples before each question; by default as many as is usual."""
    limit: int | None = None
    """Only so many items (of MMLU: of each subject)."""
    max_tokens: int | None = None
    """Most tokens of an answer; by default what the benchmark needs."""
    answers: int = 1
    """Answers to each problem of HumanEval and MBPP, for pass@1, pass@10 and pass@100."""


@dataclass(frozen=True, kw_only=True)
class ProgramLimits:
    """Limits of programs that answer HumanEval and MBPP."""

    seconds: float = 5.0
    """Time for one program."""
    memory_mib: int = 2048
    """Address space of one program."""
    isolation: Literal["full", "limits"] = "full"
    """full: no network, processes, or files of others. limits: time and sizes only."""


_BENCHMARKS, _PROGRAMS, _ENGINE = BenchmarkOptions(), ProgramLimits(), EngineConfig()


@app.command
def evaluate(
    tasks: Positional[tuple[str, ...]],
    *,
    model_options: Annotated[ModelOptions, Flat],
    output: str,
    benchmarks: Annotated[BenchmarkOptions, Flat] = _BENCHMARKS,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    programs: ProgramLimits = _PROGRAMS,
    engine: EngineConfig = _ENGINE,
) -> int:
    """Measure a model on benchmarks from files; run again, it asks only what is missing.

    NAME=PATH, of gsm8k (folder with test.jsonl and train.jsonl), mmlu (mmlu.zip or its folder),
    humaneval, mbpp and ifeval (JSONL or folder). HumanEval and MBPP run programs that the model
    wrote: read docs/evaluation.md first.

    Args:
        tasks: For example gsm8k=data/gsm8k mmlu=data/mmlu.zip.
        output: Folder for results (NAME.json) and all answers (NAME.samples.jsonl).
        temperature: 0 is greedy.
        top_p: Keep the likeliest tokens that together reach this probability.
        seed: Same seed, same answers.
    """
    from qwen_jax.tasks import registry as tasks_lib
    from qwen_jax.tasks.sandbox.sandbox import Limits

    if not tasks:
        raise ValueError("name at least one task, as NAME=PATH; --help lists them")
    if benchmarks.answers > 1 and temperature == 0:
        raise ValueError(
            f"answers={benchmarks.answers} to a problem would all be the same with temperature=0; "
            f"give a temperature, 0.2 for pass@1 and 0.8 for pass@100"
        )
    limits = Limits(
        seconds=programs.seconds, memory=programs.memory_mib * 2**20, isolation=programs.isolation
    )
    options = tasks_lib.Options(
        style=benchmarks.style, num_shots=benchmarks.shots, limit=benchmarks.limit,
        max_tokens=benchmarks.max_tokens, num_answers=benchmarks.answers, limits=limits,
    )  # fmt: skip
    read = [
        tasks_lib.load(text, options=options) for text in tasks
    ]  # before the model, which is slow
    compose.evaluate(
        load_service(model_options, Sampling(), engine),
        read,
        output=output,
        sampling=SamplingParams(temperature=temperature, top_p=top_p, seed=seed),
        subject=_subject(model_options),
    )
    return 0


@app.command
def lm_eval(
    tasks: Positional[tuple[str, ...]],
    *,
    model_options: Annotated[ModelOptions, Flat],
    output: str,
    include_path: str | None = None,
    style: Literal["plain", "chat"] = "plain",
    shots: int | None = None,
    limit: int | None = None,
    engine: EngineConfig = _ENGINE,
) -> int:
    """Run tasks of lm-evaluation-harness (the extra `eval`), which fetches what they need itself.

    Args:
        tasks: Names that the harness knows.
        output: JSON file for its results.
        include_path: Folder with task files of your own.
        style: chat applies the chat template; shots are then turns.
        shots: Worked examples before each question; by default the task's.
        limit: Only so many items of each task.
    """
    subject = _subject(model_options)
    results = compose.lm_eval(
        lambda: load_service(model_options, Sampling(), engine), tasks, name=model_options.model,
        style=style, include_path=include_path, num_shots=shots, limit=limit,
    )  # fmt: skip
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    Path(output).write_text(json.dumps({"subject": subject, **results}, indent=2) + "\n")
    print(f"{output}: {', '.join(results['results'])}")
    return 0


def _subject(model_options: ModelOptions) -> dict[str, str]:
    """The description of the model that results are stored under."""
    return {"model": model_options.model, "dtype": model_options.dtype}
