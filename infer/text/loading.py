"""A model's files as parameters, tokenizer and defaults, and as a text service over an engine."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from configs.engine import EngineConfig
from configs.mesh import MeshConfig
from configs.models.architecture import GenerationConfig, ModelConfig
from configs.sampling import SamplingParams
from infer.constraints import compiler as constraints
from infer.constraints.spec import ConstraintSpec
from infer.engine import engine as engine_lib
from infer.engine.request import Constraint
from infer.speculation import draft as draft_lib
from infer.text.service import Service
from partitioning import mesh as mesh_lib
from partitioning import rules as rules_lib
from partitioning import sharding
from partitioning.sharding import Layout
from qwen_jax.checkpoint import load as checkpoint_lib
from qwen_jax.checkpoint import resolve
from qwen_jax.decode import weights
from qwen_jax.model import transformer
from qwen_jax.text.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A model ready for an engine. `load_model` makes it."""

    cfg: ModelConfig
    params: weights.DecodeWeights
    tokenizer: Tokenizer
    defaults: SamplingParams  # what a request that says nothing gets
    eos_ids: tuple[int, ...]
    dtype: jnp.dtype
    layout: Layout | None = None


def keep_programs(folder: str | Path) -> None:
    """Has JAX keep the programs that it compiles from now on, and take those kept before.

    Not where it has a folder for that already, nor on a CPU: what was compiled for one CPU may not
    run on the next.
    """
    if folder and not jax.config.jax_compilation_cache_dir and jax.default_backend() != "cpu":
        jax.config.update("jax_compilation_cache_dir", str(Path(folder).expanduser()))


def load(
    path: str | Path,
    *,
    settings: EngineConfig,
    sampling: Mapping[str, Any],
    dtype: str = "bfloat16",
    mesh: MeshConfig | None = None,
    draft: str | Path | None = None,
) -> Service:
    """The model at `path` behind an engine, with the smaller one at `draft` to guess for it."""
    draft_lib.check_asked(settings, given="none" if draft is None else "draft")
    # Guesses are checked several at a time.
    num_rows = settings.num_slots if settings.speculation == "off" else None
    loaded = load_model(path, dtype=dtype, mesh=mesh, num_rows=num_rows)
    guesser = None if draft is None else _draft(draft, path, loaded)
    return serve(loaded, settings=settings, sampling=sampling, draft=guesser)


def load_model(
    path: str | Path,
    *,
    dtype: str = "bfloat16",
    mesh: MeshConfig | None = None,
    num_rows: int | None = None,
) -> Loaded:
    """The model at `path` with its tokenizer, on one device or on a mesh of all.

    `path` is a Hugging Face folder, a native checkpoint or a training run's output. `dtype`
    (`float32`, `bfloat16`) is that of the weights held and of the arithmetic, `num_rows` the most
    requests that are to decode at one time, None for many.
    Where the mesh does not divide a model's experts, ones that are never chosen are added.
    Raises `ValueError` for what cannot be loaded, and for a mesh that does not divide the model.
    """
    found = resolve.resolve(path)
    cfg = found.model
    layout = placed = None
    if mesh is not None:
        rules = rules_lib.rule_set("engine", kv_heads=mesh.kv_heads)
        layout = Layout(mesh_lib.make(mesh), rules)
        cfg = sharding.pad_experts(cfg, layout)
        sharding.check_model(cfg, layout)
        placed = sharding.shardings(transformer.axes(cfg), layout)
    tokenizer, said = found.tokenizer, found.generation_config  # refused before the weights load
    params = checkpoint_lib.load(found, shardings=placed, dtype=dtype, model=cfg)
    prepared = weights.prepare(
        cfg, params, dtype=jnp.dtype(dtype), layout=layout, num_rows=num_rows
    )
    return Loaded(
        cfg=cfg,
        params=prepared,
        tokenizer=tokenizer,
        defaults=sampling_defaults(said),
        eos_ids=said.eos_token_ids or cfg.eos_token_ids,
        dtype=jnp.dtype(dtype),
        layout=layout,
    )


def serve(
    loaded: Loaded,
    *,
    settings: EngineConfig,
    sampling: Mapping[str, Any] | None = None,
    draft: draft_lib.Draft | None = None,
) -> Service:
    """A text service over an engine of these settings.

    `sampling` replaces the defaults of the model's generation_config.json, for requests that say
    nothing. Raises `ValueError` for what does not fit.
    """
    engine = engine_lib.Engine(
        loaded.cfg,
        loaded.params,
        settings=settings,
        eos_ids=loaded.eos_ids,
        dtype=loaded.dtype,
        layout=loaded.layout,
        draft=draft,
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
        defaults=with_overrides(loaded.defaults, dict(sampling or {})),
        bos_id=loaded.cfg.bos_token_id,
        compile_constraint=compile_constraint,
    )


def _draft(path: str | Path, model: str | Path, loaded: Loaded) -> draft_lib.Draft:
    """The model at `path`, to guess for the one at `model`: on a mesh, all of it on every device.

    Raises `ValueError` where their tokenizers differ. Rows of their embeddings may.
    """
    found = load_model(path, dtype=str(loaded.dtype))
    if found.tokenizer.fingerprint != loaded.tokenizer.fingerprint:
        raise ValueError(
            f"the draft {path} has another tokenizer than {model}: its tokens would be other text; "
            f"take a draft of the same family"
        )
    if loaded.layout is None:
        return draft_lib.Draft(found.cfg, found.params)
    layout = Layout(loaded.layout.mesh, rules_lib.REPLICATED)
    params = jax.device_put(found.params, jax.NamedSharding(layout.mesh, jax.P()))
    return draft_lib.Draft(found.cfg, params, layout)


def sampling_defaults(said: GenerationConfig) -> SamplingParams:
    """Sampling settings of generation_config.json, with `SamplingParams`'s defaults.

    `do_sample: false` is temperature 0.
    """
    values = {
        "max_tokens": said.max_new_tokens,
        "temperature": 0.0 if said.do_sample is False else said.temperature,
        "top_k": said.top_k,
        "top_p": said.top_p,
        "min_p": said.min_p,
        "repetition_penalty": said.repetition_penalty,
    }
    return SamplingParams(**{name: value for name, value in values.items() if value is not None})


def with_overrides(settings: SamplingParams, values: dict[str, Any]) -> SamplingParams:
    """`settings` with some fields replaced. Raises `ValueError` for unknown names or bad values."""
    known = [f.name for f in dataclasses.fields(SamplingParams)]
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ValueError(f"unknown sampling parameters {unknown}; known: {', '.join(known)}")
    return dataclasses.replace(settings, **values)
