"""Any folder of images and label pictures, described by a TOML file; docs/datasets.md shows one with every field.

`images` and `labels` are path patterns in the folder: `{name}` is the picture's name, `{split}` the split's (or the folder
that the split's table names), `*` any text without a slash. A split's pictures are those in its list, or else all images
that match the pattern; or, with a `share`, those of them that fall to it by a hash of their names. Label values are classes 0,
1, ... in the order of `classes`, unless `label_ids` gives other values, or `label_colours` colours. With `depth_scale`
instead of `classes`, labels are depths.
"""

import hashlib
import math
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from search.datasets import IGNORE_INDEX
from search.datasets.files import FileDataset, LeftOut, Pair, decoded, read_lines, repeated
from search.datasets.labels import MOST_VALUES, ColourReader, DepthReader, LabelReader, label_colours, spans
from search.datasets.patterns import NOTHING, Index, composed, fixed_part, index, place, read_names
from search.datasets.pictures import PictureReader
from search.datasets.walk import SUFFIXES
from search.dense_tasks import RGB, DenseTask
from search.dense_tasks.depth import Depth
from search.dense_tasks.segmentation import Segmentation, default_palette
from search.errors import InputError

_OF_CLASSES = ("classes", "colours", "ignore", "label_ids", "label_colours")
_FIELDS = ("classes", "depth_scale", "images", "labels", "splits", "name", *_OF_CLASSES[1:], "split_seed")
_SPLIT_FIELDS = ("list", "folder", "labelled", "count", "share")
_OTHERS = "others"  # what `ignore` is if all values that mean no class do not count
_SCALES = (1e-3, 1e6)  # label values for a metre: from kilometres to micrometres
_OWN = PictureReader(remedy="save it anew, or take the picture out of the split")
_MOST_CLASSES = IGNORE_INDEX  # 0 to 254; 255 is ignored


@dataclass(frozen=True)
class Share:
    """The part of the pictures whose names' hashes, with this seed, are in [start, stop)."""

    start: float
    stop: float
    seed: int

    def __contains__(self, name: str) -> bool:
        """Whether a picture belongs to it: its name decides, in one form of Unicode, and no other picture.

        >>> [name for name in ("a", "e", "i", "z") if name in Share(0.0, 0.5, seed=0)]
        ['e', 'i']
        """
        text = f"{self.seed} {composed(name)}"
        return self.start <= int.from_bytes(hashlib.sha256(text.encode()).digest()[:6]) / 2**48 < self.stop


@dataclass(frozen=True)
class Split:
    """A split's list of names (None: all images that match), the value of `{split}`, its number of pictures, if given, and
    its share of the pictures, if they are divided.
    """

    list: str | None
    folder: str
    labelled: bool
    count: int | None
    share: Share | None = None


@dataclass(frozen=True, eq=False)
class Description:
    """A TOML file's content, checked. `recipe` is what the labels depend on besides their files.

    Without `has_colours`, the palette of the label files comes before that of the task.
    """

    path: Path
    name: str
    task: DenseTask
    read_label: LabelReader | ColourReader | DepthReader
    recipe: str
    has_colours: bool
    images: str
    labels: str | None
    splits: Mapping[str, Split]


def open_split(path: Path, split: str, data_dir: Path | None) -> FileDataset:
    """List the pictures of a split of the folder that `path` describes: `data_dir`, or else the folder of `path`.

    Raises InputError for a bad description, and for a folder in which nothing matches it.
    """
    description = load_description(path)
    wanted = description.splits[split]
    root = data_dir or path.parent
    if not root.is_dir():
        raise InputError(f"`data_dir` {root} is not a folder; give the one that {path} describes")
    images = index(root, description.images, wanted.folder)
    pattern = description.labels if wanted.labelled else None
    labels = NOTHING if pattern is None else index(root, pattern, wanted.folder)
    names, faults, listing = _names(description, split, root, images, labels)
    faults = [*repeated(names, listing), *faults]
    if wanted.list is None:
        faults += _widowed(images, labels)

    def find(found: Index, pattern: str, name: str) -> Path:
        return found.files.get(name, root / _fill(pattern, wanted.folder, name))

    return FileDataset(
        name=description.name,
        split=split,
        task=_coloured(description, root),
        pairs=tuple(
            Pair(name, find(images, description.images, name), None if pattern is None else find(labels, pattern, name))
            for name in names
        ),
        read_label=description.read_label,
        listing=listing,
        faults=(*images.faults, *labels.faults, *faults),
        official_lengths=() if wanted.count is None else (wanted.count,),
        recipe=description.recipe,
        pictures=_OWN,
        description=path,
        left_out=_left_out(description, wanted, names, images, labels),
    )


def _widowed(images: Index, labels: Index) -> list[str]:
    """A sentence for each label without an image; a picture that does not fit the pattern may be what is missed."""
    known = set(labels.files.values())
    misfits = {composed(path.stem): path for path in images.unfit if path.suffix.lower() in SUFFIXES and path not in known}
    faults = []
    for name in sorted(labels.files.keys() - images.files.keys()):
        label, misfit = labels.files[name], misfits.get(PurePosixPath(name).name)
        if misfit is None:
            faults.append(f"label {label} has no image; restore the image, or remove the label")
        else:
            remedy = "correct the pattern, or the file"
            faults.append(f"label {label} has no image that fits the pattern of images, unlike {misfit}; {remedy}")
    return faults


def _left_out(
    description: Description, wanted: Split, names: Iterable[str], images: Index, labels: Index
) -> tuple[LeftOut, ...]:
    """The files in the folders of a split that are none of its pictures or labels, by the reason."""
    fitting = {*images.files.values(), *labels.files.values(), description.path}
    taken = set(names)
    others = {path for name, path in images.files.items() if name not in taken}
    widowed = {labels.files[name] for name in labels.files.keys() - images.files.keys()}
    reasons = {
        "hidden": {*images.hidden, *labels.hidden},
        "linked to nothing": {*images.dangling, *labels.dangling},
        "not named as the patterns say": {*images.unfit, *labels.unfit} - fitting,
        f"not in {wanted.list}" if wanted.share is None else "not in this share": others,
        "without an image": widowed if wanted.list is not None else set(),  # without a list, they are faults
    }
    return tuple(LeftOut(reason, len(paths), min(paths)) for reason, paths in reasons.items() if paths)


def _coloured(description: Description, root: Path) -> DenseTask:
    """The task in the colours of the first label file, unless the TOML file has others or that has none.

    It is the same file for all splits, so that a class has one colour.
    """
    task = description.task
    labelled = next((split.folder for split in description.splits.values() if split.labelled), None)
    if not isinstance(task, Segmentation) or description.has_colours or description.labels is None or labelled is None:
        return task
    paths = sorted(index(root, description.labels, labelled).files.values())
    colours = label_colours(paths[0], task.label_ids) if paths else None
    return task if colours is None else Segmentation(task.class_names, colours, task.label_ids)


def _names(
    description: Description, split: str, root: Path, images: Index, labels: Index
) -> tuple[list[str], list[str], Path]:
    """The names of a split's pictures, of all `images`, the faults of its list, and the list or folder that they come from."""
    path, wanted = description.path, description.splits[split]
    if not images.files:
        there = f" (there is {min(images.unfit)})" if images.unfit else ""
        raise InputError(
            f"no file in {root} fits {path}, field images: {description.images!r}; correct it or `data_dir`{there}"
        )
    names, faults = sorted(images.files), list[str]()
    listing = root / fixed_part(description.images, wanted.folder)
    if wanted.list is not None:
        listing = place(root, Path(wanted.list))
        lines = read_lines(listing, f"correct {path}, field splits.{split}.list, or restore the list")
        names, faults = read_names(lines, listing, root, description.images, images.files, labels.files)
        if not names:
            raise InputError(f"no line of {listing} names a picture: {faults[0]}")
    if wanted.share is not None and not (names := [name for name in names if name in wanted.share]):
        remedy = "give another split_seed, or lists where pictures are few"
        raise InputError(f"{path}, field splits.{split}.share: no picture falls to it; {remedy}")
    return names, faults, listing


def load_description(path: Path) -> Description:
    """Read a TOML file. Raises InputError that names the file, the field and what to do."""
    try:
        content = tomllib.loads(decoded(path.read_bytes()))
    except (FileNotFoundError, IsADirectoryError) as error:
        raise InputError(f"`dataset` {path} does not exist; give the TOML file that describes your data set") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is no TOML file ({error}); docs/datasets.md shows one") from error
    fields = _Fields(path, content)
    fields.refuse_others(_FIELDS)
    task, read_label, recipe = _depths(fields) if "depth_scale" in content else _classes(fields)
    splits = _splits(fields)
    images = _pattern(fields, "images")
    labels = _pattern(fields, "labels") if any(split.labelled for split in splits.values()) else None
    unlisted = [name for name, split in splits.items() if split.list is None and split.share is None]
    if len(unlisted) > 1 and "{split}" not in images:
        raise fields.error(
            "images",
            f"must contain {{split}}, or {' and '.join(unlisted)} hold the same pictures",
            "add it, or give them lists or shares",
        )
    _require_one_source(fields, splits, images)
    return Description(
        path=path,
        name=_name(fields),
        task=task,
        read_label=read_label,
        recipe=recipe,
        has_colours="colours" in content or "label_colours" in content,
        images=images,
        labels=labels,
        splits=splits,
    )


class _Fields:
    """A table of the TOML file, from which fields are read by name and type."""

    def __init__(self, path: Path, content: Mapping[str, Any], place: str = "") -> None:
        self.path, self.content, self.place = path, content, place

    def error(self, field: str, complaint: str, remedy: str) -> InputError:
        return InputError(f"{self.path}, field {self.place}{field}: {complaint}; {remedy}")

    def refuse_others(self, known: tuple[str, ...]) -> None:
        for field in self.content:
            if field not in known:
                raise self.error(field, "is unknown", f"the fields are {', '.join(known)}")

    def text(self, field: str, default: str | None = None) -> str:
        value = self.content.get(field, default)
        if value is None:
            raise self.error(field, "is missing", "add it, as docs/datasets.md shows")
        if not isinstance(value, str) or not value.strip():
            raise self.error(field, f"must be a text, got {value!r}", "put it in quotation marks")
        return value

    def list(self, field: str, default: list[Any] | None = None) -> list[Any]:
        value = self.content.get(field, default)
        if value is None:
            raise self.error(field, "is missing", "add it, as docs/datasets.md shows")
        if not isinstance(value, list):
            raise self.error(field, f"must be a list, got {value!r}", "put it in [brackets]")
        return value

    def table(self, field: str) -> dict[str, Any]:
        value = self.content.get(field, {})
        if not isinstance(value, dict):
            raise self.error(field, f"must be a table, got {value!r}", f"write [{self.place}{field}] above its lines")
        return value


def _name(fields: _Fields) -> str:
    name = fields.text("name", fields.path.stem)
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise fields.error("name", f"{name!r} cannot be part of a file name", "use letters, digits, '_', '-' and '.'")
    return name


def _classes(fields: _Fields) -> tuple[Segmentation, LabelReader | ColourReader, str]:
    """The task of a file with `classes`, who reads its labels, and what they depend on."""
    class_names = _class_names(fields)
    if "label_colours" in fields.content:
        return _colour_coded(fields, class_names)
    palette, train_ids = _palette(fields, class_names), _train_ids(fields, class_names)
    remedy = f"correct the file, or ignore and label_ids in {fields.path}, or give label_colours there if colours are classes"
    ignores_others = fields.content.get("ignore") == _OTHERS
    unsaid = [] if "ignore" in fields.content else [value for value, meaning in train_ids.items() if meaning == IGNORE_INDEX]
    reader = LabelReader(train_ids, remedy=remedy, ignores_others=ignores_others, presumed=frozenset(unsaid))
    recipe = repr(sorted(train_ids.items())) + _OTHERS * ignores_others
    return Segmentation(class_names, palette, _label_ids(train_ids, len(class_names))), reader, recipe


def _colour_coded(fields: _Fields, class_names: tuple[str, ...]) -> tuple[Segmentation, ColourReader, str]:
    """The same of a file with `label_colours`; a class is drawn in the first colour of its labels, if not told otherwise."""
    if "label_ids" in fields.content:
        raise fields.error("label_ids", "is for labels of numbers, and label_colours for colours", "leave one of them out")
    table = {name: _colours(fields, f"label_colours.{name}", value) for name, value in fields.table("label_colours").items()}
    if strange := [name for name in table if name not in class_names]:
        remedy = "add it to `classes`, or give its colour as `ignore`"
        raise fields.error(f"label_colours.{strange[0]}", "is no class", remedy)
    if absent := [name for name in class_names if not table.get(name)]:
        raise fields.error("label_colours", f"gives no colour to {', '.join(absent)}", "add one for each class")
    ignores_others = fields.content.get("ignore") == _OTHERS
    void = [] if ignores_others else _colours(fields, "ignore", fields.list("ignore", []))
    meanings = [(colour, class_names.index(name)) for name, colours in table.items() for colour in colours]
    train_ids: dict[RGB, int] = {}
    for colour, meaning in [*meanings, *((colour, IGNORE_INDEX) for colour in void)]:
        if train_ids.setdefault(colour, meaning) != meaning:
            raise fields.error("label_colours", f"{list(colour)} has two meanings", "leave it out of one class, or of ignore")
    remedy = f"correct the file, or add the colour to label_colours or ignore in {fields.path}"
    palette = _palette(fields, class_names, [table[name][0] for name in class_names])
    recipe = repr(sorted(train_ids.items())) + _OTHERS * ignores_others
    return Segmentation(class_names, palette), ColourReader(train_ids, remedy, ignores_others), recipe


def _colours(fields: _Fields, field: str, value: object) -> list[RGB]:
    """One colour, or a list of them."""
    colours = [value] if _is_colour(value) else value
    if not isinstance(colours, list) or not all(_is_colour(colour) for colour in colours):
        complaint = f"must be a colour or a list of them, got {value!r}"
        raise fields.error(field, complaint, "give [red, green, blue], 0 to 255 each")
    return [(red, green, blue) for red, green, blue in colours]


def _depths(fields: _Fields) -> tuple[Depth, DepthReader, str]:
    """The same of a file with `depth_scale`."""
    scale = fields.content["depth_scale"]
    if type(scale) not in (int, float) or not _SCALES[0] <= scale <= _SCALES[1]:
        complaint = f"must be a number from {_SCALES[0]:g} to {_SCALES[1]:g}, got {scale!r}"
        raise fields.error("depth_scale", complaint, "give what a label has for one metre")
    for field in _OF_CLASSES:
        if field in fields.content:
            raise fields.error(field, "is for classes, and depth_scale for depths", "leave one of them out")
    reader = DepthReader(float(scale), remedy=f"store the metres times depth_scale of {fields.path}, rounded")
    return Depth(float(scale)), reader, f"depth_scale {float(scale)}"


def _class_names(fields: _Fields) -> tuple[str, ...]:
    if "classes" not in fields.content:
        remedy = "add it, as docs/datasets.md shows, or depth_scale if labels are depths"
        raise fields.error("classes", "is missing", remedy)
    names = fields.list("classes")
    if not 1 <= len(names) <= _MOST_CLASSES or not all(isinstance(name, str) and name.strip() for name in names):
        raise fields.error(
            "classes", f"must be 1 to {_MOST_CLASSES} names, got {names!r}", "name each class in quotation marks"
        )
    if double := sorted({name for name in names if names.count(name) > 1}):
        raise fields.error("classes", f"names {', '.join(double)} more than once", "give every class its own name")
    return tuple(names)


def _palette(fields: _Fields, class_names: tuple[str, ...], of_labels: list[RGB] | None = None) -> NDArray[np.uint8]:
    if "colours" not in fields.content and of_labels is None:
        return default_palette(class_names)
    colours, classes = fields.list("colours", of_labels), len(class_names)
    if len(colours) != classes:
        raise fields.error(
            "colours", f"has {len(colours)} colours for {classes} classes", "give one for each, or leave it out"
        )
    for colour in colours:
        if not _is_colour(colour):
            raise fields.error("colours", f"{colour!r} is no colour", "give [red, green, blue], 0 to 255 each")
    palette = np.array(colours, np.uint8)
    palette.flags.writeable = False
    return palette


def _train_ids(fields: _Fields, class_names: tuple[str, ...]) -> dict[int, int]:
    table = fields.table("label_ids") or {str(index): index for index in range(len(class_names))}
    ignored = _ignored(fields, [] if str(IGNORE_INDEX) in table else [IGNORE_INDEX])
    train_ids = {}
    for value, meaning in table.items():
        if not value.isdecimal() or int(value) >= MOST_VALUES:
            raise fields.error(f"label_ids.{value}", "is no label value", f"give a number from 0 to {MOST_VALUES - 1}")
        train_ids[int(value)] = _train_id(fields, value, meaning, class_names)
    if unmapped := sorted(set(range(len(class_names))) - set(train_ids.values())):
        names = ", ".join(class_names[index] for index in unmapped)
        raise fields.error("label_ids", f"gives no value to {names}", "add one for each class")
    if both := train_ids.keys() & set(ignored):
        raise fields.error("ignore", f"{spans(both)} also means a class", "say which by label_ids, or take it out")
    return train_ids | dict.fromkeys(ignored, IGNORE_INDEX)


def _ignored(fields: _Fields, default: list[int]) -> list[int]:
    """The label values that do not count; with "others" there are none to name."""
    if fields.content.get("ignore") == _OTHERS:
        return []
    ignored = fields.list("ignore", default)
    if not all(type(value) is int and 0 <= value < MOST_VALUES for value in ignored):
        complaint = f'must be label values, 0 to {MOST_VALUES - 1}, or "{_OTHERS}", got {ignored!r}'
        raise fields.error("ignore", complaint, "correct it")
    return ignored


def _train_id(fields: _Fields, value: str, meaning: object, class_names: tuple[str, ...]) -> int:
    """The class that `label_ids` gives to a value, by name or by its place in `classes`."""
    if isinstance(meaning, str) and meaning in class_names:
        return class_names.index(meaning)
    if _is_byte(meaning) and int(str(meaning)) < len(class_names):
        return int(str(meaning))
    raise fields.error(f"label_ids.{value}", f"{meaning!r} is no class", "give one of `classes`, or its number, from 0")


def _label_ids(train_ids: Mapping[int, int], classes: int) -> tuple[int, ...]:
    """The value of each class in label files; the first one, if several mean the same class."""
    first = {train_id: value for value, train_id in reversed(list(train_ids.items()))}
    return tuple(first[train_id] for train_id in range(classes))


def _splits(fields: _Fields) -> dict[str, Split]:
    tables = fields.table("splits")
    if not tables:
        raise fields.error("splits", "is missing", "add [splits.train] and [splits.val], as docs/datasets.md shows")
    shares = _shares(fields, tables)
    splits = {}
    for name, table in tables.items():
        if not isinstance(table, dict):
            raise fields.error(f"splits.{name}", f"must be a table, got {table!r}", f"write [splits.{name}] above its lines")
        split = _Fields(fields.path, table, f"splits.{name}.")
        split.refuse_others(_SPLIT_FIELDS)
        labelled, count = table.get("labelled", True), table.get("count")
        if not isinstance(labelled, bool):
            raise split.error("labelled", f"must be true or false, got {labelled!r}", "correct it")
        if count is not None and (type(count) is not int or count < 1):
            raise split.error("count", f"must be a number of pictures, got {count!r}", "correct it, or leave it out")
        folder = split.text("folder", name)
        _require_inside(split, "folder", folder)
        listed = split.text("list") if "list" in table else None
        splits[name] = Split(listed, folder, labelled, count, shares.get(name))
    return splits


def _shares(fields: _Fields, tables: Mapping[str, Any]) -> dict[str, Share]:
    """The shares of the splits that have one: neighbours in 0..1, so that every picture falls to exactly one of them."""
    seed = fields.content.get("split_seed", 0)
    if type(seed) is not int:
        raise fields.error("split_seed", f"must be a whole number, got {seed!r}", "correct it, or leave it out")
    given = {name: table["share"] for name, table in tables.items() if isinstance(table, dict) and "share" in table}
    for name, share in given.items():
        if type(share) not in (int, float) or not 0 < share < 1:
            raise fields.error(f"splits.{name}.share", f"must be above 0 and below 1, got {share!r}", "give such as 0.8")
    if given and not math.isclose(sum(given.values()), 1):
        complaint = f"{' and '.join(given)} have {sum(given.values()):g} of the pictures in all, not 1"
        raise fields.error("splits", complaint, "give each of them a share, such as 0.8 and 0.2")
    bounds = [0.0, *(sum(list(given.values())[:count]) for count in range(1, len(given))), math.inf]
    return {name: Share(bounds[i], bounds[i + 1], seed) for i, name in enumerate(given)}


def _require_one_source(fields: _Fields, splits: Mapping[str, Split], images: str) -> None:
    """Refuse shares of different pictures: what is divided must be the same for all."""
    divided = {name: split for name, split in splits.items() if split.share is not None}
    if len({split.list for split in divided.values()}) > 1:
        raise fields.error("splits", f"{' and '.join(divided)} divide different lists", "give them the same one, or none")
    if "{split}" in images and len({split.folder for split in divided.values()}) > 1:
        complaint = f"must not contain {{split}}, because {' and '.join(divided)} divide the same pictures"
        raise fields.error("images", complaint, "take it out, or give them the same folder")


def _pattern(fields: _Fields, field: str) -> str:
    pattern = fields.text(field)
    placeholders = re.findall(r"\{.*?\}", pattern)
    if placeholders.count("{name}") != 1 or set(placeholders) - {"{name}", "{split}"}:
        raise fields.error(field, f"{pattern!r} must contain {{name}} once, and may contain {{split}}", "correct it")
    _require_inside(fields, field, pattern)
    return pattern


def _require_inside(fields: _Fields, field: str, path: str) -> None:
    if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
        raise fields.error(field, f"{path!r} leaves the folder", "give a path within it, and the folder by `data_dir`")


def _fill(pattern: str, folder: str, name: str) -> str:
    return pattern.replace("{split}", folder).replace("{name}", name)


def _is_colour(value: object) -> bool:
    return isinstance(value, list | tuple) and len(value) == 3 and all(_is_byte(part) for part in value)


def _is_byte(value: object) -> bool:
    return type(value) is int and 0 <= value <= 255
