"""Documents of tokens packed into rows of one length, nothing lost and nothing padded.

Documents are laid end to end. One that does not fit goes on in the next row, as a new segment
whose positions start at 0 again; every token is an input exactly once.

A row is a dict of arrays of shape [sequence_length]:

    tokens        int32    inputs
    targets       int32    the document's next token, also where it opens the next row
    segment_ids   int32    1, 2, ... for each document in the row; 0 on padding
    positions     int32    position within the segment, from 0
    loss_weights  float32  0 on padding and on a document's last token, which has no target; else 1
"""

from collections.abc import Callable

import numpy as np

Row = dict[str, np.ndarray]


def padding_row(*, sequence_length: int, padding_id: int) -> Row:
    """A row in which every position is padding."""
    return {
        "tokens": np.full(sequence_length, padding_id, np.int32),
        "targets": np.full(sequence_length, padding_id, np.int32),
        "segment_ids": np.zeros(sequence_length, np.int32),
        "positions": np.zeros(sequence_length, np.int32),
        "loss_weights": np.zeros(sequence_length, np.float32),
    }


class RowPacker:
    """Packs documents from number `document` on, and that one from its token number `token` on.

    `read(document)` gives a document's tokens, int32 [length], or None behind the last one. The
    state is the pair (`document`, `token`): the place of the first token of the next row. A
    packer made with it goes on exactly there, and reads no earlier document to do so.
    """

    def __init__(
        self,
        read: Callable[[int], np.ndarray | None],
        *,
        sequence_length: int,
        padding_id: int,
        document: int = 0,
        token: int = 0,
    ) -> None:
        self._read = read
        self._sequence_length = sequence_length
        self._padding_id = padding_id
        self._tokens: np.ndarray | None = None  # of the document at `document`, if already read
        self.document = document
        self.token = token

    def next_row(self) -> Row | None:
        """The next row, or None when all documents are used up. Only the last row is padded."""
        row = padding_row(sequence_length=self._sequence_length, padding_id=self._padding_id)
        filled = segment = 0
        while filled < self._sequence_length:
            if self._tokens is None:
                self._tokens = self._read(self.document)
                if self._tokens is None:
                    break
            start, stop = self.token, self.token + self._sequence_length - filled
            taken = self._tokens[start:stop]
            if len(taken):
                segment += 1
                targets = self._tokens[start + 1 : stop + 1]
                end = filled + len(taken)
                row["tokens"][filled:end] = taken
                row["targets"][filled : filled + len(targets)] = targets
                row["segment_ids"][filled:end] = segment
                row["positions"][filled:end] = np.arange(len(taken))
                row["loss_weights"][filled : filled + len(targets)] = 1
                filled = end
            self.token = start + len(taken)
            if self.token >= len(self._tokens):
                self.document += 1
                self.token, self._tokens = 0, None
        return row if filled else None
