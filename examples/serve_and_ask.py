"""Start an OpenAI server, ask it with the `openai` client, and let it drain.

python examples/serve_and_ask.py --model Qwen2.5-0.5B-Instruct
"""

import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import openai
import tiny_model


def start(model: Path) -> tuple[subprocess.Popen, str]:
    """A server of `model` on a free port, as a process, and its URL.

    The same in a shell: `qwen-jax serve --model FOLDER --port 8000`.
    """
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "qwen_jax.cli", "serve"),
            *("--model", str(model), "--model-name", "tiny", "--port", "0", "--dtype", "float32"),
            *("--engine.num-slots", "4", "--engine.num-pages", "64", "--engine.page-size", "16"),
            *("--engine.max-length", "256", "--engine.prefill-chunk", "64"),
            *("--engine.prefill-tokens", "64", "--engine.buckets", "one"),
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    for line in process.stdout:
        if "listening at" in line:
            return process, line.split()[-1]
    raise SystemExit(f"the server ended with exit code {process.wait()}")


def wait_until_ready(url: str) -> None:
    """Returns when the server has compiled its programs; until then `/ready` answers 503."""
    while True:
        try:
            with urllib.request.urlopen(f"{url.removesuffix('/v1')}/ready"):
                return
        except urllib.error.HTTPError:
            time.sleep(0.5)


def ask(url: str) -> list[str]:
    """Texts of a chat and of a streamed completion."""
    with openai.OpenAI(base_url=url, api_key="none") as client:
        chat = client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": "What is a dataclass?"}],
            max_tokens=16,
        )
        print(f"chat: {chat.choices[0].message.content!r} ({chat.usage.completion_tokens} tokens)")
        with client.completions.create(
            model="tiny", prompt="def ", max_tokens=16, temperature=0, stream=True
        ) as stream:
            pieces = [event.choices[0].text for event in stream]
        print(f"completion in {len(pieces)} pieces: {''.join(pieces)!r}")
    return [chat.choices[0].message.content, "".join(pieces)]


def main(model: Path) -> list[str]:
    """Texts that the server answered; the server is gone when this returns."""
    process, url = start(model)
    with process:
        try:
            wait_until_ready(url)
            return ask(url)
        finally:
            process.send_signal(signal.SIGTERM)  # open requests are finished first
            print(f"the server ended with exit code {process.wait(timeout=60)}")


if __name__ == "__main__":
    main(tiny_model.arguments(__doc__).model)
