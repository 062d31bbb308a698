"""A model's files as a text service over an engine."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from configs import schema
from infer import constraints, generate
from infer import draft as draft_lib
from infer import engine as engine_lib
from infer.constraints_spec import ConstraintSpec
from infer.request import Constraint
from infer.service import Service
from partitioning import rules
from partitioning.sharding import Layout


def load(
    path: str | Path,
    *,
    settings: schema.Engine,
    sampling: Mapping[str, Any],
    dtype: str = "bfloat16",
    mesh: schema.Mesh | None = None,
    draft: str | Path | None = None,
) -> Service:
    """The model at `path`, as `generate.load` finds it, behind an engine.

    `sampling` replaces the defaults of the model's generation_config.json, for requests that say
    nothing. `draft` is a smaller model that guesses. Raises `ValueError` for what cannot be loaded
    or does not fit.
    """
    draft_lib.check_asked(settings, given="none" if draft is None else "draft")
    loaded = generate.load(path, dtype=dtype, mesh=mesh)
    guesser = None if draft is None else _draft(draft, path, loaded)
    engine = engine_lib.Engine(
        loaded.cfg,
        loaded.params,
        settings=settings,
        eos_ids=loaded.eos_ids,
        dtype=loaded.dtype,
        layout=loaded.layout,
        draft=guesser,
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


def _draft(path: str | Path, model: str | Path, loaded: generate.Generator) -> draft_lib.Draft:
    """The model at `path`, to guess for the one at `model`: on a mesh, all of it on every device.

    Raises `ValueError` where their tokenizers differ. Rows of their embeddings may.
    """
    found = generate.load(path, dtype=str(loaded.dtype))
    if found.tokenizer.fingerprint != loaded.tokenizer.fingerprint:
        raise ValueError(
            f"the draft {path} has another tokenizer than {model}: its tokens would be other text; "
            f"take a draft of the same family"
        )
    if loaded.layout is None:
        return draft_lib.Draft(found.cfg, found.params)
    layout = Layout(loaded.layout.mesh, rules.REPLICATED)
    params = jax.device_put(found.params, jax.NamedSharding(layout.mesh, jax.P()))
    return draft_lib.Draft(found.cfg, params, layout)
