"""Predictions as files: what several processes gather into one."""

import json
from pathlib import Path

import pytest

from jaxseg.data import results
from jaxseg.data.colours import Classes, voc_palette
from jaxseg.saver import gather

CLASSES = Classes(("ground", "cat"), voc_palette(2), (1,))


def _own(path: Path) -> None:
    image = {"file_name": f"{path.stem}.png", "height": 4, "width": 5}
    one = {"image": image, "objects": [], "panoptic": {"file_name": image["file_name"]}}
    path.write_text(json.dumps(one))


@pytest.mark.parametrize("panoptic", [False, True])
def test_of_processes_that_end_together_none_leaves_the_image_of_another_out(
    tmp_path, monkeypatch, panoptic
):
    """One reads the first image; another adds the second and gathers; then the one writes."""
    own, save = [tmp_path / "a.json", tmp_path / "b.json"], results.save_json

    def late(path: Path, content: dict) -> None:
        monkeypatch.setattr(results, "save_json", save)
        _own(own[1])
        gather(tmp_path, own, CLASSES, panoptic)
        save(path, content)

    _own(own[0])
    monkeypatch.setattr(results, "save_json", late)
    gather(tmp_path, own, CLASSES, panoptic)
    names = ["annotations.json", "panoptic.json"][: 1 + panoptic]
    for name in names:
        images = json.loads((tmp_path / name).read_text())["images"]
        assert [image["file_name"] for image in images] == ["a.png", "b.png"], name
