"""Command lines of `search`: flags from groups of settings, one sentence for bad input, a clean end by Ctrl-C."""

import os
import select
import shlex
import signal
import sys
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass, replace
from io import UnsupportedOperation
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import tyro
from tyro.conf import OmitArgPrefixes as Flat

from search.commands import spelled, to_install
from search.datasets import Dataset
from search.datasets.files import example_picture
from search.devices import is_full_memory
from search.errors import InputError, as_flag, with_fields
from search.interrupts import sigterm_is_ctrl_c
from search.settings import (
    BackboneSettings,
    DataSettings,
    HeadSettings,
    LossSettings,
    MachineSettings,
    OptimizerSettings,
    PictureSettings,
    PredictionSettings,
    TrainingPictures,
    given,
)

# Flat: a group of settings whose fields are flags by their own names, `data: Flat[DataSettings]`. Without it the group's name
# comes first, as in --large.backbone, for a command that has two groups of one kind.
__all__ = [
    "Flat",
    "arguments_of",
    "flags_of",
    "in_flags",
    "print_defaults",
    "print_next",
    "run_command",
    "spelled",
    "this_command",
    "to_export",
    "to_install",
    "to_train",
    "to_type",
    "uses_of_network",
    "uses_of_run",
]

Settings = TypeVar("Settings")


def run_command(
    settings_type: type[Settings],
    command: Callable[[Settings], None],
    *,
    prog: str,
    goes_on: bool = False,
    renamed: Mapping[str, str] | None = None,
) -> None:
    """Parse the flags of `settings_type`, run `command`, and exit: 0 done, 2 bad input, 130 stopped by Ctrl-C or SIGTERM, 141
    if whoever reads the output has gone, such as `head`.

    `goes_on` says that the same command continues where it was stopped. `renamed` maps flags of earlier versions to what is
    to be written instead. A full memory counts as bad input too, because the sizes that were given are too large.
    """
    for flag in (argument.partition("=")[0] for argument in sys.argv[1:]):
        if instead := (renamed or {}).get(flag.replace("_", "-")):
            sys.exit(_fail(f"{flag} is now {instead}"))
    try:
        with sigterm_is_ctrl_c():
            command(tyro.cli(settings_type, prog=prog, config=(tyro.conf.FlagCreatePairsOff,)))
            sys.stdout.flush()
    except InputError as error:
        sys.exit(_fail(in_flags(str(error), settings_type)))
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _has_no_reader():
            sys.exit(128 + signal.SIGPIPE)
        sys.exit(_fail(f"{error}: check the path, its permissions and the disk"))
    except (MemoryError, RuntimeError) as error:
        if not is_full_memory(error):
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        sys.exit(_fail(f"the memory is full ({reason}): give smaller sizes"))
    except KeyboardInterrupt:
        print("\nstopped" + "; the same command goes on from here" * goes_on, file=sys.stderr)
        sys.exit(130)


def in_flags(text: str, settings_type: type) -> str:
    """What a part says of fields, of the flags of a command with these settings. Fields of others stay as they are."""
    known = flags_of(settings_type)
    return with_fields(text, lambda name: known.get(name, f"`{name}`"))


def flags_of(settings_type: type) -> dict[str, str]:
    """The flags of all fields by the fields' names, with the group's name before them where the group is not `Flat`."""
    flags: dict[str, str] = {}
    for name, annotated in get_type_hints(settings_type, include_extras=True).items():
        group = getattr(annotated, "__origin__", annotated)
        if isinstance(group, type) and is_dataclass(group):
            prefix = "" if group is not annotated else f"{name}."
            flags |= {prefix + field.name: as_flag(prefix + field.name) for field in fields(group)}
        else:
            is_positional = tyro.conf.Positional in getattr(annotated, "__metadata__", ())
            flags[name] = name if is_positional else as_flag(name)
    return flags


def to_type(command: str, *arguments: object) -> str:
    """A whole command as it can be typed: `to_type("join", "--run", Path("runs/x y"))`."""
    return shlex.join([*spelled(command).split(), *map(str, arguments)])


def print_next(*commands: str) -> None:
    """Print what may be typed next; each command ends with this, once all is done."""
    print("\n".join(f"{'or' if i else 'next'}: {command}" for i, command in enumerate(commands)))


def uses_of_run(
    best: Path,
    data: DataSettings,
    backbone: BackboneSettings,
    head: HeadSettings,
    loss: LossSettings,
    machine: MachineSettings,
    proxy: OptimizerSettings,
    *,
    of_two: bool = False,
) -> list[str]:
    """Commands for what a search has kept, `best` being its best head, in a folder of the run's: to join the head to the
    backbone, to fine-tune it there, to train a network around the best cell. `proxy` has the optimiser of the search. Of a
    search with two objectives first, to train all cells of its front.
    """
    run = best.parent.parent
    recipe = arguments_of(OptimizerSettings(optimizer=proxy.optimizer, schedule=proxy.schedule))
    fine_tuning = to_train(data, backbone, HeadSettings(), loss, machine, "--head", best, "--trainable-blocks", 0, *recipe)
    whole = to_train(data, backbone, head, loss, machine, "--run", run, *recipe)
    front = [to_type("rerank", "--run", run, "--seeds", 3)] if of_two else []
    return [*front, to_type("join", "--run", run), fine_tuning, whole]


def to_train(
    data: DataSettings,
    backbone: BackboneSettings,
    head: HeadSettings,
    loss: LossSettings,
    machine: MachineSettings,
    *arguments: object,
) -> str:
    """A command that trains a whole network on what a search had."""
    if head.branch_channels == HeadSettings().completed(data.dataset).branch_channels:
        head = replace(head, branch_channels=None)  # what it is anyway
    kept = MachineSettings(cache_dir=machine.cache_dir)
    return to_type("train", *arguments, *arguments_of(data, backbone, head, loss, kept))


def uses_of_network(
    network: Path, data: PictureSettings, val: Dataset, prediction: PredictionSettings | None = None
) -> list[str]:
    """Commands for a network's file, scored on `val`: to evaluate it, to look at what it predicts, to export it.

    The second has a picture of `val`, if that is in a file. `prediction` says how pictures were predicted, if not by default.
    """
    prediction = replace(given(prediction, PredictionSettings()), max_megapixels=data.max_megapixels)
    of_data = arguments_of(PictureSettings(dataset=data.dataset, data_dir=data.data_dir))
    split = [] if val.split == "val" else ["--split", val.split]
    commands = [to_type("evaluate", "--network", network, *of_data, *split, *arguments_of(prediction))]
    if (picture := example_picture(val)) is not None:
        out = network.with_name(f"{network.stem}-predictions")
        commands.append(
            to_type("predict", "--network", network, "--pictures", picture, "--out", out, *arguments_of(prediction))
        )
    return [*commands, to_export(network, prediction)]


def to_export(network: Path, prediction: PredictionSettings) -> str:
    """A command that exports a network, at the output stride at which it predicted."""
    stride = [] if prediction.output_stride is None else ["--output-stride", prediction.output_stride]
    return to_type("export", "--network", network, "--out", network.with_suffix(".pt2"), *stride)


def arguments_of(*groups: Any) -> list[str]:
    """The flags with which the fields of these groups, which are `Flat`, are what they are; defaults are left out.

    >>> from search.settings import BackboneSettings, DataSettings
    >>> arguments_of(DataSettings(dataset="camvid", data_dir="CamVid"), BackboneSettings(pretrained=True))
    ['--dataset', 'camvid', '--data-dir', 'CamVid', '--pretrained']
    """
    settings = [(f.name, getattr(group, f.name), f.default) for group in groups for f in fields(group)]
    return _arguments({name: value for name, value, default in settings if value != default})


def print_defaults(pictures: TrainingPictures, *groups: tuple[Any, Any]) -> None:
    """Say which values the fields got that were not given; `groups` are pairs of settings, as typed and as completed."""
    names = [(typed, completed, f.name) for typed, completed in groups for f in fields(typed)]
    chosen = {name: getattr(completed, name) for typed, completed, name in names if getattr(typed, name) is None}
    if flags := shlex.join(_arguments(chosen)):
        print(f"defaults for {pictures}: {flags} (docs/training.md says why)", file=sys.stderr)


def _arguments(values: Mapping[str, Any]) -> list[str]:
    found = []
    for name, value in values.items():
        if value is None or value is False:
            continue
        parts = () if value is True else value if isinstance(value, tuple) else (value,)
        found += [as_flag(name), *map(str, parts)]
    return found


def this_command(prog: str) -> str:
    """The command line as it was typed, so that a user can repeat it."""
    return shlex.join([*prog.split(), *sys.argv[1:]])


def _has_no_reader() -> bool:
    """Whether nobody reads the standard output any more; nothing is written there then, when Python ends."""
    output = select.poll()
    try:
        output.register(sys.stdout.fileno(), 0)  # errors are always told
    except UnsupportedOperation:  # no file, but what stands for one
        return False
    if not output.poll(0):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


def _fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2
