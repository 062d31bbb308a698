"""A server over an engine without a model, as a process of its own: `-m` with settings as JSON."""

import json
import logging
import sys

from configs.sampling import SamplingParams
from configs.server import ServerConfig
from infer import server
from infer.text.service import Service
from qwen_jax.text import tokenizer_training
from tests.infer.server.conftest import Engine

if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    words = tokenizer_training.train_bpe(["a few words, to have a corpus"], vocab_size=278)
    engine = Engine(words, seconds=0.02)
    service = Service(engine, tokenizer=words, defaults=SamplingParams())
    code = server.run(
        service,
        settings=ServerConfig(port=0, **json.loads(sys.argv[1])),
        model_name="tiny",
        num_slots=4,
        warm_up=lambda: None,
        show=lambda text: print(text, flush=True),
    )
    sys.exit(code)
