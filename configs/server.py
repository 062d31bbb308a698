"""How a server meets its clients: where it listens, what it takes, how long it waits."""

from typing import Annotated

from configs import schema
from configs.schema import NonNegative, Positive, Range


@schema.config()
class ServerConfig:
    """Limits of one server. Sizes are bytes, times are seconds.

    A client beyond a limit gets an error of OpenAI's form, or loses its connection, and the reason
    is logged; the others notice nothing.
    """

    # Whom it listens to: by default this machine alone.
    host: str = "127.0.0.1"
    # 0: any that is free; the line printed at the start says which.
    port: Annotated[int, Range(min=0, max=65535)] = 8000
    # What clients call the model; empty: its folder's name.
    model_name: str = ""
    # File that holds the API key; empty: environment variable QWEN_JAX_API_KEY, or no key at all.
    api_key_file: str = ""

    # Bytes of a request's body.
    max_body: Positive[int] = 4 * 2**20
    # Bytes of a request's line and headers.
    max_header: Positive[int] = 64 * 2**10
    # Tokens of a prompt; 0: as many as model and pages take.
    max_prompt_tokens: NonNegative[int] = 0
    # Answers of one request: n, or best_of, times its prompts.
    max_choices: Positive[int] = 128
    # Answers that may wait, beyond those that the engine works on.
    max_queue: NonNegative[int] = 256
    # Open connections, idle ones included.
    max_connections: Positive[int] = 2048
    # Texts of one request for embeddings.
    max_inputs: Positive[int] = 2048

    # Seconds until a request's headers are there.
    header_seconds: Positive[float] = 10.0
    # Seconds until its body is there.
    body_seconds: Positive[float] = 30.0
    # Seconds between requests of one connection.
    idle_seconds: Positive[float] = 30.0
    # Seconds in which a client takes not a byte of its answer.
    stall_seconds: Positive[float] = 30.0
    # Pieces of one streamed answer, for each choice, that wait for a client who reads slowly.
    stream_buffer: Positive[int] = 1024
    # Bytes of a connection's answers that the operating system keeps.
    send_buffer: Positive[int] = 64 * 2**10
    # Seconds from SIGTERM until open requests are cut off.
    drain_seconds: NonNegative[float] = 60.0
    # Longest time in seconds that the engine may be at one round; then it counts as failed.
    engine_seconds: Positive[float] = 300.0
