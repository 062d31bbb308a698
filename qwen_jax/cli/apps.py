"""The tyro applications that commands are added to, and types of arguments."""

import json
from pathlib import Path
from typing import Literal

import tyro

from configs.models.architecture import ModelConfig

Positional = tyro.conf.Positional
Dtype = Literal["float32", "bfloat16"]
Flat = tyro.conf.arg(name="")  # flags without a prefix

app = tyro.extras.SubcommandApp()
tokenizer_app = tyro.extras.SubcommandApp()
convert_app = tyro.extras.SubcommandApp()
train_app = tyro.extras.SubcommandApp()
checkpoint_app = tyro.extras.SubcommandApp()


def registry() -> tyro.constructors.ConstructorRegistry:
    """The tyro registry that reads a model as a preset's name or as a path to a config.json."""
    known = tyro.constructors.ConstructorRegistry()

    def read(arguments: list[str]) -> str | ModelConfig:
        (text,) = arguments
        if not text.endswith(".json"):
            return text
        from configs.models import huggingface

        values = json.loads(Path(text).read_text(encoding="utf-8"))
        return huggingface.read_model(values, name=Path(text).parent.name)

    @known.primitive_rule
    def model(info: tyro.constructors.PrimitiveTypeInfo):
        if info.type != str | ModelConfig:
            return None
        return tyro.constructors.PrimitiveConstructorSpec(
            nargs=1,
            metavar="PRESET|CONFIG.JSON",
            instance_from_str=read,
            is_instance=lambda value: isinstance(value, str | ModelConfig),
            str_from_instance=lambda value: [value if isinstance(value, str) else value.name],
        )

    return known
