"""Write the workspace file of this deployment: compose/mlpipelines.yaml with the names that .env may change.

Run by docker-compose.yml, with the shipped file and the place of the new one. Whoever reads that one meanwhile sees the
old one or the new one.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

NAMES = ("STEPS_IMAGE", "STEPS_NETWORK")


def main(source: Path, target: Path) -> None:
    """Put the values of the variables in the place of ``${STEPS_IMAGE}`` and ``${STEPS_NETWORK}``."""
    text = source.read_text(encoding="utf-8")
    for name in NAMES:
        text = text.replace(f"${{{name}}}", os.environ[name])
    made = target.with_suffix(".new")
    made.write_text(text, encoding="utf-8")
    made.replace(target)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
