"""Azure ML v1's names in Azure ML's module layout."""

from __future__ import annotations
