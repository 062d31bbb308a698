"""The command that serves a model over HTTP."""

import logging
from pathlib import Path
from typing import Annotated

from configs.engine import EngineConfig
from configs.server import ServerConfig
from qwen_jax.cli import compose
from qwen_jax.cli.apps import Flat, app
from qwen_jax.cli.commands.answers import ModelOptions, Sampling, load_service

log = logging.getLogger("infer.server")

_SERVER, _SAMPLING, _ENGINE = ServerConfig(), Sampling(), EngineConfig()


@app.command
def serve(
    *,
    model_options: Annotated[ModelOptions, Flat],
    server: Annotated[ServerConfig, Flat] = _SERVER,
    sampling: Annotated[Sampling, Flat] = _SAMPLING,
    engine: EngineConfig = _ENGINE,
) -> int:
    """Serve a model over HTTP in OpenAI's form, to this machine alone unless --host says more.

    SIGTERM finishes open answers and ends with 0; 1 where some were cut off. See docs/serving.md.

    Args:
        sampling: What requests get that do not say it themselves.
    """
    if sampling.seed is not None:
        raise ValueError(
            f"--seed {sampling.seed} would draw the same for all who ask alike; leave it out, a "
            f"request may bring its own"
        )
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("infer").setLevel(logging.INFO)
    return compose.serve(
        load_service(model_options, sampling, engine),
        settings=server,
        model_name=server.model_name or Path(model_options.model).resolve().name,
        num_slots=engine.num_slots,
        on_program=log.info,
    )
