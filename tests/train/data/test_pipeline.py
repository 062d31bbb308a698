"""Batches are the same on any number of hosts and workers, and after any stop."""

import dataclasses
import json
import multiprocessing
import os
import pathlib
import random
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from configs.data import DataConfig
from train.data import mixture, pipeline, streams

END = 256
BATCH = 8


@pytest.fixture
def config(numbered):
    paths = (numbered("a.jsonl", 150, tag="a"), numbered("b.jsonl", 90, tag="b"))
    return DataConfig(
        paths=paths, weights=(2.0, 1.0), eval_fraction=0.1, sequence_length=48, prefetch=24
    )


@pytest.fixture
def make(tokenizer):
    """Makes training iterators, and closes them at the end."""
    made = []

    def make(config, **options):
        options = {"batch_size": BATCH} | options
        iterator = pipeline.train_iterator(
            config, tokenizer=tokenizer, end_of_document_id=END, **options
        )
        made.append(iterator)
        return iterator

    yield make
    for iterator in made:
        iterator.close()


def hosts_of(make, config, count):
    return [make(config, process_index=i, process_count=count) for i in range(count)]


def global_batch(hosts):
    parts = [next(host) for host in hosts]
    return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for key in a:
        assert a[key].dtype == b[key].dtype
        np.testing.assert_array_equal(a[key], b[key])


def through_json(state):
    return json.loads(json.dumps(state))


def test_a_batch_has_the_shapes_and_types_of_a_row(make, config):
    batch = next(make(config))
    assert {key: (array.shape, array.dtype.name) for key, array in batch.items()} == {
        "tokens": ((BATCH, 48), "int32"),
        "targets": ((BATCH, 48), "int32"),
        "segment_ids": ((BATCH, 48), "int32"),
        "positions": ((BATCH, 48), "int32"),
        "loss_weights": ((BATCH, 48), "float32"),
    }
    assert batch["segment_ids"].min() == 1  # no padding in training


def test_rows_are_the_documents_of_their_streams(make, config, tokenizer):
    iterator = make(config)
    rows = [next(iterator)["tokens"] for _ in range(6)]
    splits = mixture.open_splits(config)
    orders = mixture.training_streams(splits.train, config, rows=range(BATCH), batch_size=BATCH)
    for row, stream in enumerate(orders):
        expected = []
        for number in range(100):
            expected += [*tokenizer.encode(stream[number].text), END]
        np.testing.assert_array_equal(np.concatenate([r[row] for r in rows]), expected[: 6 * 48])


@pytest.mark.parametrize("prefetch", [1, 8, 100])
def test_resumes_exactly_at_any_step_whatever_was_read_ahead(make, config, prefetch):
    config = dataclasses.replace(config, prefetch=prefetch)
    reference = make(config)
    states, batches = [through_json(reference.get_state())], []
    for _ in range(25):
        batches.append(next(reference))
        states.append(through_json(reference.get_state()))
    resumed = make(config)
    for at in random.Random(prefetch).sample(range(25), 6):
        resumed.set_state(states[at])  # on an iterator in use, forwards and backwards
        for expected in batches[at : at + 4]:
            assert_same(next(resumed), expected)
        assert through_json(resumed.get_state()) == states[min(at + 4, 25)]


def test_a_saved_state_does_not_change_later(make, config):
    iterator = make(config)
    next(iterator)
    state = iterator.get_state()
    before = through_json(state)
    for _ in range(5):
        next(iterator)
    assert state == before


def test_resume_reads_only_the_documents_it_needs(make, config, monkeypatch):
    config = dataclasses.replace(config, prefetch=1)
    first = make(config)
    for _ in range(200):
        next(first)
    state = first.get_state()
    first.close()
    read = []
    original = streams.Tokens.__call__

    def spy(self, number):
        read.append(number)
        return original(self, number)

    monkeypatch.setattr(streams.Tokens, "__call__", spy)
    second = make(config)
    second.set_state(state)
    next(second)
    second.close()
    assert min(read) >= min(document for document, _ in state["places"])
    assert len(read) < 30 * BATCH


def test_global_batches_do_not_depend_on_the_number_of_hosts(make, config):
    one, two, four = (hosts_of(make, config, count) for count in (1, 2, 4))
    for _ in range(12):
        expected = global_batch(one)
        assert_same(global_batch(two), expected)
        assert_same(global_batch(four), expected)


@pytest.mark.parametrize(("before", "after"), [(2, 4), (4, 2), (1, 8), (8, 1)])
def test_resumes_on_another_number_of_hosts(make, config, before, after):
    reference = hosts_of(make, config, 1)
    saved = hosts_of(make, config, before)
    for _ in range(7):
        assert_same(global_batch(saved), global_batch(reference))
    states = [through_json(host.get_state()) for host in saved]
    merged = through_json(pipeline.merge_states(states[::-1]))
    resumed = hosts_of(make, config, after)
    for host in resumed:
        host.set_state(merged)
    for _ in range(7):
        assert_same(global_batch(resumed), global_batch(reference))
    assert pipeline.merge_states([host.get_state() for host in resumed]) == through_json(
        reference[0].get_state()
    )


@pytest.mark.races
def test_worker_processes_give_the_same_batches_resume_exactly_and_end(make, config):
    reference = make(config)
    expected = [next(reference) for _ in range(12)]
    workers = make(dataclasses.replace(config, worker_count=2))
    for batch in expected[:8]:
        assert_same(next(workers), batch)
        assert all(type(array) is np.ndarray for array in batch.values())
    state = through_json(workers.get_state())
    for batch in expected[8:]:
        assert_same(next(workers), batch)
    workers.set_state(state)
    for batch in expected[8:]:
        assert_same(next(workers), batch)
    children = multiprocessing.active_children()
    assert len(children) == 2
    for child in children:  # as a signal to the process group would: they leave it to the trainer
        os.kill(child.pid, signal.SIGTERM)
        os.kill(child.pid, signal.SIGINT)
    next(workers)
    assert all(child.is_alive() for child in children)
    # The number of workers is no part of the state.
    reference.set_state(state)
    assert_same(next(reference), expected[8])
    workers.close()
    assert not multiprocessing.active_children()


KILLED = """
import multiprocessing, sys, time
sys.path[:0] = {folders!r}
from configs.data import DataConfig
from train.data import pipeline
from conftest import END, ByteTokenizer

if __name__ == "__main__":
    config = DataConfig(paths=({path!r},), sequence_length=32, worker_count=2)
    iterator = pipeline.train_iterator(
        config, tokenizer=ByteTokenizer(), end_of_document_id=END, batch_size=4
    )
    next(iterator)
    print(*[child.pid for child in multiprocessing.active_children()], flush=True)
    time.sleep(60)
"""


@pytest.mark.skipif(not pathlib.Path("/proc/self").exists(), reason="looks processes up in /proc")
@pytest.mark.races
def test_workers_end_when_the_trainer_is_killed(numbered, tmp_path):
    folders = [str(pathlib.Path(__file__).parents[3]), str(pathlib.Path(__file__).parent)]
    script = tmp_path / "killed.py"
    script.write_text(KILLED.format(folders=folders, path=numbered("a.jsonl", 50)))
    trainer = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True)
    with trainer:
        workers = [pathlib.Path("/proc") / pid for pid in trainer.stdout.readline().split()]
        assert len(workers) == 2
        assert all(worker.exists() for worker in workers)
        trainer.kill()
    deadline = time.monotonic() + 20
    while any(worker.exists() for worker in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(worker.exists() for worker in workers)


@pytest.mark.races
def test_close_leaves_no_thread(make, config):
    before = set(threading.enumerate())
    iterator = make(config)
    for _ in range(3):
        next(iterator)
    assert set(threading.enumerate()) - before
    iterator.set_state(iterator.get_state())
    next(iterator)
    iterator.close()
    iterator.close()
    deadline = time.monotonic() + 5
    while set(threading.enumerate()) - before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not set(threading.enumerate()) - before
    with pytest.raises(ValueError, match="closed"):
        next(iterator)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_line_ends_the_iteration_with_its_name(make, write_jsonl, workers):
    path = write_jsonl("a.jsonl", ["fine " * 20] * 30)
    with pathlib.Path(path).open("a") as stream:
        stream.write('{"txt": "wrong field"}\n')
    config = DataConfig(
        paths=(path,), eval_fraction=0.0, sequence_length=64, shuffle=False, worker_count=workers
    )
    with make(config, batch_size=4) as iterator:
        next(iterator)
        with pytest.raises(ValueError, match="a.jsonl:31: no field 'text'; its fields are txt"):
            for _ in range(100):
                next(iterator)
    assert not multiprocessing.active_children()


def test_state_of_other_data_is_refused_by_name(make, config, numbered):
    iterator = make(config)
    next(iterator)
    state = through_json(iterator.get_state())
    for change in ({"seed": 3}, {"sequence_length": 32}, {"weights": (1.0, 1.0)}):
        (name,) = change
        with pytest.raises(ValueError, match=f"belongs to other data \\({name}: "):
            make(dataclasses.replace(config, **change)).set_state(state)
    with pytest.raises(ValueError, match="batch_size: 8 -> 4"):
        make(config, batch_size=4).set_state(state)
    numbered("b.jsonl", 91, tag="b")
    with pytest.raises(ValueError, match="documents: .*digests: "):
        make(config).set_state(state)
    with pytest.raises(ValueError, match="format None; this version reads 1"):
        iterator.set_state({})


def test_states_that_do_not_join_are_refused(make, config):
    hosts = hosts_of(make, config, 4)
    states = [host.get_state() for host in hosts]
    with pytest.raises(ValueError, match="rows 2 to 3 .* needs 0 to 1; .*merge_states"):
        hosts[0].set_state(states[1])
    with pytest.raises(ValueError, match="starts at row 4 where row 2 was due"):
        pipeline.merge_states([states[0], states[2]])
    with pytest.raises(ValueError, match="starts at row 2 where row 4 was due"):
        pipeline.merge_states([states[0], states[1], states[1]])
    with pytest.raises(ValueError, match="hold 6 of the 8 rows"):
        pipeline.merge_states(states[:3])
    with pytest.raises(ValueError, match="no data state"):
        pipeline.merge_states([])
    next(hosts[3])
    with pytest.raises(ValueError, match="differ in step: 0 and 1"):
        pipeline.merge_states([*states[:3], hosts[3].get_state()])


def test_numbers_that_do_not_fit_are_refused(make, config, numbered):
    with pytest.raises(ValueError, match="batch_size=10 is not divisible by the 4.*use 8 or 12"):
        make(config, batch_size=10, process_count=4)
    with pytest.raises(ValueError, match="batch_size=2 is not divisible by the 4.*use 4$"):
        make(config, batch_size=2, process_count=4)
    with pytest.raises(ValueError, match="process_index=4 is not among 4"):
        make(config, process_index=4, process_count=4)
    with pytest.raises(ValueError, match="worker_count=5 exceeds the 4 rows"):
        make(dataclasses.replace(config, worker_count=5), process_count=2)
    with pytest.raises(ValueError, match="data.worker_count=-1 must not be negative"):
        dataclasses.replace(config, worker_count=-1)
    few = DataConfig(paths=(numbered("few.jsonl", 7),), eval_fraction=0.0)
    with pytest.raises(ValueError, match="7 training documents, fewer than batch_size=8"):
        make(few)


def evaluation(config, tokenizer, **options):
    options = {"batch_size": BATCH} | options
    return list(
        pipeline.eval_batches(config, tokenizer=tokenizer, end_of_document_id=END, **options)
    )


def test_evaluation_is_one_pass_over_the_held_out_documents(config, tokenizer):
    batches = evaluation(config, tokenizer)
    tokens = np.concatenate([b["tokens"][b["segment_ids"] > 0] for b in batches])
    documents = bytes((tokens % 256).astype(np.uint8)).split(b"\0")  # END is 256
    splits = mixture.open_splits(config)
    expected = [c[i].text.encode() for c in splits.evaluation for i in range(len(c))]
    assert sorted(documents[:-1]) == sorted(expected)
    for batch in batches[:-1]:
        assert batch["segment_ids"].min() == 1
    assert_same(
        {str(i): b["tokens"] for i, b in enumerate(batches)},
        {
            str(i): b["tokens"]
            for i, b in enumerate(evaluation(dataclasses.replace(config, seed=9), tokenizer))
        },
    )


def test_evaluation_rows_do_not_depend_on_hosts_or_batch_size(config, tokenizer):
    whole = evaluation(config, tokenizer)
    assert len(whole) > 1
    parts = [evaluation(config, tokenizer, process_index=i, process_count=4) for i in range(4)]
    assert {len(part) for part in parts} == {len(whole)}
    for number, expected in enumerate(whole):
        got = {key: np.concatenate([p[number][key] for p in parts]) for key in expected}
        assert_same(got, expected)
    rows = np.concatenate([batch["tokens"] for batch in whole])
    others = np.concatenate([b["tokens"] for b in evaluation(config, tokenizer, batch_size=3)])
    count = min(len(rows), len(others))
    np.testing.assert_array_equal(rows[:count], others[:count])
    weights = np.concatenate([b["loss_weights"] for b in whole])
    assert not weights[count:].any() or len(rows) == count


def test_evaluation_limit_and_errors(config, tokenizer, numbered):
    whole = evaluation(config, tokenizer)
    assert_same(evaluation(config, tokenizer, limit=1)[0], whole[0])
    assert len(evaluation(config, tokenizer, limit=1)) == 1
    assert len(evaluation(config, tokenizer, limit=100)) == len(whole)
    with pytest.raises(ValueError, match="limit=0"):
        evaluation(config, tokenizer, limit=0)
    none = DataConfig(paths=(numbered("n.jsonl", 20),), eval_fraction=0.0)
    with pytest.raises(ValueError, match="eval_fraction=0.0 of 20 documents holds out none"):
        evaluation(none, tokenizer)
