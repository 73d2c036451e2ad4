"""A step type as a user would write it; the guide `own-step-types.md` shows it."""

from __future__ import annotations

# fmt: off
# [start step]
from typing import TYPE_CHECKING, Any

from airflow_mlpipelines import PipelineStep

if TYPE_CHECKING:
    from collections.abc import Sequence


class SqlStep(PipelineStep):
    """Runs a query with sqlite3's own program and writes the rows as CSV."""

    def __init__(self, query: str, *, database: Any, table: Any, **options: Any) -> None:
        super().__init__("sql", inputs=[database], outputs=[table], **options)
        self.query, self.database, self.table = query, database, table

    def make_command(self) -> Sequence[Any]:
        return ["sqlite3", "-csv", "-readonly", self.database, f".once {self.table}", self.query]
# [end step]
