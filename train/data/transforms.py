"""Token ids of a document's text."""

from typing import Protocol

import numpy as np

from train.data import sources


class Tokenizer(Protocol):
    """Interface of a tokenizer for the pipeline. Worker processes need it to be picklable."""

    vocab_size: int
    pad_id: int | None

    def encode(self, text: str) -> list[int]: ...


def encode_document(
    document: sources.Document, *, tokenizer: Tokenizer, end_of_document_id: int
) -> np.ndarray:
    """Token ids, int32 [length], with the end-of-document id where the document ends."""
    ids = tokenizer.encode(document.text)
    if document.ends:
        ids = [*ids, end_of_document_id]
    return np.asarray(ids, np.int32)
