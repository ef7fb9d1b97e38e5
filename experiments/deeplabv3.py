"""DeepLab v3 (arXiv:1706.05587): ASPP with image pooling on an atrous ResNet.

python -m jaxseg.main --config experiments/deeplabv3.py:dataset=voc2012 --workdir runs/deeplabv3

Table 6, VOC 2012 val, ResNet-101, trained at output stride 16: mIoU 77.21. Not run.
"""

from jaxseg.config import default


def get_config(
    dataset: str = "voc2012",
    backbone: str = "resnet101",
    output_stride: int = 16,
    stem: str = "7x7",
    num_classes: int = 0,
):
    """num_classes=0: as many as the data set has."""
    config = default()
    config.data.dataset = dataset
    config.data.crop = (513, 513)  # section 4.1
    config.data.scale = (0.5, 2.0)  # section 4.1

    config.model.name = "deeplabv3"
    config.model.num_classes = num_classes
    config.model.norm = {"momentum": 0.9997}  # section 4.1
    config.model.backbone = {
        "name": backbone,
        "stem": stem,
        "output_stride": output_stride,
        "multi_grid": (1, 2, 4),  # section 4.3, Table 5
        "norm": {"momentum": 0.9997},
    }

    config.optim.lr = 0.007  # section 4.1
    config.optim.weight_decay = 1e-4  # the authors' code
    config.train.steps = 30_000  # section 4.1
    config.train.batch = 16  # section 4.1
    config.eval.batch = 4
    return config
