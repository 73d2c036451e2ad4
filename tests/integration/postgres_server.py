"""A PostgreSQL server of the tests' own, in a temporary directory, gone afterwards."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from tests.parts import missing

if TYPE_CHECKING:
    from collections.abc import Iterator

USER = "mlpipelines"


@contextmanager
def run_postgres() -> Iterator[str]:
    """Run a server for the length of the block; yield the SQLAlchemy URL of its database, with ``%s``.

    It listens on this machine only. PostgreSQL refuses to run as root, so there it runs as ``postgres``.
    """
    programs = _find_programs()
    account = pwd.getpwnam("postgres") if os.geteuid() == 0 else None
    home = Path(tempfile.mkdtemp(prefix="mlp-postgres-"))
    if account is not None:
        os.chown(home, account.pw_uid, account.pw_gid)

    def run(*arguments: str) -> None:
        done = subprocess.run(
            arguments,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,  # a pipe would stay open as long as the server runs
            stderr=(home / "errors").open("ab"),
            cwd=home,
            user=account.pw_uid if account is not None else None,
            group=account.pw_gid if account is not None else None,
            extra_groups=[] if account is not None else None,
            timeout=120,
        )
        assert done.returncode == 0, (home / "errors").read_text() + _read(home / "log")

    try:
        data, port = str(home / "data"), str(_free_port())
        options = f"-p {port} -k {home} -c listen_addresses=127.0.0.1 -c fsync=off"
        initdb, pg_ctl = str(programs / "initdb"), str(programs / "pg_ctl")
        run(initdb, "-D", data, "-U", USER, "-A", "trust", "-E", "UTF8", "--no-sync")
        run(pg_ctl, "-D", data, "-w", "-l", str(home / "log"), "-o", options, "start")
        try:
            yield f"postgresql://{USER}@127.0.0.1:{port}/%s"
        finally:
            run(pg_ctl, "-D", data, "-w", "-m", "immediate", "stop")
    finally:
        shutil.rmtree(home, ignore_errors=True)


def _find_programs() -> Path:
    """Return the folder with ``initdb`` and ``pg_ctl``, or skip."""
    found = shutil.which("initdb")
    candidates = [Path(found).resolve().parent] if found else []
    candidates += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    for folder in candidates:
        if (folder / "pg_ctl").exists():
            return folder
    missing("no PostgreSQL server programs")
    raise AssertionError


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _read(path: Path) -> str:
    return path.read_text() if path.exists() else ""
