"""XLA: the options that pay on a CPU, and the cache of compiled programs."""

import os
from functools import cache
from pathlib import Path

import jax

# Convolutions go to Eigen, which uses all cores. In XLA's YNN fusions, the default of jax 0.10,
# they run on one (measured: 170 against 100 GFLOP/s on two cores).
ON_CPU = {"xla_cpu_experimental_ynn_fusion_type": ""}
# What runs once is not worth LLVM's best (measured: the first weights of a ResNet-50 segmenter
# compile in 28 instead of 80 s, and are drawn in the same 2 s).
ONCE = {"xla_backend_optimization_level": 1}


@cache
def options(once: bool = False) -> dict[str, str | int]:
    """`compiler_options` for `jax.jit` and `Lowered.compile`; {} where XLA does not know them.

    once: of a function that runs once.
    """
    if jax.default_backend() != "cpu":
        return {}
    asked = ON_CPU | ONCE if once else ON_CPU
    try:
        jax.jit(lambda x: x, compiler_options=asked).lower(0.0).compile()
    except jax.errors.JaxRuntimeError:  # another version's
        return {}
    return asked


def use_cache() -> Path | None:
    """Keeps compiled programs of a second or more in the user's cache directory; returns it.

    $XDG_CACHE_HOME/jaxseg/N-cores, by default in ~/.cache: a program is split over the cores that
    it was compiled on. None where JAX_COMPILATION_CACHE_DIR or jax's own config names another,
    which is left alone, or where it cannot be written.
    """
    if jax.config.jax_compilation_cache_dir:
        return None
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    may_use = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))(0)
    folder = Path(home) / "jaxseg" / f"{len(may_use)}-cores"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    return folder
