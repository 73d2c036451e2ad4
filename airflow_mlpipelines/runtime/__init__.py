"""What runs inside a step's process or container: standard library only, Python 3.8 or newer."""

from __future__ import annotations
