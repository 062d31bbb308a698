"""Pre-training and continued pre-training: next-token prediction over packed text."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax

from configs.models import presets
from configs.models.architecture import ModelConfig
from configs.recipes import registry as recipes
from configs.train import TrainConfig
from partitioning import mesh, rules
from partitioning.processes import cluster
from partitioning.sharding import Layout
from qwen_jax import storage
from qwen_jax.checkpoint import load, resolve
from qwen_jax.checkpoint.resolve import Resolved
from qwen_jax.text.tokenizer import tokenizer
from qwen_jax.text.tokenizer.tokenizer import Tokenizer
from train import executables
from train.core import batches, loop, run_settings
from train.core import state as state_lib
from train.core import step as step_lib
from train.core.step import Program, State
from train.data import mixture, pipeline

ASSETS = "assets"
_END_OF_DOCUMENT = "<|endoftext|>"


def run(config: TrainConfig) -> loop.Result:
    """Result of a training run of `config`, which starts anew or resumes from `config.output`.

    Everything is checked before anything compiles. Raises `ValueError` for settings, data or an
    output that do not fit, and what `loop.run` raises.
    """
    recipes.check_complete(config)
    initial = resolve.resolve(config.init_from) if config.init_from else None
    cfg = model_of(config, initial)
    layout = Layout(mesh.make(config.mesh), rules.rule_set("train", kv_heads=config.mesh.kv_heads))
    program = step_lib.make(cfg, config, layout)
    if config.executables:
        program = executables.with_bundle(program, cfg, config, layout)
    words = tokenizer.load(config.data.tokenizer)
    tokenizer.check_vocabulary(words, num_rows=cfg.vocab_size)
    splits = mixture.open_splits(config.data)
    part = batches.share(program.batch_sharding, (config.batch_size, config.data.sequence_length))
    reading = {
        "tokenizer": words,
        "end_of_document_id": end_of_document_id(words),
        "batch_size": config.batch_size,
        "process_index": part.index,
        "process_count": part.count,
        "splits": splits,
    }
    source = pipeline.train_iterator(config.data, **reading)

    def held_out() -> Iterator[batches.HostBatch]:
        return pipeline.eval_batches(config.data, **reading, limit=config.eval_batches)

    output = storage.folder(config.output)
    with state_lib.explain_full_disk(output):
        run_settings.claim(output, config, cfg)
        cluster.agree({"data.tokenizer": words.fingerprint})
        if jax.process_index() == 0:
            _keep_assets(output / ASSETS, config, words, initial)
    inputs = loop.Inputs(
        source=source,
        start=lambda: _start(config, cfg, program, initial),
        held_out=held_out if splits.evaluation else None,
        merge_states=pipeline.merge_states,
    )
    return loop.run(cfg, config, program, inputs)


def model_of(config: TrainConfig, initial: Resolved | None) -> ModelConfig:
    """The model that a run trains; `initial` is the checkpoint that it starts from.

    A checkpoint's own config wins over a preset's name, since presets and checkpoints differ; a
    whole config in `config.model` (a longer context, say) wins over both, if the shapes are equal.
    `config.experts` then says how its experts are trained.
    """
    return config.experts.apply(_model_of(config, initial))


def _model_of(config: TrainConfig, initial: Resolved | None) -> ModelConfig:
    if isinstance(config.model, ModelConfig):
        if initial is not None:
            resolve.check_same_model(initial, config.model)
        return config.model
    if initial is not None:
        return initial.model
    return presets.preset(config.model)


def end_of_document_id(words: Tokenizer) -> int:
    """The token that ends a document: <|endoftext|>, or else the tokenizer's own end token.

    An instruct tokenizer's end token ends a turn of a conversation, not a document.
    """
    if _END_OF_DOCUMENT in words.control_ids:
        return words.control_ids[_END_OF_DOCUMENT]
    if words.eos_ids:
        return words.eos_ids[0]
    raise ValueError(
        f"the tokenizer has neither {_END_OF_DOCUMENT} nor an end token to put behind documents; "
        f"add eos_token to its tokenizer_config.json"
    )


def _start(
    config: TrainConfig, cfg: ModelConfig, program: Program, initial: Resolved | None
) -> State:
    if initial is None:
        return program.init(jax.random.key(config.seed))
    where = jax.tree.map(lambda leaf: leaf.sharding, program.state.params)
    resolve.check_not_quantised(initial, remedy="train")
    params = load.load(initial, shardings=where, dtype="float32", model=cfg)
    return program.adopt(params)


def _keep_assets(
    folder: Path, config: TrainConfig, words: Tokenizer, initial: Resolved | None
) -> None:
    """Copy the tokenizer and the model's own config.json into the run's folder.

    Raises `ValueError` if the run was started with another tokenizer.
    """
    if folder.exists():
        kept = tokenizer.load(folder)
        if kept.fingerprint != words.fingerprint:
            raise ValueError(
                f"{config.data.tokenizer} is not the tokenizer that this run was started with, "
                f"which is in {folder}; use that one, or choose another output"
            )
        return
    assets = None if initial is None else initial.assets
    with tempfile.TemporaryDirectory() as made:
        words.save(made)
        for name in ("config.json", "generation_config.json"):
            if assets is not None and (assets / name).is_file():
                Path(made, name).write_bytes((assets / name).read_bytes())
        storage.publish(Path(made), folder)
