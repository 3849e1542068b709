import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from search.errors import InputError
from search.tensorflow.tensor_bundle import TensorBundle
from tests.golden.authors_dumps import SHARED
from tests.search.made_bundle import masked_crc, write_bundle

GOLDEN = SHARED / "models" / "mnv2_dpc_os16"


def made(count: int = 40) -> dict[str, NDArray[Any]]:
    """Names that share prefixes; shapes from scalars to four axes; all types that are read."""
    rng = np.random.default_rng(0)
    arrays: dict[str, NDArray[Any]] = {
        f"scope/unit_{i}/weights": rng.standard_normal((3, 1, i, 2)).astype(np.float32) for i in range(count)
    }
    others = {t: np.arange(5).astype(t) for t in ("float64", "int32", "int64", "float16")}
    return arrays | {f"scope/{name}": array for name, array in others.items()} | {"global_step": np.array(2**40)}


def test_masked_crc_is_the_published_one() -> None:
    # RFC 3720, B.4: CRC-32C of 32 zero bytes is 0x8a9136aa; LevelDB rotates it by 15 bits and adds a constant
    assert masked_crc(bytes(32)) == ((0x8A9136AA >> 15 | 0x8A9136AA << 17) + 0xA282EAD8) & 0xFFFFFFFF


@pytest.mark.parametrize("name", ["model.ckpt", "model.ckpt.index", ""], ids=["prefix", "index", "folder"])
@pytest.mark.parametrize("shards", [1, 3])
def test_round_trip(tmp_path: Path, name: str, shards: int) -> None:
    arrays = made()
    write_bundle(tmp_path / "model.ckpt", arrays, block_entries=7, shards=shards)
    bundle = TensorBundle(tmp_path / name)
    assert list(bundle.entries) == sorted(arrays)
    for key, array in arrays.items():
        assert bundle.entries[key].shape == array.shape
        values = bundle.read(key)
        assert values.dtype == array.dtype
        np.testing.assert_array_equal(values, array)


@pytest.mark.skipif(not GOLDEN.is_dir(), reason="no ../shared/golden/models beside the repository")
def test_a_checkpoint_that_tensorflow_wrote() -> None:
    """Names and shapes as TensorFlow listed them, all values with right checksums."""
    lines = [line.split("\t") for line in (GOLDEN / "variables.txt").read_text().splitlines() if line[0] != "#"]
    listed = {name: tuple(int(extent) for extent in shape[1:-1].split(",") if extent) for name, shape, _ in lines}
    bundle = TensorBundle(GOLDEN)
    assert {name: entry.shape for name, entry in bundle.entries.items()} == listed
    assert {name: str(bundle.read(name).dtype) for name in listed} == {name: dtype for name, _, dtype in lines}
    assert bundle.read("global_step") == 90000


def test_damaged_values_are_named(tmp_path: Path) -> None:
    write_bundle(tmp_path / "model.ckpt", made())
    data = tmp_path / "model.ckpt.data-00000-of-00001"
    bundle, content = TensorBundle(tmp_path), bytearray(data.read_bytes())
    entry = bundle.entries["scope/unit_7/weights"]
    content[entry.offset + 5] ^= 1
    data.write_bytes(content)
    with pytest.raises(InputError, match=r"data-00000-of-00001 is damaged at variable scope/unit_7/weights"):
        bundle.read("scope/unit_7/weights")
    np.testing.assert_array_equal(bundle.read("scope/unit_8/weights"), made()["scope/unit_8/weights"])
    data.write_bytes(content[: entry.offset + 8])
    with pytest.raises(InputError, match=r"is damaged at variable scope/unit_8/weights"):
        bundle.read("scope/unit_8/weights")
    data.unlink()
    with pytest.raises(InputError, match=r"data-00000-of-00001 is missing"):
        bundle.read("scope/unit_8/weights")


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundle")
    write_bundle(folder / "model.ckpt", made(), block_entries=9)
    return folder / "model.ckpt.index"


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])  # each example overwrites the same file
@given(position=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), cut=st.booleans())
def test_a_damaged_index_is_refused_or_read_right(index: Path, tmp_path: Path, position: float, bit: int, cut: bool) -> None:
    """Every bit but those of the padding in the footer matters; none leads to other names, shapes or an exception."""
    content = bytearray(index.read_bytes())
    place = int(position * len(content))
    if cut:
        content = content[:place]
    else:
        content[place] ^= 1 << bit
    damaged = tmp_path / "model.ckpt.index"
    damaged.write_bytes(content)
    try:
        outcome: Any = TensorBundle(damaged).entries
    except InputError as error:
        outcome = str(error)
    assert outcome == TensorBundle(index).entries or str(damaged) in outcome


def test_types_that_are_not_read_are_refused(index: Path) -> None:
    bundle = TensorBundle(index)
    text = bundle.entries["global_step"]._replace(dtype=7)  # strings
    bundle.entries |= {"text": text, "parts": text._replace(dtype=1, sliced=True)}
    with pytest.raises(InputError, match=r"variable text of .* is of TensorFlow's type 7"):
        bundle.read("text")
    with pytest.raises(InputError, match=r"variable parts of .* is stored in slices"):
        bundle.read("parts")


def test_files_that_are_no_checkpoint_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"absent\.index does not exist: give the prefix"):
        TensorBundle(tmp_path / "absent")
    with pytest.raises(InputError, match=r"must hold one \.index file to be a checkpoint, it has none"):
        TensorBundle(tmp_path)
    for name in ("a", "b"):
        (tmp_path / f"{name}.index").write_bytes(b"not a table" * 10)
    with pytest.raises(InputError, match=r"it has a\.index, b\.index: name one of them"):
        TensorBundle(tmp_path)
    with pytest.raises(InputError, match=r"a\.index is not the index of a TensorFlow V2 checkpoint, or damaged"):
        TensorBundle(tmp_path / "a")


def test_without_the_checksum_library_the_message_says_what_to_install(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "google_crc32c", None)
    with pytest.raises(InputError, match=r"needs google-crc32c: pip install -e '\.\[convert\]'"):
        TensorBundle(index)
