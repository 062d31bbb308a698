"""Asks a task's items, keeps what is answered, and sums up.

`<folder>/<task>.samples.jsonl` has what was asked of what in its first line, then a record for each
item as it is judged; a run started again asks what is missing. `<folder>/<task>.json` has the
metrics, with standard errors.
"""

import collections
import concurrent.futures
import dataclasses
import itertools
import json
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO, TypeVar

from rich import progress

from configs.sampling import SamplingParams
from infer.eval import prompts
from qwen_jax.tasks import aggregate
from qwen_jax.tasks.backend import Backend, Pair, Prompt
from qwen_jax.tasks.task import Answer, Item, Task

_Question = TypeVar("_Question", Pair, Prompt)


@dataclass(frozen=True)
class Result:
    """What a run found. Metrics by name; those of each group where the task has groups."""

    task: str
    metrics: dict[str, aggregate.Estimate]
    groups: dict[str, dict[str, aggregate.Estimate]]
    count: int  # items
    truncated: int  # items of which the beginning was cut off, as the model could not hold it

    def as_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclass
class _Asked:
    """An item's questions to the backend, and what has come."""

    item: Item
    context: tuple[int, ...]
    cut: int  # tokens cut off its beginning
    num_parts: int
    parts: dict[int, Any] = field(default_factory=dict)


def run(
    backend: Backend,
    task: Task,
    folder: str | Path,
    *,
    sampling: SamplingParams,
    subject: Mapping[str, Any],
    show_progress: bool = True,
) -> Result:
    """`subject` says what is evaluated (model, dtype ...): answers of another are not mixed in.

    `sampling` is how answers are drawn; `max_tokens` is the task's, each answer has a seed of its
    own, made of the seed and the item's id. Contexts that do not fit lose their beginning, as in
    lm-evaluation-harness; the result counts them. Raises `ValueError` where the folder holds
    another run's answers, and where not even the answer fits.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{task.name}.samples.jsonl"
    head = _head(task, sampling, subject)
    records = _resume(path, head)
    missing = [item for item in task.items if item.id not in records]
    with path.open("a", encoding="utf-8") as out, _bar(show_progress) as bar:
        line = bar.add_task(task.name, total=len(task.items), completed=len(records))
        for record in _records(backend, task, missing, sampling=sampling):
            _write(out, record)
            records[record["id"]] = record
            bar.advance(line)
    result = summarise(task, [records[item.id] for item in task.items])
    summary = {**head, **task.facts, **result.as_json()}
    (folder / f"{task.name}.json").write_text(json.dumps(summary, indent=2) + "\n")
    return result


def summarise(task: Task, records: Sequence[Mapping[str, Any]]) -> Result:
    """Metrics over all records, and over those of each group."""
    by_group = collections.defaultdict(list)
    for record in records:
        by_group[record["group"]].append(record)
    groups = {name: _estimates(members) for name, members in by_group.items() if name}
    return Result(
        task=task.name,
        metrics=_estimates(records),
        groups=groups,
        count=len(records),
        truncated=sum(record["cut"] > 0 for record in records),
    )


def _estimates(records: Sequence[Mapping[str, Any]]) -> dict[str, aggregate.Estimate]:
    names = records[0]["metrics"]
    return {name: aggregate.estimate([r["metrics"][name] for r in records]) for name in names}


def _head(task: Task, sampling: SamplingParams, subject: Mapping[str, Any]) -> dict[str, Any]:
    head = {
        "task": task.name,
        "asked": task.fingerprint,
        "style": task.style,
        "subject": dict(subject),
        "sampling": dataclasses.asdict(sampling),
    }
    return json.loads(json.dumps(head))  # as it will be read back


def _resume(path: Path, head: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Records of an earlier run, by id; writes `head` where there was none.

    A last line that was cut is dropped. Raises `ValueError` for another run's file.
    """
    content = path.read_bytes() if path.exists() else b""
    whole = content[: content.rfind(b"\n") + 1]
    lines = [json.loads(line) for line in whole.splitlines()]
    if not lines:
        path.write_text(json.dumps(head) + "\n", encoding="utf-8")
        return {}
    differs = sorted(key for key in head if lines[0].get(key) != head[key])
    if differs:
        raise ValueError(
            f"{path} holds answers of another run: its {', '.join(differs)} differ; name another "
            f"folder, or move the file away"
        )
    if whole != content:
        path.write_bytes(whole)
    return {record["id"]: record for record in lines[1:]}


def _records(
    backend: Backend, task: Task, items: Sequence[Item], *, sampling: SamplingParams
) -> Iterator[dict[str, Any]]:
    """Judged items, in the order in which they are ready.

    Judges run beside the model, in threads: those of programs wait for processes, which have half
    of the processors, so that a program is not out of time for want of one.
    """
    ask = _ask_choices if task.items[0].choices else _ask_texts
    with concurrent.futures.ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // 2)) as pool:
        judging: set[concurrent.futures.Future] = set()
        for asked in ask(backend, task, items, sampling=sampling):
            judging.add(pool.submit(_record, backend, task, asked))
            ready = {future for future in judging if future.done()}
            judging -= ready
            yield from (future.result() for future in ready)
        for future in concurrent.futures.as_completed(judging):
            yield future.result()


def _ask_choices(
    backend: Backend, task: Task, items: Sequence[Item], *, sampling: SamplingParams
) -> Iterator[_Asked]:
    del sampling
    owners: dict[int, tuple[_Asked, int]] = {}

    def questions() -> Iterator[Pair]:
        for item in items:
            own = prompts.pairs(item, task, tokenizer=backend.tokenizer, prefix=backend.prefix_id)
            fitting = [_fit_pair(pair, backend.max_length, item.id) for pair in own]
            cut = max(len(a.context) - len(b.context) for a, b in zip(own, fitting, strict=True))
            yield from _own(_Asked(item, fitting[0].context, cut, len(own)), fitting, count, owners)

    count = itertools.count()
    yield from _collect(backend.loglikelihood(questions()), owners)


def _ask_texts(
    backend: Backend, task: Task, items: Sequence[Item], *, sampling: SamplingParams
) -> Iterator[_Asked]:
    owners: dict[int, tuple[_Asked, int]] = {}
    room = backend.max_length - task.max_tokens
    if room < 1:
        raise ValueError(
            f"{task.name}: max_tokens={task.max_tokens} leaves no room for a prompt in the "
            f"model's {backend.max_length} tokens; lower it"
        )

    def questions() -> Iterator[Prompt]:
        for item in items:
            own = prompts.context(item, task, tokenizer=backend.tokenizer, prefix=backend.prefix_id)
            tokens = own[-room:]
            asked = _Asked(item, tokens, len(own) - len(tokens), task.num_answers)
            drawn = [_sampling(sampling, task, item, part) for part in range(task.num_answers)]
            yield from _own(asked, [Prompt(tokens, d, task.stop) for d in drawn], count, owners)

    count = itertools.count()
    yield from _collect(backend.generate(questions()), owners)


def _sampling(given: SamplingParams, task: Task, item: Item, part: int) -> SamplingParams:
    seed = zlib.crc32(f"{given.seed}:{item.id}:{part}".encode())
    return dataclasses.replace(given, max_tokens=task.max_tokens, seed=seed)


def _own(
    asked: _Asked,
    questions: Sequence[_Question],
    count: Iterator[int],
    owners: dict[int, tuple[_Asked, int]],
) -> Iterator[_Question]:
    """Hands out an item's questions, and writes down whose they are."""
    for part, question in enumerate(questions):
        owners[next(count)] = asked, part
        yield question


def _collect(
    answers: Iterator[tuple[int, Any]], owners: dict[int, tuple[_Asked, int]]
) -> Iterator[_Asked]:
    for index, answer in answers:
        asked, part = owners.pop(index)
        asked.parts[part] = answer
        if len(asked.parts) == asked.num_parts:
            yield asked


def _fit_pair(pair: Pair, max_length: int, name: str) -> Pair:
    room = max_length - len(pair.continuation)
    if room < 1:
        raise ValueError(
            f"{name}: a choice of {len(pair.continuation)} tokens does not fit into the model's "
            f"{max_length}"
        )
    return Pair(pair.context[-room:], pair.continuation)


def _record(backend: Backend, task: Task, asked: _Asked) -> dict[str, Any]:
    parts = tuple(asked.parts[i] for i in range(asked.num_parts))
    answer = Answer(scores=parts) if asked.item.choices else Answer(texts=parts)
    shown = [[s.logprob, s.is_greedy] for s in parts] if asked.item.choices else list(parts)
    verdict = task.judge(asked.item, answer)
    return {
        "id": asked.item.id,
        "group": asked.item.group,
        "prompt": backend.tokenizer.decode(asked.context),
        "cut": asked.cut,
        "answers": shown,
        "metrics": verdict.metrics,
        "reasons": verdict.reasons,
    }


def _write(out: TextIO, record: Mapping[str, Any]) -> None:
    out.write(json.dumps(record) + "\n")
    out.flush()


def _bar(show: bool) -> progress.Progress:
    return progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(),
        progress.TimeRemainingColumn(),
        disable=not show,
    )
