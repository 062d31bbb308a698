"""The server's own description in OpenAPI 3.1: its calls and their request bodies.

Bodies are described by what is honoured; labels that have no effect, and parameters that are taken
only where they ask for what is done anyway, are in `infer/openai/parsing.py`.
"""

from typing import Any

from configs import sampling

Schema = dict[str, Any]


def _number(low: float | None = None, high: float | None = None) -> Schema:
    limits = {"minimum": low, "maximum": high}
    return {"type": "number", **{k: v for k, v in limits.items() if v is not None}}


def _integer(low: float | None = None, high: float | None = None) -> Schema:
    return {**_number(low, high), "type": "integer"}


def _texts(**more: Any) -> Schema:
    return {"type": "array", "items": {"type": "string", **more}}


def _only(name: str, kind: Schema) -> Schema:
    return {"type": "object", "properties": {name: kind}, "required": [name]}


_BOOLEAN: Schema = {"type": "boolean"}
_TEXT: Schema = {"type": "string"}
_OBJECT: Schema = {"type": "object"}
_IDS: Schema = {"type": "array", "items": _integer(0)}
_PROMPT: Schema = {
    "anyOf": [
        _TEXT,
        {**_texts(), "minItems": 1},
        {**_IDS, "minItems": 1},
        {"type": "array", "items": {**_IDS, "minItems": 1}, "minItems": 1},
    ]
}
_CONTENT: Schema = {
    "anyOf": [
        _TEXT,
        {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {"type": {"const": "text"}, "text": _TEXT},
                "required": ["type", "text"],
            },
        },
    ]
}
_MESSAGE: Schema = {
    "type": "object",
    "properties": {
        "role": {"enum": ["system", "user", "assistant", "tool"]},
        "content": _CONTENT,
        "tool_calls": {"type": "array", "items": _OBJECT},
        "tool_call_id": _TEXT,
        "name": _TEXT,
    },
    "required": ["role"],
}
_NAMED: Schema = {
    "type": "object",
    "properties": {
        "type": {"const": "function"},
        "function": {"type": "object", "properties": {"name": _TEXT}, "required": ["name"]},
    },
    "required": ["type", "function"],
}
_TOOL: Schema = {
    "type": "object",
    "properties": {
        "type": {"const": "function"},
        "function": {
            "type": "object",
            "properties": {
                "name": _TEXT,
                "description": _TEXT,
                "parameters": _OBJECT,
                "strict": _BOOLEAN,
            },
            "required": ["name"],
        },
    },
    "required": ["type", "function"],
}
_CHOSEN: Schema = {
    "type": "object",
    "properties": {"type": {"const": "function"}, "function": _only("name", _TEXT)},
    "required": ["type", "function"],
}
_FORMS: dict[str, Schema] = {
    "json": _OBJECT,
    "json_object": {"const": True},
    "regex": {"type": "string", "minLength": 1},
    "grammar": {"type": "string", "minLength": 1},
    "choice": {**_texts(), "minItems": 1},
}
_FORMAT: Schema = {
    "anyOf": [
        _only("type", {"enum": ["text", "json_object"]}),
        {
            "type": "object",
            "properties": {
                "type": {"const": "json_schema"},
                "json_schema": {
                    "type": "object",
                    "properties": {"name": _TEXT, "schema": _OBJECT},
                    "required": ["name", "schema"],
                },
            },
            "required": ["type", "json_schema"],
        },
    ]
}
_SAMPLING: dict[str, Schema] = {
    "max_tokens": _integer(1),
    "temperature": _number(0),
    "top_p": _number(0, 1),
    "top_k": _integer(0),
    "min_p": _number(0, 1),
    "presence_penalty": _number(-2, 2),
    "frequency_penalty": _number(-2, 2),
    "repetition_penalty": _number(0),
    "min_tokens": _integer(0),
    "logit_bias": {"type": "object", "additionalProperties": _number(-100, 100)},
    "stop": {"anyOf": [_TEXT, _texts(minLength=1)]},
    "stop_token_ids": _IDS,
    "ignore_eos": _BOOLEAN,
    "seed": _integer(),
    "n": _integer(1, 128),
    "prompt_logprobs": _integer(0, sampling.MOST_LOGPROBS),
    "stream": _BOOLEAN,
    "stream_options": {"type": "object", "properties": {"include_usage": _BOOLEAN}},
    "return_token_ids": _BOOLEAN,
    "response_format": _FORMAT,
    "structured_outputs": {"anyOf": [_only(name, kind) for name, kind in _FORMS.items()]},
    **{f"guided_{name}": kind for name, kind in _FORMS.items()},
    "user": _TEXT,
    "metadata": _OBJECT,
}


def bodies(model_name: str) -> dict[str, Schema]:
    """The body of each call, by the path below /v1."""
    model = {"type": "string", "const": model_name}
    return {
        "chat/completions": {
            "type": "object",
            "properties": {
                "model": model,
                "messages": {"type": "array", "items": _MESSAGE, "minItems": 1},
                "tools": {"type": "array", "items": _TOOL},
                "tool_choice": {"anyOf": [{"enum": ["none", "auto", "required"]}, _NAMED]},
                "parallel_tool_calls": _BOOLEAN,
                "max_completion_tokens": _integer(1),
                "logprobs": _BOOLEAN,
                "top_logprobs": _integer(0, sampling.MOST_LOGPROBS),
                **_SAMPLING,
            },
            "required": ["messages"],
        },
        "completions": {
            "type": "object",
            "properties": {
                "model": model,
                "prompt": _PROMPT,
                "echo": _BOOLEAN,
                "best_of": _integer(1, 128),
                "logprobs": _integer(0, sampling.MOST_LOGPROBS),
                **_SAMPLING,
            },
            "required": ["prompt"],
        },
        "embeddings": {
            "type": "object",
            "properties": {
                "model": model,
                "input": _PROMPT,
                "encoding_format": {"enum": ["float", "base64"]},
                "user": _TEXT,
            },
            "required": ["input"],
        },
    }


_REFUSALS = {
    400: "what the message says is wrong with the body",
    401: "the API key is missing or wrong",
    404: "another model",
    408: "the body came too slowly",
    413: "the body is too large",
    415: "the body is not application/json",
    429: "all places are taken; try later",
    500: "the engine has failed",
    503: "warming up, or stopping",
}


def openapi(model_name: str) -> Schema:
    """The complete OpenAPI description that /openapi.json returns."""
    error = {"$ref": "#/components/schemas/Error"}
    refusals = {
        str(status): {"description": text, "content": {"application/json": {"schema": error}}}
        for status, text in _REFUSALS.items()
    }
    paths: Schema = {
        f"/v1/{path}": {
            "post": {
                "requestBody": {
                    "required": True,
                    "content": {"application/json": {"schema": body}},
                },
                "responses": {"200": {"description": "the answer"}, **refusals},
                "security": [{}, {"key": []}],
            }
        }
        for path, body in bodies(model_name).items()
    }
    for path in ("/v1/models", "/health", "/ready", "/metrics", "/openapi.json"):
        paths[path] = {"get": {"responses": {"200": {"description": "see docs/serving.md"}}}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "qwen_jax", "version": "1"},
        "paths": paths,
        "components": {
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
            "schemas": {
                "Error": {
                    "type": "object",
                    "properties": {
                        "error": {
                            "type": "object",
                            "properties": {
                                "message": _TEXT,
                                "type": _TEXT,
                                "param": {"type": ["string", "null"]},
                                "code": {"type": ["string", "null"]},
                            },
                            "required": ["message", "type", "param", "code"],
                        }
                    },
                    "required": ["error"],
                }
            },
        },
    }
