"""The backbone and the found head of a search as one network: `python -m search.join --run runs/shapes`.

Nothing is trained: a search keeps the heads of its best cell and of the known ones. The network is scored on the search's
validation pictures, padded as they were there. The search had rounded the features to 16 bits, the network does not: where two
classes are all but equal in score, a pixel may get the other one.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from tqdm import tqdm

from fast.checkpoint import save_network
from fast.model_card import write_card
from fast.segmentation import SegmentationNetwork
from reference.cell import Cell
from search.cli import Flat, print_next, run_command, spelled, to_type, uses_of_network
from search.datasets import Dataset, contents, is_named, open_dataset
from search.datasets.look import require_labelled
from search.dense_tasks import Scores, restored_task
from search.devices import resolve_device
from search.errors import InputError
from search.folder import other_files
from search.runs.study import HEADS, Run, best_head, load_run, ranked
from search.runs.tables import BEST_HEAD, head_name
from search.settings import (
    BackboneSettings,
    DataSettings,
    DeviceSettings,
    MachineSettings,
    given,
    known,
    plain,
)
from search.training.network import join_head
from search.training.scoring import count_split


@dataclass(frozen=True, kw_only=True)
class JoinSettings:
    """Make one network of a search's backbone and the head that it found, and score it as the search did."""

    run: Path | None = None
    """Folder of the search, such as runs/shapes. None: the one that the head is in."""
    head: Path | None = None
    """Head to join, such as runs/shapes/heads/dpc_seed0.safetensors. None: that of the run's best cell."""
    out: Path | None = None
    """File to write. None: network.safetensors in the run's folder; for other heads their name comes first."""
    dataset: str | None = None
    """Data set of the run, such as its TOML file where that is now. None: the run's."""
    data_dir: Path | None = None
    """Folder of the data set. None: the run's."""
    cache_dir: Path | None = None
    """Where the small backbone for shapes is kept. None: the run's."""
    backbone: Flat[BackboneSettings] = BackboneSettings()
    device: Flat[DeviceSettings] = DeviceSettings()


def main(settings: JoinSettings) -> None:
    """Join, score if the head is in the folder of a run, and write the file."""
    device = resolve_device(settings.device.device)
    run, head = _found(settings)
    network, description = join_head(head, _backbone(settings, run), _cache_dir(settings, run))
    task, out = restored_task(description), settings.out or _default_out(run, head)
    if run is None:
        save_network(out, network, task=task.describe(), source={"head": str(head)})
        print(f"{head} is in no run's folder, so its network was not scored")
        print(f"network: {out}, with its model card, {write_card(out)}")
        print_next(to_type("export", "--network", out, "--out", out.with_suffix(".pt2")))
        return
    had = run.settings.data
    data = replace(had, dataset=given(settings.dataset, had.dataset), data_dir=given(settings.data_dir, had.data_dir))
    val, padded = _validation(run, data), (run.identity["image_size"][0], run.identity["image_size"][1])
    scores = _score(network.to(device), val, padded)
    source = {"run": str(run.directory), "head": str(head), "data": plain(data), "image_size": padded}
    source |= {"loss": plain(run.settings.loss)} | task.named(scores)
    evaluation = {"dataset": data.dataset, "pad_to": padded}
    save_network(out, network, task=task.describe(), source=source, evaluation=evaluation)
    print(f"{task.score.name} on {val.name} {val.split}: {task.score.text(scores.score)}")
    if (recorded := _recorded(run, head, network.head.context.cell)) is not None:
        print(f"in the search: {task.score.text(recorded.score)}, with features rounded to {run.identity['feature_dtype']}")
    print(f"network: {out}, with its model card, {write_card(out)}")
    print_next(*uses_of_network(out, data, val))


def _found(settings: JoinSettings) -> tuple[Run | None, Path]:
    """The run, if there is one, and the head. Raises InputError where they are not to be found."""
    if settings.run is None and settings.head is None:
        raise InputError("give the folder of a search as `run`, or a head that it kept as `head`")
    directory = settings.run
    if directory is None and settings.head is not None:
        folder = settings.head.absolute().parent
        directory = folder.parent if folder.name == HEADS and (folder.parent / "settings.json").is_file() else None
    run = None if directory is None else load_run(directory)
    if run is not None and not is_named(run.settings.data.dataset):
        raise InputError(
            f"{directory} was searched from Python, on objects that no command can open: join them there, by "
            f'`load_found("{directory}").network(backbone)`'
        )
    head = settings.head or best_head(known(directory))
    if not head.is_file():
        raise InputError(f"there is no head {head}: let the search score a cell first, or give another as `head`")
    return run, head


def _backbone(settings: JoinSettings, run: Run | None) -> BackboneSettings:
    """What is given, if it says where weights are, else the run's."""
    is_given = settings.backbone.weights is not None or settings.backbone.pretrained
    return settings.backbone if run is None or is_given else run.settings.backbone


def _cache_dir(settings: JoinSettings, run: Run | None) -> Path:
    return settings.cache_dir or (MachineSettings() if run is None else run.settings.machine).cache_dir


def _default_out(run: Run | None, head: Path) -> Path:
    name = "network.safetensors" if head.stem == BEST_HEAD else f"{head.stem}-network.safetensors"
    return (head.parent if run is None else run.directory) / name


def _validation(run: Run, data: DataSettings) -> Dataset:
    """The split that the search scored on. Raises InputError for other pictures than it had then."""
    val = open_dataset(data.dataset, data.val_split, data.data_dir, data.task, data.max_megapixels)
    now = contents("val_split", val.fingerprint())
    if run.identity.keys().isdisjoint(now):
        raise InputError(f"{run.directory} is of an earlier version, which did not look into files: search in another folder")
    if changed := other_files(run.identity, now):
        raise InputError(f"{run.directory} was scored on {changed} than now: restore them, or give their `data_dir`")
    require_labelled(val)
    return val


def _score(network: SegmentationNetwork, val: Dataset, padded: tuple[int, int]) -> Scores:
    """The scores on all pictures, padded to one size."""
    with tqdm(total=len(val), desc=f"{val.name} {val.split}", unit="picture") as bar:
        total = count_split(network, val, indices=range(len(val)), pad_to=padded, on_picture=bar.update)
    return val.task.scores(total.cpu().numpy())


def _recorded(run: Run, head: Path, cell: Cell) -> Scores | None:
    """The scores that the search has of a head of this cell that it kept."""
    if head.absolute().parent != (run.directory / HEADS).absolute():
        return None
    results = {head_name(record.name): record.result for record in run.baselines if record.seed == 0}
    best = [record for record in ranked(run.trials)[:1] if record.cell == cell]  # which may be another by now
    result = best[0].result if best and head.stem == BEST_HEAD else results.get(head.stem)
    return None if result is None else result.scores


if __name__ == "__main__":
    run_command(JoinSettings, main, prog=spelled("join"))
