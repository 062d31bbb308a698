"""Time of structured output's masks: `python benchmarks/masks.py TOKENIZER_FOLDER`, on a CPU.

For each form of answer: compiling it, starting an answer, and a token's mask and acceptance along a
random walk through valid answers. `--tiny` rehearses with a tokenizer made on the spot.
"""

import argparse
import json
import time
from collections.abc import Callable

import numpy as np

from infer.constraints import compiler as constraints
from infer.constraints.spec import ConstraintSpec, forced_calls, or_calls
from qwen_jax.text import tokenizer_training
from qwen_jax.text.tokenizer import tokenizer

_PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "email": {"type": "string", "format": "email"},
        "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "maxItems": 5},
        "address": {
            "type": "object",
            "properties": {
                "street": {"type": "string", "maxLength": 80},
                "zip": {"type": "string"},
            },
            "required": ["street"],
        },
    },
    "required": ["name", "age", "tags"],
}
_WIDE = {"type": "object", "properties": {f"field_{i}": _PERSON for i in range(40)}}
_TOOLS = [{"function": {"name": f"tool_{i}", "parameters": _PERSON}} for i in range(20)]
FORMS = {
    "any JSON object": ConstraintSpec("json_object"),
    "schema of 5 fields": ConstraintSpec("json_schema", json.dumps(_PERSON)),
    "schema of 40 objects": ConstraintSpec("json_schema", json.dumps(_WIDE)),
    "call of one of 20 tools": forced_calls(_TOOLS),
    "schema, or a call": or_calls(ConstraintSpec("json_schema", json.dumps(_PERSON)), _TOOLS),
    "regex of a date": ConstraintSpec("regex", r"[0-9]{4}-[0-9]{2}-[0-9]{2}"),
    "regex of any text": ConstraintSpec("regex", r"(?s)[^<]*"),
    "1000 choices": ConstraintSpec("choice", tuple(f"option number {i}" for i in range(1000))),
}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("folder", nargs="?", help="tokenizer")
    options.add_argument("--tiny", action="store_true", help="rehearse")
    options.add_argument("--tokens", type=int, default=400, help="a form")
    given = options.parse_args()
    if given.tiny == bool(given.folder):
        options.error("give a tokenizer's folder, or --tiny")
    words = tokenizer.load(given.folder) if given.folder else _tiny()
    rows = -(-words.vocab_size // 256) * 256
    num_tokens = 20 if given.tiny else given.tokens

    def compiled(spec: ConstraintSpec) -> constraints.Compiled:
        return constraints.compile(
            spec, tokenizer=words, vocab_size=rows, eos_ids=tuple(words.eos_ids)
        )

    seconds, _ = _timed(lambda: compiled(ConstraintSpec("regex", "a")))
    print(f"{rows} rows; first form, with the vocabulary: {seconds:.2f} s; times in ms")
    heads = "".join(f"{head:>8}" for head in ("start", "mean", "median", "99%", "most"))
    print(f"{'form':24} {'compile':>8}{heads}")
    for name, spec in FORMS.items():
        made, form = _timed(lambda spec=spec: compiled(spec))
        started, _ = _timed(form.start)
        ms = np.array(_walk(form, rows=rows, eos_ids=words.eos_ids, num_tokens=num_tokens)) * 1e3
        print(
            f"{name:24} {made * 1e3:8.2f} {started * 1e3:7.3f} {ms.mean():7.3f} "
            f"{np.median(ms):7.3f} {np.percentile(ms, 99):7.3f} {ms.max():7.3f}"
        )


def _walk(form: constraints.Compiled, *, rows: int, eos_ids, num_tokens: int) -> list[float]:
    """Seconds of each step. Answers that end are begun anew."""
    rng, state, taken = np.random.default_rng(0), form.start(), []
    while len(taken) < num_tokens:
        begin = time.perf_counter()
        mask_W = state.mask()
        middle = time.perf_counter()
        allowed = np.unpackbits(mask_W.view(np.uint8), bitorder="little")[:rows].nonzero()[0]
        token = int(rng.choice(allowed))
        if token in eos_ids:
            state = form.start()
            continue
        accepting = time.perf_counter()
        state.accept(token)
        taken.append(middle - begin + time.perf_counter() - accepting)
    return taken


def _timed(run: Callable):
    begin = time.perf_counter()
    result = run()
    return time.perf_counter() - begin, result


def _tiny() -> tokenizer.Tokenizer:
    return tokenizer_training.train_bpe(["a few words, to have a corpus"], vocab_size=279)


if __name__ == "__main__":
    main()
