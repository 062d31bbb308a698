"""Bodies that a server's own description allows, and what becomes of them when things go wrong."""

import copy
import json
import random
from collections.abc import Iterator
from typing import Any

from infer.server import description

JUNK: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 7, 20, 129, 2**31, 2**63, 2**64, -(2**63), 10**30,
    0.5, -0.0, 1e-9, 1e308, 5e-324,
    "", "a", "null", "\x00", "\ud800", "<|im_end|>", "<|im_start|>system", "{", "é" * 50,
    "🙂\u202e", "a" * 3000,
    [], [[]], [None], [0], [[0]], [-1], [10**9], [""], ["a", 1],
    {}, {"": ""}, {"a": {"b": [1]}}, {"type": "text"}, {"type": []}, {"role": "user"}, {"-1": 0},
    {"5": 1e9}, {"type": "object", "properties": 5}, {"$ref": "#"},
)  # fmt: skip


def valid(schema: dict[str, Any], rng: random.Random) -> Any:
    """A small value that a schema allows."""
    if "const" in schema:
        return schema["const"]
    if "enum" in schema:
        return rng.choice(schema["enum"])
    if "anyOf" in schema:
        return valid(rng.choice(schema["anyOf"]), rng)
    kind = schema["type"]
    if kind == "object":
        return _object(schema, rng)
    if kind == "array":
        count = rng.randrange(schema.get("minItems", 0), 4)
        return [valid(schema["items"], rng) for _ in range(count)]
    if kind in ("integer", "number"):
        low = schema.get("minimum", 0)
        high = min(schema.get("maximum", low + 30), low + 30)
        return rng.randint(int(low), int(high)) if kind == "integer" else rng.uniform(low, high)
    if kind == "boolean":
        return rng.random() < 0.5
    return rng.choice(["a", "hello there", "x y z", "é🙂", " "])


def _object(schema: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    required = schema.get("required", ())
    # Few at a time: parameters that exclude each other would make nearly all bodies wrong.
    chance = rng.choice([0.0, 0.05, 0.3])
    return {
        name: valid(inner, rng)
        for name, inner in schema.get("properties", {}).items()
        if name in required or rng.random() < chance
    }


def mutated(value: Any, rng: random.Random) -> Any:
    """A copy with one place of it replaced, deleted, doubled or wrapped."""
    value = copy.deepcopy(value)
    places = list(_places(value))
    if not places:
        return rng.choice(JUNK)
    container, key = rng.choice(places)
    way = rng.randrange(4)
    if way == 0:
        del container[key]
    elif way == 1:
        container[key] = [container[key]] * rng.choice([1, 2, 50])
    elif way == 2 and isinstance(container, dict):
        container[rng.choice(["", "x", "temperature", "n", "stream", "\ud800"])] = rng.choice(JUNK)
    else:
        container[key] = copy.deepcopy(rng.choice(JUNK))
    return value


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(value, dict | list):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from _places(value[key])


def call(rng: random.Random, *, model: str) -> tuple[str, bytes]:
    """A path and a body: as described, a little wrong, very wrong, or not even JSON."""
    path, schema = rng.choice(list(description.bodies(model).items()))
    value = valid(schema, rng)
    for _ in range(rng.choice([0, 1, 1, 1, 2, 5])):
        value = mutated(value, rng)
    body = json.dumps(value).encode()
    way = rng.randrange(10)
    if way == 0 and body:
        body = body[: rng.randrange(len(body))]
    elif way == 1:
        place = rng.randrange(len(body) + 1)
        body = body[:place] + rng.randbytes(rng.randrange(1, 4)) + body[place:]
    return f"/v1/{path}", body
