"""A job's lines: what each asks of a service, and the record that answers it.

| a line with | is answered by |
| --- | --- |
| `url`, `body` (OpenAI's batch format) | OpenAI's batch format |
| `prompt` (text or token ids) or `messages` | `text`, `token_ids`, `finish_reason`; with n > 1 a
  list of `choices` |
| one of them and `continuation` or `continuations` | `scores` |
| `input` (text or token ids) | `embedding` |
"""

import dataclasses
import hashlib
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from configs.sampling import SamplingParams
from infer.batch.job_files import Line
from infer.constraints import spec
from infer.openai import parameters, parsing, responses
from infer.openai.parameters import ParameterError, Reader
from infer.openai.responses import SplitToolCalls
from infer.text import scoring
from infer.text.outputs import Answer, Answers, TextLogprobs
from infer.text.service import Embeddings, Prompt, Service, TextRequest
from qwen_jax.text.tokenizer.tokenizer import Special

Record = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Terms:
    """The settings that all lines of a job share.

    `settings` serve lines that do not set their own. `models` are the names that a body may ask
    for; answers carry the first.
    """

    service: Service
    settings: SamplingParams
    special: Special = "text"
    models: tuple[str, ...] = ()
    split_tool_calls: SplitToolCalls | None = None


@dataclass(frozen=True)
class TextJob:
    """A line that needs tokens: `record` takes the answers to `requests`, in their order."""

    requests: tuple[TextRequest, ...]
    record: Callable[[Sequence[Answers]], Record]


@dataclass(frozen=True)
class VectorJob:
    """A line that needs vectors of these tokens."""

    rows: tuple[tuple[int, ...], ...]
    record: Callable[[Embeddings], Record]


def job(line: Line, terms: Terms) -> TextJob | VectorJob:
    """The job that a line asks for. Raises `ValueError`, without naming the line."""
    if line.record is None:
        raise ValueError(line.problem)
    if _is_openai(line):
        return _openai_job(line, terms)
    reader = Reader(line.record, name="the line")
    reader.drop("custom_id")
    if "input" in reader:
        return _vector_job(line, reader, terms)
    prompt = _prompt(reader)
    if "continuation" in reader or "continuations" in reader:
        return _score_job(line, reader, prompt, terms)
    return _text_job(line, reader, prompt, terms)


def refusal(line: Line, error: ValueError) -> Record:
    """The record of a line that cannot be served."""
    message = f"{line.where}: {error}".encode("utf-8", "backslashreplace").decode("utf-8")
    if not _is_openai(line):
        return {"custom_id": line.custom_id, "error": {"message": message}}
    param = error.name if isinstance(error, ParameterError) else None
    return _envelope(line, responses.error(message, param=param), status=400)


def is_error(record: Mapping[str, Any]) -> bool:
    """Whether a record is a refusal."""
    response = record.get("response")
    if isinstance(response, dict):
        return response.get("status_code") != 200
    return record.get("error") is not None


def _seed(line: Line, terms: Terms) -> int:
    """The seed of a line that gives none; every line has its own."""
    return zlib.crc32(f"{terms.settings.seed}:{line.custom_id}".encode())


def _is_openai(line: Line) -> bool:
    return line.record is not None and ("url" in line.record or "body" in line.record)


def _openai_job(line: Line, terms: Terms) -> TextJob | VectorJob:
    reader = Reader(line.record, name="the line")
    reader.drop("custom_id")
    reader.only("method", "POST")
    url, body = reader.take("url", str), reader.take("body", dict)
    reader.finish()
    known = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings")
    if url not in known:
        raise ParameterError("url", f"url={url!a} is unknown; known: {', '.join(known)}")
    if url == "/v1/embeddings":
        call = parsing.parse_embeddings(body)
        model = _model(call.model, terms)

        def vectors(made: Embeddings) -> Record:
            return _envelope(line, responses.embeddings_response(call, made, model=model))

        return VectorJob(tuple(map(terms.service.encode_input, call.prompts)), vectors)
    is_chat = url == known[0]
    parse = parsing.parse_chat if is_chat else parsing.parse_completion
    defaults = dataclasses.replace(terms.settings, seed=_seed(line, terms))
    call = parse(body, id=str(line.number), defaults=defaults)
    if call.stream:
        raise ParameterError("stream", "stream=true has no place in a file; leave it out")
    model = _model(call.model, terms)

    def texts(answers: Sequence[Answers]) -> Record:
        answer = responses.response(
            call,
            answers,
            id=f"{'chatcmpl' if is_chat else 'cmpl'}-{_name(line)}",
            created=int(time.time()),
            model=model,
            split_tool_calls=terms.split_tool_calls,
        )
        return _envelope(line, answer)

    return TextJob(call.requests, texts)


def _model(asked: str | None, terms: Terms) -> str:
    if asked is not None and asked not in terms.models:
        raise ParameterError(
            "model",
            f"model={asked!a} is not the one loaded; known by the names: {', '.join(terms.models)}",
        )
    return terms.models[0] if terms.models else ""


def _envelope(line: Line, body: Record, *, status: int = 200) -> Record:
    name = _name(line)
    return {
        "id": f"batch_req_{name}",
        "custom_id": line.custom_id,
        "response": {"status_code": status, "request_id": f"req_{name}", "body": body},
        "error": None,
    }


def _name(line: Line) -> str:
    return hashlib.blake2b(line.custom_id.encode(), digest_size=12).hexdigest()


def _prompt(reader: Reader) -> Prompt:
    if ("prompt" in reader) == ("messages" in reader):
        raise ValueError("give either prompt or messages")
    if "prompt" in reader:
        prompt = reader.take("prompt", (str, list))
        return prompt if isinstance(prompt, str) else parameters.token_ids("prompt", prompt)
    messages = reader.take("messages", list)
    if not messages or not all(isinstance(message, dict) for message in messages):
        raise ParameterError("messages", "messages must be a list of objects, at least one")
    return tuple(messages)


def _text_job(line: Line, reader: Reader, prompt: Prompt, terms: Terms) -> TextJob:
    tools, constraint = reader.take("tools", list), parameters.constraint(reader)
    if tools and not (prompt and isinstance(prompt[0], Mapping)):
        raise ParameterError("tools", "tools need messages: a prompt is continued as it is")
    if tools and constraint is not None:
        constraint = spec.or_calls(constraint, tools)
    request = TextRequest(
        id=str(line.number),
        prompt=prompt,
        tools=tools,
        n=reader.take("n", int, 1),
        best_of=reader.take("best_of", int),
        stop=parameters.stop(reader),
        constraint=constraint,
        special=terms.special,
        sampling=parameters.sampling(
            reader,
            defaults=terms.settings,
            max_tokens=reader.take("max_tokens", int),
            logprobs=reader.take("logprobs", int),
            seed=reader.take("seed", int, _seed(line, terms)),
        ),
    )
    reader.finish()

    def record(answers: Sequence[Answers]) -> Record:
        choices = [_plain(answer) for answer in answers[0].choices]
        own = choices[0] if request.n == 1 else {"choices": choices}
        return {"custom_id": line.custom_id, **own}

    return TextJob((request,), record)


def _plain(answer: Answer) -> Record:
    record: Record = {
        "text": answer.text,
        "token_ids": answer.tokens,
        "finish_reason": answer.finish_reason,
    }
    for name in ("logprobs", "prompt_logprobs"):
        if entries := getattr(answer, name):
            record[name] = [_plain_logprobs(entry) for entry in entries]
    return record


def _plain_logprobs(entry: TextLogprobs) -> Record:
    """drawn: under the distribution sampled from; logprob: under the model's own."""
    top = [{"token_id": token.id, "logprob": token.logprob} for token in entry.top]
    return {"token_id": entry.id, "logprob": entry.logprob, "drawn": entry.drawn, "top": top}


def _score_job(line: Line, reader: Reader, prompt: Prompt, terms: Terms) -> TextJob:
    if "continuation" in reader:
        continuations = [reader.take("continuation", (str, list))]
    else:
        continuations = reader.take("continuations", list)
    reader.finish()
    if not continuations:
        raise ParameterError("continuations", "continuations is empty; give at least one text")
    scored = []
    for number, text in enumerate(continuations):
        if not isinstance(text, str):
            text = parameters.token_ids("continuations", text if isinstance(text, list) else [text])
        id = f"{line.number}/{number}"
        scored.append(scoring.request(terms.service, prompt, text, id=id, special=terms.special))

    def record(answers: Sequence[Answers]) -> Record:
        pairs = zip(scored, answers, strict=True)
        scores = [scoring.score(asked, answer.choices[0]) for asked, answer in pairs]
        return {"custom_id": line.custom_id, "scores": [_plain_score(score) for score in scores]}

    return TextJob(tuple(one.request for one in scored), record)


def _plain_score(score: scoring.Score) -> Record:
    return {
        "logprob": score.logprob,
        "num_tokens": len(score.token_ids),
        "is_greedy": score.is_greedy,
        "token_ids": list(score.token_ids),
        "token_logprobs": list(score.token_logprobs),
    }


def _vector_job(line: Line, reader: Reader, terms: Terms) -> VectorJob:
    value = reader.take("input", (str, list))
    reader.finish()
    prompt = value if isinstance(value, str) else parameters.token_ids("input", value)

    def record(made: Embeddings) -> Record:
        return {"custom_id": line.custom_id, "embedding": made.vectors_ND[0].tolist()}

    return VectorJob((terms.service.encode_input(prompt),), record)
