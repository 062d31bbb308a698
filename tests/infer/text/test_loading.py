import jax
import pytest

from infer.text import loading
from tests.support import opened_files


@pytest.mark.parametrize(
    ("backend", "before", "folder", "after"),
    [
        ("gpu", None, "~/kept", "{home}/kept"),
        ("tpu", "elsewhere", "~/kept", "elsewhere"),
        ("gpu", None, "", None),
        ("cpu", None, "~/kept", None),
    ],
)
def test_where_programs_are_kept(monkeypatch, tmp_path, backend, before, folder, after):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    was = jax.config.jax_compilation_cache_dir
    try:
        jax.config.update("jax_compilation_cache_dir", before)
        loading.keep_programs(folder)
        assert jax.config.jax_compilation_cache_dir == (after and after.format(home=tmp_path))
    finally:
        jax.config.update("jax_compilation_cache_dir", was)


def test_a_models_config_is_read_once(hf_folder):
    with opened_files.counted() as opened:
        loading.load_model(hf_folder, dtype="float32")
    assert opened[hf_folder.resolve() / "config.json"] == 1
