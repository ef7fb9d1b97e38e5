"""SegNet (arXiv:1511.00561): VGG-16 with batch norm, a mirrored decoder, argmax unpooling.

    python -m jaxseg.main --config experiments/segnet.py --workdir runs/segnet
    python -m jaxseg.main --config experiments/segnet.py:variant=basic --workdir runs/segnet_basic

Table 1, CamVid test, SegNet-Basic with median-frequency balancing: global accuracy 82.7, class mean
62.0, mIoU 47.7. Table 3 has SegNet on 3,433 images of several data sets, without balancing: 90.40,
71.20, 60.10. Not run.
"""

from typing import Literal

from jaxseg import recipes
from jaxseg.config import default


def get_config(
    dataset: str = "camvid",
    backbone: str = "",
    variant: Literal["segnet", "basic"] = "segnet",
    recipe: Literal["paper"] = "paper",
    balance: bool = True,
    output_stride: int = 0,
    stem: str = "",
    num_classes: int = 0,
):
    """balance: weigh CamVid's classes by median frequency. num_classes=0: as many as the data set
    has. Its encoder is its own: it has no backbone, output_stride and stem."""
    recipes.refuse("segnet.py", backbone=backbone, output_stride=output_stride, stem=stem)
    config = default()
    recipes.read(config, dataset, recipe, paper="camvid")
    config.data.crop = (360, 480)  # section 4: CamVid's whole images
    config.data.flip = False  # the authors' code
    config.model.name = "segnet"
    config.model.num_classes = num_classes
    if balance and recipes.known(config) == "camvid":
        config.loss.pixel = {"class_weights": recipes.CAMVID_MEDIAN_FREQUENCY}  # section 4
    config.optim.momentum = 0.9  # section 3.3
    config.optim.weight_decay = 5e-4  # the authors' code
    config.optim.multipliers = (("(conv|classifier)/bias$", 2.0),)  # the authors' code
    config.optim.power = 0.0  # section 3.3: a fixed rate
    config.eval.batch = 4
    segnet(config) if variant == "segnet" else basic(config)
    return config


def segnet(config):
    """The authors' code for CamVid's 367 images, from ImageNet's VGG-16 (init.backbone)."""
    config.optim.lr = 1e-3  # section 4.1
    config.train.batch = 4
    config.train.steps = 40_000


def basic(config):
    """Section 3.1 and the authors' code, from scratch."""
    config.data.mean = (0.0, 0.0, 0.0)  # the network normalises its image itself
    config.data.std = (1.0, 1.0, 1.0)
    config.model.encoder = ((64,),) * 4
    config.model.decoder = ((64,),) * 4
    config.model.update(kernel=7, decoder_act=False, classifier_kernel=1, local_norm=True)
    config.optim.lr = 0.1  # section 3.3
    config.train.batch = 12  # section 3.3
    config.train.steps = 10_000  # the authors' code
