"""The checkpoint at a path: a Hugging Face folder, a native checkpoint or a training run.

A native checkpoint is a folder:

    params/         an Orbax PyTree checkpoint of the parameter tree
    model/metadata  JSON: {"format": 1, "model": <ModelConfig>, ...}
    assets/         files of the Hugging Face folder that it was imported from

A step of a training run, OUTPUT/checkpoints/STEP, is one too; its assets are in OUTPUT/assets.

`resolve` reads config.json or model/metadata once, and everything that takes a checkpoint takes its
result: `load.load`, the importer, the exporter and the quantiser.
"""

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from configs.models import (
    architecture,
    huggingface,
    huggingface_generation,
    huggingface_quantised,
)
from configs.models.architecture import GenerationConfig, ModelConfig, QuantisationConfig
from qwen_jax import storage
from qwen_jax.checkpoint import tensor_table
from qwen_jax.checkpoint.native import store
from qwen_jax.checkpoint.quantised import stored_arrays

if TYPE_CHECKING:
    from qwen_jax.text.tokenizer.tokenizer import Tokenizer

WeightFormat = Literal["safetensors", "torch"]
_WEIGHT_FILES: tuple[tuple[WeightFormat, str], ...] = (
    ("safetensors", "model.safetensors"),
    ("torch", "pytorch_model.bin"),
)


@dataclass(frozen=True, kw_only=True)
class WeightFiles:
    """The weights of a Hugging Face folder: their only file, or the index of their shards."""

    format: WeightFormat
    path: Path

    @property
    def is_index(self) -> bool:
        return self.path.name.endswith(".index.json")


@dataclass(frozen=True, kw_only=True)
class Resolved:
    """A checkpoint that was found. Whatever it cannot do without is there."""

    kind: Literal["huggingface", "native", "training"]
    folder: Path  # the Hugging Face folder, or the native checkpoint
    model: ModelConfig
    dtype: str | None = None  # what config.json says of the tensors, which may be of another one
    assets: Path | None = None  # the folder of config.json, tokenizer files and the like
    step: int | None = None  # of a training run: its newest complete one
    config: Mapping = field(default_factory=dict)  # config.json of a Hugging Face folder
    weights: WeightFiles | None = None  # of a Hugging Face folder
    quantisation: QuantisationConfig | None = None  # GPTQ or AWQ, in a Hugging Face folder
    metadata: Mapping = field(default_factory=dict)  # model/metadata of a native checkpoint
    specs: stored_arrays.Specs = field(default_factory=dict)  # a native one's quantised parameters

    @property
    def is_quantised(self) -> bool:
        return self.quantisation is not None or bool(self.specs)

    @functools.cached_property
    def files(self) -> frozenset[str]:
        """The names of the files in `assets`."""
        if self.assets is None:
            return frozenset()
        return frozenset(path.name for path in self.assets.iterdir() if path.is_file())

    @functools.cached_property
    def generation_config(self) -> GenerationConfig:
        """The sampling defaults of generation_config.json, all unset where there is no such file.

        Raises `ValueError` naming the key that is not supported.
        """
        name = "generation_config.json"
        if name not in self.files:
            return GenerationConfig()
        return huggingface_generation.read(storage.read_json(self.assets / name))

    @functools.cached_property
    def tokenizer(self) -> "Tokenizer":
        """The tokenizer, with the chat template if it has one.

        Raises `ValueError` where there is none, and for one with more ids than the model has rows.
        """
        from qwen_jax.text.tokenizer import tokenizer  # not in the bounded memory of an import

        if self.assets is None:
            raise ValueError(
                f"{self.folder} has no tokenizer beside it; import it again from a Hugging Face "
                f"folder that holds one, or put the tokenizer files into {self.folder / 'assets'}"
            )
        found = tokenizer.load(self.assets)
        tokenizer.check_vocabulary(found, num_rows=self.model.vocab_size)
        return found

    @property
    def has_chat_template(self) -> bool:
        return self.tokenizer.chat_template is not None


def resolve(path: Path | str) -> Resolved:
    """The checkpoint at `path`: a Hugging Face folder, a native one, or a training run's newest.

    Raises `ValueError` saying what is missing where it is none of these.
    """
    path = _existing_folder(path)
    if (path / "import.json").exists() and path.name.endswith(".partial"):
        raise ValueError(f"{path} is an unfinished import; run the import again to finish it")
    if (path / "params").is_dir() or (path / "model").is_dir():
        return _resolve_native(path)
    if (path / "checkpoints").is_dir():
        return _resolve_training(path)
    if (path / "config.json").is_file():
        return resolve_huggingface(path)
    raise ValueError(
        f"{path} is no checkpoint: it has neither config.json (Hugging Face), params/ and "
        f"model/metadata (native), nor checkpoints/ (a training run)"
    )


def resolve_huggingface(path: Path | str) -> Resolved:
    """The Hugging Face folder at `path`, whatever else lies in it.

    Raises `ValueError` naming the file that is missing or the key that is not supported.
    """
    path = _existing_folder(path)
    if storage.is_remote(path):
        raise ValueError(f"{path} is a Hugging Face folder in a bucket; copy it to a disk")
    config = storage.read_json(path / "config.json")
    return Resolved(
        kind="huggingface",
        folder=path,
        model=huggingface.read_model(config, name=path.resolve().name),
        dtype=config.get("dtype", config.get("torch_dtype")),
        assets=path,
        config=config,
        weights=_weight_files(path),
        quantisation=huggingface_quantised.read(config),
    )


def check_not_quantised(resolved: Resolved, *, remedy: str) -> None:
    """Raises `ValueError` for a quantised checkpoint, which serves inference alone.

    `remedy` is what to do with the checkpoint that it was made from, a verb.
    """
    if resolved.is_quantised:
        raise ValueError(
            f"{resolved.folder} is quantised, for inference alone; {remedy} the checkpoint that it "
            f"was made from"
        )


def check_same_model(resolved: Resolved, model: ModelConfig) -> None:
    """Raises `ValueError` naming every parameter shape in which `model` differs.

    `model` may pad the number of its experts otherwise, and may add router biases.
    """
    if tensor_table.has_router_bias(resolved.model) and not tensor_table.has_router_bias(model):
        raise ValueError(
            f"{resolved.folder} has router biases, without which other experts would be chosen; "
            f"set experts.bias_update_rate to go on with them"
        )
    stored, wanted = (
        {row.path: tensor_table.shape(row, plain) for row in tensor_table.rows(plain)}
        for plain in (_without_extras(resolved.model), _without_extras(model))
    )
    differing = [
        f"{path} {list(stored.get(path, ()))} instead of {list(wanted.get(path, ()))}"
        for path in dict.fromkeys([*wanted, *stored])
        if stored.get(path) != wanted.get(path)
    ]
    if differing:
        raise ValueError(
            f"{resolved.folder} is a checkpoint of another model ({resolved.model.name}, not "
            f"{model.name}): {tensor_table.first_names(differing)}"
        )


def _existing_folder(path: Path | str) -> Path:
    path = storage.folder(path)
    if not path.is_dir():
        partial = path.with_name(path.name + ".partial")
        hint = f"; {partial} is an unfinished import: run it again" if partial.is_dir() else ""
        raise ValueError(f"{path} is not a folder{hint}")
    return path


def _weight_files(folder: Path) -> WeightFiles:
    """The weights of a Hugging Face folder; safetensors where both formats are there.

    Raises `ValueError` where there are none, and where one format is there both in a single file
    and in shards.
    """
    for format, name in _WEIGHT_FILES:
        found = [p for p in (folder / name, folder / f"{name}.index.json") if p.is_file()]
        if len(found) == 2:
            raise ValueError(
                f"{folder} has both {name} and {name}.index.json; remove the stale one"
            )
        if found:
            return WeightFiles(format=format, path=found[0])
    raise ValueError(
        f"{folder} has config.json but has no weights: neither safetensors nor pytorch_model.bin, "
        f"as one file or with an index (model.safetensors.index.json, pytorch_model.bin.index.json)"
    )


def _resolve_native(path: Path) -> Resolved:
    for part in ("params/_METADATA", "model/metadata"):
        if not (path / part).is_file():
            raise ValueError(f"{path} is an incomplete native checkpoint: {part} is missing")
    where = path / "model" / "metadata"
    values = storage.read_json(where)
    if values.get("format") != store.FORMAT:
        raise ValueError(
            f"{path} has checkpoint format {values.get('format')!r}; "
            f"this version reads {store.FORMAT}"
        )
    if not isinstance(values.get("model"), dict):
        raise ValueError(f"{where} has no model")
    try:
        model = architecture.model_from_dict(values["model"])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from None
    # A step of a training run shares the run's assets.
    candidates = [path / "assets"]
    parent = storage.absolute(path).parent
    if parent.name == "checkpoints":
        candidates.append(parent.parent / "assets")
    return Resolved(
        kind="native",
        folder=path,
        model=model,
        assets=next((folder for folder in candidates if folder.is_dir()), None),
        metadata=values,
        specs=stored_arrays.from_metadata(values, model, where=str(where)),
    )


def _resolve_training(path: Path) -> Resolved:
    folder = path / "checkpoints"
    steps = sorted(int(p.name) for p in folder.iterdir() if p.name.isdecimal() and p.is_dir())
    complete = [step for step in steps if _is_complete(folder / str(step))]
    if not complete:
        raise ValueError(f"{path} is a training run without a complete checkpoint yet")
    newest = _resolve_native(folder / str(complete[-1]))
    assets = path / "assets"
    return dataclasses.replace(
        newest,
        kind="training",
        step=complete[-1],
        assets=assets if assets.is_dir() else newest.assets,
    )


def _is_complete(path: Path) -> bool:
    complete = (path / "params" / "_METADATA").is_file() and (path / "model/metadata").is_file()
    # In a bucket, where nothing can be renamed, Orbax writes this file last.
    return complete and (not storage.is_remote(path) or (path / "commit_success.txt").is_file())


def _without_extras(model: ModelConfig) -> ModelConfig:
    """`model` without padding experts and router biases, which a checkpoint may lack."""
    if model.moe is None:
        return model
    moe = dataclasses.replace(model.moe, pad_experts_to=None, bias_update_rate=None)
    return dataclasses.replace(model, moe=moe)
