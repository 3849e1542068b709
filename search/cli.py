"""Command lines of `search`: flags from groups of settings, one sentence for bad input, a clean end by Ctrl-C."""

import shlex
import sys
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from typing import TypeVar, get_type_hints

import tyro
from tyro.conf import OmitArgPrefixes as Flat

from search.commands import spelled, to_install
from search.devices import is_full_memory
from search.errors import InputError, as_flag, with_fields

# Flat: a group of settings whose fields are flags by their own names, `data: Flat[DataSettings]`. Without it the group's name
# comes first, as in --large.backbone, for a command that has two groups of one kind.
__all__ = ["Flat", "flags_of", "in_flags", "run_command", "spelled", "this_command", "to_install"]

Settings = TypeVar("Settings")


def run_command(
    settings_type: type[Settings],
    command: Callable[[Settings], None],
    *,
    prog: str,
    goes_on: bool = False,
    renamed: Mapping[str, str] | None = None,
) -> None:
    """Parse the flags of `settings_type`, run `command`, and exit: 0 done, 2 bad input, 130 stopped by Ctrl-C.

    `goes_on` says that the same command continues where it was stopped. `renamed` maps flags of earlier versions to what is
    to be written instead. A full memory counts as bad input too, because the sizes that were given are too large.
    """
    for flag in (argument.partition("=")[0] for argument in sys.argv[1:]):
        if instead := (renamed or {}).get(flag.replace("_", "-")):
            sys.exit(_fail(f"{flag} is now {instead}"))
    settings = tyro.cli(settings_type, prog=prog, config=(tyro.conf.FlagCreatePairsOff,))
    try:
        command(settings)
    except InputError as error:
        sys.exit(_fail(in_flags(str(error), settings_type)))
    except OSError as error:
        sys.exit(_fail(f"{error}: check the path, its permissions and the disk"))
    except (MemoryError, RuntimeError) as error:
        if not is_full_memory(error):
            raise
        sys.exit(_fail(f"the memory is full ({str(error).strip().splitlines()[0]}): give smaller sizes"))
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


def this_command(prog: str) -> str:
    """The command line as it was typed, so that a user can repeat it."""
    return shlex.join([*prog.split(), *sys.argv[1:]])


def _fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2
