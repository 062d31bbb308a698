"""Greedy answers of the engine, all prompts at once, against transformers, one prompt at a time.

    python benchmarks/against_transformers.py MODEL PROMPTS --count 200 --max-tokens 64

MODEL is a Hugging Face folder of an instruct model, PROMPTS a JSON-lines file with a `question` (as
GSM8K's) or a `prompt` a line. Both sides are float32 on the CPU. Prints how many answers are the
same, token by token, and where the others part: how far apart the two likeliest tokens were there.
"""

import argparse
import json
import pathlib
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import torch
import transformers

from configs.engine import EngineConfig
from configs.sampling import SamplingParams
from infer.engine import engine as engine_lib
from infer.engine.request import Request
from infer.text import loading
from qwen_jax.text.chat import encoding as chat


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=pathlib.Path)
    parser.add_argument("prompts", type=pathlib.Path)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--slots", type=int, default=16)
    arguments = parser.parse_args()
    loaded = loading.load_model(arguments.model, dtype="float32")
    sampling = SamplingParams(temperature=0.0, max_tokens=arguments.max_tokens)
    requests = [
        Request(id=str(index), tokens=tokens, sampling=sampling)
        for index, tokens in enumerate(read(arguments.prompts, loaded, arguments.count))
    ]
    began = time.monotonic()
    ours = answer(loaded, requests, slots=arguments.slots)
    print(f"ours: {len(ours)} answers in {time.monotonic() - began:.0f} s", flush=True)
    oracle = transformers.AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    same, began = 0, time.monotonic()
    for index, request in enumerate(requests):
        theirs = alone(oracle, request, eos_ids=loaded.eos_ids)
        if ours[request.id] == theirs:
            same += 1
        else:
            print(f"{request.id}: {parting(oracle, request, ours[request.id], theirs)}", flush=True)
        if index % 20 == 19:
            print(f"{same} of {index + 1} the same, {time.monotonic() - began:.0f} s", flush=True)
    print(f"{same} of {len(requests)} answers are the same, token by token")
    return 0 if same == len(requests) else 1


def read(path: pathlib.Path, loaded: loading.Loaded, count: int) -> list[tuple[int, ...]]:
    """The first prompts of the file, as conversations of one turn."""
    prompts = []
    with path.open(encoding="utf-8") as file:
        for line in file:
            record = json.loads(line)
            turn = {"role": "user", "content": record.get("question") or record["prompt"]}
            encoded = chat.encode(
                [turn], tokenizer=loaded.tokenizer, add_generation_prompt=True, mask="none"
            )
            prompts.append(tuple(encoded.token_ids))
            if len(prompts) == count:
                return prompts
    return prompts


def answer(loaded: loading.Loaded, requests: list[Request], *, slots: int) -> dict:
    longest = max(len(r.tokens) + r.sampling.max_tokens for r in requests)
    settings = EngineConfig(
        num_slots=slots, max_length=longest, prefill_chunk=256, prefill_tokens=1024, buckets="one"
    )
    engine = engine_lib.Engine(
        loaded.cfg,
        loaded.params,
        settings=settings,
        eos_ids=loaded.eos_ids,
        dtype=loaded.dtype,
    )
    answers: dict[str, list[int]] = {request.id: [] for request in requests}
    for event in engine.run(requests):
        answers[event.id] += event.tokens
    return answers


@torch.no_grad()
def alone(oracle, request: Request, *, eos_ids: tuple[int, ...]) -> list[int]:
    tokens = torch.tensor([request.tokens])
    whole = oracle.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        do_sample=False,
        max_new_tokens=request.sampling.max_tokens,
        eos_token_id=list(eos_ids),
        repetition_penalty=1.0,
        pad_token_id=0,
    )
    return whole[0, len(request.tokens) :].tolist()


@torch.no_grad()
def parting(oracle, request: Request, ours: list[int], theirs: list[int]) -> str:
    """Where two answers part, and the oracle's scores of the two tokens there."""
    at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)
    if at is None:
        return f"lengths {len(ours)} and {len(theirs)}"
    tokens = torch.tensor([[*request.tokens, *theirs[:at]]])
    scores = oracle(tokens).logits[0, -1]
    gap = float(scores[theirs[at]] - scores[ours[at]])
    return f"parts at token {at}: {ours[at]} against {theirs[at]}, {gap:.2e} apart"


if __name__ == "__main__":
    sys.exit(main())
