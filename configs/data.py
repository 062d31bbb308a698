"""Local text, and the settings by which it becomes batches."""

from typing import Annotated

from configs import schema
from configs.schema import NonNegative, Positive, Range


@schema.config(prefix="data.")
class DataConfig:
    """Local text, and the settings by which it becomes batches.

    A path is a file or a folder (searched recursively): .jsonl and .parquet rows give `text_field`;
    any other file of `text_suffixes` is one document.
    """

    paths: tuple[str, ...] = ()
    # One per path: the share of the documents drawn that comes from it; empty: by size
    weights: tuple[Positive[float], ...] = ()
    eval_paths: tuple[str, ...] = ()  # empty: `eval_fraction` of the documents is held out
    eval_fraction: Annotated[float, Range(min=0, below=1)] = 0.02
    tokenizer: str = ""  # folder with tokenizer files, a .tiktoken rank file or a .model
    text_field: str = "text"
    text_suffixes: tuple[str, ...] = (".txt", ".md", ".rst", ".py")
    sequence_length: Positive[int] = 4096  # tokens a row
    seed: int = 0
    shuffle: bool = True
    # Grain worker processes; 0 reads in the training process
    worker_count: NonNegative[int] = 0
    prefetch: Positive[int] = 16  # rows read ahead

    def __post_init__(self) -> None:
        schema.check(
            not self.weights or len(self.weights) == len(self.paths),
            f"data.weights has {len(self.weights)} entries for {len(self.paths)} paths; "
            f"give one per path, or none",
        )
