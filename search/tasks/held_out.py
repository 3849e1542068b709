"""Test splits: pictures by which neither a cell nor a network is chosen (`search.rerank --test-splits`).

The best of many cells is partly the luckiest one, so the split that has chosen it overrates it. Networks that were trained end
to end are therefore scored on other splits too. The scores lie beside each network, in a file for each split.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from fast.checkpoint import load_network
from search.datasets import Dataset, Fingerprint, open_dataset
from search.datasets.copies import in_common
from search.datasets.look import require_labelled
from search.dense_tasks import Scores
from search.devices import Devices
from search.errors import InputError, require_file_name
from search.folder import Folder
from search.settings import DataSettings, RecipeSettings
from search.training.scoring import count_split
from search.training.tiles import Tiles


@dataclass(frozen=True)
class HeldOut:
    """A test split, and what its files held when it was opened: scores of other pictures do not count."""

    dataset: Dataset
    content: Fingerprint

    @property
    def name(self) -> str:
        return self.dataset.split

    def scores(self, folder: Path) -> Scores | None:
        """The scores of the network in a training's folder; None as long as there are none of these pictures.

        Raises InputError for a damaged file.
        """
        training = Folder(folder)
        kept = training.result(self._job)
        if kept is None:
            return None
        try:
            return Scores.restored(kept["scores"]) if kept["content"] == list(self.content) else None
        except (KeyError, TypeError) as error:
            raise training.damaged(self._job, error) from error

    @torch.no_grad()
    def score(self, folder: Path, recipe: RecipeSettings, devices: Devices) -> None:
        """Score the network that a finished training has left in its folder, as its validation did, and keep the scores there.

        Raises InputError for a network or a picture that cannot be used.
        """
        try:
            network, _ = load_network(folder / "last.safetensors")
        except ValueError as error:
            raise InputError(f"{error}; restore the file, or delete {folder} to train the network again") from error
        network.to(devices.device)
        with torch.autocast(devices.device.type, torch.bfloat16, enabled=recipe.precision == "bfloat16"):
            try:
                totals = count_split(network, self.dataset, indices=range(len(self.dataset)), tiles=Tiles.of(recipe))
            except InputError as error:
                raise InputError(f"{error}; or leave `test_splits` out: what is trained is kept") from error
        scores = self.dataset.task.scores(totals.double().cpu().numpy())
        Folder(folder).write_result(self._job, {"content": list(self.content), "scores": asdict(scores)})

    @property
    def _job(self) -> str:
        return _PREFIX + self.name


_PREFIX = "test-"


def open_held_out(splits: Sequence[str], data: DataSettings) -> list[HeldOut]:
    """Open splits of a data set, each once. Raises InputError for one that cannot be used, or has no labels to score by."""
    opened: dict[str, HeldOut] = {}
    for split in splits:
        dataset = open_dataset(data.dataset, split, data.data_dir, data.task, data.max_megapixels)
        require_file_name(dataset.split, "a split of `test_splits`")
        require_labelled(dataset, "test_splits")
        opened[dataset.split] = HeldOut(dataset, dataset.fingerprint())
    return list(opened.values())


def require_held_out(held_out: Sequence[HeldOut], used: Sequence[Dataset]) -> None:
    """Raise InputError for a test split that has a picture of the splits that cells and networks are chosen by."""
    for split in held_out:
        if shared := in_common(split.dataset, used):
            raise InputError(f"{shared}, so scores on {split.name} would be too good: give another `test_splits`")


def forget_scores(folder: Path) -> None:
    """Delete what is kept in a training's folder: the network there will be another one."""
    for path in folder.glob(f"{_PREFIX}*.json"):
        path.unlink()
