"""Documents come back as they were written, and what cannot be read is named."""

import json
import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train.data import sources

SUFFIXES = (".txt", ".md")


def index(path, **options):
    return sources.index_path(str(path), text_suffixes=SUFFIXES, **{"text_field": "text"} | options)


def texts(corpus):
    return [corpus[i].text for i in range(len(corpus))]


def test_jsonl_rows_by_random_access(tmp_path):
    values = ["first", "", "näïve 字 😀", "line\nfeed", "carriage\r\nreturn"]
    lines = [json.dumps({"text": value}, ensure_ascii=i % 2 == 0) for i, value in enumerate(values)]
    path = tmp_path / "a.jsonl"
    path.write_bytes(("\n\n" + "\r\n".join(lines) + "\n\r\n").encode())
    corpus = index(path)
    assert texts(corpus) == values
    assert all(corpus[i].ends for i in range(len(corpus)))
    path.write_bytes("\n".join(lines).encode())  # no line feed at the end
    assert texts(index(path)) == values


def test_folder_is_read_recursively_and_in_order_of_names(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "one.TXT").write_text("b one")
    (tmp_path / "a.md").write_text("a")
    (tmp_path / "c.jsonl").write_text('{"text": "c"}\n')
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "picture.png").write_bytes(b"\xff")
    corpus = index(tmp_path)
    assert corpus.names == ("a.md", "b/one.TXT", "c.jsonl", "empty.txt")
    assert texts(corpus) == ["a", "b one", "c"]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), "str")])
def test_parquet_rows_over_row_groups(tmp_path, kind):
    values = [f"row {i}" for i in range(25)]
    table = pa.table({"n": list(range(25)), "body": pa.array(values).cast(kind)})
    path = tmp_path / "a.parquet"
    pq.write_table(table, path, row_group_size=4)
    corpus = index(path, text_field="body")
    assert len(corpus.row_groups[0]) == 8
    order = np.random.default_rng(0).permutation(25)
    assert [corpus[i].text for i in order] == [values[i] for i in order]


def test_parquet_cache_is_bounded(tmp_path, monkeypatch):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["x" * 100] * 40}), path, row_group_size=4)
    monkeypatch.setattr(sources, "_ROW_GROUP_CACHE_BYTES", 1000)
    sources._row_group_cache.clear()
    assert texts(index(path)) == ["x" * 100] * 40
    assert 1 <= len(sources._row_group_cache) <= 2


@settings(max_examples=40, deadline=None)
@given(
    pieces=st.lists(
        st.tuples(st.sampled_from(["a", "字", "😀", "w ", "é\n"]), st.integers(1, 9000)), min_size=1
    ),
    limit=st.integers(1, 1 << 17),
)
def test_blocks_of_a_long_text_cover_it(tmp_path_factory, pieces, limit):
    text = "".join(piece * count for piece, count in pieces)
    path = tmp_path_factory.mktemp("blocks") / "a.txt"
    path.write_bytes(text.encode())
    corpus = index(path)
    lengths = corpus.stop - corpus.start
    assert len(corpus) == 1 or lengths.max() <= 2 * sources.BLOCK_BYTES
    assert "".join(texts(corpus)) == text
    merged = sources.merge_blocks(corpus, limit=limit)
    assert "".join(texts(merged)) == text
    assert (merged.stop - merged.start).max() <= max(limit, lengths.max())
    assert [merged[i].ends for i in range(len(merged))] == [False] * (len(merged) - 1) + [True]


def test_blocks_are_cut_behind_line_feeds_and_joined_only_to_neighbours(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("".join(f"line {i}\n" for i in range(20000)))
    (tmp_path / "b.txt").write_text("short")
    (tmp_path / "c.jsonl").write_text('{"text": "c"}\n{"text": "d"}\n')
    corpus = index(tmp_path)
    assert len(corpus) > 10
    assert all(text.endswith("\n") for text in texts(corpus)[:-3])
    mask = np.ones(len(corpus), bool)
    mask[4] = False
    merged = sources.merge_blocks(corpus.select(mask), limit=1 << 30)
    whole = texts(corpus)
    expected = ["".join(whole[:4]), "".join(whole[5:-3]), "short", "c", "d"]
    assert texts(merged) == expected


def test_index_is_small_and_travels_to_workers(write_jsonl):
    corpus = index(write_jsonl("a.jsonl", ["word " * 200] * 2000))
    pickled = pickle.dumps(corpus)
    assert len(pickled) < 30 * len(corpus)
    assert texts(pickle.loads(pickled)) == texts(corpus)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "cut', "not valid JSON: Unterminated string starting at at column 10"),
        (b'{"text": "\xff"}', "can't decode byte 0xff"),
        (b'{"body": "x", "id": 1}', "no field 'text'; its fields are body, id"),
        (b'{"text": 3}', "field 'text' is int, not a string"),
        (b'{"text": null}', "field 'text' is NoneType"),
        (b'["text"]', "expected an object, found list"),
        (b'{"text": "\\ud800"}', "surrogates not allowed"),
        (b"   ", "not valid JSON: Expecting value at column 4"),
        (b"7", "expected an object, found int"),
        (b"[" * 100000, "nested too deeply"),
    ],
)
def test_unreadable_line_is_named_by_file_and_number(tmp_path, line, message):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"text": "good"}\n\n' + line + b'\n{"text": "good"}\n')
    corpus = index(path)
    assert len(corpus) == 3
    assert corpus[0].text == corpus[2].text == "good"
    with pytest.raises(ValueError, match="bad.jsonl:3: ") as caught:
        corpus[1]
    assert message in str(caught.value)


def test_text_that_is_not_utf8_is_named_by_byte(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"good \xff")
    with pytest.raises(ValueError, match=r"a.txt is not UTF-8 at byte 5"):
        index(tmp_path)[0]


def test_null_in_parquet_is_named_by_row(tmp_path):
    pq.write_table(pa.table({"text": ["a", None]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="a.parquet: row 1 of column 'text' is null"):
        index(tmp_path)[1]


def test_file_that_shrank_is_named(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n{"text": "b"}\n')
    corpus = index(path)
    path.write_text('{"text": "a"}\n')
    with pytest.raises(ValueError, match="became shorter"):
        corpus[1]


def test_what_cannot_be_indexed_is_refused(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        index(tmp_path / "absent")
    with pytest.raises(ValueError, match="holds no document: no file in it ends in .jsonl, .par"):
        index(tmp_path)
    (tmp_path / "table.csv").write_text("a,b")
    with pytest.raises(ValueError, match="suffix '.csv', which is none of .jsonl, .parquet, .txt"):
        index(tmp_path / "table.csv")
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(ValueError, match="holds no document"):
        index(tmp_path)
    pq.write_table(pa.table({"id": [1], "body": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="no column 'text'; its columns are id, body"):
        index(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="holds int64; text must be string"):
        index(tmp_path / "a.parquet", text_field="id")
    (tmp_path / "b.parquet").write_bytes(b"not parquet at all")
    with pytest.raises(ValueError, match="b.parquet is not a readable parquet file"):
        index(tmp_path / "b.parquet")
