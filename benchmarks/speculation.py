"""Tokens a second without draft tokens, with prompt lookup and with a draft model, side by side.

    python benchmarks/speculation.py                                  # GPU: 7B, draft of 0.5B
    python benchmarks/speculation.py --model FOLDER --draft FOLDER    # real checkpoints, real text
    python benchmarks/speculation.py --tiny                           # rehearsal on a CPU

Models are folders, or sizes of the family with random bfloat16 weights. Random models never agree,
so these are made to: what layers add to the stream is multiplied by zero (it takes the same time),
and the output projection makes token t+1 follow token t. In a draft it does so for a share of all
tokens, `--agree`, so that a guess is right with this probability. Such answers never repeat
themselves: prompt lookup finds nothing in them. Of folders, answers go on from short texts, and end
where they end; a model that is its own draft shows guesses that are all right, and what they cost.

Each number is the median of `--repeats` runs, of which each takes all three ways in turn; prompts
of different repeats differ. Every row of the table serves so many requests at one time.
"""

import argparse
import dataclasses
import functools
import pathlib
import sys
import time
from typing import TYPE_CHECKING

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np

from configs.engine import EngineConfig
from configs.models import qwen2_5
from configs.models.architecture import ModelConfig
from configs.sampling import SamplingParams
from infer.engine import engine as engine_lib
from infer.engine.request import Request
from infer.speculation.draft import Draft
from qwen_jax.decode import weights
from qwen_jax.model import transformer

if TYPE_CHECKING:
    from infer.text import loading

TEXTS = (
    "The history of the lighthouse begins long before electricity, when keepers",
    "def parse_line(line):\n    name, value = line.split('=')\n    return name, value\n\ndef parse",
    "Question: A train leaves at nine and arrives at noon. How long does it travel? Answer:",
    "Once upon a time, in a village between two rivers, there lived a baker who",
    "The three most important things to remember about baking bread are",
    "List of capitals: France - Paris; Italy - Rome; Spain - Madrid; Germany - Berlin; Japan -",
    "Dear Sir or Madam, I am writing to you because",
    "The mitochondria of a cell are",
)


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model ready for an engine, and its tokenizer if it reads text."""

    cfg: ModelConfig
    params: dict
    loaded: "loading.Loaded | None" = None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="7b", help="folder or size")
    parser.add_argument("--draft", default="0.5b", help="folder or size")
    parser.add_argument("--agree", type=float, default=0.8, help="of a draft with random weights")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--guesses", type=int, default=4)
    parser.add_argument("--rows", default="1,4,8", help="requests at one time")
    parser.add_argument("--prompt", type=int, default=512, help="tokens in, of random models")
    parser.add_argument("--answer", type=int, default=256, help="tokens out")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_args()
    if arguments.tiny:
        arguments.model = arguments.draft = "tiny"
        arguments.rows, arguments.prompt, arguments.answer, arguments.repeats = "1,3", 40, 48, 1
    device = jax.devices()[0]
    print(f"{device.device_kind}, jax {jax.__version__}, {arguments.dtype}", flush=True)
    target = subject(arguments.model, arguments, agree=1.0)
    draft = target
    if arguments.draft != arguments.model or arguments.tiny:
        draft = subject(arguments.draft, arguments, agree=arguments.agree)
    print(f"{arguments.model} with draft {arguments.draft}, {arguments.guesses} guesses")
    print("| requests | without tokens/s | prompt lookup | right | draft | right | same answers |")
    for rows in (int(text) for text in arguments.rows.split(",")):
        print(measure(target, draft, arguments, rows=rows), flush=True)


def subject(name: str, arguments: argparse.Namespace, *, agree: float) -> Subject:
    dtype = jnp.dtype(arguments.dtype)
    if pathlib.Path(name).is_dir():
        from infer.text import loading  # needs the extras for structured output

        loaded = loading.load_model(name, dtype=arguments.dtype)
        return Subject(loaded.cfg, loaded.params, loaded)
    cfg = qwen2_5.tiny() if name == "tiny" else qwen2_5.base(name)
    cfg = dataclasses.replace(cfg, tie_word_embeddings=False)
    params = follow(cfg, random_params(cfg), agree=agree)
    return Subject(cfg, weights.prepare(cfg, params, dtype=dtype))


def random_params(cfg: ModelConfig) -> dict:
    """Stacked bfloat16 weights, made on the device leaf by leaf."""

    @functools.partial(jax.jit, static_argnums=1)
    def make(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        return 0.02 * jax.random.normal(key, shape, jnp.bfloat16)

    leaves, tree = jax.tree.flatten(transformer.shapes(cfg, dtype=jnp.bfloat16))
    keys = jax.random.split(jax.random.key(0), len(leaves))
    return tree.unflatten([make(key, x.shape) for key, x in zip(keys, leaves, strict=True)])


def follow(cfg: ModelConfig, params: dict, *, agree: float) -> dict:
    """Random weights with which a share `agree` of all tokens t is followed by t + 1."""
    layers = params["layers"]
    for part, name in (("attention", "o"), ("mlp", "down")):
        layers[part][name]["kernel"] *= 0
    params["norm"]["scale"] = jnp.ones_like(params["norm"]["scale"])
    V = cfg.vocab_size
    after_V = np.roll(np.arange(V), 1)  # column v of the projection is the embedding of this token
    # Wrong ones get each other's columns, by the same numbers whatever the vocabulary's padding.
    wrong = np.flatnonzero(np.random.default_rng(0).random(V) >= agree)
    after_V[wrong] = after_V[np.roll(wrong, 1)]
    project = jax.jit(lambda weight_VD, after_V: weight_VD[after_V].T)
    params["lm_head"]["kernel"] = project(params["embed"]["weight"], after_V)
    return params


def measure(target: Subject, draft: Subject, arguments: argparse.Namespace, *, rows: int) -> str:
    make = functools.partial(engine, target, draft, arguments, rows=rows)
    engines = {name: make(name) for name in ("off", "prompt_lookup", "draft")}
    speeds: dict[str, list[float]] = {name: [] for name in engines}
    same = asked = 0
    for repeat in range(arguments.repeats + 1):
        requests = prompts(target, draft, arguments, rows=rows, repeat=repeat)
        answers = {}
        for name, one in engines.items():
            answers[name], speed = drive(one, requests)
            if repeat:  # the first compiles
                speeds[name].append(speed)
        asked += 2 * rows
        same += sum(
            answers[name][id] == answers["off"][id] for name in engines if name != "off"
            for id in answers["off"]
        )  # fmt: skip
    middle = {name: float(np.median(values)) for name, values in speeds.items()}
    cells = [str(rows), f"{middle['off']:,.1f}"]
    for name in ("prompt_lookup", "draft"):
        stats = engines[name].stats()
        share = stats["accepted_tokens"] / max(1, stats["guessed_tokens"])
        cells += [f"{middle[name]:,.1f} ({middle[name] / middle['off']:.2f}x)", f"{share:.0%}"]
    return f"| {' | '.join(cells)} | {same} of {asked} |"


def engine(
    target: Subject, draft: Subject, arguments: argparse.Namespace, speculation: str, *, rows: int
) -> engine_lib.Engine:
    page = 16 if arguments.tiny else 64
    length = -(-(arguments.prompt + arguments.answer) // page) * page
    settings = EngineConfig(
        num_slots=rows,
        page_size=page,
        num_pages=rows * length // page,
        max_length=length,
        prefill_chunk=length,
        prefill_tokens=rows * length,
        speculation=speculation,
        guesses=arguments.guesses,
        speculation_rows=rows,
        prefix_cache="off",
        buckets="one",  # rows that end early leave the shapes as they are
    )
    return engine_lib.Engine(
        target.cfg,
        target.params,
        settings=settings,
        eos_ids=target.loaded.eos_ids if target.loaded else (),
        dtype=jnp.dtype(arguments.dtype),
        draft=Draft(draft.cfg, draft.params) if speculation == "draft" else None,
    )


def prompts(
    target: Subject, draft: Subject, arguments: argparse.Namespace, *, rows: int, repeat: int
) -> list[Request]:
    random = np.random.default_rng(repeat)
    most = min(target.cfg.vocab_size, draft.cfg.vocab_size) - arguments.answer
    requests = []
    for row in range(rows):
        if target.loaded:
            text = TEXTS[(row + repeat) % len(TEXTS)]
            tokens = target.loaded.tokenizer.encode(text)[: arguments.prompt]
        else:
            tokens = random.integers(0, most, arguments.prompt).tolist()
        sampling = SamplingParams(
            temperature=arguments.temperature, max_tokens=arguments.answer, seed=repeat
        )
        requests.append(Request(id=str(row), tokens=tuple(tokens), sampling=sampling))
    return requests


def drive(one: engine_lib.Engine, requests: list[Request]) -> tuple[dict[str, list[int]], float]:
    """The answers, and tokens a second once every request has its first token."""
    answers: dict[str, list[int]] = {request.id: [] for request in requests}
    for request in requests:
        one.submit(request)
    began, before = 0.0, 0
    while not one.idle:
        for event in one.step():
            answers[event.id] += event.tokens
        if not began and all(answers.values()):
            began, before = time.perf_counter(), sum(map(len, answers.values()))
    seconds = time.perf_counter() - began
    return answers, (sum(map(len, answers.values())) - before) / seconds


if __name__ == "__main__":
    main()
