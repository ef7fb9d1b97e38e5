"""A packed data set trains as its folder does."""

from pathlib import Path

import pytest

from jaxseg import main
from jaxseg.train import load_variables

QUICKSTART = str(Path(__file__).parents[1] / "experiments" / "quickstart.py")
SMALL = (
    *("train.steps=3", "train.batch=8", "train.log_every=1", "train.eval_every=0"),
    *("data.crop=(32,32)", "data.scale=(0.5,2.0)", "data.photometric=True"),
    *("model.widths=(4,8)", "model.num_classes=3", "eval.pictures=1"),
)


@pytest.mark.slow
def test_packed_and_folder_train_to_identical_parameters(write_folder, tmp_path):
    folder = write_folder(tmp_path / "mine")
    pack = ["pack", "--dataset", str(folder), "--output", str(tmp_path / "packed")]
    assert main.run(pack) == 0
    digests = set()
    for name, dataset in (("a", str(folder)), ("b", "tfds:mine")):
        changes = (*SMALL, f"data.dataset={dataset}", f"data.root={tmp_path / 'packed'}")
        command = ["--config", QUICKSTART, "--workdir", str(tmp_path / name)]
        assert main.run([*command, *(f"--config.{change}" for change in changes)]) == 0
        digests.add(load_variables(tmp_path / name)[4])
    assert len(digests) == 1
