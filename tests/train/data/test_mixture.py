"""Held-out documents stay held out; epochs are permutations; shares are those asked for."""

import collections
import pathlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from configs.data import DataConfig
from train.data import mixture, sources


def all_texts(corpora):
    return [corpus[i].text for corpus in corpora for i in range(len(corpus))]


def test_split_is_disjoint_complete_and_of_the_size_asked_for(numbered):
    path = numbered("a.jsonl", 3000)
    splits = mixture.open_splits(DataConfig(paths=(path,), eval_fraction=0.1))
    train, evaluation = set(all_texts(splits.train)), set(all_texts(splits.evaluation))
    assert not train & evaluation
    assert len(train | evaluation) == 3000
    assert abs(len(evaluation) - 300) < 5 * np.sqrt(3000 * 0.1 * 0.9)


def test_split_does_not_move_with_seed_lengths_weights_new_files_or_new_lines(numbered, tmp_path):
    path = numbered("folder/a.jsonl", 500, tag="a")
    long = tmp_path / "folder" / "b.txt"
    long.write_text("".join(f"b {i}\n" for i in range(100000)))
    folder = str(tmp_path / "folder")

    def held_out(**options):
        config = DataConfig(**({"paths": (folder,), "eval_fraction": 0.2} | options))
        texts = all_texts(mixture.open_splits(config).evaluation)
        rows = {text for text in texts if text.startswith("a")}
        return rows, {line for text in texts for line in text.splitlines()} - rows

    rows, lines = held_out()
    assert 50 < len(rows) < 150
    assert 10000 < len(lines) < 30000
    assert held_out(seed=5, shuffle=False) == (rows, lines)
    assert held_out(sequence_length=1 << 16) == (rows, lines)
    numbered("other/z.jsonl", 10, tag="z")
    assert held_out(paths=(str(tmp_path / "other"), folder), weights=(1.0, 2.0))[0] >= rows
    (tmp_path / "folder" / "0.md").write_text("comes first in the order of names")
    with pathlib.Path(path).open("a") as stream:
        stream.write('{"text": "appended"}\n')
    after_rows, after_lines = held_out()
    assert after_rows - {"appended"} == rows
    assert after_lines - {"comes first in the order of names", "appended"} == lines
    # More held out is more of the same.
    assert held_out(eval_fraction=0.4)[0] > rows


def test_eval_paths_replace_the_fraction(numbered):
    train, evaluation = numbered("a.jsonl", 50), numbered("b.jsonl", 7, tag="e")
    splits = mixture.open_splits(DataConfig(paths=(train,), eval_paths=(evaluation,)))
    assert sum(map(len, splits.train)) == 50
    assert sum(map(len, splits.evaluation)) == 7


def test_bad_splits_are_refused(numbered, tmp_path):
    path = numbered("a.jsonl", 3)
    with pytest.raises(ValueError, match="data.paths is empty"):
        mixture.open_splits(DataConfig())
    with pytest.raises(ValueError, match="a.jsonl is in both data.paths and data.eval_paths"):
        mixture.open_splits(DataConfig(paths=(str(tmp_path),), eval_paths=(path,)))
    with pytest.raises(ValueError, match="eval_fraction=0.999.* holds out all 3 documents"):
        mixture.open_splits(DataConfig(paths=(path,), eval_fraction=0.999))


def streams_of(paths, batch_size, **options):
    config = DataConfig(paths=tuple(paths), eval_fraction=0.0, **options)
    corpora = mixture.open_splits(config).train
    return mixture.training_streams(corpora, config, rows=range(batch_size), batch_size=batch_size)


def order_of(paths, count, batch_size=1, **options):
    """The first `count` texts, where the rows take turns."""
    streams = streams_of(paths, batch_size, **options)
    return [streams[i % batch_size][i // batch_size].text for i in range(count)]


def write_parquet(path, values, row_group_size):
    pq.write_table(pa.table({"text": values}), path, row_group_size=row_group_size)
    return str(path)


@pytest.mark.parametrize("batch_size", [1, 3, 8, 101])
@pytest.mark.parametrize("kind", ["lines", "row groups"])
def test_every_epoch_is_a_permutation_and_another_one(numbered, tmp_path, kind, batch_size):
    paths = [numbered("a.jsonl", 40, tag="a"), numbered("b.jsonl", 61, tag="b")]
    if kind == "row groups":
        paths[1] = write_parquet(tmp_path / "b.parquet", [f"b{i}" for i in range(61)], 7)
    texts = order_of(paths, 404, batch_size)
    epochs = [texts[e * 101 : (e + 1) * 101] for e in range(4)]
    for epoch in epochs:
        assert sorted(epoch) == sorted(epochs[0])
        assert len(set(epoch)) == 101
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert order_of(paths, 101, batch_size, seed=1) != epochs[0]
    assert order_of(paths, 404, batch_size) == texts


def test_lines_are_shuffled_across_paths(numbered):
    paths = [numbered("a.jsonl", 50, tag="a"), numbered("b.jsonl", 50, tag="b")]
    assert 10 < sum(text[0] == "a" for text in order_of(paths, 50)) < 40


def test_no_shuffle_keeps_the_order_on_disk(numbered):
    paths = [numbered("a.jsonl", 5), numbered("b.jsonl", 3, tag="b")]
    for batch_size in (1, 3):
        texts = order_of(paths, 10, batch_size, shuffle=False)
        assert [text.split()[0] for text in texts] == [
            "d0", "d1", "d2", "d3", "d4", "b0", "b1", "b2", "d0", "d1",
        ]  # fmt: skip


def test_each_row_decodes_a_row_group_about_once(tmp_path, monkeypatch):
    values = [f"{i}" for i in range(2000)]
    path = write_parquet(tmp_path / "a.parquet", values, 50)
    read = []
    original = sources._read_row_group

    def spy(file, group, text_field):
        read.append(group)
        return original(file, group, text_field)

    monkeypatch.setattr(sources, "_read_row_group", spy)
    streams = streams_of([path], 8)
    for stream in streams:
        read.clear()
        texts = [int(stream[i].text) for i in range(250)]
        changes = 1 + np.count_nonzero(np.diff(read))
        # One epoch: 40 groups in 5 windows, of each of which the row has one part.
        assert len(set(texts)) == 250
        assert changes <= 5
        assert np.abs(np.diff(texts[:50])).max() > 1  # not as they lie
    firsts = [int(stream[0].text) // 50 for stream in streams]
    assert len(set(firsts)) == 8  # the rows of a batch are of different groups


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.2, 0.8), (3.0, 2.0, 5.0)])
@pytest.mark.parametrize("shuffle", [True, False])
def test_weights_are_shares_of_documents_for_each_row_and_each_number(numbered, weights, shuffle):
    paths = [numbered(f"{i}.jsonl", 400 + 30 * i, tag=f"p{i}-") for i in range(len(weights))]
    streams = streams_of(paths, 10, weights=weights, shuffle=shuffle)
    tags = np.array([[int(stream[i].text[1]) for i in range(4096)] for stream in streams[::3]])
    early = np.array([[int(stream[i].text[1]) for i in range(50)] for stream in streams])
    for number, share in enumerate(np.array(weights) / sum(weights)):
        assert (np.abs((tags == number).mean(axis=1) - share) < 0.005).all()
        deviation = np.sqrt(share * (1 - share) / early.size)
        assert abs((early == number).mean() - share) < 5 * deviation
        # Rows choose by themselves: the number of rows on this path is binomial at each number.
        spread = (early == number).sum(axis=0).std()
        assert spread < 2 * np.sqrt(10 * share * (1 - share))


def test_each_weighted_path_goes_through_its_own_epochs(numbered):
    paths = [numbered("a.jsonl", 300, tag="a"), numbered("b.jsonl", 1000, tag="b")]
    counts = collections.Counter(order_of(paths, 4096, weights=(1.0, 1.0)))
    # Half of the positions each; 2048 = 300 * 6 + 248 = 2 * 1000 + 48.
    assert sorted(counts[text] for text in counts if text[0] == "a") == [6] * 52 + [7] * 248
    assert sorted(counts[text] for text in counts if text[0] == "b") == [2] * 952 + [3] * 48
