"""Copies of a tokenizer: pickled, in a forked child, and how they are told apart."""

import dataclasses
import os
import pickle
import subprocess
import sys

import pytest

from qwen_jax.text import tokenizer_training
from tests.qwen_jax.text import tokenizer_oracle


def test_pickle_keeps_the_vocabulary_alone(bpe, pieces):
    for tok in (bpe, pieces):
        tok.decode(tok.encode("fill the caches"))
        copy = pickle.loads(pickle.dumps(tok))
        assert copy == tok
        assert copy.fingerprint == tok.fingerprint
        assert copy.encode("The fox") == tok.encode("The fox")
        assert len(pickle.dumps(tok)) < len(tok.backend.source) * 1.2 + 10_000


def test_fingerprint_tells_vocabularies_apart(bpe, pieces):
    other = tokenizer_training.train_bpe(tokenizer_oracle.CORPUS, vocab_size=901)
    fewer = dataclasses.replace(bpe, control_tokens=bpe.control_tokens[:-1])
    roles = dataclasses.replace(bpe, eos_ids=(), chat_template=None)
    prints = [tok.fingerprint for tok in (bpe, pieces, other, fewer)]
    assert len(set(prints)) == 4
    assert roles.fingerprint == bpe.fingerprint


FORKED = """
import os, sys
from qwen_jax.text.tokenizer import tokenizer
tok = tokenizer.load(sys.argv[1])
batch = ["some text"] * 200
want = tok.encode_batch(batch)
before = os.environ.get("TOKENIZERS_PARALLELISM")
child = os.fork()
if child == 0:
    os._exit(tok.encode_batch(batch) != want)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert os.environ.get("TOKENIZERS_PARALLELISM") == before
"""


@pytest.mark.parametrize("setting", [None, "true"])
def test_forked_child_encodes_batches_in_silence(bpe, tmp_path, setting):
    bpe.save(tmp_path)
    env = {key: value for key, value in os.environ.items() if key != "TOKENIZERS_PARALLELISM"}
    env |= {"TOKENIZERS_PARALLELISM": setting} if setting else {}
    command = [sys.executable, "-c", FORKED, str(tmp_path)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
