"""A file of prompts to a file of answers, one JSON object a line.

Input lines have `prompt` (text) or `messages` (a conversation), optionally `custom_id` (default
`request-<line number>`) and sampling parameters for this line. Output lines have `custom_id`,
`text`, `token_ids`, `finish_reason`, in the order in which answers come; a line that cannot be
served gives `custom_id` and `error`. A job started again answers only what is missing.
"""

import collections
import dataclasses
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TextIO

import jax
from rich import progress

from configs import schema
from infer import generate
from qwen_jax import generation, tokenizer

_OWN_KEYS = ("prompt", "messages", "custom_id")
_SAMPLING_KEYS = tuple(f.name for f in dataclasses.fields(schema.Sampling))
_HOST_MEMORY = 2 * 2**30  # bytes for caches and activations where the device does not tell its size


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What a run did: lines answered, refused, and found answered already."""

    answered: int
    failed: int
    skipped: int
    generated_tokens: int

    @property
    def exit_code(self) -> int:
        """1 where a line was refused."""
        return 1 if self.failed else 0


@dataclass(frozen=True)
class _Line:
    custom_id: str
    where: str  # file and line number
    record: dict[str, Any] | None  # None: not a JSON object
    problem: str = ""


@dataclass(frozen=True)
class _Job:
    custom_id: str
    request: generation.Request


def run(
    generator: generate.Generator,
    input_path: str | Path,
    output_path: str | Path,
    *,
    settings: schema.Sampling | None = None,
    special: Literal["text", "control"] = "text",
    max_rows: int = 64,
    memory: int | None = None,
    show_progress: bool = True,
) -> Summary:
    """Answers every line of `input_path` that `output_path` does not hold yet.

    `settings` (default: the model's) serve lines that do not set their own. A line without a seed
    gets one of its own, made of `settings.seed` and its custom_id. `memory` is the bytes that a
    batch may take beside the parameters; default: four fifths of what the device has left.
    Raises `ValueError` if two lines share a custom_id, or if the output holds something else.
    """
    settings = settings or generator.defaults
    lines = _read_input(Path(input_path))
    finished = _repair_output(Path(output_path), known={line.custom_id for line in lines})
    missing = [line for line in lines if line.custom_id not in finished]
    answered = failed = tokens = 0
    with Path(output_path).open("a", encoding="utf-8") as out, _bar(show_progress) as bar:
        task = bar.add_task("answers", total=len(missing), rate=0.0)
        jobs = []
        for line in missing:
            try:
                jobs.append(_job(generator, line, settings=settings, special=special))
            except ValueError as error:
                failed += 1
                message = f"{error}".encode("utf-8", "backslashreplace").decode("utf-8")
                _write(out, {"custom_id": line.custom_id, "error": {"message": message}})
                bar.advance(task)
        batches = _batches(generator, jobs, max_rows=max_rows, memory=memory)
        for batch in batches:
            for step in _answers(generator, batch):
                tokens += step.num_tokens
                bar.update(task, rate=tokens / max(bar.tasks[task].elapsed or 0.0, 1e-9))
                if step.record is not None:
                    answered += 1
                    _write(out, step.record)
                    bar.advance(task)
    return Summary(
        answered=answered, failed=failed, skipped=len(lines) - len(missing), generated_tokens=tokens
    )


def _read_input(path: Path) -> list[_Line]:
    lines: list[_Line] = []
    seen: dict[str, str] = {}
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            if not raw.strip():
                continue
            line = _parse(raw, number, where=f"{path}:{number}")
            if line.custom_id in seen:
                raise ValueError(
                    f"{line.where}: custom_id {line.custom_id!r} was used at "
                    f"{seen[line.custom_id]}; answers are told apart by it, give each its own"
                )
            seen[line.custom_id] = line.where
            lines.append(line)
    return lines


def _parse(raw: bytes, number: int, *, where: str) -> _Line:
    default = f"request-{number}"
    try:
        record = json.loads(raw.decode("utf-8"))
    except ValueError as error:  # of decoding, or of JSON
        return _Line(default, where, None, f"not readable as JSON: {error}")
    if not isinstance(record, dict):
        return _Line(default, where, None, f"a JSON object is needed, not {type(record).__name__}")
    custom_id = record.get("custom_id", default)
    if not isinstance(custom_id, str) or not _is_unicode(custom_id):
        return _Line(default, where, None, f"custom_id={custom_id!a} must be a Unicode string")
    return _Line(custom_id, where, record)


def _is_unicode(text: str) -> bool:
    """False for lone surrogates, which JSON can spell and UTF-8 cannot."""
    return not any("\ud800" <= c <= "\udfff" for c in text)


def _job(
    generator: generate.Generator, line: _Line, *, settings: schema.Sampling, special: str
) -> _Job:
    """Raises `ValueError` that names file and line."""
    try:
        return _Job(line.custom_id, _request(generator, line, settings=settings, special=special))
    except ValueError as error:
        raise ValueError(f"{line.where}: {error}") from None


def _request(
    generator: generate.Generator, line: _Line, *, settings: schema.Sampling, special: str
) -> generation.Request:
    record = line.record
    if record is None:
        raise ValueError(line.problem)
    unknown = sorted(set(record) - {*_OWN_KEYS, *_SAMPLING_KEYS})
    if unknown:
        raise ValueError(
            f"unknown keys {unknown}; known: {', '.join((*_OWN_KEYS, *_SAMPLING_KEYS))}"
        )
    if ("prompt" in record) == ("messages" in record):
        raise ValueError("give either prompt or messages")
    prompt = record.get("prompt", record.get("messages"))
    if "prompt" in record and not isinstance(prompt, str):
        raise ValueError(f"prompt must be a text, not {type(prompt).__name__}")
    if "messages" in record and not (
        isinstance(prompt, list) and prompt and all(isinstance(m, dict) for m in prompt)
    ):
        raise ValueError("messages must be a list of objects, at least one")
    own = {"seed": zlib.crc32(f"{settings.seed}:{line.custom_id}".encode())}
    own |= {key: record[key] for key in _SAMPLING_KEYS if key in record}
    settings = generate.with_overrides(settings, own)
    return generate.prompt_request(generator, prompt, settings=settings, special=special)


def _repair_output(path: Path, *, known: set[str]) -> set[str]:
    """The ids answered in an earlier run. Drops a half-written last line, and errors: they are
    tried again. Raises `ValueError` for answers to other questions and unreadable lines."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        return set()
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    kept, finished = [], set()
    for number, raw in enumerate(whole.splitlines(keepends=True), 1):
        where = f"{path}:{number}"
        try:
            record = json.loads(raw)
            custom_id, failed = record["custom_id"], "error" in record
        except (ValueError, KeyError, TypeError):
            raise ValueError(
                f"{where} is not an answer of an earlier run; move the file away, or name another "
                f"output"
            ) from None
        if custom_id not in known:
            raise ValueError(
                f"{where} answers {custom_id!r}, which the input does not ask; move the file away, "
                f"or name another output"
            )
        if not failed:
            kept.append(raw)
            finished.add(custom_id)
    if b"".join(kept) != content:
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_bytes(b"".join(kept))
        temporary.replace(path)
    return finished


def _batches(
    generator: generate.Generator, jobs: Sequence[_Job], *, max_rows: int, memory: int | None
) -> Iterator[list[_Job]]:
    """Jobs of one shape bucket together, the longest first, as many as memory holds."""
    cfg, layout = generator.cfg, generator.layout
    buckets = collections.defaultdict(list)
    for job in jobs:
        buckets[generation.shape(cfg, [job.request], layout=layout)[1:]].append(job)
    memory = _memory_left(generator) if memory is None else memory
    for (prompt, cache), members in sorted(buckets.items(), reverse=True):
        rows = generation.batch_bucket(1, layout=layout)
        while rows < max_rows and memory >= generation.num_bytes(
            cfg, rows=2 * rows, prompt=prompt, cache=cache, dtype=generator.dtype
        ):
            rows *= 2
        for first in range(0, len(members), rows):
            yield members[first : first + rows]


def _memory_left(generator: generate.Generator) -> int:
    devices = [jax.local_devices()[0]]
    if generator.layout is not None:
        devices = list(generator.layout.mesh.local_devices)
    left = 0
    for device in devices:
        stats = device.memory_stats() or {}
        if "bytes_limit" not in stats:
            return _HOST_MEMORY
        left += stats["bytes_limit"] - stats["bytes_in_use"]
    return left * 4 // 5


@dataclass(frozen=True)
class _Step:
    num_tokens: int
    record: dict[str, Any] | None  # of the request that these tokens finished


def _answers(generator: generate.Generator, batch: Sequence[_Job]) -> Iterator[_Step]:
    """Runs one batch; a record as each request ends."""
    decoders = [tokenizer.StreamDecoder(generator.tokenizer, skip_special=True) for _ in batch]
    texts: list[str] = ["" for _ in batch]
    token_ids: list[list[int]] = [[] for _ in batch]
    for piece in generate.run(generator, [job.request for job in batch]):
        row, record = piece.row, None
        token_ids[row] += piece.tokens
        texts[row] += decoders[row].push(generate.visible(piece))
        if piece.finish_reason is not None:
            record = {
                "custom_id": batch[row].custom_id,
                "text": texts[row] + decoders[row].finish(),
                "token_ids": token_ids[row],
                "finish_reason": piece.finish_reason,
            }
        yield _Step(len(piece.tokens), record)


def _write(out: TextIO, record: dict[str, Any]) -> None:
    out.write(json.dumps(record, ensure_ascii=False) + "\n")
    out.flush()


def _bar(show: bool) -> progress.Progress:
    return progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TextColumn("{task.fields[rate]:.0f} tokens/s"),
        progress.TimeRemainingColumn(),
        disable=not show,
    )
