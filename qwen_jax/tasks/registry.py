"""The tasks by name. To add one, write its file and name its loader in `_LOADERS`.

A loader takes the path of the benchmark's files, and as keyword parameters those of `Options` that
make sense for it: `style` and `limit` always, `num_shots`, `max_tokens`, `num_answers` and `limits`
where it has them.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from qwen_jax.tasks import gsm8k, mmlu
from qwen_jax.tasks.code import humaneval, mbpp
from qwen_jax.tasks.ifeval import ifeval
from qwen_jax.tasks.sandbox.sandbox import Limits
from qwen_jax.tasks.task import Style, Task

_LOADERS: dict[str, Callable[..., Task]] = {
    "gsm8k": gsm8k.load,
    "mmlu": mmlu.load,
    "humaneval": humaneval.load,
    "mbpp": mbpp.load,
    "ifeval": ifeval.load,
}
NAMES = tuple(_LOADERS)


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of all tasks. None is a task's own default."""

    style: Style = "plain"
    num_shots: int | None = None
    limit: int | None = None
    max_tokens: int | None = None  # a task that scores choices does not need it
    num_answers: int = 1  # more than one only where answers are programs, for pass@k
    limits: Limits = Limits()  # of a program in the sandbox


def load(text: str, *, options: Options) -> Task:
    """The task that `text` names as `name=path`.

    Raises `ValueError` for an unknown name, for an option that the task does not have, and for
    files that are missing or not the benchmark's.
    """
    name, equals, path = text.partition("=")
    if not equals or name not in _LOADERS:
        raise ValueError(f"{text!r} must be NAME=PATH with a name of {', '.join(_LOADERS)}")
    load_task = _LOADERS[name]
    return load_task(
        path, **_arguments(name, options, set(inspect.signature(load_task).parameters))
    )


def _arguments(name: str, options: Options, parameters: set[str]) -> dict[str, Any]:
    """The options that the loader of `name` has parameters for."""
    given: dict[str, Any] = {"style": options.style, "limit": options.limit}
    if options.num_shots and "num_shots" not in parameters:
        raise ValueError(f"{name} is asked without worked examples; leave shots out, or 0")
    if options.num_answers != 1 and "num_answers" not in parameters:
        raise ValueError(
            f"{name} takes one answer to an item, not {options.num_answers}; run it by itself"
        )
    for option in ("num_shots", "max_tokens", "num_answers", "limits"):
        value = getattr(options, option)
        if option in parameters and value is not None:
            given[option] = value
    return given
