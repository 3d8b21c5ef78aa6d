"""Pictures for COCO's captions, measured as in the paper's tables: FID and CLIP score, and KID, precision and recall.

    python -m instaflow_jax.main --config=configs/evaluate_coco.py:coco5k --config.inception=FILE \\
        --config.data.source=COCO/val2017 --config.data.captions=COCO/annotations/captions_val2017.json
    python -m instaflow_jax.main --config=configs/evaluate_coco.py:coco30k --config.inception=FILE \\
        --config.data.source=tfds:DIR --config.data.captions= --config.data.split=val+test+restval

coco5k: COCO 2017 val, 5,000 pictures of 512 pixels. coco30k: COCO 2014 val, 30,000 pictures reduced to 256 pixels,
against all its 40,504 photographs; its TFDS form is `coco_captions` prepared with file_format='array_record'. (Its
splits val and test are Karpathy's, of 2014 too: they are not the 5,000 of coco5k.)

Needs COCO (images and annotations_trainval, https://cocodataset.org/#download), pytorch-fid's weight file
(https://github.com/mseitzer/pytorch-fid/releases/tag/fid_weights), and OpenCLIP's ViT-g/14, had from its hub id.

Writes WORKDIR/evaluate/coco: pictures/ (a PNG for each image's first caption, named by its id), the photographs'
statistics reference.npz (which pytorch-fid reads), results.json and results.md. May be killed and started again: it
goes on, and the pictures have the same bytes. Not yet measured with the released weights; the paper says FID 23.4 and
CLIP score 0.304 (coco5k) and FID 13.1 (coco30k) for the default model.
"""

from ml_collections import ConfigDict

from configs import common


def base() -> ConfigDict:
    """Every field, unlocked; which captions is for `coco5k` and `coco30k` to say."""
    config = common.solving()
    config.stage = "evaluate_coco"
    config.update({"model": "XCLiu/instaflow_0_9B_from_sd_1_5", "dynamics": "flow", "N": 1, "alpha": 1.0})
    config.data = {
        "source": "",  # directory of images, or tfds:DIRECTORY of coco_captions
        "captions": "",  # JSON file of captions; "" for TFDS
        "split": "",  # of TFDS; "" for a directory
        "count": 0,  # captions
    }
    config.size = 512  # pixels of the pictures measured; larger ones are reduced by Lanczos
    config.seed = 0  # with an image's id, all that its noise depends on
    config.batch = 8  # pictures a device and call, for all networks
    config.reference = ""  # .npz as pytorch-fid's of the photographs; "" computes it, and KID and the rest
    config.inception = "pt_inception-2015-12-05-6726825d.pth"  # pytorch-fid's file
    config.clip = "laion/CLIP-ViT-g-14-laion2B-s12B-b42K"  # CLIPModel and its tokenizer, directory or hub id
    return config


def coco5k(config: ConfigDict) -> None:
    """5,000 pictures at 512 pixels, COCO 2017 val."""
    config.update(base())
    config.data.update(source="coco/val2017", captions="coco/annotations/captions_val2017.json", count=5000)


def coco30k(config: ConfigDict) -> None:
    """30,000 pictures reduced to 256 pixels, COCO 2014 val."""
    config.update(base())
    config.data.update(source="coco/val2014", captions="coco/annotations/captions_val2014.json", count=30000)
    config.size = 256


VARIANTS = {"coco5k": coco5k, "coco30k": coco30k}


def get_config(variant: str = "coco5k") -> ConfigDict:
    config = base()
    common.pick(VARIANTS, variant)(config)
    return config.lock()
