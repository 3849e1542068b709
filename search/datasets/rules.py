"""Whether labels say what they are meant to: rules on counts of their pixels (`facts.py`), each of which may end in a warning.

A warning is a sentence with the numbers and what to do. The labels may be right nevertheless, so nothing is refused here.
"""

from collections import Counter
from collections.abc import Sequence

from search.datasets import IGNORE_INDEX
from search.datasets.facts import SplitFacts
from search.datasets.files import FileDataset
from search.datasets.labels import spans
from search.dense_tasks import RGB
from search.dense_tasks.segmentation import Segmentation

# Lone pixels for each edge of a label. Sound ones (CamVid and PASCAL VOC, also at a third of their size by nearest neighbours)
# have up to 0.10; CamVid's resized with smoothing, or saved as JPEG, have 0.23 to 0.57.
_THIN, _USUAL = 0.15, 0.1
# A class is drawn as a line if it has so many of the lone pixels, and if so many of its own lie between others.
_OF_LONE, _OF_OWN = 0.9, 0.5
_VISIBLE = 0.001  # of the pixels
_MOST = 0.5
_VOID = ("void", "unlabelled", "unlabeled", "ignore", "ignored")  # names for what does not count
_NO_CLASS = (*_VOID, "background", "unknown", "other", "others")
_TRAIN_IDS, _LABEL_IDS = 19, 34  # how many Cityscapes has


def warnings_about(train: SplitFacts | None, val: SplitFacts | None, others: Sequence[SplitFacts] = ()) -> list[str]:
    """What is to be said about the labels to train and to score on, and about those of other splits."""
    together = [facts for facts in (train, val) if facts is not None]
    splits = [*together, *others]
    if not splits or not isinstance(splits[0].dataset.task, Segmentation):
        return []
    found = [] if train is None or val is None else absent_classes(train, val)
    found += one_class(splits[0]) + void_classes(together) + presumed_void(splits) + thin_classes(splits)
    for facts in splits:
        found += odd_forms(facts)
    return found + odd_colours(together) + other_numbers(together)


def absent_classes(train: SplitFacts, val: SplitFacts) -> list[str]:
    """Classes that no pixel has, of the split to train on, or of the one to score on."""
    classes = _task(train).class_names
    of_train, of_val = (facts.pixels[:-1] / max(facts.pixels[:-1].sum(), 1) for facts in (train, val))
    if not (of_train.any() and of_val.any()):  # a split without labels is said by others
        return []
    found = []
    if absent := [k for k in range(len(classes)) if not of_train[k]]:
        names = [classes[k] for k in absent]
        share = f" ({100 * of_val[absent].sum():.2f} % of {val.name} are)" if of_val[absent].any() else ""
        found.append(
            f"no pixel of {train.name} is {_or(names)}{share}: {_unless(train)}nothing is learnt of {_it(names)}; "
            f"{_to_fill(train, names)}"
        )
    if absent := [k for k in range(len(classes)) if of_train[k] and not of_val[k]]:
        names = [classes[k] for k in absent]
        remedy = f"move pictures with {_it(names)} to {val.dataset.split}" if _description(val) else _to_fill(val, names)
        found.append(
            f"no pixel of {val.name} is {_or(names)} ({100 * of_train[absent].sum():.2f} % of {train.name} are): "
            f"{_unless(val)}scores say nothing of {_it(names)}; {remedy}"
        )
    return found


def one_class(facts: SplitFacts) -> list[str]:
    """A single class: whatever is predicted is right."""
    if len(_task(facts).class_names) > 1:
        return []
    remedy = f"name what is around it as a class, too, in {_description(facts)}" if _description(facts) else "give two or more"
    return [f"there is one class, {_task(facts).class_names[0]}, so that every prediction is right: {remedy}"]


def void_classes(splits: Sequence[SplitFacts]) -> list[str]:
    """Classes that are named as what does not count, and counted."""
    found = []
    for number, name in enumerate(_task(splits[0]).class_names if splits else ()):
        shares = [facts.pixels[number] / max(facts.pixels[:-1].sum(), 1) for facts in splits]
        if name.lower() in _VOID and any(shares):
            texts = [f"{100 * share:.2f} % of {facts.name}" for share, facts in zip(shares, splits, strict=True)]
            found.append(
                f"{' and '.join(texts)} are {name}, which is learnt and scored as any other class: if it is not to count, "
                "take it out of classes and give its value as ignore"
            )
    return found


def presumed_void(splits: Sequence[SplitFacts]) -> list[str]:
    """Values that do not count only because no field of a TOML file says anything else."""
    shares: dict[int, list[str]] = {}
    for facts in splits:
        for value in sorted(facts.reader.presumed if facts.reader else ()):
            share = facts.values[value] / max(facts.values.total(), 1)
            if share >= _VISIBLE:
                shares.setdefault(value, []).append(f"{100 * share:.2f} % of the pixels of {facts.name}")
    return [
        f"{' and '.join(texts)} are {value}, which does not count because {_description(splits[0])} says nothing of it: if it "
        f"is a class, give {value} a class in label_ids there; if not, write ignore = [{value}]"
        for value, texts in shares.items()
    ]


def thin_classes(splits: Sequence[SplitFacts]) -> list[str]:
    """Values in thin lines between two others, as interpolation and compression leave them along every edge."""
    thin = [(facts, labels) for facts in splits if (labels := _thin_labels(facts))]
    if not thin:
        return []
    texts = [f"{len(labels):,} label{'s' * (len(labels) > 1)} of {facts.name}" for facts, labels in thin]
    rate, label = max((facts.rates[index], facts.label(index)) for facts, labels in thin for index in labels)
    return [
        f"in {' and '.join(texts)} many pixels lie alone between pixels of two other classes, most in {label}: "
        f"{100 * rate:.0f} for 100 edges, where up to {100 * _USUAL:.0f} are usual; resizing with interpolation, smooth "
        "brushes and lossy compression leave such lines of classes that are not there: make them anew from the originals, by "
        "nearest neighbours, as PNG"
    ]


def odd_forms(facts: SplitFacts) -> list[str]:
    """Label files that are stored in another way than most of the split: with a palette, in grey, with other bits."""
    usual, *others = sorted(facts.forms, key=lambda form: -len(facts.forms[form])) or [""]
    found = []
    for odd in others:
        (first, *more), same = facts.forms[odd], facts.forms[usual]
        found.append(
            f"{facts.label(first)}{f' and {len(more):,} more are' if more else ' is'} stored {odd}, {len(same):,} such as "
            f"{facts.label(same[0])} {usual}: the same number may mean another class there; look at both, and save all alike"
        )
    return found


def odd_colours(splits: Sequence[SplitFacts]) -> list[str]:
    """Label files whose palette has another colour for a value than most have."""
    odd: dict[str, str] = {}  # what is to be said of each
    for value in sorted({value for facts in splits for value in facts.shown}):
        labels: dict[RGB, list[str]] = {}
        for facts in splits:
            for colour, indices in facts.shown.get(value, {}).items():
                labels.setdefault(colour, []).extend(map(facts.label, indices))
        usual, *others = sorted(labels, key=lambda colour: -len(labels[colour]))
        same = f"{len(labels[usual]):,} such as {labels[usual][0]} in {list(usual)}"
        for colour in others:
            for label in labels[colour]:
                odd.setdefault(label, f"shows the value {value} in the colour {list(colour)}, {same}")
    if not odd:
        return []
    label, text = next(iter(odd.items()))
    more = f" ({len(odd) - 1:,} more are odd)" if len(odd) > 1 else ""
    remedy = "look at both, and save all labels with one palette, or give label_colours in a TOML file"
    return [f"{label} {text}{more}: its numbers may mean other classes; {remedy}"]


def other_numbers(splits: Sequence[SplitFacts]) -> list[str]:
    """Values that fit another numbering of the same classes than the one by which they are read."""
    reader = splits[0].reader if splits else None
    counts = sum((facts.values for facts in splits), start=Counter[int]())
    del counts[IGNORE_INDEX]
    if reader is None or not counts:
        return []
    task, described = _task(splits[0]), _description(splits[0])
    classes, largest = len(task.class_names), max(counts)
    seen = f"the values of {' and '.join(facts.name for facts in splits)} are {spans(counts)}"
    of_classes = {value: train_id for value, train_id in reader.train_ids.items() if train_id != IGNORE_INDEX}
    if any(value != train_id for value, train_id in of_classes.items()):
        lost = 1 - sum(counts[value] for value in of_classes) / counts.total()
        if len(counts) < 2 or largest >= classes or lost < _MOST:
            return []
        remedy = f"take label_ids out of {described}" if described else "give the files that have these"
        of_cityscapes = " (of Cityscapes *_labelIds.png, not *_labelTrainIds.png)" if classes == _TRAIN_IDS else ""
        return [
            f"{seen}, as if the {classes} classes were numbered from 0, and expected are {spans(of_classes)}, so that "
            f"{100 * lost:.0f} % of the pixels are no class: {remedy}{of_cityscapes}"
        ]
    if _are_label_ids(task, largest):
        return [
            f"{seen}, which are Cityscapes' label ids, and expected are its train ids, 0 to {classes - 1}: give label_ids in "
            f'{described}, such as 7 = "road", or the *_labelTrainIds.png'
        ]
    if largest == classes and min(counts) == 1 and classes not in reader.train_ids:
        remedy = f'give label_ids in {described}, such as 1 = "{task.class_names[0]}"' if described else "subtract 1"
        return [f"{seen}, as if the {classes} classes were numbered from 1, and expected are 0 to {classes - 1}: {remedy}"]
    return []


def _thin_labels(facts: SplitFacts) -> list[int]:
    """Labels with many lone pixels; none, if these are of one class that has hardly others, and so is meant to be a line."""
    for value, lone in facts.lone.most_common(1):
        if lone >= _OF_LONE * facts.lone.total() and facts.lines[value] >= _OF_OWN * facts.values[value]:
            return []
    return [index for index, rate in facts.rates.items() if rate >= _THIN]


def _are_label_ids(task: Segmentation, largest: int) -> bool:
    if len(task.class_names) != _TRAIN_IDS or not _TRAIN_IDS <= largest < _LABEL_IDS:
        return False
    from search.datasets.cityscapes import CLASS_NAMES  # its import takes long

    return tuple(name.lower() for name in task.class_names) == CLASS_NAMES


def _to_fill(facts: SplitFacts, absent: Sequence[str]) -> str:
    """What to do about classes without a pixel."""
    described = _description(facts)
    if not described:
        return "see that the pictures are all there, and that labels have the numbers of this data set"
    remedy = f"correct the labels, or label_ids of {described}, or take {_it(absent)} out of classes"
    void = [name for name in absent if name.lower() in _NO_CLASS]
    return remedy + (f" ({void[0]} too counts as a class; what shall not count, goes into ignore)" if void else "")


def _unless(facts: SplitFacts) -> str:
    return "unless other labels have it, " if facts.is_sample else ""


def _task(facts: SplitFacts) -> Segmentation:
    assert isinstance(facts.dataset.task, Segmentation)
    return facts.dataset.task


def _description(facts: SplitFacts) -> str:
    """The TOML file that describes the folder; nothing of other data sets."""
    path = facts.dataset.description if isinstance(facts.dataset, FileDataset) else None
    return "" if path is None else str(path)


def _or(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"


def _it(several: Sequence[object]) -> str:
    return "it" if len(several) == 1 else "them"
