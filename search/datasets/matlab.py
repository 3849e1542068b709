"""Labels in MATLAB files: SBD's and PASCAL-Part's."""

import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.io import loadmat
from scipy.io.matlab import MatReadError

from search.datasets.pictures import RESTORE
from search.errors import InputError

# The class in PASCAL-Person-Part of each of PASCAL-Part's names for parts of a person, of either side.
_PARTS = (
    ("head", "ear", "eye", "ebrow", "mouth", "nose", "hair"),
    ("torso", "neck"),
    ("uarm",),
    ("larm", "hand"),
    ("uleg",),
    ("lleg", "foot"),
)
PERSON_PARTS = {
    side + part: train_id for train_id, parts in enumerate(_PARTS, start=1) for part in parts for side in ("", "l", "r")
}


def read_class_map(path: Path) -> NDArray[np.uint8]:
    """Read `GTcls.Segmentation` of a file in SBD's folder `cls`: (H, W) uint8. Raises InputError naming the file."""
    content = _load(path)
    try:
        return np.asarray(content["GTcls"].Segmentation, np.uint8)
    except (KeyError, AttributeError, TypeError, ValueError) as error:
        raise InputError(f"label {path} holds no GTcls.Segmentation; it must be a file of SBD's folder cls") from error


def read_person_parts(path: Path) -> NDArray[np.uint8]:
    """Read the (H, W) uint8 values 0 to 6 of a file in PASCAL-Part's folder `Annotations_Part`.

    People and their parts are drawn in the order of the file, each over those before. This gives the published maps, pixel
    by pixel. Raises InputError naming the file.
    """
    content = _load(path)
    try:
        objects = np.atleast_1d(content["anno"].objects)
        values = np.zeros(objects[0].mask.shape, np.uint8)
        for person in (thing for thing in objects if getattr(thing, "class") == "person"):
            for part in np.atleast_1d(person.parts):
                values[part.mask > 0] = PERSON_PARTS[part.part_name]
    except (KeyError, AttributeError, TypeError, ValueError, IndexError) as error:
        raise InputError(
            f"label {path} is no list of objects and their parts ({type(error).__name__}: {error}); "
            "it must be a file of PASCAL-Part's folder Annotations_Part"
        ) from error
    return values


def _load(path: Path) -> dict[str, Any]:
    """Load the file's variables, with structs as objects that have attributes."""
    try:
        content: dict[str, Any] = loadmat(path, squeeze_me=True, struct_as_record=False)
    # What SciPy raises for damaged files: its own errors, those of struct and zlib, and one for MATLAB's newer format.
    except (MatReadError, zlib.error, OSError, ValueError, TypeError, LookupError, NotImplementedError, MemoryError) as error:
        raise InputError(f"label {path} is truncated or no MATLAB file ({error}); {RESTORE}") from error
    return content
