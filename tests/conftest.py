"""What all tests share: eight CPU devices, a compilation cache, data sets, and one small run."""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's `&` leaves ignored

# Read by jax when it is imported, so it comes first.
FORCED = (
    "--xla_force_host_platform_device_count=8"
    # Eight devices that share two busy cores wait longer for each other than XLA thinks sound.
    " --xla_cpu_collective_call_warn_stuck_timeout_seconds=120"
    " --xla_cpu_collective_call_terminate_timeout_seconds=600"
)
# Compiling is most of what a test does, and half of that is LLVM making fast code of it.
QUICK = "--xla_backend_optimization_level=1"
os.environ["XLA_FLAGS"] = f"{QUICK} {os.environ.get('XLA_FLAGS', '')} {FORCED}"
os.environ["JAX_PLATFORMS"] = "cpu"
CACHE = Path(__file__).parent.parent / ".cache" / "jax"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import jax  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
from ml_collections import ConfigDict  # noqa: E402
from PIL import Image  # noqa: E402
from processes import tidy  # noqa: E402

from jaxseg import config as configs  # noqa: E402
from jaxseg import models  # noqa: E402
from jaxseg.data import catalog  # noqa: E402
from jaxseg.data.colours import Classes, save_label, voc_palette  # noqa: E402
from jaxseg.data.sources import Shapes  # noqa: E402
from jaxseg.train import train  # noqa: E402


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="also the tests marked slow")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--all"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="slow: runs with --all"))


@pytest.fixture(autouse=True, scope="module")
def _forget() -> Iterator[None]:
    """Compiled functions of one file are of no use to the next, and hold gigabytes in the end."""
    yield
    jax.clear_caches()
    tidy()


@pytest.fixture(autouse=True)
def _stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """A command line that ends must not end the tests ten seconds later."""
    monkeypatch.setattr("jaxseg.main.leave", sys.exit)
    monkeypatch.setattr("jaxseg.main.interrupt", signal.default_int_handler)


FEW_SCENES = {"train": (0, 16), "val": (1, 8), "test": (2, 8)}  # seed, number of scenes


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder of data sets that JAXSEG_DATA names; without it, or where it is gone, a skip."""
    root = os.environ.get("JAXSEG_DATA")
    if not root or not Path(root).is_dir():
        pytest.skip("needs real data: set JAXSEG_DATA to the folder that holds the data sets")
    return Path(root).absolute()


def tiny_config() -> ConfigDict:
    """A U-Net of 2 levels on 32x32 crops of `shapes`, for three steps: complete and locked."""
    config = configs.default()
    config.data.crop = (32, 32)
    config.data.threads = 1
    config.model.update(name="unet", num_classes=8, widths=(4, 8), padding="same", dropout=0.0)
    config.train.steps = 3
    config.train.batch = 8
    config.train.log_every = 1
    config.train.eval_every = 0
    config.train.checkpoint_every = 0
    config.eval.batch = 8
    config.eval.pictures = 2
    models.complete(config)
    configs.check(config)
    return config.lock()


@pytest.fixture
def few_scenes(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[int, int]]:
    """Makes the splits of `shapes` so small that an evaluation takes a moment."""
    monkeypatch.setattr(Shapes, "SPLITS", FEW_SCENES)
    return FEW_SCENES


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The workdir of a finished run of `tiny_config`. Read it; copy it to change it."""
    workdir = tmp_path_factory.mktemp("tiny") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Shapes, "SPLITS", FEW_SCENES)
        assert train(tiny_config(), workdir) == 0
    yield workdir


@pytest.fixture(scope="session")
def write_folder() -> Callable[..., Path]:
    """A function that writes a random data set in the folder layout and returns its folder."""

    def write(
        root: Path,
        names: tuple[str, ...] = ("sky", "road", "car"),
        *,
        size: tuple[int, int] = (40, 48),
        train: int = 8,
        val: int = 2,
    ) -> Path:
        table, rng = Classes(names, voc_palette(len(names))), np.random.default_rng(0)
        for split, count in {"train": train, "val": val}.items():
            images, masks = root / split / "images", root / split / "masks"
            images.mkdir(parents=True)
            masks.mkdir()
            for i in range(count):
                image = rng.integers(0, 256, (*size, 3), np.uint8)
                Image.fromarray(image).save(images / f"{i:02}.png")
                label = rng.integers(0, len(names), size, np.uint8)
                label[0] = 255
                save_label(masks / f"{i:02}.png", label, table)
        catalog.write_classes(root / "classes.json", table)
        return root

    return write
