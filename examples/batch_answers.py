"""Answer many prompts with the batch engine, from Python.

    python examples/batch_answers.py --model Qwen2.5-0.5B-Instruct

The engine batches continuously: a request joins as soon as another one ends, prompts that begin
alike are read once, and each request has its own sampling settings.
"""

from pathlib import Path

import tiny_model

from configs.engine import EngineConfig
from configs.sampling import SamplingParams
from infer.text import loading
from infer.text.outputs import Answers
from infer.text.service import TextRequest

# A tiny engine: 4 requests decode at a time, and programs of one shape, so that few are compiled.
# The defaults (256 requests, shapes that follow the load) suit an accelerator.
ENGINE = EngineConfig(
    num_slots=4, page_size=16, num_pages=64, max_length=256, prefill_chunk=64, prefill_tokens=64,
    buckets="one",
)  # fmt: skip


def requests() -> list[TextRequest]:
    """A few prompts: plain text and a conversation, greedy and sampled, one and several answers."""
    greedy = SamplingParams(temperature=0.0, max_tokens=24)
    sampled = SamplingParams(temperature=0.8, top_p=0.95, max_tokens=24, seed=7)
    question = [{"role": "user", "content": "What does textwrap.dedent do?"}]
    return [
        TextRequest(id="class", prompt="class ", sampling=greedy),
        TextRequest(id="return", prompt="    return ", sampling=greedy, stop=("\n",)),
        TextRequest(id="def", prompt="def ", sampling=sampled, n=2),
        TextRequest(id="chat", prompt=question, sampling=sampled),
    ]


def main(model: Path) -> dict[str, Answers]:
    """Answers by request id, printed as they end."""
    service = loading.load(model, settings=ENGINE, sampling={}, dtype="float32")
    answers = {}
    for request in requests():
        service.submit(request)
        answers[request.id] = Answers()
    while not service.idle:
        for update in service.step():  # pieces of text, as the engine draws tokens
            answers[update.id].add(update)
            if update.usage is not None:  # the last piece of this request
                for choice in answers[update.id].choices:
                    print(f"{update.id}[{choice.index}] ({choice.finish_reason}): {choice.text!r}")
    return answers


if __name__ == "__main__":
    main(tiny_model.arguments(__doc__).model)
