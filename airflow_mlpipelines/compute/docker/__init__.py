"""Steps as containers of a Docker daemon, through the provider's DockerOperator.

What the provider's operator alone would do to a step, and what is done instead:

* It follows a container by the connection that it was started on. Here a container runs *detached*:
  its log is followed with reconnection, and a worker that was killed leaves a container that the next
  try finds by its name, adopts, and reads from the first line on. So each try's log is whole.
* Its ``cpus`` are relative shares. Here they are a quota, and the memory limit includes swap.
* Its kill waits ten seconds for the program, of which Airflow leaves five, and never removes. Here the
  program has two seconds to end, then the container is killed and removed.
* It removes containers by how it ended itself. Here they are removed once their end was read.
* It puts secrets into the container's configuration, which ``docker inspect`` shows. Here they are
  copied into the container as a file, for its user only, which ``/bin/sh`` turns into variables before
  it becomes the step's program (docs/decisions/docker-secrets.md).

An image's ENTRYPOINT is not used: a step's process is what the step declares.
"""

from __future__ import annotations

from airflow_mlpipelines.compute.docker.launcher import DockerLauncher

__all__ = ["DockerLauncher"]
