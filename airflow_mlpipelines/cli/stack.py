"""A real Airflow on this machine: api-server, scheduler, dag-processor and triggerer, on SQLite.

For the demo, for tests and for a desk. What it starts, it ends: by the process groups that it made.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from airflow_mlpipelines.exceptions import SubmissionError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from types import TracebackType

COMPONENTS = ("api-server", "scheduler", "dag-processor", "triggerer")
USERNAME = "admin"
_XCOM_BACKEND = "airflow_mlpipelines.xcom.DataReferenceXComBackend"
_PATIENT_DATABASE = {
    f"AIRFLOW__DATABASE__SQL_ALCHEMY_CONNECT_ARGS{mode}": "airflow_mlpipelines.cli.sqlite.PATIENT"
    for mode in ("", "_ASYNC")
}
_STATE_FILE = "stack.json"
_READY_SECONDS = 180
_STOP_SECONDS = 12
_SHOWN_LINES = 15


class AirflowStack:
    """Airflow's components as child processes, with settings that suit one machine.

    Use it as a context manager, or with :meth:`start` and :meth:`stop`.

    Args:
        home: Its ``AIRFLOW_HOME``; made if it is not there. Logs are in ``logs/`` below it.
        dags_folder: Where its DAG files are.
        port: Where the api-server listens, on 127.0.0.1 only; None takes a free one.
        settings: More environment variables for its processes.
        database: SQLAlchemy URL of Airflow's database; None is SQLite below ``home``.

    Attributes:
        url: Where the UI and the REST API are.
        username: Who may log in.
        password: The password, made anew for each home.
    """

    username = USERNAME

    def __init__(
        self,
        home: Path,
        dags_folder: Path,
        *,
        port: int | None = None,
        settings: Mapping[str, str] | None = None,
        database: str | None = None,
    ) -> None:
        self.home = home.absolute()
        self.dags_folder = dags_folder.absolute()
        self.port = port or _find_free_port()
        self.password = _read_or_make_secret(self.home / "password")
        self._key = _read_or_make_secret(self.home / "secret-key")
        self._settings = dict(settings or {})
        self._database = database or f"sqlite:///{self.home / 'airflow.db'}"
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    @property
    def url(self) -> str:
        """Where the UI and the REST API are."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def logs(self) -> Path:
        """Where the components' own logs are."""
        return self.home / "logs"

    @property
    def environment(self) -> dict[str, str]:
        """The environment of its processes; other programs that shall use the same Airflow need it too."""
        passwords = self.home / "passwords.json"
        inherited = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith("AIRFLOW") and name != "PYTHONDONTWRITEBYTECODE"
        }
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        return {
            **inherited,
            "PATH": path,
            "AIRFLOW_HOME": str(self.home),
            "AIRFLOW__CORE__DAGS_FOLDER": str(self.dags_folder),
            "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
            "AIRFLOW__CORE__EXECUTOR": "LocalExecutor",
            "AIRFLOW__CORE__XCOM_BACKEND": _XCOM_BACKEND,
            "AIRFLOW__CORE__AUTH_MANAGER": (
                "airflow.api_fastapi.auth.managers.simple.simple_auth_manager.SimpleAuthManager"
            ),
            "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_USERS": f"{USERNAME}:admin",
            "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_PASSWORDS_FILE": str(passwords),
            "AIRFLOW__CORE__EXECUTION_API_SERVER_URL": f"{self.url}/execution/",
            # Slots are refilled once in a scheduler's loop: few of them make wide pipelines slow.
            "AIRFLOW__CORE__PARALLELISM": "32",
            "AIRFLOW__CORE__MAX_ACTIVE_TASKS_PER_DAG": "32",
            "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": self._database,
            # With fewer connections than threads, a burst of tasks stops the API server for 30 seconds: its
            # threads wait for connections, which are held by requests that wait for a thread to end in.
            "AIRFLOW__DATABASE__SQL_ALCHEMY_MAX_OVERFLOW": "-1",
            **(_PATIENT_DATABASE if self._database.startswith("sqlite") else {}),
            "AIRFLOW__API__HOST": "127.0.0.1",
            "AIRFLOW__API__PORT": str(self.port),
            "AIRFLOW__API__BASE_URL": self.url,
            "AIRFLOW__API__WORKERS": "1",
            "AIRFLOW__API__SECRET_KEY": self._key,
            "AIRFLOW__API_AUTH__JWT_SECRET": self._key,
            # Seconds for one answer of the API server: after the default of 5, tasks fail on a machine that is busy.
            "AIRFLOW__WORKERS__EXECUTION_API_TIMEOUT": "30",
            # Airflow sleeps this long between two looks at a run; the default of 1 s is felt in every step.
            "AIRFLOW__SCHEDULER__SCHEDULER_IDLE_SLEEP_TIME": "0.1",
            # One that got no processor for so long takes itself for dead, and its running tasks for lost.
            "AIRFLOW__SCHEDULER__SCHEDULER_HEALTH_CHECK_THRESHOLD": "120",
            "AIRFLOW__DAG_PROCESSOR__REFRESH_INTERVAL": "2",
            "AIRFLOW__DAG_PROCESSOR__MIN_FILE_PROCESS_INTERVAL": "2",
            "AIRFLOW__DAG_PROCESSOR__BUNDLE_REFRESH_CHECK_INTERVAL": "2",
            "AIRFLOW__LOGGING__BASE_LOG_FOLDER": str(self.home / "task-logs"),
            "AIRFLOW__LOGGING__LOGGING_LEVEL": "INFO",
            **self._settings,
        }

    def start(self, report: Callable[[str], None] = lambda _: None) -> None:
        """Start all components and wait until they are ready.

        Args:
            report: Takes a line for people now and then.

        Raises:
            SubmissionError: A component died or did not get ready; nothing is left running.
        """
        self.logs.mkdir(parents=True, exist_ok=True)
        self.dags_folder.mkdir(parents=True, exist_ok=True)
        passwords = self.home / "passwords.json"
        passwords.write_text(json.dumps({USERNAME: self.password}))
        passwords.chmod(0o600)
        try:
            report("Preparing Airflow's database")
            self._run_once("db", "migrate")
            report(f"Starting {', '.join(COMPONENTS)}")
            for component in COMPONENTS:
                self._processes[component] = self._spawn(component)
            self._write_state()
            self._wait_until_ready()
        except BaseException:
            self.stop()
            raise
        report(f"Airflow is ready at {self.url}")

    def stop(self) -> None:
        """End all components and whatever they started; nothing happens if none runs."""
        if not self._processes:
            return
        end_process_groups([process.pid for process in self._processes.values()])
        for process in self._processes.values():
            process.wait()
        self._processes.clear()
        (self.home / _STATE_FILE).unlink(missing_ok=True)

    def detach(self) -> None:
        """Let the components run on after this process; :func:`stop_detached` ends them."""
        self._processes.clear()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        self.stop()

    def _command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "airflow", *arguments]

    def _run_once(self, *arguments: str) -> None:
        log = self.logs / f"{'-'.join(arguments)}.log"
        with log.open("wb") as file:
            done = subprocess.run(
                self._command(*arguments),
                env=self.environment,
                cwd=self.home,
                stdout=file,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                check=False,
            )
        if done.returncode != 0:
            raise SubmissionError(
                f"`airflow {' '.join(arguments)}` failed; the end of {log}:\n{_tail(log)}"
            )

    def _spawn(self, component: str) -> subprocess.Popen[bytes]:
        with (self.logs / f"{component}.log").open("ab") as log:
            return subprocess.Popen(
                self._command(component),
                env=self.environment,
                cwd=self.home,
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )

    def _wait_until_ready(self) -> None:
        import httpx

        deadline = time.monotonic() + _READY_SECONDS
        health: dict[str, Any] = {}
        while time.monotonic() < deadline:
            for component, process in self._processes.items():
                if process.poll() is not None:
                    log = self.logs / f"{component}.log"
                    raise SubmissionError(
                        f"Airflow's {component} ended with code {process.returncode}; the end of {log}:\n"
                        f"{_tail(log)}"
                    )
            try:
                health = httpx.get(f"{self.url}/api/v2/monitor/health", timeout=5).json()
            except (httpx.HTTPError, ValueError):
                health = {}
            states = [(health.get(part) or {}).get("status") for part in _HEALTH_PARTS]
            if states and all(state == "healthy" for state in states):
                return
            time.sleep(0.2)
        raise SubmissionError(
            f"Airflow did not get ready within {_READY_SECONDS} s (its health: {health}); its logs are in "
            f"{self.logs}"
        )

    def _write_state(self) -> None:
        state = {
            "url": self.url,
            "groups": [process.pid for process in self._processes.values()],
            "started": [_start_time(process.pid) for process in self._processes.values()],
        }
        (self.home / _STATE_FILE).write_text(json.dumps(state))


_HEALTH_PARTS = ("metadatabase", "scheduler", "dag_processor", "triggerer")


def stop_detached(home: Path) -> bool:
    """End the components that were left running with this home; return whether there were any."""
    file = home / _STATE_FILE
    try:
        state = json.loads(file.read_text())
    except (FileNotFoundError, ValueError):
        return False
    pairs = zip(state["groups"], state["started"], strict=True)
    # A process id may have been given to somebody else meanwhile.
    ours = [pid for pid, started in pairs if started is not None and _start_time(pid) == started]
    end_process_groups(ours)
    file.unlink(missing_ok=True)
    return bool(ours)


def find_detached(home: Path) -> str | None:
    """Return the address of the Airflow that was left running with this home, or None."""
    try:
        state = json.loads((home / _STATE_FILE).read_text())
    except (FileNotFoundError, ValueError):
        return None
    running = _start_time(state["groups"][0]) == state["started"][0]
    return str(state["url"]) if running and state["started"][0] is not None else None


def end_process_groups(groups: list[int]) -> None:
    """End process groups: politely at first, then for certain."""
    _signal_all(groups, signal.SIGTERM)
    deadline = time.monotonic() + _STOP_SECONDS
    while time.monotonic() < deadline:
        _reap(groups)
        if not any(_is_alive(group) for group in groups):
            return
        time.sleep(0.1)
    _signal_all(groups, signal.SIGKILL)


def _signal_all(groups: list[int], number: int) -> None:
    for group in groups:
        try:
            os.killpg(group, number)
        except (ProcessLookupError, PermissionError):
            continue


def _reap(groups: list[int]) -> None:
    """Take note of children of ours that have ended: until then they count as alive."""
    for group in groups:
        try:
            os.waitpid(group, os.WNOHANG)
        except ChildProcessError:
            continue


def _is_alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _start_time(pid: int) -> str | None:
    """Return when a process started, in the kernel's ticks, to tell it from a later one of its id."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return None


def _find_free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _read_or_make_secret(file: Path) -> str:
    if file.is_file():
        return file.read_text().strip()
    file.parent.mkdir(parents=True, exist_ok=True)
    value = secrets.token_urlsafe(24)
    file.touch(mode=0o600)
    file.write_text(value)
    return value


def _tail(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines()[-_SHOWN_LINES:]
    return "\n".join(f"  {line}" for line in lines)
