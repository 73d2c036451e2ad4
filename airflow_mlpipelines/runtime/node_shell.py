"""What ``mpirun`` takes for ssh: starts a command on another node of the gang, where no sshd runs.

``python -m airflow_mlpipelines.runtime.node_shell HOST COMMAND…`` asks the gang's process on that node for it,
hands on what the command prints, and ends with its exit code.
"""

from __future__ import annotations

import base64
import os
import subprocess
import sys
import threading
from contextlib import suppress
from signal import SIGKILL
from typing import TYPE_CHECKING

from airflow_mlpipelines.runtime.connection import Connection, LostError

if TYPE_CHECKING:
    from typing import IO

_NOT_REACHED = 255
_SIGNALLED = 128
_PIECE = 64 << 10
_DRAIN_SECONDS = 2.0
_SHELL = "/bin/sh"
_OPTIONS_WITH_VALUES = ("-l", "-p", "-o", "-i", "-F")


def serve_shell(connection: Connection, command: str) -> None:
    """Run ``command`` in a shell for whoever has asked for it; it ends with the connection."""
    connection.keep_alive()
    process = subprocess.Popen(
        [_SHELL, "-c", command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )

    def relay(stream: int, pipe: IO[bytes]) -> None:
        with suppress(LostError):
            while data := os.read(pipe.fileno(), _PIECE):
                connection.send(kind="output", stream=stream, data=base64.b64encode(data).decode())

    def watch() -> None:
        try:
            while True:
                connection.receive()
        except LostError:
            if process.poll() is None:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, SIGKILL)

    pipes = ((1, process.stdout), (2, process.stderr))
    relays = [
        threading.Thread(target=relay, args=(stream, pipe), daemon=True) for stream, pipe in pipes
    ]
    for thread in (*relays, threading.Thread(target=watch, daemon=True)):
        thread.start()
    code = process.wait()
    for thread in relays:  # a daemon that it left behind may hold them open
        thread.join(_DRAIN_SECONDS)
    with suppress(LostError):
        connection.send(kind="exit", code=code if code >= 0 else _SIGNALLED - code)
    connection.close()


def run_on_node(host: str, port: int, token: str, command: str) -> int:
    """Run ``command`` on a node of the gang, handing on what it prints; return its exit code.

    Raises:
        LostError: The node went away.
        OSError: It can't be reached.
    """
    connection = Connection.make(host, port, token)
    connection.keep_alive()
    connection.send(kind="shell", command=command)
    streams = {1: sys.stdout.buffer, 2: sys.stderr.buffer}
    while True:
        message = connection.receive()
        if message["kind"] == "exit":
            return int(message["code"])
        stream = streams[message["stream"]]
        stream.write(base64.b64decode(message["data"]))
        stream.flush()


def main() -> int:
    """Run what the arguments say, as ssh would."""
    from airflow_mlpipelines.runtime.nodes import Place

    arguments = sys.argv[1:]
    while arguments and arguments[0].startswith("-"):
        del arguments[: 2 if arguments[0] in _OPTIONS_WITH_VALUES else 1]
    place = Place.from_environment()
    if place is None or not arguments:
        sys.stderr.write("usage, on a node of a gang: node_shell HOST COMMAND…\n")
        return _NOT_REACHED
    name, *command = arguments
    host = place.find_host(name)
    if host is None:
        sys.stderr.write(f"{name!r} is no node of this gang, which has {', '.join(place.hosts)}\n")
        return _NOT_REACHED
    try:
        return run_on_node(host, place.port, place.token, " ".join(command))
    except (OSError, LostError) as error:
        sys.stderr.write(f"{host} can't be reached: {error}\n")
        return _NOT_REACHED


if __name__ == "__main__":
    sys.exit(main())
