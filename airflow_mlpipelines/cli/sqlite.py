"""What Airflow is told to open its SQLite database with, where it runs on one machine.

It waits five seconds for another process that writes, and then the scheduler ends. With thirty tasks at
once on a busy machine they are not always enough.
"""

from __future__ import annotations

PATIENT = {"timeout": 60}
