"""Any folder of images and label pictures, described by a TOML file; docs/datasets.md shows one with every field.

`images` and `labels` are path patterns in the folder: `{name}` is the picture's name, `{split}` the split's (or the folder
that the split's table names), `*` any text without a slash. A split's pictures are those in its list, or else all images
that match the pattern. Label values are classes 0, 1, ... in the order of `classes`, unless `label_ids` gives other values.
With `depth_scale` instead of `classes`, labels are depths.
"""

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from search.datasets import IGNORE_INDEX
from search.datasets.files import DepthReader, FileDataset, LabelReader, Pair, label_colours, read_lines, repeated, spans
from search.dense_tasks import DenseTask
from search.dense_tasks.depth import Depth
from search.dense_tasks.segmentation import Segmentation, default_palette
from search.errors import InputError

_FIELDS = ("classes", "depth_scale", "images", "labels", "splits", "name", "colours", "ignore", "label_ids")
_OF_CLASSES = ("classes", "colours", "ignore", "label_ids")
_SPLIT_FIELDS = ("list", "folder", "labelled", "count")
_SCALES = (1e-3, 1e6)  # label values for a metre: from kilometres to micrometres
_MOST_CLASSES = IGNORE_INDEX  # 0 to 254; 255 is ignored


@dataclass(frozen=True)
class Split:
    """A split's list of names (None: all images that match), the value of `{split}`, and its number of pictures, if given."""

    list: str | None
    folder: str
    labelled: bool
    count: int | None


@dataclass(frozen=True, eq=False)
class Description:
    """A TOML file's content, checked. `recipe` is what the labels depend on besides their files.

    Without `has_colours`, the palette of the label files comes before that of the task.
    """

    path: Path
    name: str
    task: DenseTask
    read_label: LabelReader | DepthReader
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
    images, faults = _index(root, description.images, wanted.folder)
    if wanted.list is None:
        names, listing = sorted(images), root / _fixed_part(description.images, wanted.folder)
    else:
        listing = root / wanted.list
        names = [line for _, line in read_lines(listing, f"correct {path}, field splits.{split}.list, or restore the list")]
        faults += repeated(names, listing)
    if not names:
        raise InputError(f"no file in {root} fits {path}, field images: {description.images!r}; correct it or `data_dir`")
    labels: dict[str, Path] = {}
    if description.labels is not None and wanted.labelled:
        labels, double = _index(root, description.labels, wanted.folder)
        faults += double
        if wanted.list is None:
            widowed = sorted(labels.keys() - images.keys())
            faults += [f"label {labels[name]} has no image; restore the image, or remove the label" for name in widowed]

    def find(found: Mapping[str, Path], pattern: str, name: str) -> Path:
        return found.get(name, root / _fill(pattern, wanted.folder, name))

    return FileDataset(
        name=description.name,
        split=split,
        task=_coloured(description, root),
        pairs=tuple(
            Pair(
                name,
                find(images, description.images, name),
                find(labels, description.labels, name) if description.labels is not None and wanted.labelled else None,
            )
            for name in names
        ),
        read_label=description.read_label,
        listing=listing,
        faults=tuple(faults),
        official_lengths=() if wanted.count is None else (wanted.count,),
        recipe=description.recipe,
    )


def _coloured(description: Description, root: Path) -> DenseTask:
    """The task in the colours of the first label file, unless the TOML file has others or that has none.

    It is the same file for all splits, so that a class has one colour.
    """
    task = description.task
    labelled = next((split.folder for split in description.splits.values() if split.labelled), None)
    if not isinstance(task, Segmentation) or description.has_colours or description.labels is None or labelled is None:
        return task
    paths = sorted(_index(root, description.labels, labelled)[0].values())
    colours = label_colours(paths[0], task.label_ids) if paths else None
    return task if colours is None else Segmentation(task.class_names, colours, task.label_ids)


def load_description(path: Path) -> Description:
    """Read a TOML file. Raises InputError that names the file, the field and what to do."""
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
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
    unlisted = [name for name, split in splits.items() if split.list is None]
    if len(unlisted) > 1 and "{split}" not in images:
        raise fields.error(
            "images",
            f"must contain {{split}}, or {' and '.join(unlisted)} hold the same pictures",
            "add it, or give them lists",
        )
    return Description(
        path=path,
        name=_name(fields),
        task=task,
        read_label=read_label,
        recipe=recipe,
        has_colours="colours" in content,
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


def _classes(fields: _Fields) -> tuple[Segmentation, LabelReader, str]:
    """The task of a file with `classes`, who reads its labels, and what they depend on."""
    class_names = _class_names(fields)
    palette, train_ids = _palette(fields, class_names), _train_ids(fields, class_names)
    reader = LabelReader(train_ids, remedy=f"correct the file, or ignore and label_ids in {fields.path}")
    return Segmentation(class_names, palette, _label_ids(train_ids, len(class_names))), reader, repr(sorted(train_ids.items()))


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


def _palette(fields: _Fields, class_names: tuple[str, ...]) -> NDArray[np.uint8]:
    if "colours" not in fields.content:
        return default_palette(class_names)
    colours, classes = fields.list("colours"), len(class_names)
    if len(colours) != classes:
        raise fields.error(
            "colours", f"has {len(colours)} colours for {classes} classes", "give one for each, or leave it out"
        )
    for colour in colours:
        if not (isinstance(colour, list) and len(colour) == 3 and all(_is_byte(value) for value in colour)):
            raise fields.error("colours", f"{colour!r} is no colour", "give [red, green, blue], 0 to 255 each")
    palette = np.array(colours, np.uint8)
    palette.flags.writeable = False
    return palette


def _train_ids(fields: _Fields, class_names: tuple[str, ...]) -> dict[int, int]:
    ignored = fields.list("ignore", [IGNORE_INDEX])
    if not all(_is_byte(value) for value in ignored):
        raise fields.error("ignore", f"must be label values, 0 to 255, got {ignored!r}", "correct it")
    table = fields.table("label_ids") or {str(index): index for index in range(len(class_names))}
    train_ids = {}
    for value, meaning in table.items():
        if not value.isdecimal() or int(value) > 255:
            raise fields.error(f"label_ids.{value}", "is no label value", "give a number from 0 to 255")
        train_ids[int(value)] = _train_id(fields, value, meaning, class_names)
    if unmapped := sorted(set(range(len(class_names))) - set(train_ids.values())):
        names = ", ".join(class_names[index] for index in unmapped)
        raise fields.error("label_ids", f"gives no value to {names}", "add one for each class")
    if both := train_ids.keys() & set(ignored):
        raise fields.error("ignore", f"{spans(both)} also means a class", "say which by label_ids, or take it out")
    return train_ids | dict.fromkeys(ignored, IGNORE_INDEX)


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
        splits[name] = Split(split.text("list") if "list" in table else None, folder, labelled, count)
    return splits


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


def _index(root: Path, pattern: str, folder: str) -> tuple[dict[str, Path], list[str]]:
    """The files that match the pattern, by name, and an error sentence for each name that several files share."""
    filled = pattern.replace("{split}", folder)
    fits = re.compile(re.escape(filled).replace(r"\{name\}", "(?P<name>.+)").replace(r"\*", "[^/]*"))
    found: dict[str, Path] = {}
    faults = []
    for path in sorted((root / _fixed_part(pattern, folder)).rglob("*")):
        match = fits.fullmatch(path.relative_to(root).as_posix())
        if match and path.is_file() and (other := found.setdefault(match["name"], path)) != path:
            faults.append(f"{other} and {path} both fit {pattern!r}; remove one, or be more precise")
    return found, faults


def _fixed_part(pattern: str, folder: str) -> Path:
    """The folders of a pattern that come before its first `{name}` or `*`."""
    parts = PurePosixPath(pattern.replace("{split}", folder)).parts[:-1]
    first = next((i for i, part in enumerate(parts) if "{name}" in part or "*" in part), len(parts))
    return Path(*parts[:first])


def _fill(pattern: str, folder: str, name: str) -> str:
    return pattern.replace("{split}", folder).replace("{name}", name)


def _is_byte(value: object) -> bool:
    return type(value) is int and 0 <= value <= 255
