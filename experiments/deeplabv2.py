"""DeepLab v2 (arXiv:1606.00915): atrous spatial pyramid pooling, and three scales of a ResNet-101.

    python -m jaxseg.main --config experiments/deeplabv2.py --workdir runs/deeplabv2

Trained on VOC 2012's trainaug, val without the CRF: mIoU 76.35 (Table 4, ResNet-101 from COCO's
weights); VGG-16, Table 3: 66.98 (backbone=vgg16,variant=aspp_s), 68.96
(backbone=vgg16,variant=aspp_l). Not run.
"""

from typing import Literal

from jaxseg import recipes
from jaxseg.config import default

RATES = {"aspp_s": (2, 4, 8, 12), "aspp_l": (6, 12, 18, 24)}  # section 4.1.2


def get_config(
    dataset: str = "voc2012",
    backbone: str = "resnet101",
    variant: Literal["aspp_s", "aspp_l"] = "aspp_l",
    recipe: Literal["paper"] = "paper",
    output_stride: int = 8,
    stem: str = "",
    num_classes: int = 0,
):
    """stem="": 7x7, of a ResNet. num_classes=0: as many as the data set has."""
    recipes.resnet_only(backbone, stem)
    config = default()
    recipes.read(config, dataset, recipe, paper="voc2012")
    config.data.mean = (122.675, 116.669, 104.008)  # of the Caffe weights, which take no std
    config.data.std = (1.0, 1.0, 1.0)
    config.data.crop = (321, 321)  # the authors' code
    config.model.name = "deeplabv2"
    config.model.num_classes = num_classes
    config.model.rates = RATES[variant]
    config.model.backbone = {"name": backbone, "output_stride": output_stride}
    vgg(config) if backbone.startswith("vgg") else resnet(config, stem or "7x7")

    config.optim.power = 0.9  # section 4.1.1
    config.optim.momentum = 0.9  # section 4.1
    config.optim.weight_decay = 5e-4  # section 4.1
    config.train.batch = 10  # section 4.1.1
    config.train.steps = 20_000  # section 4.1.1
    config.eval.batch = 4
    return config


def vgg(config):
    config.model.features = 1024  # section 4.1.2
    config.model.scales = (1.0,)
    config.model.backbone.pool = 3  # the authors' code
    config.optim.lr = 1e-3  # section 4.1
    # Section 4.1: the classifier learns ten times as fast; the authors' code: biases twice.
    config.optim.multipliers = (("/fc8_.*bias", 20.0), ("/fc8_", 10.0), ("bias$", 2.0))


def resnet(config, stem):
    """The numbers of the PyTorch code that reproduces the paper's result."""
    config.data.scale = (0.5, 1.5)  # section 4.1.2
    config.data.scale_step = 0.25
    if config.model.backbone.name.startswith("resnet"):
        config.model.backbone.update(stem=stem, strides="caffe", ceil_mode=True)
    config.model.backbone.norm = {"frozen": True}
    config.optim.lr = 2.5e-4
    config.optim.multipliers = (("^aspp/.*bias", 20.0), ("^aspp/", 10.0), ("norm/", 0.0))
