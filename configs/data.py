"""Local text, and how it becomes batches."""

from dataclasses import dataclass

from configs import schema


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Local text and how it becomes batches.

    A path is a file or a folder (searched recursively): .jsonl and .parquet rows give `text_field`;
    any other file of `text_suffixes` is one document.
    """

    paths: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()  # one per path: shares of documents drawn; empty: by size
    eval_paths: tuple[str, ...] = ()  # empty: `eval_fraction` of the documents is held out
    eval_fraction: float = 0.02
    tokenizer: str = ""  # folder with tokenizer files, a .tiktoken rank file or a .model
    text_field: str = "text"
    text_suffixes: tuple[str, ...] = (".txt", ".md", ".rst", ".py")
    sequence_length: int = 4096  # tokens a row
    seed: int = 0
    shuffle: bool = True
    worker_count: int = 0  # Grain worker processes; 0 reads in the training process
    prefetch: int = 16  # rows read ahead

    def __post_init__(self) -> None:
        schema.check_positive(self, "sequence_length", "prefetch")
        schema.check(
            self.worker_count >= 0, f"data.worker_count={self.worker_count} must not be negative"
        )
        schema.check(
            not self.weights or len(self.weights) == len(self.paths),
            f"data.weights has {len(self.weights)} entries for {len(self.paths)} paths; "
            f"give one per path, or none",
        )
        for weight in self.weights:
            schema.check(weight > 0, f"data.weights entry {weight} must be greater than 0")
        schema.check(
            0 <= self.eval_fraction < 1,
            f"data.eval_fraction={self.eval_fraction} must be in [0, 1)",
        )
