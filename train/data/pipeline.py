"""Text on disk to batches for one host, the same on any number of hosts, resumable at any step.

The global batch is the unit of order. Its row r is always fed by *packing stream* r, which packs
the documents of `mixture.training_streams` for that row one behind the other. A host owns an equal,
contiguous share of the streams, a worker process a share of the host's; neither number enters
into what a stream holds, so that global batch n is the same whatever they are.

All that a stream has to remember is the number of a document and of a token within it. A saved
state is one such pair per row, of the batch handed out last: every batch carries the state behind
it through the prefetch queues, and what has been read ahead does not count. To resume is to start
new streams at these places, whatever host then owns them; nothing is replayed.

A row of the batch moves on by tokens, not by documents, so that streams pass through the epochs
at slightly different speeds.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import grain
import grain.experimental
import numpy as np
from absl import flags

from configs.data import DataConfig
from train.data import mixture, packing, streams, transforms

Batch = streams.Batch
_STATE_FORMAT = 1


def train_iterator(
    config: DataConfig,
    *,
    tokenizer: transforms.Tokenizer,
    end_of_document_id: int,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
    splits: mixture.Splits | None = None,
) -> "TrainIterator":
    """This host's rows of every global batch of `batch_size` rows, without end.

    Batches are dicts of arrays [batch_size / process_count, sequence_length] with the keys of
    `packing`. `splits` is what `mixture.open_splits(config)` gave, to save looking again. Raises
    `ValueError` where the data or the numbers do not fit; a broken document raises one when it is
    read, out of `next`.
    """
    rows = local_rows(batch_size, process_index=process_index, process_count=process_count)
    splits = splits or mixture.open_splits(config)
    if config.worker_count > len(rows):
        raise ValueError(
            f"data.worker_count={config.worker_count} exceeds the {len(rows)} rows of a batch on "
            f"this host; set it to {len(rows)} or less"
        )
    count = sum(len(corpus) for corpus in splits.train)
    if count < batch_size:
        raise ValueError(
            f"the data holds {count} training documents, fewer than batch_size={batch_size}: rows "
            f"of a batch would repeat each other; lower batch_size or add documents"
        )
    row_streams = [
        streams.Tokens(
            order, tokenizer=tokenizer, end_of_document_id=end_of_document_id, limit=None
        )
        for order in mixture.training_streams(
            splits.train, config, rows=rows, batch_size=batch_size
        )
    ]
    identity = {
        "batch_size": batch_size,
        "sequence_length": config.sequence_length,
        "seed": config.seed,
        "shuffle": config.shuffle,
        "weights": list(config.weights),
        "documents": [len(corpus) for corpus in splits.train],
        "digests": [corpus.digest() for corpus in splits.train],
        "vocab_size": tokenizer.vocab_size,
        "end_of_document_id": end_of_document_id,
    }
    return TrainIterator(config, row_streams=row_streams, rows=rows, identity=identity)


class TrainIterator(Iterator[Batch]):
    """Host-local training batches; made by `train_iterator`. Close it, or use it in `with`."""

    def __init__(
        self,
        config: DataConfig,
        *,
        row_streams: Sequence[streams.Tokens],
        rows: range,
        identity: dict[str, Any],
    ) -> None:
        self._config = config
        self._streams = row_streams
        self._rows = rows
        self._identity = identity
        self._step = 0
        self._places = np.zeros((len(rows), 2), np.int64)  # document and token, a row
        self._parts: list[grain.DatasetIterator] | None = None
        self._closed = False

    def __next__(self) -> Batch:
        if self._closed:
            raise ValueError("the data iterator is closed")
        if self._parts is None:
            self._parts = self._open()
        try:
            parts = [next(part) for part in self._parts]
        except BaseException:
            self._stop()
            raise
        # asarray: a worker's arrays live in shared memory, which goes when they do.
        batch = {key: np.concatenate([np.asarray(part[key]) for part in parts]) for key in parts[0]}
        self._places = batch.pop(streams.PLACE)
        self._step += 1
        return batch

    def get_state(self) -> dict[str, Any]:
        """Positions of this host's streams after the last batch handed out, as plain JSON."""
        return {
            "format": _STATE_FORMAT,
            "identity": self._identity,
            "step": self._step,
            "first_row": self._rows.start,
            "places": self._places.tolist(),  # [document, token] a row
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue after the batch at which `state` was taken.

        `state` is one host's, if that has this host's rows, or that of all hosts
        (`merge_states`). Raises `ValueError` if it belongs to other data or lacks rows.
        """
        _check_format(state)
        changed = [
            f"{key}: {state['identity'].get(key)} -> {value}"
            for key, value in self._identity.items()
            if state["identity"].get(key) != value
        ]
        if changed:
            raise ValueError(
                f"the saved data state belongs to other data ({'; '.join(changed)}); put these "
                f"back, or start a new run from the checkpoint's weights"
            )
        start = self._rows.start - state["first_row"]
        places = state["places"][max(start, 0) : start + len(self._rows)]
        if start < 0 or len(places) < len(self._rows):
            first, last = state["first_row"], state["first_row"] + len(state["places"]) - 1
            raise ValueError(
                f"the saved data state has rows {first} to {last} of the batch, and this host "
                f"needs {self._rows.start} to {self._rows.stop - 1}; join the states of all "
                f"hosts with merge_states"
            )
        self._stop()
        self._step = state["step"]
        self._places = np.array(places, np.int64)

    def close(self) -> None:
        """Stop the threads and worker processes."""
        self._stop()
        self._closed = True

    def __enter__(self) -> "TrainIterator":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _open(self) -> list[grain.DatasetIterator]:
        """One prefetching iterator per worker process, or one with a thread in this process."""
        if self._config.worker_count and not flags.FLAGS.is_parsed():
            # Grain's workers read absl flags, which a program that has none of its own never
            # parses; this gives each its default.
            flags.FLAGS.mark_as_parsed()
        batches = -(-self._config.prefetch // len(self._rows))
        parts = []
        for share in np.array_split(np.arange(len(self._rows)), max(1, self._config.worker_count)):
            dataset = streams.RowStreams(
                [self._streams[row] for row in share],
                places=self._places[share],
                sequence_length=self._config.sequence_length,
            )
            if self._config.worker_count:
                # One worker for each dataset: with more Grain would split the documents itself,
                # and the number of workers would change the rows.
                dataset = dataset.mp_prefetch(
                    grain.MultiprocessingOptions(num_workers=1, per_worker_buffer_size=batches),
                    worker_init_fn=streams.start_worker,
                )
            else:
                dataset = grain.experimental.ThreadPrefetchIterDataset(
                    dataset, prefetch_buffer_size=batches
                )
            parts.append(iter(dataset))
        for part in parts:
            part.start_prefetch()
        return parts

    def _stop(self) -> None:
        parts, self._parts = self._parts or [], None
        for part in parts:
            part.close()


def merge_states(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The states of all hosts at one step as one state, for any number of hosts.

    Raises `ValueError` where they differ in step or data, or leave out rows of the batch.
    """
    if not states:
        raise ValueError("there is no data state to merge")
    for state in states:
        _check_format(state)
    states = sorted(states, key=lambda state: state["first_row"])
    first = states[0]
    for state in states:
        for key in ("step", "identity"):
            if state[key] != first[key]:
                raise ValueError(
                    f"the data states of the hosts differ in {key}: {first[key]} and {state[key]}; "
                    f"take all from one checkpoint"
                )
    row = 0
    for state in states:
        if state["first_row"] != row:
            raise ValueError(
                f"the data states of the hosts do not join: one starts at row "
                f"{state['first_row']} where row {row} was due; give each host's state once"
            )
        row += len(state["places"])
    if row != first["identity"]["batch_size"]:
        raise ValueError(
            f"the data states hold {row} of the {first['identity']['batch_size']} rows of a "
            f"batch; give the states of all hosts"
        )
    return {**first, "places": [place for state in states for place in state["places"]]}


def eval_batches(
    config: DataConfig,
    *,
    tokenizer: transforms.Tokenizer,
    end_of_document_id: int,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
    limit: int | None = None,
    splits: mixture.Splits | None = None,
) -> Iterator[Batch]:
    """This host's rows of the held-out batches: one pass, always the same, at most `limit` batches.

    All rows come from one packing stream, so that only the very last is padded, and the rows do
    not depend on batch size or hosts. The last batch is filled with rows of weight 0; every host
    has the same number of batches. Each host tokenises all rows to know where its own begin, which
    is cheap as long as the held-out set, or `limit`, is small. Raises `ValueError` if nothing is
    held out.
    """
    rows = local_rows(batch_size, process_index=process_index, process_count=process_count)
    splits = splits or mixture.open_splits(config)
    if limit is not None and limit <= 0:
        raise ValueError(f"limit={limit} evaluation batches; give at least 1, or None for all")
    if not splits.evaluation:
        count = sum(len(corpus) for corpus in splits.train)
        raise ValueError(
            f"data.eval_fraction={config.eval_fraction} of {count} documents holds out none; "
            f"raise it, or give data.eval_paths"
        )
    order = mixture.evaluation_order(splits.evaluation)
    tokens = streams.Tokens(
        order, tokenizer=tokenizer, end_of_document_id=end_of_document_id, limit=len(order)
    )
    return _eval_batches(tokens, config, batch_size=batch_size, rows=rows, limit=limit)


def _eval_batches(
    tokens: streams.Tokens, config: DataConfig, *, batch_size: int, rows: range, limit: int | None
) -> Iterator[Batch]:
    packer = packing.RowPacker(
        tokens,
        sequence_length=config.sequence_length,
        padding_id=tokens.padding_id,
    )
    filler = packing.padding_row(
        sequence_length=config.sequence_length, padding_id=tokens.padding_id
    )
    done = 0
    while limit is None or done < limit:
        batch = []
        while len(batch) < batch_size and (row := packer.next_row()) is not None:
            batch.append(row)
        if not batch:
            return
        batch += [filler] * (batch_size - len(batch))
        yield streams.stack(batch[rows.start : rows.stop])
        done += 1


def local_rows(batch_size: int, *, process_index: int, process_count: int) -> range:
    """The rows of the global batch that belong to a host."""
    if batch_size % process_count:
        lower = batch_size // process_count * process_count
        choices = f"{lower} or {lower + process_count}" if lower else f"{process_count}"
        raise ValueError(
            f"batch_size={batch_size} is not divisible by the {process_count} processes that "
            f"read data; use {choices}"
        )
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index={process_index} is not among {process_count} processes")
    share = batch_size // process_count
    return range(process_index * share, (process_index + 1) * share)


def _check_format(state: dict[str, Any]) -> None:
    if state.get("format") != _STATE_FORMAT:
        raise ValueError(
            f"data state of format {state.get('format')!r}; this version reads {_STATE_FORMAT}"
        )
