"""How every command of `search` meets its user: flags from a dataclass, one clear sentence for bad input, clean Ctrl-C."""

import sys
from collections.abc import Callable
from typing import TypeVar

import tyro

Settings = TypeVar("Settings")


class InputError(ValueError):
    """Something the user gave cannot be used; the message names the file or flag and the remedy."""


def run_command(settings_type: type[Settings], command: Callable[[Settings], None], *, prog: str) -> None:
    """Parse the flags of `settings_type`, run `command`, and exit: 0 done, 2 bad input, 130 stopped by Ctrl-C."""
    settings = tyro.cli(settings_type, prog=prog, config=(tyro.conf.FlagCreatePairsOff,))
    try:
        command(settings)
    except InputError as error:
        sys.exit(_fail(str(error)))
    except OSError as error:
        sys.exit(_fail(f"{error}: check the path, its permissions and the disk"))
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here", file=sys.stderr)
        sys.exit(130)


def _fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2
