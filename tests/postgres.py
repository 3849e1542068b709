"""A real PostgreSQL for tests: `database`, an empty one for a test, and `Server`, which a test of faults may kill.

A server has its data and its Unix socket in a folder of its own, and no port. It writes to disk as it is shipped. Tests that
ask for one are skipped where there are no programs of PostgreSQL (`apt-get install postgresql`).
"""

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

import pytest

_ACCOUNTS = ("postgres", "nobody")  # PostgreSQL refuses to run as root: as one of these then
_PATIENCE = 60  # seconds for a server to come up; it recovers first what a killed one left
_POLL = 0.02  # seconds


class Server:
    """A PostgreSQL server with its data in `folder`, which is not running yet; `programs` has its binaries."""

    def __init__(self, folder: Path, programs: Path) -> None:
        self.folder = folder
        self._programs = programs
        self._process: subprocess.Popen[bytes] | None = None
        if os.getuid() == 0:
            shutil.chown(folder, _account())
        flags = ("--auth=trust", "--username=postgres", "--no-sync", "--encoding=UTF8", "--locale=C")
        self._run("initdb", f"--pgdata={self._data}", *flags)

    def start(self) -> None:
        """Start, on the data as they are, and wait until it answers. Raises RuntimeError with the log if it does not."""
        deadline = time.monotonic() + _PATIENCE
        while not self._answers():
            if self._process is None or self._process.poll() is not None:  # or: sessions of a killed server were still there
                self._process = self._popen("postgres", "-D", self._data, "-k", self.folder, "-c", "listen_addresses=")
            if time.monotonic() > deadline:
                raise RuntimeError(f"PostgreSQL does not start: {self._log.read_text()[-2000:]}")
            time.sleep(_POLL)

    def stop(self) -> None:
        """Stop in good order, if it runs; sessions are cut."""
        self._end(signal.SIGINT)  # PostgreSQL's "fast shutdown"

    def kill(self) -> None:
        """Kill the server as the kernel does when memory is short; its sessions end with it."""
        self._end(signal.SIGKILL)

    def create_database(self) -> str:
        """Make an empty database; returns its URL."""
        name = f"test_{uuid4().hex}"
        self._run("createdb", f"--host={self.folder}", "--username=postgres", name)
        return f"postgresql+psycopg://postgres@/{name}?host={self.folder}"

    @property
    def _data(self) -> Path:
        return self.folder / "data"

    @property
    def _log(self) -> Path:
        return self.folder / "log"

    def _end(self, number: signal.Signals) -> None:
        if self._process is not None:
            self._process.send_signal(number)
            self._process.wait(_PATIENCE)

    def _answers(self) -> bool:
        return self._popen("pg_isready", f"--host={self.folder}").wait() == 0

    def _run(self, program: str, *arguments: str) -> None:
        if self._popen(program, *arguments).wait():
            raise RuntimeError(f"{program} failed: {self._log.read_text()[-2000:]}")

    def _popen(self, program: str, *arguments: str | Path) -> subprocess.Popen[bytes]:
        account = _account() if os.getuid() == 0 else None
        with self._log.open("ab") as log:
            return subprocess.Popen(
                [self._programs / program, *arguments],
                cwd=self.folder,
                user=account,
                group=None if account is None else pwd.getpwnam(account).pw_gid,
                extra_groups=None if account is None else [],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )


@contextmanager
def running_server() -> Iterator[Server]:
    """A server of its own, for a test that kills it; skips the test where there is no PostgreSQL."""
    programs = _find_programs()
    if programs is None:
        pytest.skip("no programs of PostgreSQL here: apt-get install postgresql")
    with tempfile.TemporaryDirectory(prefix="pg-") as folder:  # a short name: that of a socket has at most 107 bytes
        server = Server(Path(folder), programs)
        server.start()
        try:
            yield server
        finally:
            server.stop()


@pytest.fixture(scope="session")
def postgres() -> Iterator[Server]:
    """The server of this test session, or of this worker of pytest-xdist. A test that stops it has to start it again."""
    with running_server() as server:
        yield server


@pytest.fixture
def database(postgres: Server) -> str:
    """The URL of an empty PostgreSQL database for this test."""
    return postgres.create_database()


def _find_programs() -> Path | None:
    """The folder of the newest PostgreSQL; Debian keeps its servers out of PATH."""
    if found := shutil.which("initdb"):
        return Path(found).resolve().parent
    versions = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    return versions[-1].parent if versions else None


def _account() -> str:
    """The account that a server runs under when the tests are root's."""
    names = {each.pw_name for each in pwd.getpwall()}
    return next(name for name in _ACCOUNTS if name in names)
