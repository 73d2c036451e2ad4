"""Exit with 0 if Airflow's API server says that a component is healthy.

Used as ``healthy.py scheduler`` by the health checks of docker-compose.yml. It imports nothing of Airflow, which
would take seconds of a processor at each check.
"""

from __future__ import annotations

import json
import sys
from urllib.request import urlopen

URL = "http://api-server:8080/api/v2/monitor/health"

component = sys.argv[1]
with urlopen(URL, timeout=5) as reply:
    status = json.load(reply)[component]["status"]
if status != "healthy":
    sys.exit(f"{component} is {status}")
