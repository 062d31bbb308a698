"""Which documents are for training and which for evaluation, and in what order they come."""

import dataclasses
import hashlib
import pathlib
from collections.abc import Sequence

import grain
import grain.experimental
import numpy as np

from configs import schema
from train.data import sources

_BYTES_A_TOKEN = 16  # two to four times what tokenizers reach on ordinary text
_MIXING_WINDOW = 4096  # documents; Grain's shuffle is slow (milliseconds) for a window of a few


@dataclasses.dataclass(frozen=True, kw_only=True)
class Splits:
    """Training documents, one corpus per path, and evaluation documents; they share none."""

    train: tuple[sources.Corpus, ...]
    evaluation: tuple[sources.Corpus, ...]


def open_splits(config: schema.Data) -> Splits:
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
    salts = np.array(
        [
            int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
            for name in corpus.names
        ],
        np.uint64,
    )
    # SplitMix64 (Steele et al., 2014, "Fast splittable pseudorandom number generators"): the
    # n-th output of the generator seeded by the file's name, for document n. Wraps on purpose.
    z = salts[corpus.file] + (corpus.ordinal.astype(np.uint64) + 1) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    return (z >> np.uint64(11)) * 2.0**-53 < fraction


def training_order(corpora: Sequence[sources.Corpus], config: schema.Data) -> grain.MapDataset:
    """Training documents by position, 0, 1, 2, ... without end; any position is found at once.

    Without weights each epoch, `sum(map(len, corpora))` positions, is a permutation of all
    documents, another one every time (the order on disk, if `shuffle` is off). With weights each
    path goes through its own epochs, and every window of `_MIXING_WINDOW` positions has each
    path's share of documents. Grain takes shares in hundredths of the smallest weight.
    """
    parents = [grain.MapDataset.source(corpus) for corpus in corpora]
    if not config.weights:
        order = grain.MapDataset.concatenate(parents)
        return _shuffle(order, config, name="all").repeat()
    paths = [
        _shuffle(parent, config, name=f"path {number}").repeat()
        for number, parent in enumerate(parents)
    ]
    # Grain mixes with a fixed rhythm, and row r of a batch reads every `batch_size`-th position:
    # where the two beat in time a row would see only some of the paths.
    return grain.experimental.WindowShuffleMapDataset(
        grain.MapDataset.mix(paths, config.weights),
        window_size=_MIXING_WINDOW,
        seed=_seed(config, "rows"),
    )


def evaluation_order(corpora: Sequence[sources.Corpus]) -> grain.MapDataset:
    """Evaluation documents, each once, in a fixed random order.

    The order is that of no seed in a config, so that runs are comparable; it is random so that
    the first few batches represent every path.
    """
    return grain.MapDataset.concatenate(
        [grain.MapDataset.source(corpus) for corpus in corpora]
    ).shuffle(seed=0)


def _shuffle(dataset: grain.MapDataset, config: schema.Data, *, name: str) -> grain.MapDataset:
    return dataset.shuffle(seed=_seed(config, name)) if config.shuffle else dataset


def _seed(config: schema.Data, name: str) -> int:
    """A seed of 31 bits: Grain adds the epoch to it, so that near seeds would share orders."""
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
