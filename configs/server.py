"""Settings of a server: address, limits of a request, and time limits."""

from typing import Annotated

from configs import schema
from configs.schema import NonNegative, Positive, Range


@schema.config()
class ServerConfig:
    """Limits of one server. Sizes are bytes, times are seconds.

    A client beyond a limit gets an error of OpenAI's form, or loses its connection, and the reason
    is logged; the others notice nothing.
    """

    # Address to listen on; the default accepts clients of this machine only.
    host: str = "127.0.0.1"
    # Port to listen on; 0: a free port, which is printed at the start.
    port: Annotated[int, Range(min=0, max=65535)] = 8000
    # Name of the model in the API; empty: the name of its folder.
    model_name: str = ""
    # File that holds the API key; empty: environment variable QWEN_JAX_API_KEY, or no key at all.
    api_key_file: str = ""

    # Most bytes of a request's body.
    max_body: Positive[int] = 4 * 2**20
    # Most bytes of a request's line and headers.
    max_header: Positive[int] = 64 * 2**10
    # Most tokens of a prompt; 0: as many as the model and the cache pages allow.
    max_prompt_tokens: NonNegative[int] = 0
    # Most answers of one request: n, or best_of, times the number of its prompts.
    max_choices: Positive[int] = 128
    # Most answers that wait for the engine, beyond those in progress.
    max_queue: NonNegative[int] = 256
    # Most open connections, idle ones included.
    max_connections: Positive[int] = 2048
    # Most texts in one request for embeddings.
    max_inputs: Positive[int] = 2048

    # Seconds within which a request's headers must arrive.
    header_seconds: Positive[float] = 10.0
    # Seconds within which a request's body must arrive.
    body_seconds: Positive[float] = 30.0
    # Seconds after which an idle connection is closed.
    idle_seconds: Positive[float] = 30.0
    # Seconds after which a client that reads no byte of its answer is disconnected.
    stall_seconds: Positive[float] = 30.0
    # Most pieces of a streamed answer, per choice, that are buffered for a slow client.
    stream_buffer: Positive[int] = 1024
    # Bytes of the operating system's send buffer of a connection.
    send_buffer: Positive[int] = 64 * 2**10
    # Seconds from SIGTERM until open requests are cut off.
    drain_seconds: NonNegative[float] = 60.0
    # Seconds after which an engine that has not finished a round counts as failed.
    engine_seconds: Positive[float] = 300.0
