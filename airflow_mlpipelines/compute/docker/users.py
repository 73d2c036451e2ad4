"""The user that a step's container runs as, and the directories it must be able to write."""

from __future__ import annotations

import io
import os
import tarfile
from typing import TYPE_CHECKING

from airflow_mlpipelines.exceptions import DataError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from docker import APIClient

_ROOTLESS = "name=rootless"
_NAME, _UID = 0, 2


def default_user(client: APIClient) -> str:
    """Return the worker's own ``uid:gid``, so that what a step writes belongs to the worker.

    In a rootless daemon's containers that user is called root.
    """
    uid, gid = os.getuid(), os.getgid()
    if uid and any(_ROOTLESS in option for option in client.info().get("SecurityOptions") or ()):
        return "0:0"
    return f"{uid}:{gid}"


def find_uid(client: APIClient, image: str, user: str) -> int:
    """Return the number of ``user``, looked up in the image's ``/etc/passwd`` if it is a name.

    Raises:
        DataError: The image has no such user.
    """
    name = user.partition(":")[0]
    if name.isdecimal():
        return int(name)
    for line in _read_passwd(client, image).splitlines():
        fields = line.split(":")
        if len(fields) > _UID and fields[_NAME] == name:
            return int(fields[_UID])
    raise DataError(f"the image {image!r} has no user {name!r}. Name one it has, or a number.")


def hand_over(paths: Iterable[Path], uid: int) -> None:
    """Make ``uid`` the owner of the directories and of all that lies in them.

    Raises:
        DataError: This worker may not do so.
    """
    worker = os.getuid()
    if uid in (worker, 0):
        return
    if worker != 0:
        raise DataError(
            f"its container runs as user {uid}, but this worker, as user {worker}, can't give it the step's "
            "directories. Leave out the compute's user=, or let the worker run as root."
        )
    for path in paths:
        os.chown(path, uid, -1)
        for directory, names, files in os.walk(path):
            for name in (*names, *files):
                os.chown(os.path.join(directory, name), uid, -1, follow_symlinks=False)  # noqa: PTH118


def _read_passwd(client: APIClient, image: str) -> str:
    """Return the image's ``/etc/passwd``, read through a container that is never started."""
    from docker.errors import NotFound

    container = client.create_container(image=image, command=["true"])["Id"]
    try:
        chunks, _ = client.get_archive(container, "/etc/passwd")
        with tarfile.open(fileobj=io.BytesIO(b"".join(chunks))) as archive:
            member = archive.extractfile(archive.next() or "passwd")
            return member.read().decode("utf-8", "replace") if member else ""
    except NotFound:
        return ""
    finally:
        client.remove_container(container, force=True, v=True)
