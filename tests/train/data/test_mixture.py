"""Held-out documents stay held out; epochs are permutations; shares are those asked for."""

import collections
import pathlib

import numpy as np
import pytest

from configs import schema
from train.data import mixture


def all_texts(corpora):
    return [corpus[i].text for corpus in corpora for i in range(len(corpus))]


def test_split_is_disjoint_complete_and_of_the_size_asked_for(numbered):
    path = numbered("a.jsonl", 3000)
    splits = mixture.open_splits(schema.Data(paths=(path,), eval_fraction=0.1))
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
        config = schema.Data(**({"paths": (folder,), "eval_fraction": 0.2} | options))
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
    splits = mixture.open_splits(schema.Data(paths=(train,), eval_paths=(evaluation,)))
    assert sum(map(len, splits.train)) == 50
    assert sum(map(len, splits.evaluation)) == 7


def test_bad_splits_are_refused(numbered, tmp_path):
    path = numbered("a.jsonl", 3)
    with pytest.raises(ValueError, match="data.paths is empty"):
        mixture.open_splits(schema.Data())
    with pytest.raises(ValueError, match="a.jsonl is in both data.paths and data.eval_paths"):
        mixture.open_splits(schema.Data(paths=(str(tmp_path),), eval_paths=(path,)))
    with pytest.raises(ValueError, match="eval_fraction=0.999.* holds out all 3 documents"):
        mixture.open_splits(schema.Data(paths=(path,), eval_fraction=0.999))


def order_of(paths, **options):
    config = schema.Data(paths=tuple(paths), eval_fraction=0.0, **options)
    corpora = mixture.open_splits(config).train
    return mixture.training_order(corpora, config)


def test_every_epoch_is_a_permutation_and_another_one(numbered):
    paths = [numbered("a.jsonl", 40, tag="a"), numbered("b.jsonl", 61, tag="b")]
    order = order_of(paths)
    epochs = [[order[e * 101 + i].text for i in range(101)] for e in range(4)]
    for epoch in epochs:
        assert sorted(epoch) == sorted(epochs[0])
        assert len(set(epoch)) == 101
        assert len({text[0] for text in epoch[:20]}) == 2  # shuffled across the paths
    assert len({tuple(epoch) for epoch in epochs}) == 4
    other = order_of(paths, seed=1)
    assert [other[i].text for i in range(101)] != epochs[0]
    again = order_of(paths)
    assert [again[i].text for i in range(101)] == epochs[0]


def test_no_shuffle_keeps_the_order_on_disk(numbered):
    order = order_of([numbered("a.jsonl", 5), numbered("b.jsonl", 3, tag="b")], shuffle=False)
    assert [order[i].text.split()[0] for i in range(10)] == [
        "d0", "d1", "d2", "d3", "d4", "b0", "b1", "b2", "d0", "d1",
    ]  # fmt: skip


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.2, 0.8), (3.0, 2.0, 5.0)])
@pytest.mark.parametrize("shuffle", [True, False])
def test_weights_are_shares_of_documents_for_the_whole_and_for_each_row(numbered, weights, shuffle):
    paths = [numbered(f"{i}.jsonl", 20 + 30 * i, tag=f"p{i}-") for i in range(len(weights))]
    order = order_of(paths, weights=weights, shuffle=shuffle)
    tags = np.array([int(order[i].text[1]) for i in range(8192)])
    for number, share in enumerate(np.array(weights) / sum(weights)):
        assert abs((tags == number).mean() - share) < 0.005
        for batch_size in (2, 4, 10, 64):
            for row in range(batch_size):
                seen = tags[row::batch_size] == number
                deviation = np.sqrt(share * (1 - share) / len(seen))
                assert abs(seen.mean() - share) < 5 * deviation


def test_each_weighted_path_goes_through_its_own_epochs(numbered):
    paths = [numbered("a.jsonl", 10, tag="a"), numbered("b.jsonl", 1000, tag="b")]
    order = order_of(paths, weights=(1.0, 1.0))
    texts = [order[i].text for i in range(2 * 4096)]
    counts = collections.Counter(texts)
    # Half of the positions each, window by window; 4096 = 10 * 409 + 6 = 4 * 1000 + 96.
    assert sorted(counts[text] for text in counts if text[0] == "a") == [409] * 4 + [410] * 6
    assert sorted(counts[text] for text in counts if text[0] == "b") == [4] * 904 + [5] * 96
