"""Compiler options and the cache of compiled programs."""

import jax
import pytest

from jaxseg import compiler


@pytest.fixture
def fresh():
    compiler.options.cache_clear()
    before = jax.config.jax_compilation_cache_dir
    yield
    jax.config.update("jax_compilation_cache_dir", before)
    compiler.options.cache_clear()


def test_unknown_options_are_left_out(fresh, monkeypatch):
    monkeypatch.setattr(compiler, "ON_CPU", {"xla_of_another_version": "1"})
    assert compiler.options() == {}


@pytest.mark.parametrize("once", [False, True])
def test_options_compile(fresh, once):
    options = compiler.options(once)
    assert once == ("xla_backend_optimization_level" in options)
    assert float(jax.jit(lambda x: x + 1, compiler_options=options)(1.0)) == 2


def test_the_cache_is_the_users(fresh, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    jax.config.update("jax_compilation_cache_dir", None)
    folder = compiler.use_cache()
    assert folder.parent == tmp_path / "cache" / "jaxseg" and folder.is_dir()
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(3))  # as in a smaller container
    jax.config.update("jax_compilation_cache_dir", None)
    assert compiler.use_cache() == folder.parent / "3-cores"
    folder = compiler.use_cache() or folder.parent / "3-cores"  # chosen already: stays
    assert jax.config.jax_compilation_cache_dir == str(folder)


def test_a_cache_that_was_chosen_stays(fresh, tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    assert compiler.use_cache() is None
    assert jax.config.jax_compilation_cache_dir == str(tmp_path)


def test_without_a_folder_there_is_no_cache(fresh, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    jax.config.update("jax_compilation_cache_dir", None)
    assert compiler.use_cache() is None and not jax.config.jax_compilation_cache_dir
