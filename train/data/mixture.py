"""Split of the documents into training and evaluation, and the order of each."""

import dataclasses
import hashlib
import pathlib
from collections.abc import Iterable, Sequence

import grain
import grain.experimental
import numpy as np

from configs.data import DataConfig
from train.data import sources

_BYTES_A_TOKEN = 16  # two to four times what tokenizers reach on ordinary text
_MIXING_WINDOW = 4096  # documents; Grain's shuffle is slow (milliseconds) for a window of a few


@dataclasses.dataclass(frozen=True, kw_only=True)
class Splits:
    """Training documents, one corpus per path, and evaluation documents; they share none."""

    train: tuple[sources.Corpus, ...]
    evaluation: tuple[sources.Corpus, ...]


def open_splits(config: DataConfig) -> Splits:
    """The documents of `config.paths`, less those held out.

    With `eval_paths` the held-out documents are theirs. Otherwise `eval_fraction` of each path is
    held out, document by document, by a hash of the file's name within the path and the
    document's number within the file: neither seed, weights, sequence length, other files nor
    lines appended later move a document from one set to the other.
    Raises `ValueError` where there is nothing to train on, or a file is in both sets.
    """
    if not config.paths:
        raise ValueError("data.paths is empty; give the files or folders to train on")
    corpora = sources.index_paths(config.paths, config)
    if config.eval_paths:
        train, evaluation = corpora, sources.index_paths(config.eval_paths, config)
        _check_disjoint(train, evaluation)
    else:
        masks = [held_out(corpus, fraction=config.eval_fraction) for corpus in corpora]
        train = [corpus.select(~mask) for corpus, mask in zip(corpora, masks, strict=True)]
        evaluation = [corpus.select(mask) for corpus, mask in zip(corpora, masks, strict=True)]
    for corpus, kept in zip(corpora, train, strict=True):
        if not len(kept):
            raise ValueError(
                f"data.eval_fraction={config.eval_fraction} holds out all {len(corpus)} "
                f"documents of {corpus.path}; lower it, or give data.eval_paths"
            )
    # Rows hold `sequence_length` tokens: a shorter piece of a long file would waste context.
    limit = max(sources.BLOCK_BYTES, _BYTES_A_TOKEN * config.sequence_length)
    return Splits(
        train=tuple(sources.merge_blocks(corpus, limit=limit) for corpus in train),
        evaluation=tuple(
            sources.merge_blocks(corpus, limit=limit) for corpus in evaluation if len(corpus)
        ),
    )


def held_out(corpus: sources.Corpus, *, fraction: float) -> np.ndarray:
    """A mask of the documents held out: true for about `fraction` of them, always the same."""
    salts = np.array([_salt(name) for name in corpus.names], np.uint64)
    values = _hash(salts[corpus.file], corpus.ordinal.astype(np.uint64))
    return (values >> np.uint64(11)) * 2.0**-53 < fraction


def training_streams(
    corpora: Sequence[sources.Corpus], config: DataConfig, *, rows: Iterable[int], batch_size: int
) -> list[grain.MapDataset]:
    """Endless stream of documents for each of `rows`, which feeds that row of every batch.

    Streams have random access. Without weights there is one global order; each epoch of it is a
    new permutation of all documents (or the order on disk, if `shuffle` is off), and row r takes
    its numbers r, r + batch_size, r + 2 batch_size, ...
    With weights every path has such an order of its own, and each row mixes its parts of them:
    every `_MIXING_WINDOW` documents have each path's share. Grain takes shares in hundredths of
    the smallest weight.
    """
    if not config.weights:
        order = _order(corpora, config, name="all", batch_size=batch_size)
        return [order[row::batch_size] for row in rows]
    orders = [
        _order([corpus], config, name=f"path {number}", batch_size=batch_size)
        for number, corpus in enumerate(corpora)
    ]
    # Grain mixes with a fixed rhythm; shuffled, the rows do not all change paths at one time.
    return [
        grain.experimental.WindowShuffleMapDataset(
            grain.MapDataset.mix([order[row::batch_size] for order in orders], config.weights),
            window_size=_MIXING_WINDOW,
            seed=_seed(config, f"row {row}"),
        )
        for row in rows
    ]


def evaluation_order(corpora: Sequence[sources.Corpus]) -> grain.MapDataset:
    """Evaluation documents, each once, in a fixed random order.

    The order is that of no seed in a config, so that runs are comparable; it is random so that
    the first few batches represent every path.
    """
    return grain.MapDataset.concatenate(
        [grain.MapDataset.source(corpus) for corpus in corpora]
    ).shuffle(seed=0)


def _order(
    corpora: Sequence[sources.Corpus], config: DataConfig, *, name: str, batch_size: int
) -> grain.MapDataset:
    order = grain.MapDataset.concatenate([grain.MapDataset.source(corpus) for corpus in corpora])
    if config.shuffle:
        seed = _seed(config, name)
        if any(any(corpus.row_groups) for corpus in corpora):
            order = _GroupShuffle(
                order,
                sizes=np.concatenate([sources.group_sizes(corpus) for corpus in corpora]),
                seed=seed,
                num_parts=batch_size,
            )
        else:
            order = order.shuffle(seed=seed)
    return order.repeat()


class _GroupShuffle(grain.MapDataset):
    """A shuffle for documents that are read in groups, where a group is dear and a row is not.

    The groups are shuffled, and taken `num_parts` at a time. The documents of these are laid end
    to end and cut into `num_parts` equal parts; each part is shuffled; then the parts take turns.
    So every `num_parts`-th document is of one part, which lies in one group or two, and a stream
    of them decodes each group once. Every epoch is a permutation, and has another one.
    """

    def __init__(
        self, parent: grain.MapDataset, *, sizes: np.ndarray, seed: int, num_parts: int
    ) -> None:
        super().__init__(parent)
        self._sizes = sizes
        self._starts = np.cumsum(sizes) - sizes
        self._seed = seed
        self._num_parts = num_parts
        self._epochs: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._parts: dict[tuple[int, int, int], np.ndarray] = {}

    def __len__(self) -> int:
        return len(self._parent)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.slice(index)
        epoch, place = divmod(index, len(self))
        groups, bounds = self._epoch(epoch)
        window = int(np.searchsorted(bounds[:: self._num_parts], place, side="right")) - 1
        turn, part = divmod(place - int(bounds[window * self._num_parts]), self._num_parts)
        place = int(self._part(epoch, window, part)[turn])
        group = int(np.searchsorted(bounds, place, side="right")) - 1
        return self._parent[int(self._starts[groups[group]]) + place - int(bounds[group])]

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Groups in the order of the epoch, and first document of each, then their number."""
        if epoch not in self._epochs:
            numbers = np.arange(len(self._sizes), dtype=np.uint64)
            groups = np.argsort(_hash(_salt(f"{self._seed}/{epoch}"), numbers), kind="stable")
            bounds = np.concatenate([np.zeros(1, np.int64), np.cumsum(self._sizes[groups])])
            _put(self._epochs, epoch, (groups, bounds), size=4)
        return self._epochs[epoch]

    def _part(self, epoch: int, window: int, part: int) -> np.ndarray:
        """Document numbers of one part, in shuffled order."""
        key = epoch, window, part
        if key not in self._parts:
            _, bounds = self._epoch(epoch)
            first = int(bounds[window * self._num_parts])
            last = int(bounds[min((window + 1) * self._num_parts, len(bounds) - 1)])
            size, larger = divmod(last - first, self._num_parts)  # the first `larger` have one more
            start = first + part * size + min(part, larger)
            numbers = np.arange(size + (part < larger), dtype=np.uint64)
            salt = _salt(f"{self._seed}/{epoch}/{window}/{part}")
            order = start + np.argsort(_hash(salt, numbers), kind="stable")
            _put(self._parts, key, order, size=2 * self._num_parts)
        return self._parts[key]


def _put(cache: dict, key: object, value: object, *, size: int) -> None:
    cache[key] = value
    while len(cache) > size:
        del cache[next(iter(cache))]


def _salt(name: str) -> np.uint64:
    return np.uint64(int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little"))


def _hash(salts: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """SplitMix64: the n-th output of the generator seeded with a salt; uint64, wraps on purpose.

    Steele et al., "Fast splittable pseudorandom number generators", 2014. Written out because the
    order of the data may not change with a version of NumPy, whose generators make no promise.
    """
    z = salts + (numbers + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _seed(config: DataConfig, name: str) -> int:
    """Hashed seed of 31 bits; Grain adds the epoch to it, so nearby seeds would share orders."""
    digest = hashlib.sha256(f"{config.seed}/{name}".encode()).digest()
    return int.from_bytes(digest[:4], "little") >> 1


def _check_disjoint(train: Sequence[sources.Corpus], evaluation: Sequence[sources.Corpus]) -> None:
    trained_on = {pathlib.Path(file).resolve() for corpus in train for file in corpus.files}
    for corpus in evaluation:
        for file in corpus.files:
            if pathlib.Path(file).resolve() in trained_on:
                raise ValueError(
                    f"{file} is in both data.paths and data.eval_paths; take it out of one, or "
                    f"leave data.eval_paths empty to hold out data.eval_fraction"
                )
