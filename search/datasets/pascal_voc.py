"""PASCAL VOC 2012 segmentation (Everingham et al.), and its training set augmented by SBD (Hariharan et al., ICCV 2011).

    VOCdevkit/VOC2012/JPEGImages/*.jpg
    VOCdevkit/VOC2012/SegmentationClass/*.png
    VOCdevkit/VOC2012/ImageSets/Segmentation/{train,val,trainval,test}.txt

Split `train_aug` is the 10,582 pictures of VOC's train and of SBD without VOC's val. Its labels are the converted ones that
many repositories distribute, or else those of SBD's own archive, unpacked beside `VOCdevkit`:

    VOCdevkit/VOC2012/SegmentationClassAug/*.png
    benchmark_RELEASE/dataset/{img,cls}/, train.txt, val.txt

With SBD's archive, VOC's own label is used where VOC has one. The list `train_aug.txt` may lie beside the other lists; without
it, the split is all labelled pictures but VOC's val. Labels of the test split are not public.
"""

from pathlib import Path

from search.datasets import IGNORE_INDEX
from search.datasets.files import FileDataset, Pair, read_lines, repeated, require_layout
from search.datasets.labels import LabelReader
from search.datasets.matlab import read_class_map
from search.datasets.pictures import RESTORE
from search.datasets.walk import is_hidden
from search.dense_tasks.segmentation import Segmentation, voc_palette
from search.errors import InputError

CLASS_NAMES = (
    "background",
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "dining table",
    "dog",
    "horse",
    "motorbike",
    "person",
    "potted plant",
    "sheep",
    "sofa",
    "train",
    "tv monitor",
)
PALETTE = voc_palette(len(CLASS_NAMES))
PAD_TO = (513, 513)  # the authors' evaluation; no picture is larger than 500 × 500
LENGTHS = {"train": (1464,), "train_aug": (10582,), "val": (1449,), "trainval": (2913,), "test": (1456,)}

_ORIGIN = "VOCtrainval_11-May-2012.tar (host.robots.ox.ac.uk/pascal/VOC/voc2012)"
_LABELS = LabelReader(
    {**{value: value for value in range(len(CLASS_NAMES))}, IGNORE_INDEX: IGNORE_INDEX},
    remedy=RESTORE,
    read_mat=read_class_map,
)


def open_split(split: str, data_dir: Path | None) -> FileDataset:
    """List the pictures of `split` in `data_dir`. Raises InputError for a folder or list that is missing or empty."""
    if data_dir is None:
        raise InputError(f"`dataset` pascal_voc needs `data_dir`: the folder with VOCdevkit/ from {_ORIGIN}")
    voc = data_dir / "VOCdevkit" / "VOC2012"
    listing = voc / "ImageSets" / "Segmentation" / f"{split}.txt"
    required = [voc / "JPEGImages"]
    if split != "test":
        required.append(voc / "SegmentationClass")
    if split != "train_aug":
        required.append(listing)
    layout = f"expected VOCdevkit/VOC2012/ from {_ORIGIN}; correct `data_dir` or unpack it there"
    require_layout(data_dir, required, layout)
    if split == "train_aug":
        listing, pairs = _augmented_pairs(data_dir, voc)
    elif split == "test":
        names = [line for _, line in read_lines(listing, f"restore it from {_ORIGIN}")]
        pairs = [Pair(name, voc / "JPEGImages" / f"{name}.jpg", None) for name in names]
    else:
        pairs = _voc_pairs(data_dir, split)
    return FileDataset(
        name="pascal_voc",
        split=split,
        task=Segmentation(CLASS_NAMES, PALETTE),
        pairs=tuple(pairs),
        read_label=_LABELS,
        listing=listing,
        faults=tuple(repeated((pair.name for pair in pairs), listing)),
        official_lengths=LENGTHS[split],
    )


def _voc_pairs(data_dir: Path, split: str) -> list[Pair]:
    voc = data_dir / "VOCdevkit" / "VOC2012"
    lines = read_lines(voc / "ImageSets" / "Segmentation" / f"{split}.txt", f"restore it from {_ORIGIN}")
    return [Pair(name, voc / "JPEGImages" / f"{name}.jpg", voc / "SegmentationClass" / f"{name}.png") for _, name in lines]


def _augmented_pairs(data_dir: Path, voc: Path) -> tuple[Path, list[Pair]]:
    """The list or folder that names the pictures, and their pairs."""
    converted, sbd = voc / "SegmentationClassAug", data_dir / "benchmark_RELEASE" / "dataset"
    if converted.is_dir():
        where = converted
        labelled = {
            path.stem: Pair(path.stem, voc / "JPEGImages" / f"{path.stem}.jpg", path)
            for path in sorted(converted.glob("*.png"))
            if not is_hidden(path.name)
        }
    elif sbd.is_dir():
        where = sbd / "cls"
        own = [pair for split in ("train", "val") for pair in _voc_pairs(data_dir, split)]
        labelled = {pair.name: pair for pair in (*_sbd_pairs(sbd), *own)}  # VOC's own labels replace SBD's
    else:
        raise InputError(f"split train_aug of pascal_voc needs SBD's labels: unpack them as {converted} or as {sbd}")
    lists = [voc / "ImageSets" / "Segmentation" / name for name in ("train_aug.txt", "trainaug.txt")]
    listing = next((path for path in lists if path.is_file()), None)
    if listing is None:
        val = {pair.name for pair in _voc_pairs(data_dir, "val")}
        return where, [pair for name, pair in sorted(labelled.items()) if name not in val]
    # Some lists hold names, others the paths of an image and a label.
    names = [Path(line.split()[0]).stem for _, line in read_lines(listing, "restore it, or delete it to take all labels")]
    suffix = ".png" if where is converted else ".mat"
    absent = {name: Pair(name, voc / "JPEGImages" / f"{name}.jpg", where / f"{name}{suffix}") for name in names}
    return listing, [labelled.get(name, absent[name]) for name in names]


def _sbd_pairs(sbd: Path) -> list[Pair]:
    """All pairs of SBD, because its train and val are not VOC's."""
    layout = f"expected img/, cls/, train.txt and val.txt in {sbd} from SBD's benchmark.tgz; unpack it there"
    require_layout(sbd, [sbd / "img", sbd / "cls", sbd / "train.txt", sbd / "val.txt"], layout)
    lines = [
        line for part in ("train", "val") for line in read_lines(sbd / f"{part}.txt", "restore it from SBD's benchmark.tgz")
    ]
    return [Pair(name, sbd / "img" / f"{name}.jpg", sbd / "cls" / f"{name}.mat") for _, name in lines]
