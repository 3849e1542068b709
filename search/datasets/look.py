"""A look at the labels before anything is computed: what cannot be trained or scored is refused, what looks wrong is said.

Warnings follow from a sample of the labels, and say so; `python -m search.datasets check` looks at all. The sample grows while
it lacks a class, up to a limit: one that few pictures show is usual, and nothing to warn of. A sample never decides that no
pixel of a split is labelled, or all in one class: labels are read until another one is found.
"""

import sys
from collections.abc import Iterator

import torch

from search.commands import spelled
from search.datasets import Dataset
from search.datasets.copies import copies, overlaps
from search.datasets.counts import label_of
from search.datasets.facts import SplitFacts, label_facts
from search.datasets.rules import warnings_about
from search.errors import InputError

_SAMPLE = 64  # labels of a split
_MOST = 256  # labels, where classes are still to be found: of one that 1 picture in 20 shows, 64 often have nothing


def look_at(train: Dataset | None, val: Dataset) -> None:
    """Print to standard error what looks wrong in the labels, `train` to learn from and `val` to score on.

    Raises InputError for a label that cannot be used.
    """
    warnings = warnings_about(None if train is None else sampled_facts(train), sampled_facts(val))
    if train is not None:
        warnings += overlaps([train, val]) + copies([train, val])
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)


def sampled_facts(dataset: Dataset) -> SplitFacts:
    """The facts of evenly spaced labels, and of more where these lack a class. InputError for one that cannot be used."""
    facts = SplitFacts(dataset)
    sample, larger = _sample(len(dataset), _SAMPLE), _sample(len(dataset), _MOST)
    for index in (*sample, *sorted(set(larger).difference(sample))):
        if facts.looked >= _SAMPLE and facts.pixels[:-1].all():
            break
        facts.add(index, label_facts(dataset, index))
    return facts


def require_labels(train: Dataset, val: Dataset) -> None:
    """Refuse pictures to learn from without any label, and pictures to score on whose labels make all scores equal.

    Raises InputError for these, and for a label that cannot be used.
    """
    require_labelled(val)
    if not _different(train, 1):
        raise InputError(_complaint(train, "no pixel of {} has a label to learn from", "train_split"))
    if _different(val, min(2, len(val.task.outputs))) == 1 < len(val.task.outputs):  # any cell could score 100 %
        raise InputError(_complaint(val, "all labelled pixels of {} have the same label", "val_split"))


def require_labelled(val: Dataset, field: str = "val_split") -> None:
    """Refuse pictures to score on without any label; `field` is the setting that names the split."""
    if not _different(val, 1):
        raise InputError(_complaint(val, "no pixel of {} has a label to score by", field))


def _complaint(dataset: Dataset, complaint: str, field: str) -> str:
    remedy = f"give another `{field}`, or correct its labels; `{spelled('datasets check')}` counts them"
    return f"{complaint.format(f'{dataset.name} {dataset.split}')}: {remedy}"


def _different(dataset: Dataset, enough: int) -> int:
    """How many different labels there are; the first `enough` end the count."""
    found: set[float] = set()
    for index in _sample_first(len(dataset)):
        label = torch.from_numpy(label_of(dataset, index))
        found |= set(label[dataset.task.is_labelled(label)].unique().tolist())  # type: ignore[no-untyped-call]
        if len(found) >= enough:
            break
    return min(len(found), enough)


def _sample(length: int, most: int) -> list[int]:
    """Evenly spaced numbers below `length`, each once: all, if they are no more than `most`."""
    count = min(length, most)
    return [place * length // count for place in range(count)]


def _sample_first(length: int) -> Iterator[int]:
    """All numbers below `length`: a whole folder of pictures may be without labels, and so is not read to its end first."""
    sample = _sample(length, _SAMPLE)
    yield from sample
    yield from sorted(set(range(length)).difference(sample))
