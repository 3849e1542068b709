"""Which files a description's patterns and lists mean: names in any form of Unicode, lists as editors and tools write them.

`{name}` in a pattern is the picture's name, `{split}` the split's or its folder, `*` any text without a slash.
"""

import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path, PurePosixPath
from posixpath import splitext
from typing import NamedTuple

from search.datasets.walk import SUFFIXES, walk

_SEPARATOR = re.compile(r"[\s,;]+")  # of columns
_MOST_COMPARED = 5  # unknown names for which a similar one is looked for: that takes long among many


class Index(NamedTuple):
    """The files that fit a pattern, by name, and a sentence for each name that two files share; the files beside them that
    do not fit, hidden ones, and links that lead nowhere.
    """

    files: dict[str, Path]
    faults: list[str]
    unfit: list[Path]
    hidden: list[Path]
    dangling: list[Path]


NOTHING = Index({}, [], [], [], [])


def index(root: Path, pattern: str, folder: str) -> Index:
    """Look for the files in `root` that fit the pattern, `{split}` in it being `folder`. A suffix may be in capitals.

    Raises InputError for a folder that cannot be read.
    """
    filled = composed(pattern.replace("{split}", folder))
    suffix = PurePosixPath(filled).suffix
    fits = re.compile(_expression(filled.removesuffix(suffix)) + f"(?i:{_expression(suffix)})")
    found = walk(place(root, fixed_part(pattern, folder)))
    files: dict[str, Path] = {}
    faults, unfit = [], []
    for path in sorted(found.files, key=lambda path: not path.name.endswith(suffix)):
        match = fits.fullmatch(_relative(path, root))
        is_picture = "*" not in suffix or path.suffix.lower() in SUFFIXES  # not a.json of LabelMe beside a.jpg
        if match is None or not is_picture:
            unfit.append(path)
        elif (other := files.setdefault(match["name"], path)) != path:
            if other.suffix != path.suffix and other.suffix == suffix:  # the pattern means one of the two
                unfit.append(path)
            else:
                faults.append(f"{other} and {path} both fit {pattern!r}; remove one, or be more precise")
    return Index(files, faults, unfit, found.hidden, found.dangling)


def composed(text: str) -> str:
    """The text in the form of Unicode that keyboards write, in which é is one character; macOS stores names in the other."""
    return unicodedata.normalize("NFC", text)


def fixed_part(pattern: str, folder: str) -> Path:
    """The folders of a pattern that come before its first `{name}` or `*`."""
    parts = PurePosixPath(pattern.replace("{split}", folder)).parts[:-1]
    first = next((i for i, part in enumerate(parts) if "{name}" in part or "*" in part), len(parts))
    return Path(*parts[:first])


def place(root: Path, path: Path) -> Path:
    """What `path` within `root` is called on disk, where its name may be in another form of Unicode."""
    for part in path.parts:
        alike = () if (root / part).exists() or not root.is_dir() else root.iterdir()
        root = next((each for each in alike if composed(each.name) == composed(part)), root / part)
    return root


class Lines(NamedTuple):
    """What the lines of a list mean: the pictures' names, in the list's order, and a sentence for each line without one."""

    names: list[str]
    faults: list[str]


def read_names(
    lines: Sequence[tuple[int, str]],
    listing: Path,
    root: Path,
    pattern: str,
    images: Mapping[str, Path],
    labels: Mapping[str, Path],
) -> Lines:
    """Find the pictures that the numbered lines of a list mean, each by its name, its file name or its path.

    More columns may follow, such as the path of the label: where that is the label of another picture, it is a fault.
    """
    of_images, of_labels = _Meanings(images, root), _Meanings(labels, root)
    names, faults = list[str](), list[str]()
    for number, line in lines:
        name, rest = of_images.find(line)
        if name is None:
            faults.append(_unknown(listing, number, line, pattern, images if len(faults) < _MOST_COMPARED else ()))
            continue
        names.append(name)
        paired, _ = of_labels.find(rest) if rest else (None, "")
        if paired not in (None, name):
            faults.append(
                f"{listing}, line {number}: has {name} beside the label of {paired}, and labels are found by names; "
                "correct the line, or name the files alike"
            )
    return Lines(names, faults)


def _unknown(listing: Path, number: int, line: str, pattern: str, names: Iterable[str]) -> str:
    similar = get_close_matches(PurePosixPath(line.split()[0].replace("\\", "/")).stem, list(names), n=1, cutoff=0.5)
    remedy = f"the nearest is {similar[0]!r}: correct the line, or restore the picture" if similar else "correct the line"
    return f"{listing}, line {number}: {line!r} is no picture that fits {pattern!r}; {remedy}"


class _Meanings:
    """Which file a text of a list may mean: by its name, file name or path, whole or from some folder on."""

    def __init__(self, files: Mapping[str, Path], root: Path) -> None:
        self._exact = {name: name for name in files}
        self._paths: dict[str, str] = {}
        self._whole: dict[str, str] = {}  # the same, with suffixes in small letters
        endings: dict[str, set[str]] = {}
        for name, path in files.items():
            relative = _relative(path, root)
            self._exact.setdefault(relative[max(0, relative.rfind(name)) :], name)
            for form in (relative, splitext(relative)[0]):
                self._paths.setdefault(form, name)
                self._whole.setdefault(_small_suffix(form), name)
                for ending in _from_each_folder(form):
                    endings.setdefault(_small_suffix(ending), set()).add(name)
        self._endings = {ending: next(iter(names)) for ending, names in endings.items() if len(names) == 1}

    def find(self, line: str) -> tuple[str | None, str]:
        """The name of the file that the line, or its first column, means, and the rest of the line; None if it means none."""
        for text, rest in _columns(line):
            written = re.sub(r"^\.?/+", "", composed(text).strip("\"'").replace("\\", "/"))
            name = self._exact.get(written) or self._paths.get(written) or self._endings.get(_small_suffix(written))
            if name := name or self._from_elsewhere(written):
                return name, rest
        return None, ""

    def _from_elsewhere(self, path: str) -> str | None:
        """The file with this path in another folder than here, such as one of another machine, if a single path is written."""
        endings = (ending for ending in _from_each_folder(path) if _small_suffix(ending) in self._whole)
        ending = next(endings, None)
        is_one = ending is not None and not _SEPARATOR.search(path.removesuffix(ending))
        return self._whole[_small_suffix(ending)] if ending is not None and is_one else None


def _columns(line: str) -> Iterator[tuple[str, str]]:
    """The line divided into its beginning and the rest, the longest beginnings first: a name may contain what separates."""
    yield line, ""
    for separator in reversed(list(_SEPARATOR.finditer(line))):
        yield line[: separator.start()], line[separator.end() :]


def _from_each_folder(path: str) -> Iterator[str]:
    """The path, and what remains of it when its first folders are left out.

    >>> list(_from_each_folder("data/train/a.png"))
    ['data/train/a.png', 'train/a.png', 'a.png']
    """
    yield path
    yield from (path[slash.end() :] for slash in re.finditer("/", path))


def _small_suffix(path: str) -> str:
    stem, suffix = splitext(path)
    return stem + suffix.lower()


def _relative(path: Path, root: Path) -> str:
    return composed(path.relative_to(root).as_posix())


def _expression(pattern: str) -> str:
    return re.escape(pattern).replace(r"\{name\}", "(?P<name>.+)").replace(r"\*", "[^/]*")
