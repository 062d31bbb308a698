"""A server over an engine without a model, as a process of its own: `-m` with settings as JSON."""

import json
import logging
import sys

from configs import schema, serving
from infer import server
from infer.service import Service
from qwen_jax import tokenizer_train
from tests.infer.server.conftest import Engine

if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    words = tokenizer_train.train_bpe(["a few words, to have a corpus"], vocab_size=278)
    engine = Engine(words, seconds=0.02)
    service = Service(engine, tokenizer=words, defaults=schema.Sampling())
    code = server.run(
        service,
        settings=serving.Serve(port=0, **json.loads(sys.argv[1])),
        model_name="tiny",
        num_slots=4,
        warm_up=lambda: None,
        show=lambda text: print(text, flush=True),
    )
    sys.exit(code)
