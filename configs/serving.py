"""How a server meets its clients: where it listens, what it takes, how long it waits."""

from dataclasses import dataclass

from configs.architecture import check, check_positive


@dataclass(frozen=True, kw_only=True)
class Serve:
    """Limits of one server. Sizes are bytes, times are seconds.

    A client beyond a limit gets an error of OpenAI's form, or loses its connection, and the reason
    is logged; the others notice nothing.
    """

    host: str = "127.0.0.1"  # whom it listens to: by default this machine alone
    port: int = 8000  # 0: any that is free; the line printed at the start says which
    model_name: str = ""  # what clients call the model; empty: its folder's name
    # File that holds the API key; empty: environment variable QWEN_JAX_API_KEY, or no key at all.
    api_key_file: str = ""

    max_body: int = 4 * 2**20  # of a request's body
    max_header: int = 64 * 2**10  # of a request's line and headers
    max_prompt_tokens: int = 0  # 0: as many as model and pages take
    max_choices: int = 128  # answers of one request: n, or best_of, times its prompts
    max_queue: int = 256  # answers that may wait, beyond those that the engine works on
    max_connections: int = 2048  # open ones, idle ones included
    max_inputs: int = 2048  # texts of one request for embeddings

    header_seconds: float = 10.0  # until a request's headers are there
    body_seconds: float = 30.0  # until its body is there
    idle_seconds: float = 30.0  # between requests of one connection
    stall_seconds: float = 30.0  # without a byte of an answer being taken
    stream_buffer: int = 1024  # pieces of one streamed answer that wait for its client
    send_buffer: int = 64 * 2**10  # of the operating system, for each connection
    drain_seconds: float = 60.0  # after SIGTERM, until open requests are cut off
    engine_seconds: float = 300.0  # longest that the engine may be at one round

    def __post_init__(self) -> None:
        check_positive(
            self, "max_body", "max_header", "max_choices", "max_connections", "max_inputs",
            "header_seconds", "body_seconds", "idle_seconds", "stall_seconds", "stream_buffer",
            "send_buffer", "engine_seconds",
        )  # fmt: skip
        for name in ("max_prompt_tokens", "max_queue", "drain_seconds"):
            value = getattr(self, name)
            check(value >= 0, f"{name}={value} must be 0 or greater")
        check(0 <= self.port < 2**16, f"port={self.port} must be in [0, 65535]")
