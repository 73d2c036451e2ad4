"""The files that a trigger's lines are kept in, which Airflow empties when the same try is deferred again."""

from __future__ import annotations

import glob
import time
from contextlib import suppress
from pathlib import Path
from typing import Any


def put_aside_earlier_lines(ti: Any) -> None:
    """Rename the files with what earlier triggers of this try have logged on this machine.

    A triggerer opens ``attempt=1.log.trigger.<job>.log`` for each trigger anew, and so empties it. Whoever shows the
    log reads all files whose names begin as the try's does: those put aside, too. Call it before the trigger's first
    line.
    """
    from airflow.sdk.configuration import conf
    from airflow.utils.helpers import log_filename_template_renderer

    # Whatever is in the way: the step matters more than its log.
    with suppress(OSError, AttributeError, KeyError, ValueError):
        folder = Path(conf.get("logging", "base_log_folder"))
        path = folder / log_filename_template_renderer()(ti=ti)
        for file in path.parent.glob(f"{glob.escape(path.name)}.trigger.*.log"):
            file.rename(file.with_name(f"{file.name}.{time.time_ns()}"))
