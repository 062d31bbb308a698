"""Batch job: answers a file of prompts into a file of answers, one JSON object a line.

`infer.batch.job_lines` says what lines may hold and how they are answered. Answers are written as
they come; a job started again, after whatever end, answers only what is missing, and tries refused
lines anew. Several processes can share an input: each answers its lines into a file of its own.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from configs.sampling import SamplingParams
from infer.batch import job_files, job_lines, progress
from infer.batch.job_files import Line, Share
from infer.batch.job_lines import Terms, TextJob, VectorJob
from infer.openai.responses import SplitToolCalls
from infer.text.outputs import Answers, Update
from infer.text.service import Embeddings, Service
from qwen_jax.text.tokenizer.tokenizer import Special

Order = Literal["arrival", "input"]

_READ_AT_ONCE = 64  # lines between two steps of the engine, which must not wait for the tokenizer
_VECTORS_AT_ONCE = 64  # lines


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Counts of the lines that a run answered, refused, and found already answered."""

    path: Path  # of the answers
    answered: int
    failed: int
    skipped: int
    prompt_tokens: int
    generated_tokens: int
    seconds: float

    @property
    def exit_code(self) -> int:
        """Exit code of the command: 1 if a line was refused, else 0."""
        return 1 if self.failed else 0


def run(
    service: Service,
    input_path: str | Path,
    output_path: str | Path,
    *,
    settings: SamplingParams | None = None,
    special: Special = "text",
    models: Sequence[str] = (),
    share: Share = Share(),  # noqa: B008 (frozen)
    order: Order = "arrival",
    max_open: int = 1024,
    split_tool_calls: SplitToolCalls | None = None,
    report: progress.Report = lambda _: None,
) -> Summary:
    """Answers every line of `input_path` that `output_path` does not hold yet.

    `settings` (default: the service's) serve lines that do not set their own. A line without a seed
    gets one of its own, made of `settings.seed` and its custom_id. `models` are the names that
    OpenAI's bodies may ask for. At most `max_open` lines are read and not answered at any time.
    With `order="input"` the answers are sorted at the end; a job that was killed is not sorted yet.
    Raises `ValueError` if two lines share a custom_id, if the output holds something else, or if
    another process writes to it.
    """
    index = job_files.Index(Path(input_path))
    output = job_files.Output(
        share.path(Path(output_path)), index=index, share=share, is_error=job_lines.is_error
    )
    terms = Terms(
        service=service,
        settings=settings or service.defaults,
        special=special,
        models=tuple(models),
        split_tool_calls=split_tool_calls,
    )
    asked = index.rows(share)
    total = int(asked.sum() - output.done.sum())
    job = _Job(terms, output, progress.Meter(total), report)
    missing = _wanted(index, asked & ~output.done)
    try:
        job.run(missing, max_open=max_open)
        if order == "input":
            output.sync()
            job_files.merge(index, [output.path], output.path, share=share)
    finally:
        output.close()
    return job.summary(skipped=int(output.done.sum()))


def merge(input_path: str | Path, output_path: str | Path, *, count: int) -> Path:
    """Joins the files of `count` shares into `output_path`, in the order of the input.

    Raises `ValueError` where a share is not complete.
    """
    index = job_files.Index(Path(input_path))
    output = Path(output_path)
    parts = [Share(number, count).path(output) for number in range(count)]
    job_files.merge(index, parts, output)
    return output


def _wanted(index: job_files.Index, wanted: np.ndarray) -> Iterator[Line]:
    """The index' rows that are wanted. Raises `ValueError` if they are not what they were."""
    lines = job_files.lines(index.path)
    for row, is_wanted in enumerate(wanted):
        line = next(lines, None)
        if line is None or (is_wanted and index.row(line.custom_id) != row):
            raise ValueError(
                f"{index.path} changed while the job ran; start it again for what is missing"
            )
        if is_wanted:
            yield line


@dataclass
class _OpenLine:
    line: Line
    job: TextJob
    answers: list[Answers] = field(default_factory=list)
    num_open: int = 0
    num_shown: int = 0  # tokens that updates have told of


class _Job:
    """A run under way. Of a line that was refused or finished nothing is kept."""

    def __init__(
        self,
        terms: Terms,
        output: job_files.Output,
        meter: progress.Meter,
        report: progress.Report,
    ) -> None:
        self._terms, self._output, self._meter, self._report = terms, output, meter, report
        self._service = terms.service
        self._lines: dict[int, _OpenLine] = {}  # by their numbers
        self._requests: dict[str, tuple[_OpenLine, int]] = {}  # place among the line's requests
        self._vectors: list[tuple[Line, VectorJob]] = []
        self._began = time.monotonic()
        self._answered = self._failed = self._prompt_tokens = self._generated_tokens = 0

    def run(self, lines: Iterator[Line], *, max_open: int) -> None:
        is_last = False
        while not (is_last and self._service.idle):
            for _ in range(min(_READ_AT_ONCE, max_open - len(self._lines) - len(self._vectors))):
                line = next(lines, None)
                if line is None:
                    is_last = True
                    break
                self._begin(line)
            if is_last or len(self._vectors) >= min(_VECTORS_AT_ONCE, max_open):
                waiting, self._vectors = self._vectors, []
                self._embed(waiting)
            for update in self._service.step():
                self._take(update)
            self._report(self._meter.read())

    def summary(self, *, skipped: int) -> Summary:
        return Summary(
            path=self._output.path,
            answered=self._answered,
            failed=self._failed,
            skipped=skipped,
            prompt_tokens=self._prompt_tokens,
            generated_tokens=self._generated_tokens,
            seconds=time.monotonic() - self._began,
        )

    def _begin(self, line: Line) -> None:
        try:
            job = job_lines.job(line, self._terms)
            if isinstance(job, VectorJob):
                self._vectors.append((line, job))
            else:
                self._submit(line, job)
        except ValueError as error:
            self._refuse(line, error)

    def _submit(self, line: Line, job: TextJob) -> None:
        opened = _OpenLine(line, job)
        for request in job.requests:
            try:
                self._service.submit(request)
            except ValueError:
                for earlier in job.requests[: len(opened.answers)]:
                    self._service.cancel(earlier.id)
                    del self._requests[earlier.id]
                raise
            self._requests[request.id] = (opened, len(opened.answers))
            opened.answers.append(Answers())
        opened.num_open = len(job.requests)
        self._lines[line.number] = opened

    def _take(self, update: Update) -> None:
        if update.id not in self._requests:  # of a line that was refused for another prompt
            return
        opened, place = self._requests[update.id]
        opened.answers[place].add(update)
        self._meter.add_tokens(len(update.tokens))
        opened.num_shown += len(update.tokens)
        if update.usage is None:
            return
        del self._requests[update.id]
        opened.num_open -= 1
        if opened.num_open == 0:
            del self._lines[opened.line.number]
            usages = [answers.usage for answers in opened.answers]
            generated = sum(usage.completion_tokens for usage in usages)
            self._prompt_tokens += sum(usage.prompt_tokens for usage in usages)
            self._meter.add_tokens(generated - opened.num_shown)  # of choices that were discarded
            choices = [choice for answers in opened.answers for choice in answers.choices]
            if errors := [choice.error for choice in choices if choice.error is not None]:
                self._refuse(opened.line, ValueError(errors[0]))
            else:
                self._finish(opened.job.record(opened.answers), generated)

    def _finish(self, record: job_lines.Record, generated: int) -> None:
        self._output.write(record)
        self._answered += 1
        self._generated_tokens += generated
        self._meter.finish(generated)

    def _refuse(self, line: Line, error: ValueError) -> None:
        self._output.write(job_lines.refusal(line, error))
        self._failed += 1
        self._meter.fail()

    def _embed(self, waiting: list[tuple[Line, VectorJob]]) -> None:
        """Answers lines that want vectors, together where none of them is refused."""
        if not waiting:
            return
        try:
            made = self._service.embed([row for _, job in waiting for row in job.rows])
        except ValueError as error:
            if len(waiting) == 1:
                self._refuse(waiting[0][0], error)
                return
            for one in waiting:
                self._embed([one])
            return
        start = 0
        for _, job in waiting:
            vectors_ND = made.vectors_ND[start : start + len(job.rows)]
            own = Embeddings(vectors_ND, sum(map(len, job.rows)))
            self._prompt_tokens += own.num_tokens
            self._finish(job.record(own), generated=0)
            start += len(job.rows)
