"""Images for COCO's captions, measured as in the paper's tables: FID and CLIP score, and KID, precision and recall.

    python -m instaflow_jax.main --config=configs/evaluate_coco.py:coco5k --config.inception=FILE \\
        --config.data.source=COCO/val2017 --config.data.captions=COCO/annotations/captions_val2017.json
    python -m instaflow_jax.main --config=configs/evaluate_coco.py:coco30k --config.inception=FILE \\
        --config.data.source=tfds:DIR --config.data.captions= --config.data.split=val+test+restval
    … --config.extra='DIR/reflow/export,N=25,alpha=1.5|HUB_ID,N=25,alpha=5,dynamics=teacher'   # more rows, one table

coco5k: COCO 2017 val, 5,000 images of 512 pixels. coco30k: COCO 2014 val, 30,000 images reduced to 256 pixels, against
all its 40,504 photographs; its TFDS form is `coco_captions` prepared with file_format='array_record'. (The splits val
and test of that set are Karpathy's, also of 2014: they are not the 5,000 of coco5k.)

Needs COCO (images and annotations_trainval, https://cocodataset.org/#download), pytorch-fid's weight file
(https://github.com/mseitzer/pytorch-fid/releases/tag/fid_weights), and OpenCLIP's ViT-g/14, downloaded from its hub id.

Writes WORKDIR/evaluate/coco: pictures/ (a PNG for the first caption of each photograph, named by its id), reference.npz
(the photographs' statistics, readable by pytorch-fid), results.json, and results.md: all rows, then the paper's Table 1
(coco5k) or Table 2 (coco30k) with the rows below it. The models of config.extra have folders there, each with its own
pictures/ and results.json. A killed run continues when started again, and its images have the same bytes; every row is
measured again. Not yet measured with the released weights.
"""

from ml_collections import ConfigDict

from configs import common


def base() -> ConfigDict:
    """Every field, unlocked; `coco5k` and `coco30k` choose the captions."""
    config = common.solving()
    config.stage = "evaluate_coco"
    config.update({"model": "XCLiu/instaflow_0_9B_from_sd_1_5", "dynamics": "flow", "N": 1, "alpha": 1.0})
    config.extra = ""  # more rows, MODEL,N=25,alpha=1.5|MODEL,dynamics=teacher; what one leaves out is as in the config
    config.data = {
        "source": "",  # directory of photographs, or tfds:DIRECTORY of coco_captions
        "captions": "",  # JSON file of captions; "" for TFDS
        "split": "",  # TFDS split; "" for a directory
        "count": 0,  # number of captions
    }
    config.size = 512  # height and width in pixels of the measured images; larger ones are reduced by Lanczos
    config.seed = 0  # noise depends on this and the photograph's id alone
    config.batch = 8  # images a device and call, for all networks
    config.straightness = {"N": 25, "count": 128}  # Euler steps and captions for S
    config.repeats = 11  # runs; the seconds per image are their median
    config.paper = 0  # the paper's table to set the rows below, 1 or 2; 0 for none
    config.reference = ""  # pytorch-fid's .npz of the photographs; "" computes it, and also KID, precision and recall
    config.inception = "pt_inception-2015-12-05-6726825d.pth"  # pytorch-fid's file
    config.clip = "laion/CLIP-ViT-g-14-laion2B-s12B-b42K"  # directory or hub id of a CLIPModel and its tokenizer
    return config


def coco5k(config: ConfigDict) -> None:
    """5,000 images at 512 pixels, COCO 2017 val."""
    config.data.update(source="coco/val2017", captions="coco/annotations/captions_val2017.json", count=5000)
    config.paper = 1


def coco30k(config: ConfigDict) -> None:
    """30,000 images reduced to 256 pixels, COCO 2014 val."""
    config.data.update(source="coco/val2014", captions="coco/annotations/captions_val2014.json", count=30000)
    config.size, config.paper = 256, 2


VARIANTS = {"coco5k": coco5k, "coco30k": coco30k}


def get_config(variant: str = "coco5k") -> ConfigDict:
    config = base()
    common.pick(VARIANTS, variant)(config)
    return config.lock()
