"""Paths of file systems and of buckets; the bucket itself is in tests/train/test_bucket.py."""

from pathlib import Path

import pytest

from qwen_jax import storage


@pytest.mark.parametrize("scheme", ["s3", "az", "https"])
def test_what_cannot_be_written_to_is_refused_with_a_way_out(scheme):
    with pytest.raises(ValueError, match=rf"{scheme}:// is not supported; use gs://, or mount"):
        storage.folder(f"{scheme}://bucket/run")


def test_a_bucket_needs_its_package(monkeypatch):
    monkeypatch.setattr(storage.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs the package gcsfs; install qwen-jax\[gcs\]"):
        storage.folder("gs://bucket/run")


def test_what_a_path_is(tmp_path):
    remote = storage.folder("gs://bucket/some/run")
    assert storage.is_remote(remote) and storage.absolute(remote) == remote
    assert storage.kvstore(remote / "x") == {
        "driver": "gcs", "bucket": "bucket", "path": "some/run/x/",
    }  # fmt: skip
    assert storage.folder(str(tmp_path)) == tmp_path and not storage.is_remote(tmp_path)
    assert storage.kvstore(tmp_path) == {"driver": "file", "path": f"{tmp_path}/"}
    assert storage.absolute(Path("here")) == Path.cwd() / "here"


def test_a_folder_is_published_whole_or_not_at_all(tmp_path, monkeypatch):
    made, target = tmp_path / "made", tmp_path / "out" / "target"
    (made / "inner").mkdir(parents=True)
    (made / "inner" / "a").write_text("a")
    with monkeypatch.context() as patch, pytest.raises(OSError, match="full"):

        def fail(*_):
            raise OSError("full")

        patch.setattr(storage.shutil, "copyfileobj", fail)
        storage.publish(made, target)
    assert not target.exists()
    storage.publish(made, target)  # what was left half-way is no hindrance
    assert [path.relative_to(target) for path in storage.files(target)] == [Path("inner/a")]
    assert sorted(path.name for path in target.parent.iterdir()) == ["target"]


def test_written_text_replaces_what_was_there(tmp_path):
    for text in ("old", "new"):
        storage.write_text(tmp_path / "a", text)
    assert (tmp_path / "a").read_text() == "new" and len(list(tmp_path.iterdir())) == 1
    assert storage.size(tmp_path / "a") == 3
