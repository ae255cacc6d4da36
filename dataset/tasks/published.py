"""Names of data sets as they are published: CLIP_benchmark's, and its collections.

CLIP_benchmark (github.com/LAION-AI/CLIP_benchmark) calls a set `vtab/pets`, and `wds/vtab/pets` its
copy in shards, which lies in a folder or repository `wds_vtab-pets`.
"""

CLIP_BENCHMARK = {  # its name -> the catalogue's; "" = only in shards
    "imagenet1k": "imagenet",
    "imagenetv2": "imagenetv2",
    "imagenet_sketch": "imagenet_sketch",
    "imagenet-a": "imagenet-a",
    "imagenet-r": "imagenet-r",
    "imagenet-o": "imagenet-o",
    "objectnet": "objectnet",
    "fer2013": "fer2013",
    "voc2007": "",  # objects cut out, a class each; the catalogue's voc2007 has several a image
    "voc2007_multilabel": "voc2007",
    "sun397": "sun397",
    "cars": "cars",
    "fgvc_aircraft": "aircraft",
    "mnist": "mnist",
    "stl10": "stl10",
    "gtsrb": "gtsrb",
    "country211": "country211",
    "food101": "food101",
    "renderedsst2": "rendered_sst2",
    "vtab/caltech101": "caltech101",
    "vtab/cifar10": "cifar10",
    "vtab/cifar100": "cifar100",
    "vtab/clevr_count_all": "clevr_counts",
    "vtab/clevr_closest_object_distance": "",
    "vtab/diabetic_retinopathy": "",
    "vtab/dmlab": "",
    "vtab/dsprites_label_orientation": "",
    "vtab/dsprites_label_x_position": "",
    "vtab/dsprites_label_y_position": "",
    "vtab/dtd": "dtd",
    "vtab/eurosat": "eurosat",
    "vtab/kitti_closest_vehicle_distance": "kitti_distance",
    "vtab/flowers": "flowers",
    "vtab/pets": "pets",
    "vtab/pcam": "patch_camelyon",
    "vtab/resisc45": "resisc45",
    "vtab/smallnorb_label_azimuth": "",
    "vtab/smallnorb_label_elevation": "",
    "vtab/svhn": "",
    "mscoco_captions": "coco",
    "flickr8k": "",
    "flickr30k": "flickr30k",
}

NOT_IN_VTAB_PLUS = (
    *("imagenet-o", "voc2007_multilabel", "food101", "vtab/dsprites_label_y_position"),
    *("mscoco_captions", "flickr8k", "flickr30k"),
)
# the 35 sets of which the LAION-5B paper (Schuhmann et al. 2022, section 4.2) averages top 1
VTAB_PLUS = tuple(name for name in CLIP_BENCHMARK if name not in NOT_IN_VTAB_PLUS)
VTAB = ("sun397", *(name for name in VTAB_PLUS if name.startswith("vtab/")))  # with cifar10
ROBUSTNESS = ("imagenetv2", "imagenet_sketch", "imagenet-a", "imagenet-r", "objectnet")
SUGAR_CREPE = (
    "sugar_crepe/add_att",
    "sugar_crepe/add_obj",
    "sugar_crepe/replace_att",
    "sugar_crepe/replace_obj",
    "sugar_crepe/replace_rel",
    "sugar_crepe/swap_att",
    "sugar_crepe/swap_obj",
)
COLLECTIONS = {  # as CLIP_benchmark names them; vtab+ there also evaluates voc2007_multilabel
    "vtab": tuple(name for name in VTAB if name != "vtab/cifar10"),
    "vtab+": (*VTAB_PLUS, "voc2007_multilabel"),
    "imagenet_robustness": ROBUSTNESS,
    "retrieval": ("mscoco_captions", "flickr8k", "flickr30k"),
    "sugar_crepe": SUGAR_CREPE,
}


def benchmark_name(name: str) -> str:
    """What CLIP_benchmark calls a data set of the catalogue; other names stay."""
    for published, own in CLIP_BENCHMARK.items():
        if own == name:
            return published
    return name


def shard_folder(name: str) -> str:
    """The folder or repository of CLIP_benchmark's shards: `vtab/pets` -> `wds_vtab-pets`."""
    return f"wds_{name.replace('/', '-')}"


def of_shard_folder(folder: str) -> str:
    """The data set of `wds_...`: CLIP_benchmark's name where it has one, else what follows."""
    name = folder.removeprefix("wds_")
    return next((known for known in CLIP_BENCHMARK if shard_folder(known) == folder), name)
