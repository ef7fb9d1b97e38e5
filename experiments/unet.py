"""U-Net (arXiv:1505.04597), as published and as it is usually run today.

The paper's network, valid convolutions and no norm, on the ISBI 2012 membranes. Not run.

    python -m jaxseg.main --config experiments/unet.py --workdir runs/unet_original

Same padding and batch norm; inside at half the resolution, except for ISBI. Measured: see README.

    python -m jaxseg.main --config experiments/unet.py:dataset=isbi2012,variant=same --workdir DIR
    python -m jaxseg.main --config experiments/unet.py:dataset=camvid,variant=same --workdir DIR
    python -m jaxseg.main --config experiments/unet.py:dataset=FOLDER,variant=same --workdir DIR

variant=matting learns soft masks, SPLIT/alphas/*.png of a FOLDER with two classes; predict
--save_alpha writes them. Not run on a published data set.

    python -m jaxseg.main --config experiments/unet.py:dataset=FOLDER,variant=matting --workdir DIR

recipe=smp is segmentation_models.pytorch's network on a backbone, recipe=mmseg MMSegmentation's
UNet-S5-D16, Cityscapes val, 160,000 steps: mIoU 69.10 (its own figure). Not run.
"""

from typing import Literal

from jaxseg import recipes
from jaxseg.config import default


def get_config(
    dataset: str = "",
    variant: Literal["", "original", "same", "matting"] = "",
    recipe: Literal["paper", "smp", "mmseg"] = "paper",
    backbone: str = "",
    output_stride: int = 0,
    stem: str = "",
    num_classes: int = 0,
    width: int = 0,
    in_channels: int = 0,
):
    """dataset="": the recipe's. variant="" (original): of recipe=paper. backbone="" (resnet50),
    output_stride, stem: of recipe=smp. width: channels of the first level, doubled after each
    pooling; 0 = the variant's own. num_classes=0: as many as the data set has. in_channels=0: 1 on
    ISBI, else 3."""
    config = default()
    recipes.read(config, dataset, recipe, paper="isbi2012")
    config.data.channels = in_channels or (1 if recipes.known(config) == "isbi2012" else 3)
    if recipe == "paper" or config.data.channels != 3:  # the libraries' are ImageNet's
        config.data.mean = (127.5,) * config.data.channels
        config.data.std = (64.0,) * config.data.channels
    config.model.name = "unet"
    config.model.num_classes = num_classes
    if recipe != "paper":
        recipes.refuse(f"recipe={recipe}", variant=variant)
    if recipe == "smp":
        smp(config, backbone or "resnet50", output_stride, stem)
    else:
        of_smp = {"backbone": backbone, "output_stride": output_stride, "stem": stem}
        recipes.refuse(f"recipe={recipe}", **of_smp)
        variants = {"": original, "original": original, "same": same, "matting": matting}
        mmseg(config) if recipe == "mmseg" else variants[variant](config)
    if width:
        config.model.widths = tuple(width * 2**level for level in range(5))
    return config


def original(config):
    """Section 3. The paper gives no learning rate; momentum 0.99 multiplies it by 100."""
    config.model.padding = "valid"
    config.model.widths = (64, 128, 256, 512, 1024)  # Fig. 1
    config.data.crop = (508, 508)  # 324 labelled pixels; Fig. 1's 572 are more than ISBI's 512
    config.data.flip_vertical = True
    config.data.quarter_turns = True  # section 3.1: "rotation invariance"
    config.data.photometric = True  # section 3.1: "gray value variations"
    config.data.elastic = 10.0  # section 3.1: pixels, on a 3x3 grid
    config.data.border_weight = 10.0  # section 3: w0
    config.data.border_sigma = 5.0  # section 3: pixels
    config.optim.lr = 1e-3
    config.optim.momentum = 0.99  # section 3
    config.optim.weight_decay = 0.0
    config.optim.clip = 1.0
    config.train.batch = 1  # section 3: large tiles rather than a large batch
    config.train.steps = 30_000
    config.eval.batch = 1


def same(config):
    """What libraries call U-Net today; the recipe is ours, for two CPU cores."""
    config.model.padding = "same"
    config.model.patch = 2
    config.model.widths = (32, 64, 96, 128, 192)
    config.model.norm = {"kind": "batch"}
    config.model.dropout = 0.1
    config.data.crop = (256, 256)
    config.data.scale = (0.8, 1.25)
    config.optim.name = "adamw"
    config.optim.lr = 2e-3
    config.optim.warmup = 100
    config.optim.weight_decay = 1e-2
    config.optim.clip = 1.0
    config.train.batch = 8
    config.train.steps = 2_000
    config.train.ema = 0.99
    config.train.eval_every = 500
    config.train.checkpoint_every = 500
    if recipes.known(config) == "camvid":
        config.data.crop = (256, 320)
        config.train.steps = 1_350
        config.train.eval_every = 675
        config.eval.scales = (1.0, 1.25)  # the thin classes gain
        config.eval.flip = True
        # The roots: the full weights cost the frequent classes more than they bring the rare ones.
        weights = tuple(round(w**0.5, 3) for w in recipes.CAMVID_MEDIAN_FREQUENCY)
        config.loss.pixel = {"class_weights": weights}
    elif recipes.known(config) == "isbi2012":
        # Membranes are few pixels wide and lie half a pixel below their labels: slices are seen
        # at full resolution, and neither turned nor scaled much, which would unteach that.
        config.model.patch = 1
        config.model.widths = (16, 32, 64, 96, 128, 128)
        config.model.dropout = 0.4
        config.data.scale = (0.95, 1.05)
        config.data.rotate = 8.0  # degrees
        config.data.elastic = 8.0  # pixels
        config.data.photometric = True
        config.train.batch = 4
        config.train.steps = 1_200
        config.train.ema = 0.995
        config.train.eval_every = 600
        config.eval.flip = True
        config.eval.scales = tuple(k / 20 for k in range(14, 29))  # 0.7 .. 1.4


def matting(config):
    """Portraits and their like: variant=same at full resolution, where hair is."""
    if config.model.num_classes != 2:
        recipes.refuse("variant=matting, of two classes", num_classes=config.model.num_classes)
    same(config)
    config.model.num_classes = 2  # background, foreground
    config.model.patch = 1
    config.data.scale = (0.75, 1.5)
    config.data.rotate = 10.0  # degrees
    config.data.photometric = True


def smp(config, backbone, output_stride, stem):
    """segmentation_models.pytorch 0.6; the training is that of variant=same."""
    same(config)
    config.model.patch = 1
    config.model.widths = (16, 32, 64, 128, 256)
    config.model.update(up="nearest", classifier_kernel=3, dropout=0.0)
    recipes.resnet_only(backbone, stem)
    config.model.backbone = {"name": backbone}
    if stem:
        config.model.backbone.stem = stem
    if output_stride:
        config.model.backbone.output_stride = output_stride
    if backbone == "mobilenetv2":
        config.model.backbone.last = 1280


def mmseg(config):
    """configs/unet/unet-s5-d16_fcn_4xb4-160k_cityscapes-512x1024.py."""
    recipes.mmseg(config, steps=160_000)
    config.train.batch = 16  # 4 devices of 4
    config.model.update(padding="same", up="bilinear", head=64, aux=64)
    config.model.update(dropout=0.0, head_dropout=0.1)
    config.model.norm = {"kind": "batch"}
