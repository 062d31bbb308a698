"""The benchmarks by name."""

from dataclasses import dataclass
from typing import Any

from qwen_jax.tasks import code, gsm8k, ifeval, mmlu, sandbox
from qwen_jax.tasks.task import Style, Task

_LOADERS = {
    "gsm8k": gsm8k.load,
    "mmlu": mmlu.load,
    "humaneval": code.load_humaneval,
    "mbpp": code.load_mbpp,
    "ifeval": ifeval.load,
}
_WITHOUT_SHOTS = ("humaneval", "ifeval")
_PROGRAMS = ("humaneval", "mbpp")
_KS = (1, 10, 100)  # of pass@k, as far as there are answers; arXiv 2107.03374's


@dataclass(frozen=True, kw_only=True)
class Options:
    """How benchmarks are put to a model; None is what is usual for each."""

    style: Style = "plain"
    num_shots: int | None = None
    limit: int | None = None
    max_tokens: int | None = None
    num_answers: int = 1  # of those that run programs
    limits: sandbox.Limits = sandbox.Limits()


def load(text: str, *, options: Options) -> Task:
    """The task written `name=path`.

    Raises `ValueError` for an unknown name, for options that the task does not have, and for what
    its files lack.
    """
    name, equals, path = text.partition("=")
    if not equals or name not in _LOADERS:
        raise ValueError(f"{text!r} must be NAME=PATH with a name of {', '.join(_LOADERS)}")
    given: dict[str, Any] = {"style": options.style, "limit": options.limit}
    if options.num_shots is not None:
        if name in _WITHOUT_SHOTS and options.num_shots:
            raise ValueError(f"{name} is asked without worked examples; leave shots out, or 0")
        if name not in _WITHOUT_SHOTS:
            given["num_shots"] = options.num_shots
    if options.max_tokens is not None and name != "mmlu":
        given["max_tokens"] = options.max_tokens
    if name in _PROGRAMS:
        given |= {
            "limits": options.limits,
            "num_answers": options.num_answers,
            "ks": tuple(k for k in _KS if k <= options.num_answers),
        }
    elif options.num_answers != 1:
        raise ValueError(
            f"{name} takes one answer to an item, not {options.num_answers}; run it by itself"
        )
    return _LOADERS[name](path, **given)
