"""Where this package keeps its things on a machine, read from the environment when asked for."""

from __future__ import annotations

import os
import pwd
import socket
from pathlib import Path

CONFIG_FILE_NAME = "mlpipelines.yaml"
CONFIG_VARIABLE = "MLPIPELINES_CONFIG"
CONFIG_SECTION = "mlpipelines"
"""Our section of Airflow's configuration; its options are listed in ``provider_info.py``."""
METADATA_OPTION = "metadata_conn_id"
BLOB_CACHE_OPTION = "blob_cache_size"
PRELOAD_OPTION = "preload"
PYTHON_DOWNLOADS_OPTION = "python_downloads"
HOME_VARIABLE = "MLPIPELINES_HOME"
METADATA_URL_VARIABLE = "MLPIPELINES_METADATA_URL"
ECHO_VARIABLE = "MLPIPELINES_ECHO"
"""Set where a run goes on in a process that a person watches: steps print their lines there."""
ALLOW_PICKLE_VARIABLE = "MLPIPELINES_ALLOW_PICKLE"
WORK_VARIABLE = "MLPIPELINES_WORK_DIR"
GPU_LOCKS_VARIABLE = "MLPIPELINES_GPU_LOCKS"
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def airflow_home() -> Path:
    """Return Airflow's home directory by Airflow's own rule: ``$AIRFLOW_HOME``, else ``~/airflow``."""
    return Path(os.environ.get("AIRFLOW_HOME") or "~/airflow").expanduser().absolute()


def home() -> Path:
    """Return the directory for this package's data on this machine.

    ``$MLPIPELINES_HOME`` if set (in containers that share a Docker daemon: a directory of the host, at the
    same path in all of them), else ``$AIRFLOW_HOME/mlpipelines``.
    """
    override = os.environ.get(HOME_VARIABLE)
    return Path(override).expanduser().absolute() if override else airflow_home() / "mlpipelines"


def work_directory() -> Path:
    """Return where steps get their working directories on this machine.

    ``$MLPIPELINES_WORK_DIR`` if set (name one that a Docker daemon on the same host can see), else
    ``work`` in :func:`home`. Data that this machine has fetched are linked into it only if it is on the same
    mount as :func:`home`; else they are copied.
    """
    override = os.environ.get(WORK_VARIABLE)
    return Path(override).expanduser().absolute() if override else home() / "work"


def runtime_directory() -> Path:
    """Return where steps find the runtime package: where their working directories are, if that was chosen."""
    if os.environ.get(WORK_VARIABLE):
        return work_directory() / ".runtime"
    return home() / "runtime"


def stat_cache_file() -> Path:
    """Return where this machine remembers the digests of files that it has read."""
    return home() / "stat-cache.db"


def blob_cache_directory() -> Path:
    """Return where this machine keeps fetched data by digest."""
    return home() / "blobs"


def gpu_lock_directory() -> Path:
    """Return where the workers of this machine agree on who has which GPU.

    ``$MLPIPELINES_GPU_LOCKS`` if set, else a directory in the user's home that all Airflow deployments of
    one user share. It is one for each boot of each machine: homes may be shared between machines, on
    which the same number means another GPU. Not in ``/tmp``: Airflow's own service files give each of
    its services one of its own.
    """
    override = os.environ.get(GPU_LOCKS_VARIABLE)
    if override:
        return Path(override).expanduser().absolute()
    try:
        base = Path(pwd.getpwuid(os.getuid()).pw_dir)
    except KeyError:  # a container with a user that has no entry
        base = airflow_home()
    try:
        machine = _BOOT_ID.read_text(encoding="ascii").strip()
    except OSError:
        machine = socket.gethostname()
    return base / ".cache" / "airflow_mlpipelines" / "gpus" / machine


def default_metadata_url() -> str:
    """Return the SQLAlchemy URL of the metadata database that is used without any set-up."""
    return os.environ.get(METADATA_URL_VARIABLE) or f"sqlite:///{home() / 'metadata.db'}"


def allow_pickle(*, configured: bool = False) -> bool:
    """Return whether this deployment lets tasks hand on values as pickles.

    ``$MLPIPELINES_ALLOW_PICKLE`` says so where it is set; else it is as ``configured`` in Airflow.
    """
    override = os.environ.get(ALLOW_PICKLE_VARIABLE)
    if override is None:
        return configured
    return override.strip().lower() in ("1", "true", "yes", "on")
