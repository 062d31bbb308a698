"""Packing streams side by side as one Grain dataset, and the processes that may run it."""

import dataclasses
import multiprocessing
import os
import signal
import threading
from collections.abc import Sequence
from typing import Any

import grain
import numpy as np

from train.data import packing, transforms

Batch = dict[str, np.ndarray]
PLACE = "place"  # key under which a batch carries the places behind it: int64 [rows, 2]


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Token ids of a document by its number in `order`; None from number `limit` on."""

    order: grain.MapDataset
    tokenizer: transforms.Tokenizer = dataclasses.field(kw_only=True)
    end_of_document_id: int = dataclasses.field(kw_only=True)
    limit: int | None = dataclasses.field(kw_only=True)

    @property
    def padding_id(self) -> int:
        pad_id = self.tokenizer.pad_id
        return self.end_of_document_id if pad_id is None else pad_id

    def __call__(self, number: int) -> np.ndarray | None:
        if self.limit is not None and number >= self.limit:
            return None
        return transforms.encode_document(
            self.order[number],
            tokenizer=self.tokenizer,
            end_of_document_id=self.end_of_document_id,
        )


class RowStreams(grain.IterDataset):
    """Some rows of every batch, each from its own packing stream, with the streams' places."""

    def __init__(
        self, streams: Sequence[Tokens], *, places: np.ndarray, sequence_length: int
    ) -> None:
        super().__init__()
        self._make = (streams, places, sequence_length)

    def __iter__(self) -> grain.DatasetIterator:
        return _RowStreamsIterator(*self._make)


class _RowStreamsIterator(grain.DatasetIterator):
    def __init__(self, streams: Sequence[Tokens], places: np.ndarray, sequence_length: int) -> None:
        super().__init__()
        self._packers = [
            packing.RowPacker(
                tokens,
                sequence_length=sequence_length,
                padding_id=tokens.padding_id,
                document=document,
                token=token,
            )
            for tokens, (document, token) in zip(streams, places.tolist(), strict=True)
        ]

    def __next__(self) -> Batch:
        batch = stack([packer.next_row() for packer in self._packers])
        batch[PLACE] = np.array([(packer.document, packer.token) for packer in self._packers])
        return batch

    # Grain asks every iterator for its state with each element. Ours travels in the element.
    def get_state(self) -> dict[str, Any]:
        return {}

    def set_state(self, state: dict[str, Any]) -> None:
        raise NotImplementedError("make RowStreams anew with other places")


def start_worker(index: int, count: int) -> None:
    """Ignore signals in a worker, which the training process ends; exit if that was killed."""
    for number in (signal.SIGINT, signal.SIGTERM):  # these often go to the whole process group
        signal.signal(number, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def stack(rows: Sequence[packing.Row]) -> Batch:
    return {key: np.stack([row[key] for row in rows]) for key in rows[0]}
