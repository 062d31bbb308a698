"""Rows keep every token once, in order, with the right targets and restarted positions."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from train.data import packing

PADDING = -1


def make_packer(documents, length, *, document=0, token=0):
    def read(position):
        return documents[position] if position < len(documents) else None

    return packing.RowPacker(
        read,
        sequence_length=length,
        padding_id=PADDING,
        document=document,
        token=token,
    )


def all_rows(packer):
    return list(iter(packer.next_row, None))


@st.composite
def corpora(draw):
    """Documents in which every token is another number."""
    lengths = draw(st.lists(st.integers(0, 30), max_size=12))
    ends = np.cumsum(lengths)
    return [np.arange(end - n, end, dtype=np.int32) for n, end in zip(lengths, ends, strict=True)]


@settings(max_examples=300, deadline=None)
@given(documents=corpora(), length=st.integers(1, 17))
def test_rows_hold_every_token_once_with_its_target(documents, length):
    rows = all_rows(make_packer(documents, length))
    real = [row["segment_ids"] > 0 for row in rows]
    tokens = np.concatenate([row["tokens"][r] for row, r in zip(rows, real, strict=True)] or [[]])
    np.testing.assert_array_equal(tokens, np.arange(sum(map(len, documents))))
    # Only the last row may be padded, and only at its end.
    for row, r in zip(rows, real, strict=True):
        assert r.all() or row is rows[-1]
        assert not (np.diff(r.astype(int)) > 0).any()
        assert (row["tokens"][~r] == PADDING).all()
        assert not row["loss_weights"][~r].any()

    pairs = [
        pair
        for row in rows
        for pair in zip(row["tokens"], row["targets"], row["loss_weights"], strict=True)
    ]
    learnt = [(int(token), int(target)) for token, target, weight in pairs if weight]
    expected = [(int(a), int(b)) for d in documents for a, b in zip(d, d[1:], strict=False)]
    assert learnt == expected
    assert {float(weight) for *_, weight in pairs} <= {0.0, 1.0}


@settings(max_examples=200, deadline=None)
@given(documents=corpora(), length=st.integers(1, 17))
def test_segments_are_single_documents_with_positions_from_zero(documents, length):
    owner = {int(token): i for i, document in enumerate(documents) for token in document}
    for row in all_rows(make_packer(documents, length)):
        segments = row["segment_ids"]
        used = segments.max()
        assert used >= 1
        for segment in range(1, used + 1):
            (places,) = np.nonzero(segments == segment)
            assert len({owner[int(t)] for t in row["tokens"][places]}) == 1
            np.testing.assert_array_equal(places, places[0] + np.arange(len(places)))
            np.testing.assert_array_equal(row["positions"][places], np.arange(len(places)))
        owners = [owner[int(t)] for t in row["tokens"][segments > 0]]
        assert len(set(owners)) == used  # one segment a document
        assert {name: array.dtype.name for name, array in row.items()} == {
            "tokens": "int32",
            "targets": "int32",
            "segment_ids": "int32",
            "positions": "int32",
            "loss_weights": "float32",
        }


@settings(max_examples=200, deadline=None)
@given(documents=corpora(), length=st.integers(1, 17), data=st.data())
def test_a_packer_made_with_a_saved_place_goes_on_exactly(documents, length, data):
    packer = make_packer(documents, length)
    places, rows = [], []
    while True:
        places.append((packer.document, packer.token))
        if (row := packer.next_row()) is None:
            break
        rows.append(row)
    at = data.draw(st.integers(0, len(rows)))
    document, token = places[at]
    resumed = all_rows(make_packer(documents, length, document=document, token=token))
    assert len(resumed) == len(rows) - at
    for before, after in zip(rows[at:], resumed, strict=True):
        for key in before:
            np.testing.assert_array_equal(before[key], after[key])


def test_a_long_document_goes_on_in_the_next_row_with_its_target_known():
    first, second = all_rows(make_packer([np.array([5, 6, 7, 8, 9]), np.array([3, 4])], 4))
    assert first["tokens"].tolist() == [5, 6, 7, 8]
    assert first["targets"].tolist() == [6, 7, 8, 9]
    assert first["loss_weights"].tolist() == [1, 1, 1, 1]
    assert second["tokens"].tolist() == [9, 3, 4, PADDING]
    assert second["targets"].tolist() == [PADDING, 4, PADDING, PADDING]
    assert second["segment_ids"].tolist() == [1, 2, 2, 0]
    assert second["positions"].tolist() == [0, 0, 1, 0]
    assert second["loss_weights"].tolist() == [0, 1, 0, 0]
