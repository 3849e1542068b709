"""A folder that lasts: one process at a time, the same settings, results whole or not at all."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from search.errors import InputError
from search.folder import Folder, differences
from search.settings import (
    BackboneSettings,
    DataSettings,
    HeadSettings,
    ProxySettings,
    RecipeSettings,
    declared,
    plain,
    restored,
    scored,
)

IDENTITY = {"iterations": 3, "`weights` (content)": "ab", "crop_size": (33, 49), "cell": [{"op": "conv"}]}


def begun(path: Path, kind: str = "run") -> Folder:
    folder = Folder(path, kind)
    with folder.locked():
        folder.begin(IDENTITY, "python -m x --iterations 3", note=1)
    return folder


def test_the_same_identity_goes_on(tmp_path: Path) -> None:
    folder = begun(tmp_path)
    folder.begin(dict(IDENTITY), "python -m x again", note=2)
    description = folder.description()
    assert description is not None
    assert (description["command"], description["note"]) == ("python -m x again", 2)
    assert description["identity"] == json.loads(json.dumps(IDENTITY))


def test_another_identity_is_refused_by_the_names_of_what_differs(tmp_path: Path) -> None:
    folder = begun(tmp_path)
    before = (tmp_path / "settings.json").read_bytes()
    words = (
        f"run {tmp_path} was started with `weights` (content) ab, now it is cd, and `iterations` 3, now it is 4: use the same "
        "values (python -m x --iterations 3), give another `out`, or delete that folder"
    )
    with pytest.raises(InputError) as refused:
        folder.begin(IDENTITY | {"iterations": 4, "`weights` (content)": "cd"}, "python -m x --iterations 4")
    assert str(refused.value) == words
    assert (tmp_path / "settings.json").read_bytes() == before


def test_files_that_hold_something_else_need_another_folder(tmp_path: Path) -> None:
    names = [f"content of the {part} of `{split}_split`" for split in ("train", "val") for part in ("images", "labels")]
    before = IDENTITY | dict.fromkeys(names, "ab" * 32)
    folder = Folder(tmp_path)
    folder.begin(before, "python -m x")
    folder.begin(before, "python -m x")
    with pytest.raises(InputError) as refused:
        folder.begin(before | {names[1]: "cd" * 32, names[2]: "cd" * 32}, "python -m x")
    assert str(refused.value) == (
        f"run {tmp_path} was started with other labels of `train_split` and other images of `val_split` than now "
        "(python -m x): restore them, give another `out`, or delete that folder"
    )


def test_a_folder_that_knew_no_content_says_so(tmp_path: Path) -> None:
    folder = begun(tmp_path)
    with pytest.raises(
        InputError, match=r"run .* was started by an earlier version, .* nobody knows whether the pictures are"
    ):
        folder.begin(IDENTITY | {"content of the images of `train_split`": "ab" * 32}, "python -m x")


def test_a_setting_that_is_new_or_gone_differs() -> None:
    assert differences({"a": 1}, {"b": 1}) == "`a` 1, now it is unknown, and `b` unknown, now it is 1"
    assert (
        differences({"a": 1, "number of devices": 1}, {"a": 1, "number of devices": 2}) == "number of devices 1, now it is 2"
    )


def test_a_setting_that_did_not_exist_yet_had_its_default(tmp_path: Path) -> None:
    folder, defaults = begun(tmp_path), declared(HeadSettings)
    assert defaults == scored(HeadSettings())
    folder.begin(IDENTITY | {"dropout": 0.1, "branch_channels": None}, "", defaults=defaults)
    folder.begin(IDENTITY | {"dropout": 0.1, "branch_channels": None}, "")  # now it is written down
    with pytest.raises(InputError, match=r"was started with `dropout` 0\.1, now it is 0\.2: use the same values"):
        begun(tmp_path / "other").begin(IDENTITY | {"dropout": 0.2}, "", defaults=defaults)
    with pytest.raises(InputError, match="was started with `something` unknown, now it is 1"):
        begun(tmp_path / "third").begin(IDENTITY | {"something": 1}, "", defaults=defaults)


def test_a_folder_of_another_kind_is_named(tmp_path: Path) -> None:
    begun(tmp_path, "training")
    with pytest.raises(InputError, match=f"{tmp_path} holds a training, not a run: give another `out`"):
        Folder(tmp_path).begin(IDENTITY, "")
    with pytest.raises(InputError, match="holds a training"):
        Folder(tmp_path).description()


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "{}", '{"format": 3}', '{"format": 3, "kind": "run"}'])
def test_damaged_settings_are_named_and_left_alone(tmp_path: Path, text: str) -> None:
    (tmp_path / "settings.json").write_text(text)
    with pytest.raises(InputError, match=r"settings\.json is damaged .*: delete the run .* and start it again"):
        Folder(tmp_path).begin(IDENTITY, "")
    assert (tmp_path / "settings.json").read_text() == text


def test_a_folder_of_an_earlier_version_is_no_damage(tmp_path: Path) -> None:
    (tmp_path / "settings.json").write_text(json.dumps({"settings": {"iterations": 3}, "command": "python -m x"}))
    with pytest.raises(InputError, match=f"run {tmp_path} is of another version of this project: give another `out`"):
        Folder(tmp_path).begin(IDENTITY, "")


def test_a_second_process_is_refused_and_the_lock_dies_with_its_process(tmp_path: Path) -> None:
    code = "import sys, time; from pathlib import Path; from search.folder import Folder\n"
    code += "with Folder(Path(sys.argv[1])).locked(): print(flush=True), time.sleep(600)"
    root = Path(__file__).parents[2]
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=root, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(InputError, match=f"{tmp_path} is in use by another process"), Folder(tmp_path).locked():
            pass
        other.kill()
        other.wait()
        with Folder(tmp_path).locked():
            pass


def test_results_are_read_back_and_a_damaged_one_is_named(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    assert folder.result("job") is None
    folder.write_result("job", {"score": 0.5})
    assert folder.result("job") == {"score": 0.5}
    folder.result_path("job").write_text("{")
    with pytest.raises(InputError, match=r"job\.json is damaged .*: delete it and run the same command again"):
        folder.result("job")


def test_two_settings_of_one_name_do_not_hide_each_other() -> None:
    with pytest.raises(AssertionError, match="two settings of one name"):
        scored(ProxySettings(), RecipeSettings())


def test_settings_that_move_files_or_share_work_are_not_scored() -> None:
    names = scored(DataSettings(), BackboneSettings(), RecipeSettings()).keys()
    assert {"dataset", "backbone", "weights_origin", "output_stride", "iterations", "precision"} <= names
    assert names.isdisjoint({"data_dir", "train_split", "weights", "pretrained", "checkpoint_every", "loading_processes"})


def test_groups_are_restored_from_what_is_written() -> None:
    data = DataSettings(dataset="mine.toml", data_dir=Path("x"), val_split="test")
    recipe = RecipeSettings(crop_size=(33, 49), iterations=None, decoder=True)
    assert restored(DataSettings, plain(data)) == data
    assert restored(RecipeSettings, plain(recipe)) == recipe
    assert restored(RecipeSettings, plain(recipe) | {"of_a_later_version": 1}) == recipe
    assert restored(DataSettings, {"dataset": "camvid"}) == DataSettings(dataset="camvid")
