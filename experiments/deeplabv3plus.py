"""DeepLab v3+ (arXiv:1802.02611): the decoder on DeepLab v3, with an atrous ResNet.

python -m jaxseg.main --config experiments/deeplabv3plus.py:dataset=voc2012 --workdir runs/v3plus

Table 3, VOC 2012 val, ResNet-101, trained and evaluated at output stride 16: mIoU 78.85; the paper
has no ResNet-50. Not run.
"""

from jaxseg.config import default


def get_config(
    dataset: str = "voc2012",
    backbone: str = "resnet50",
    output_stride: int = 16,
    stem: str = "7x7",
    num_classes: int = 0,
):
    """num_classes=0: as many as the data set has."""
    config = default()
    config.data.dataset = dataset
    config.data.crop = (513, 513)  # section 4
    config.data.scale = (0.5, 2.0)  # section 4; the authors' code, in steps of 0.25

    config.model.name = "deeplabv3plus"
    config.model.num_classes = num_classes
    config.model.norm = {"momentum": 0.9997}  # the authors' code
    config.model.backbone = {
        "name": backbone,
        "stem": stem,
        "output_stride": output_stride,
        "multi_grid": (1, 2, 4),  # DeepLab v3, Table 5; the authors' code
        "norm": {"momentum": 0.9997},
    }

    config.optim.lr = 0.007  # section 4
    config.optim.weight_decay = 1e-4  # the authors' code, ResNet
    config.train.steps = 30_000  # the authors' code
    config.train.batch = 16  # the authors' code
    config.eval.batch = 4
    return config
