"""Evaluation of a backend on a task: asks its items, saves graded answers, estimates metrics.

The first line of `<folder>/<task>.samples.jsonl` says which model was asked what; each further line
is the record of one graded item. A run that is started again asks only the items without a record.
`<folder>/<task>.json` has the metrics with standard errors.
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
from qwen_jax.tasks import estimates, prompt_tokens
from qwen_jax.tasks.backend import Backend, GenerationRequest, ScoringRequest
from qwen_jax.tasks.task import Answer, Item, Task

_Request = TypeVar("_Request", ScoringRequest, GenerationRequest)


@dataclass(frozen=True)
class Result:
    """The metrics of one run by name, over all items and over those of each group."""

    task: str
    metrics: dict[str, estimates.Estimate]
    groups: dict[str, dict[str, estimates.Estimate]]
    count: int  # items
    truncated: int  # items whose prompt lost its beginning, as it did not fit into the model

    def as_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclass
class _Pending:
    """An item whose requests are with the backend, and the results that have come."""

    item: Item
    context: tuple[int, ...]  # the prompt's tokens, as cut to fit
    num_cut: int  # tokens cut off the prompt's beginning
    num_requests: int
    results: dict[int, Any] = field(default_factory=dict)  # by the request's number in the item


_Owners = dict[int, tuple[_Pending, int]]  # index of a request -> its item, its number there


def run(
    backend: Backend,
    task: Task,
    folder: str | Path,
    *,
    sampling: SamplingParams,
    subject: Mapping[str, Any],
    show_progress: bool = True,
) -> Result:
    """The task's metrics for the model behind `backend`; records and metrics go to `folder`.

    `subject` says what is evaluated (model, dtype, ...), so that answers of another model are not
    mixed in. `max_tokens` of `sampling` is replaced by the task's, and its seed by one that each
    answer derives from it and from the item's id. A prompt that does not fit loses its beginning,
    as in lm-evaluation-harness; the result counts them. Raises `ValueError` where the folder holds
    another run's answers, and where not even the answer fits into the model.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{task.name}.samples.jsonl"
    header = _header(task, sampling, subject)
    records = _resume(path, header)
    missing = [item for item in task.items if item.id not in records]
    with path.open("a", encoding="utf-8") as out, _progress_bar(show_progress) as bar:
        line = bar.add_task(task.name, total=len(task.items), completed=len(records))
        for record in _graded_records(backend, task, missing, sampling=sampling):
            _write(out, record)
            records[record["id"]] = record
            bar.advance(line)
    result = summarise(task, [records[item.id] for item in task.items])
    summary = {**header, **task.environment, **result.as_json()}
    (folder / f"{task.name}.json").write_text(json.dumps(summary, indent=2) + "\n")
    return result


def summarise(task: Task, records: Sequence[Mapping[str, Any]]) -> Result:
    """The metrics over all records, and over those of each group."""
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


def _estimates(records: Sequence[Mapping[str, Any]]) -> dict[str, estimates.Estimate]:
    names = records[0]["metrics"]
    return {name: estimates.estimate([r["metrics"][name] for r in records]) for name in names}


def _header(task: Task, sampling: SamplingParams, subject: Mapping[str, Any]) -> dict[str, Any]:
    """The first line of the samples file: which model was asked what, with which settings."""
    header = {
        "task": task.name,
        "asked": task.fingerprint,
        "style": task.style,
        "subject": dict(subject),
        "sampling": dataclasses.asdict(sampling),
    }
    return json.loads(json.dumps(header))  # as it reads back from the file


def _resume(path: Path, header: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The records of an earlier run by item id; a file without any line gets `header`.

    An incomplete last line is dropped. Raises `ValueError` for another run's file.
    """
    content = path.read_bytes() if path.exists() else b""
    complete = content[: content.rfind(b"\n") + 1]
    lines = [json.loads(line) for line in complete.splitlines()]
    if not lines:
        path.write_text(json.dumps(header) + "\n", encoding="utf-8")
        return {}
    differs = sorted(key for key in header if lines[0].get(key) != header[key])
    if differs:
        raise ValueError(
            f"{path} holds answers of another run: its {', '.join(differs)} differ; name another "
            f"folder, or move the file away"
        )
    if complete != content:
        path.write_bytes(complete)
    return {record["id"]: record for record in lines[1:]}


def _graded_records(
    backend: Backend, task: Task, items: Sequence[Item], *, sampling: SamplingParams
) -> Iterator[dict[str, Any]]:
    """The records of the graded items, in the order in which they are ready.

    Answers are graded in threads beside the model. Grading a program waits for its process; half of
    the processors run such processes, so that no program times out for want of a processor.
    """
    scored = bool(task.items[0].choices)
    answers = (
        _scored(backend, task, items) if scored else _generated(backend, task, items, sampling)
    )
    with concurrent.futures.ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // 2)) as pool:
        grading: set[concurrent.futures.Future] = set()
        for pending in answers:
            grading.add(pool.submit(_record, backend, task, pending))
            ready = {future for future in grading if future.done()}
            grading -= ready
            yield from (future.result() for future in ready)
        for future in concurrent.futures.as_completed(grading):
            yield future.result()


def _scored(backend: Backend, task: Task, items: Sequence[Item]) -> Iterator[_Pending]:
    """The items with a score for each choice, in the order in which they are complete."""
    owners: _Owners = {}
    indices = itertools.count()

    def requests() -> Iterator[ScoringRequest]:
        for item, prompt in zip(items, task.prompts(items), strict=True):
            whole = prompt_tokens.scoring_requests(
                prompt, tokenizer=backend.tokenizer, prefix_id=backend.prefix_id
            )
            fitting = [_fit(request, backend.max_length, item.id) for request in whole]
            num_cut = max(
                len(a.context) - len(b.context) for a, b in zip(whole, fitting, strict=True)
            )
            pending = _Pending(item, fitting[0].context, num_cut, len(fitting))
            yield from _assign(pending, fitting, indices, owners)

    yield from _collect(backend.loglikelihood(requests()), owners)


def _generated(
    backend: Backend, task: Task, items: Sequence[Item], sampling: SamplingParams
) -> Iterator[_Pending]:
    """The items with their written answers, in the order in which they are complete."""
    owners: _Owners = {}
    indices = itertools.count()
    room = backend.max_length - task.max_tokens
    if room < 1:
        raise ValueError(
            f"{task.name}: max_tokens={task.max_tokens} leaves no room for a prompt in the "
            f"model's {backend.max_length} tokens; lower it"
        )

    def requests() -> Iterator[GenerationRequest]:
        for item, prompt in zip(items, task.prompts(items), strict=True):
            whole = prompt_tokens.encode(
                prompt, tokenizer=backend.tokenizer, prefix_id=backend.prefix_id
            )
            tokens = whole[-room:]
            pending = _Pending(item, tokens, len(whole) - len(tokens), task.num_answers)
            own = [
                GenerationRequest(tokens, _answer_sampling(sampling, task, item, number), task.stop)
                for number in range(task.num_answers)
            ]
            yield from _assign(pending, own, indices, owners)

    yield from _collect(backend.generate(requests()), owners)


def _answer_sampling(
    sampling: SamplingParams, task: Task, item: Item, number: int
) -> SamplingParams:
    """The settings of an item's answer `number`, with a seed of its own."""
    seed = zlib.crc32(f"{sampling.seed}:{item.id}:{number}".encode())
    return dataclasses.replace(sampling, max_tokens=task.max_tokens, seed=seed)


def _assign(
    pending: _Pending, requests: Sequence[_Request], indices: Iterator[int], owners: _Owners
) -> Iterator[_Request]:
    """The item's requests, one by one; `owners` notes the index that the backend gives each."""
    for number, request in enumerate(requests):
        owners[next(indices)] = pending, number
        yield request


def _collect(results: Iterator[tuple[int, Any]], owners: _Owners) -> Iterator[_Pending]:
    """The items of which every request has its result."""
    for index, result in results:
        pending, number = owners.pop(index)
        pending.results[number] = result
        if len(pending.results) == pending.num_requests:
            yield pending


def _fit(request: ScoringRequest, max_length: int, name: str) -> ScoringRequest:
    """The request without the beginning of a context that exceeds `max_length` tokens."""
    room = max_length - len(request.continuation)
    if room < 1:
        raise ValueError(
            f"{name}: a choice of {len(request.continuation)} tokens does not fit into the "
            f"model's {max_length}; raise the engine's max_length"
        )
    return ScoringRequest(request.context[-room:], request.continuation)


def _record(backend: Backend, task: Task, pending: _Pending) -> dict[str, Any]:
    """The record of an item: its prompt, the model's answers, their grade."""
    item = pending.item
    results = tuple(pending.results[number] for number in range(pending.num_requests))
    answer = Answer(scores=results) if item.choices else Answer(texts=results)
    verdict = task.grade(item, answer)
    return {
        "id": item.id,
        "group": item.group,
        "prompt": backend.tokenizer.decode(pending.context),
        "cut": pending.num_cut,
        "answers": [[s.logprob, s.is_greedy] for s in results] if item.choices else list(results),
        "metrics": verdict.metrics,
        "reasons": verdict.reasons,
    }


def _write(out: TextIO, record: Mapping[str, Any]) -> None:
    out.write(json.dumps(record) + "\n")
    out.flush()


def _progress_bar(show: bool) -> progress.Progress:
    return progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(),
        progress.TimeRemainingColumn(),
        disable=not show,
    )
