"""The command itself, over a real engine and a model on disk."""

import dataclasses
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx2 as httpx
import openai
import pytest

from configs.engine import EngineConfig
from infer.text import loading
from qwen_jax.checkpoint import load
from tests.infer import whole_forward

ROOT = Path(__file__).parents[3]
# Few programs to compile.
ENGINE = EngineConfig(
    num_slots=2, page_size=16, prefill_chunk=32, prefill_tokens=32, decode_steps=4, num_pages=32,
    max_length=192, buckets="one",
)  # fmt: skip


def _alone(folder: Path, prompts: list[str]) -> list[str]:
    """Answers of the model without engine, pages and server, one at a time."""
    loaded = dataclasses.replace(
        loading.load_model(folder, dtype="float32"),
        params=load.load_params(folder, dtype="float32"),  # not fused
    )
    texts = []
    for prompt in prompts:
        tokens = whole_forward.answer(
            loaded, loaded.tokenizer.encode(prompt), settings=loaded.defaults
        )
        ended = tokens[-1] in loaded.eos_ids
        texts.append(loaded.tokenizer.decode(tokens[: len(tokens) - ended], skip_special=True))
    return texts


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.races
def test_command_serves_a_model(hf_folder):
    flags = [
        f"--engine.{field.name.replace('_', '-')}={getattr(ENGINE, field.name)}"
        for field in dataclasses.fields(EngineConfig)
        if field.default != getattr(ENGINE, field.name)
    ]
    command = [sys.executable, "-m", "qwen_jax.cli", "serve", "--model", str(hf_folder), "--port=0",
               "--dtype=float32", *flags]  # fmt: skip
    process = subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE)
    try:
        line = process.stdout.readline()
        url = re.fullmatch(r"random: listening at (http://127\.0\.0\.1:\d+)/v1\n", line)[1]
        while httpx.get(url + "/ready", timeout=60).status_code == 503:
            assert httpx.get(url + "/health", timeout=60).status_code == 200
            time.sleep(0.5)
        client = openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0, timeout=100)
        prompts = ["hello", "a few words", "Zug"]
        answer = client.completions.create(model="random", prompt=prompts)
        assert [c.text for c in answer.choices] == _alone(hf_folder, prompts)
        pieces = client.completions.create(model="random", prompt="hello", stream=True)
        assert "".join(c.choices[0].text for c in pieces) == answer.choices[0].text
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": ["yes"]}}}
        chat = client.chat.completions.create(
            model="random", messages=[{"role": "user", "content": "?"}], response_format=form
        )
        assert chat.choices[0].message.content == '"yes"'
        vectors = client.embeddings.create(model="random", input=["hello"]).data
        assert sum(x * x for x in vectors[0].embedding) == pytest.approx(1, abs=1e-5)
        client.close()
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.communicate()
