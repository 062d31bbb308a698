"""A model's files as a text service over an engine."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from configs import schema
from infer import constraints, generate
from infer import engine as engine_lib
from infer.constraints_spec import ConstraintSpec
from infer.request import Constraint
from infer.service import Service


def load(
    path: str | Path,
    *,
    settings: schema.Engine,
    sampling: Mapping[str, Any],
    dtype: str = "bfloat16",
    mesh: schema.Mesh | None = None,
) -> Service:
    """The model at `path`, as `generate.load` finds it, behind an engine.

    `sampling` replaces the defaults of the model's generation_config.json, for requests that say
    nothing. Raises `ValueError` for what cannot be loaded or does not fit.
    """
    loaded = generate.load(path, dtype=dtype, mesh=mesh)
    engine = engine_lib.Engine(
        loaded.cfg,
        loaded.params,
        settings=settings,
        eos_ids=loaded.eos_ids,
        dtype=loaded.dtype,
        layout=loaded.layout,
    )

    def compile_constraint(spec: ConstraintSpec) -> Constraint:
        compiled = constraints.compile(
            spec,
            tokenizer=loaded.tokenizer,
            vocab_size=loaded.cfg.vocab_size,
            eos_ids=tuple(loaded.eos_ids),
        )
        return compiled.start()

    return Service(
        engine,
        tokenizer=loaded.tokenizer,
        defaults=generate.with_overrides(loaded.defaults, dict(sampling)),
        bos_id=loaded.cfg.bos_token_id,
        compile_constraint=compile_constraint,
    )
