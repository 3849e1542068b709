"""A PostgreSQL server of the benchmark's own: its data in a temporary folder, on a Unix socket alone, settings as shipped."""

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path

_USER = "postgres"  # of the database, and of the system where this process is root, which PostgreSQL refuses to be
_PATIENCE_S = 60.0


@cache
def programs() -> Path | None:
    """The folder of `initdb` and `postgres`, the newest one; None where PostgreSQL is not installed."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))  # Debian's places
    known = shutil.which("initdb")
    return Path(known).resolve().parent if known else found[-1].parent if found else None


@contextmanager
def postgres() -> Iterator[str]:
    """Run a server while the block lasts; yields the URL of its database `postgres`.

    Raises FileNotFoundError where PostgreSQL is not installed, and RuntimeError if the server does not start.
    """
    bin_folder = programs()
    if bin_folder is None:
        raise FileNotFoundError("PostgreSQL is not installed")
    user = _USER if os.geteuid() == 0 else None
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-postgres-")))
        if user:
            shutil.chown(folder, user)
        data, log = folder / "data", stack.enter_context((folder / "log").open("wb"))
        made: list[str | Path] = [bin_folder / "initdb", "--pgdata", data, "--username", _USER, "--auth", "trust"]
        made += ["--encoding", "UTF8", "--no-locale"]  # so that no order of texts depends on the machine
        subprocess.run(made, check=True, capture_output=True, user=user, cwd=folder)
        options = [f"unix_socket_directories={folder}", "listen_addresses=", "max_connections=300"]
        command: list[str | Path] = [bin_folder / "postgres", "-D", data]
        command += [part for option in options for part in ("-c", option)]
        server = stack.enter_context(subprocess.Popen(command, user=user, cwd=folder, stdout=log, stderr=log))
        stack.callback(server.send_signal, signal.SIGINT)  # a fast shutdown, which ends sessions that are still open
        _wait_for(server, [bin_folder / "pg_isready", "--host", folder, "--quiet"], folder / "log")
        yield f"postgresql+psycopg://{_USER}@/postgres?host={folder}"


def _wait_for(server: "subprocess.Popen[bytes]", is_ready: Sequence[str | Path], log: Path) -> None:
    end = time.monotonic() + _PATIENCE_S
    while subprocess.run(is_ready).returncode:
        if server.poll() is not None or time.monotonic() > end:
            raise RuntimeError(f"PostgreSQL does not start: {log.read_text(errors='replace')[-300:]}")
        time.sleep(0.05)
