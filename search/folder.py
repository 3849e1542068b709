"""A folder that lasts: a run, a training, a re-ranking, the scores of a protocol, a feature cache, a benchmark.

One process at a time holds it, and it remembers what it was begun with, so that the same command goes on and another one is
refused by the names of what differs. What a job came to is one JSON file, which is there whole or not at all.
"""

import json
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from search.errors import InputError, require_file_name
from search.files import write_json


class InUseError(InputError):
    """Another process holds the folder."""


NO_DEFAULTS: Mapping[str, Any] = {}
CONTENT = "content of the "  # begins the names of hashes of files in an identity, such as that of the images
_FORMAT = 3  # version of settings.json and of the results; the first one had no number


@dataclass(frozen=True)
class Folder:
    """The folder at `path`; `kind` names its content in error messages, and `remedy` says there how to use another folder."""

    path: Path
    kind: str = "run"
    remedy: str = "give another `out`"

    @contextmanager
    def locked(self, *, waits: bool = False) -> Iterator[None]:
        """Make the folder and keep other processes out of it. Raises InUseError if another process is using it, or `waits`."""
        self.path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.path / "lock", timeout=0)
        try:
            lock.acquire()
        except Timeout as error:
            if not waits:
                raise InUseError(f"{self.path} is in use by another process: wait for it, or {self.remedy}") from error
            print(f"{self.path} is in use by another process, which is waited for", file=sys.stderr)
            lock.acquire(timeout=-1)
        try:
            yield
        finally:
            lock.release()

    def begin(
        self, identity: Mapping[str, Any], command: str, *, defaults: Mapping[str, Any] = NO_DEFAULTS, **description: Any
    ) -> None:
        """Begin, or continue: `identity` maps the settings that all results in the folder depend on to their values.

        It is kept in `settings.json`, with the command and the `description`, which may change. Raises InputError as `check`.
        """
        self.check(identity, defaults)
        content = {"format": _FORMAT, "kind": self.kind, "identity": identity, "command": command, **description}
        write_json(self.path / "settings.json", content)

    def check(self, identity: Mapping[str, Any], defaults: Mapping[str, Any] = NO_DEFAULTS) -> None:
        """Raise InputError, naming each difference, if the folder was begun with another identity.

        `defaults` are those of settings: one that did not exist yet when the folder was begun is taken to have had its own.
        """
        now, description = json.loads(json.dumps(identity)), self.description()
        if description is None:
            return
        before, typed = description["identity"], f" ({description['command']})" * bool(description["command"])
        if any(name.startswith(CONTENT) and name not in before for name in now):
            raise InputError(
                f"{self.kind} {self.path} was started by an earlier version, which did not look into files, so nobody knows "
                f"whether the pictures are still the same{typed}: {self.remedy}, or delete that folder"
            )
        if changed := other_files(before, now):
            raise InputError(
                f"{self.kind} {self.path} was started with {changed} than now{typed}: restore them, "
                f"{self.remedy}, or delete that folder"
            )
        if different := differences(before, now, defaults):
            raise InputError(
                f"{self.kind} {self.path} was started with {different}: use the same values{typed}, "
                f"{self.remedy}, or delete that folder"
            )

    def description(self) -> dict[str, Any] | None:
        """Read what `begin` wrote, or None. Raises InputError for a file that is damaged or of another version."""
        path = self.path / "settings.json"
        try:
            description: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(description, dict) or not description:
                raise ValueError("no settings are in it")
            if description.get("format") == _FORMAT and description["kind"] != self.kind:
                raise InputError(f"{self.path} holds a {description['kind']}, not a {self.kind}: {self.remedy}")
            if description.get("format") == _FORMAT:
                return description | {"identity": dict(description["identity"]), "command": str(description["command"])}
        except (FileNotFoundError, NotADirectoryError):
            return None
        except InputError:
            raise
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path} is damaged ({error}): delete the {self.kind} {self.path} and start it again") from error
        raise InputError(f"{self.kind} {self.path} is of another version of this project: {self.remedy}")

    def result(self, job: str) -> dict[str, Any] | None:
        """Read what `write_result` wrote, or None. Raises InputError naming a damaged file."""
        path = self.result_path(job)
        try:
            return dict(json.loads(path.read_text(encoding="utf-8")))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (ValueError, TypeError) as error:
            raise self.damaged(job, error) from error

    def write_result(self, job: str, result: Mapping[str, Any]) -> None:
        """Write the result of a job."""
        write_json(self.result_path(job), result)

    def result_path(self, job: str) -> Path:
        return self.path / f"{require_file_name(job, 'a job')}.json"

    def damaged(self, job: str, error: Exception) -> InputError:
        """The error for a result file that cannot be read."""
        return InputError(f"{self.result_path(job)} is damaged ({error}): delete it and run the same command again")


def differences(before: Mapping[str, Any], now: Mapping[str, Any], defaults: Mapping[str, Any] = NO_DEFAULTS) -> str:
    """Which settings are not what they were, as fields; "" if all are. A name with a space in it is said as it is.

    >>> before, now = {"top_k": 3, "`weights` (content)": "ab" * 32}, {"top_k": 5, "`weights` (content)": "cd" * 32}
    >>> differences({"top": 1} | before, {"top": 1} | now)
    '`weights` (content) abababababab…, now it is cdcdcdcdcdcd…, and `top_k` 3, now it is 5'

    A setting that is new has its default in `before`; one of a group, such as `large.top_k`, the default by its own name.

    >>> differences({}, {"top_k": 3, "large.top_k": 4}, {"top_k": 3})
    '`large.top_k` 3, now it is 4'
    """
    added = {name: defaults[field] for name in now.keys() - before.keys() if (field := name.rpartition(".")[2]) in defaults}
    earlier = {**before, **added}
    return ", and ".join(
        f"{_as_field(name)} {_brief(earlier.get(name, 'unknown'))}, now it is {_brief(now.get(name, 'unknown'))}"
        for name in sorted(earlier.keys() | now.keys())
        if earlier.get(name) != now.get(name)
    )


def other_files(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Which files hold something else than they did, as words; "" if none does.

    >>> of_labels = f"{CONTENT}labels of `val_split`"
    >>> other_files({"top_k": 3, of_labels: "ab" * 32}, {"top_k": 3, of_labels: "cd" * 32})
    'other labels of `val_split`'
    """
    names = [name for name in now if name.startswith(CONTENT) and before.get(name) != now[name]]
    return " and ".join(f"other {name.removeprefix(CONTENT)}" for name in names)


def _as_field(name: str) -> str:
    return name if " " in name else f"`{name}`"


def _brief(value: Any) -> str:
    """The value as text; of a hash, and of a long list, the beginning."""
    text = str(value)
    length = 12 if re.fullmatch("[0-9a-f]{32,}", text) else 300
    return text if len(text) <= length else text[:length] + "…"
