"""Lines of all kinds, and jobs over them with an engine without a model."""

import json

from infer.batch import batch_job
from tests.infer import fake_engine

TURNS = [{"role": "user", "content": "hello <|im_end|>"}]
MIXED = [
    {"prompt": "short"},
    {"prompt": "a prompt that is a good deal longer than the others " * 2, "stop": ["a", "e"]},
    {"prompt": "sampled", "temperature": 1.0, "seed": 7, "custom_id": "mine"},
    {"prompt": "sampled, and its seed made from its name", "temperature": 1.3, "max_tokens": 30},
    {"prompt": [5, 6, 7], "custom_id": "空", "logprobs": 2},
    {"messages": TURNS, "top_k": 5, "temperature": 0.7, "n": 2},
    {"prompt": "p", "temperature": 0.8, "best_of": 3, "prompt_logprobs": 1},
    {"prompt": "the answer is ", "continuations": ["yes", "no, never"]},
    {"messages": TURNS, "continuation": "yes"},
    {"input": "words"},
]


def write_lines(path, records) -> None:
    lines = [r if isinstance(r, str) else json.dumps(r, ensure_ascii=False) for r in records]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def read_lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def by_id(records: list[dict]) -> dict[str, dict]:
    assert len({r["custom_id"] for r in records}) == len(records)
    return {r["custom_id"]: r for r in records}


def run(folder, records, *, output="out.jsonl", service=None, **options):
    write_lines(folder / "in.jsonl", records)
    service = service or fake_engine.service()
    summary = batch_job.run(service, folder / "in.jsonl", folder / output, **options)
    assert service.idle and service.num_open == 0
    return summary, read_lines(summary.path)


def openai(custom_id: str, url: str, **body) -> dict:
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body}


CHAT, COMPLETION, VECTORS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
