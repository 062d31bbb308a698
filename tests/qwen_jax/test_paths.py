"""Paths of file systems and of buckets; the bucket itself is in tests/train/test_bucket.py."""

from pathlib import Path

import pytest

from qwen_jax import paths


@pytest.mark.parametrize("scheme", ["s3", "az", "https"])
def test_what_cannot_be_written_to_is_refused_with_a_way_out(scheme):
    with pytest.raises(ValueError, match=rf"{scheme}:// is not supported; use gs://, or mount"):
        paths.folder(f"{scheme}://bucket/run")


def test_a_bucket_needs_its_package(monkeypatch):
    monkeypatch.setattr(paths.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs the package gcsfs; install qwen-jax\[gcs\]"):
        paths.folder("gs://bucket/run")


def test_what_a_path_is(tmp_path):
    remote = paths.folder("gs://bucket/some/run")
    assert paths.is_remote(remote) and paths.absolute(remote) == remote
    assert paths.kvstore(remote / "x") == {
        "driver": "gcs", "bucket": "bucket", "path": "some/run/x/",
    }  # fmt: skip
    assert paths.folder(str(tmp_path)) == tmp_path and not paths.is_remote(tmp_path)
    assert paths.kvstore(tmp_path) == {"driver": "file", "path": f"{tmp_path}/"}
    assert paths.absolute(Path("here")) == Path.cwd() / "here"


def test_a_folder_is_published_whole_or_not_at_all(tmp_path, monkeypatch):
    made, target = tmp_path / "made", tmp_path / "out" / "target"
    (made / "inner").mkdir(parents=True)
    (made / "inner" / "a").write_text("a")
    with monkeypatch.context() as patch, pytest.raises(OSError, match="full"):

        def fail(*_):
            raise OSError("full")

        patch.setattr(paths.shutil, "copyfileobj", fail)
        paths.publish(made, target)
    assert not target.exists()
    paths.publish(made, target)  # what was left half-way is no hindrance
    assert [path.relative_to(target) for path in paths.files(target)] == [Path("inner/a")]
    assert sorted(path.name for path in target.parent.iterdir()) == ["target"]


def test_written_text_replaces_what_was_there(tmp_path):
    for text in ("old", "new"):
        paths.write_text(tmp_path / "a", text)
    assert (tmp_path / "a").read_text() == "new" and len(list(tmp_path.iterdir())) == 1
    assert paths.size(tmp_path / "a") == 3
