"""Write the table of backbones.md: `python docs/list_backbones.py`, in some minutes, without weights.

Of each family of timm's models (`timm.list_modules()`) one of the smallest is cut as a search would cut it, with random
weights, and its grid is measured. Families whose smallest model has 150 million weights or more are left out. Names as
arguments print their rows alone.
"""

import sys
from collections.abc import Iterable
from pathlib import Path

import torch

from fast.backbone import timm_backbone
from fast.timm_models import DEEPEST, open_model, strides_of

PAGE = Path(__file__).with_name("backbones.md")
BEGIN, END = "<!-- by list_backbones.py -->\n", "<!-- end -->\n"
HEAD = "| model | output stride | grid | channels | layers |\n|---|---:|---|---:|---:|\n"
STRIDES = (None, 32, 14, 8, 7, 4)  # the first that a model has is shown
_OF_PICTURES = ("takes pictures of", "gives no features of pictures")  # in refusals whatever the stride

MODELS = (
    "botnet26t_256",
    "cait_xxs24_224",
    "coat_tiny",
    "convit_tiny",
    "convmixer_768_32",
    "convnext_atto",
    "convnextv2_atto",
    "cpubone_nano",
    "crossvit_tiny_240",
    "cs3darknet_s",
    "csatv2",
    "cspnext_tiny",
    "davit_tiny",
    "deit_tiny_patch16_224",
    "densenet121",
    "dla46x_c",
    "dpn48b",
    "edgenext_xx_small",
    "efficientformer_l1",
    "efficientformerv2_s0",
    "efficientnet_b0",
    "efficientvim_m1",
    "efficientvit_b0",
    "efficientvit_m0",
    "ese_vovnet19b_slim_dw",
    "eva02_tiny_patch14_224",
    "fasternet_t0",
    "fastvit_t8",
    "focalnet_tiny_srf",
    "gcvit_xxtiny",
    "ghostnet_050",
    "gmlp_ti16_224",
    "hardcorenas_a",
    "hgnetv2_b0",
    "hiera_tiny_224",
    "hrnet_w18_small",
    "iformer_t",
    "inception_next_atto",
    "inception_v3",
    "lcnetv2_small",
    "legacy_seresnet18",
    "legacy_xception",
    "levit_128s",
    "lowformer_b0",
    "mixer_s32_224",
    "mobilenetv2_100",
    "mobilenetv3_small_050",
    "mobilenetv4_conv_small",
    "mobileone_s0",
    "mobilevit_xxs",
    "mvitv2_tiny",
    "nest_tiny",
    "nextvit_small",
    "nf_regnet_b0",
    "pit_ti_224",
    "poolformerv2_s12",
    "pvt_v2_b0",
    "rdnet_tiny",
    "regnetx_002",
    "regnety_002",
    "repghostnet_050",
    "repvit_m1",
    "res2next50",
    "resnest14d",
    "resnet18",
    "resnet50d",
    "resnetv2_18",
    "rexnet_100",
    "sam2_hiera_tiny",
    "sequencer2d_s",
    "shvit_s1",
    "skresnet18",
    "starnet_s050",
    "swiftformer_xs",
    "swin_tiny_patch4_window7_224",
    "swinv2_cr_tiny_224",
    "swinv2_tiny_window8_256",
    "test_byobnet",
    "test_coatnet",
    "test_convnext",
    "test_efficientnet",
    "test_mambaout",
    "test_maxvit",
    "test_nfnet",
    "test_resnet",
    "test_vit",
    "test_vit_relpos",
    "tf_efficientnet_lite0",
    "tiny_vit_5m_224",
    "tnt_s_patch16_224",
    "tresnet_m",
    "twins_pcpvt_small",
    "twins_svt_small",
    "visformer_tiny",
    "vit_pe_spatial_tiny_patch16_512",
    "vit_small_patch14_dinov2",
    "vit_small_patch16_dinov3",
    "vit_tiny_patch16_224",
    "vit_tiny_r_s16_p8_224",
    "vitamin_small_224",
    "volo_d1_224",
    "xception41",
    "xcit_nano_12_p16_224",
)


def row(name: str) -> str:
    """The model's row: what it gives by default, else at the largest stride that it has, else why it is refused."""
    refusals: list[str] = []
    for stride in STRIDES:
        try:
            with torch.random.fork_rng(devices=[]):
                backbone = timm_backbone(name, output_stride=stride)
        except ValueError as error:
            refusals.append(str(error).removeprefix(f"backbone '{name}' "))
            if refusals[-1].startswith(_OF_PICTURES):
                break
            continue
        assert backbone.cut is not None
        whole = open_model(name, (DEEPEST,), backbone.cut, "timm")
        layers = len(strides_of(whole)) + backbone.cut.deepest + 1
        return f"| {name} | {backbone.output_stride} | {backbone.grid.name} | {backbone.channels} | {layers} |\n"
    return f"| {name} | | {refusals[0].replace('|', '/')} | | |\n"


def table(names: Iterable[str]) -> str:
    """The rows of these models, below the table's head."""
    return HEAD + "".join(map(row, names))


def main() -> None:
    """Write the page, or print the rows of the models that were named."""
    if len(sys.argv) > 1:
        print(table(sys.argv[1:]), end="")
        return
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(before + BEGIN + table(MODELS) + END + after, encoding="utf-8")


if __name__ == "__main__":
    main()
