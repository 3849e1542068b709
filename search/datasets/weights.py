"""Weights of classes in the loss: numbers for `balanced`, from the labels of the split to train on.

The labels are counted once: the counts are kept in the cache folder beside the features, by data set and split.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray
from tqdm import tqdm

from search.datasets import Dataset
from search.datasets.counts import label_counts
from search.dense_tasks import DenseTask
from search.folder import Folder
from search.settings import LossSettings


def completed_loss(loss: LossSettings, train: Dataset, cache_dir: Path) -> LossSettings:
    """With numbers in place of `balanced`. Raises InputError for weights that do not fit the task, and for unusable labels."""
    weights = loss.class_weights
    if weights == "balanced":
        weights = train.task.balanced(lambda: kept_counts(train, cache_dir))
    train.task.weighted(weights)  # refuses what does not fit
    return replace(loss, class_weights=weights)


def kept_counts(dataset: Dataset, cache_dir: Path) -> NDArray[np.int64]:
    """Pixels of all pictures by the task's bins, and last those that are not labelled: (bins + 1,).

    Raises InputError for a label that cannot be used, and for a damaged file of counts.
    """
    folder, name = Folder(cache_dir / "label-counts"), f"{dataset.name}-{dataset.split}"
    origin = {"labels": dataset.fingerprint().labels, "bins": list(dataset.task.bins)}
    folder.path.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.path / f"{name}.lock"):  # other processes of one training wait for the counts
        found = folder.result(name)
        if found is None or found.get("origin") != origin or "pixels" not in found:
            indices = tqdm(range(len(dataset)), desc=f"labels of {dataset.name} {dataset.split}", unit="label")
            found = {"origin": origin, "pixels": label_counts(dataset, indices).tolist()}
            folder.write_result(name, found)
    return np.array(found["pixels"], np.int64)


def weights_in_words(task: DenseTask, loss: LossSettings) -> str:
    """The weight of each class of a completed loss, by name; "" without any.

    >>> from search.dense_tasks import restored_task
    >>> weights_in_words(restored_task({"class_names": ["road", "car"]}), LossSettings(class_weights=(0.5, 2.0)))
    'class weights: road 0.5, car 2'
    """
    if loss.numbers is None:
        return ""
    return "class weights: " + ", ".join(f"{name} {w:g}" for name, w in zip(task.outputs, loss.numbers, strict=True))
