"""Images built by a BuildKit daemon elsewhere, and pushed by it: the worker has no Docker daemon, only ``buildctl``."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from airflow_mlpipelines.compute.build_log import BuildLog, build_failure, run_builder
from airflow_mlpipelines.compute.registries import make_docker_config
from airflow_mlpipelines.exceptions import ComputeUnavailableError, EnvironmentBuildError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from airflow_mlpipelines.compute.base import Emit
    from airflow_mlpipelines.compute.build_context import BuildContext
    from airflow_mlpipelines.compute.registries import Login

_PROGRAM = "buildctl"
_CONNECT_SECONDS = 10
_NO_DAEMON = re.compile(
    r"^error: .*(failed to list workers|Error while dialing|error reading from server)"
)
_PUSH = re.compile(r"failed to push|insufficient_scope|failed to authorize")


@dataclass(frozen=True)
class BuildkitDaemon:
    """A BuildKit daemon, and as whom it pulls and pushes.

    Attributes:
        compute: The compute that it builds for, for messages.
        host: Where it listens, ``tcp://…`` or ``unix://…``.
        tls: A directory of this machine with ``ca.pem``, ``cert.pem`` and ``key.pem``; None is no encryption.
        logins: The registries' credentials, which it uses for one build and does not keep.
        insecure: Whether it pushes over plain HTTP.
    """

    compute: str
    host: str
    tls: str | None
    logins: Sequence[Login]
    insecure: bool

    def build(
        self,
        context: BuildContext,
        *,
        reference: str,
        platform: str,
        labels: Mapping[str, str],
        named: str,
        emit: Emit,
    ) -> None:
        """Build an image and put it into its registry.

        Args:
            context: What to build. Its bases are in registries.
            reference: The image's name in its registry.
            platform: The kind of processor that it is for, such as ``amd64``.
            labels: The image's labels.
            named: How messages call the environment.
            emit: Takes the build's log.

        Raises:
            EnvironmentBuildError: An instruction failed, with it and the end of the log; these credentials may
                not push there; or this machine has no ``buildctl``.
            ComputeUnavailableError: The daemon or the registry does not answer.
        """
        program = shutil.which(_PROGRAM)
        if program is None:
            raise EnvironmentBuildError(
                f"{named} is to be built by the BuildKit daemon of compute {self.compute!r}, but this machine has no "
                f"{_PROGRAM}, which asks it to. Put it on the worker's PATH: "
                "`COPY --from=moby/buildkit /usr/bin/buildctl /usr/local/bin/` in its image."
            )
        output = f"type=image,name={reference},push=true"
        command = [program, "--addr", self.host, "--timeout", str(_CONNECT_SECONDS)]
        command += ["--tlsdir", self.tls] if self.tls is not None else []
        command += ["build", "--progress", "plain", "--frontend", "dockerfile.v0"]
        command += ["--opt", f"platform=linux/{platform}"]
        for name, value in labels.items():
            command += ["--opt", f"label:{name}={value}"]
        command += ["--output", f"{output},registry.insecure=true" if self.insecure else output]
        log = BuildLog(emit)
        with tempfile.TemporaryDirectory(prefix="mlpipelines-build-") as name:
            directory = Path(name) / "context"
            context.write(directory)
            config = Path(name) / "config.json"
            config.touch(0o600)
            config.write_text(make_docker_config(self.logins), encoding="utf-8")
            for local in ("context", "dockerfile"):
                command += ["--local", f"{local}={directory}"]
            code = run_builder(command, env={**os.environ, "DOCKER_CONFIG": name}, log=log)
        if code != 0:
            raise self._failure(named, reference, log)

    def _failure(
        self, named: str, reference: str, log: BuildLog
    ) -> EnvironmentBuildError | ComputeUnavailableError:
        from airflow_mlpipelines.compute.docker.images import push_failure

        said = next((line for line in reversed(log.tail) if line.startswith("error: ")), "")
        if _NO_DAEMON.search(said):
            return ComputeUnavailableError(
                f"compute {self.compute!r}: the BuildKit daemon at {self.host} does not answer, so that {named} can't "
                f"be built: {said.removeprefix('error: ')}. Start it, let this worker reach it, or correct buildkit_host="
                + (" and buildkit_tls=." if self.tls is not None else ".")
            )
        if log.instruction is None and _PUSH.search(said) and reference in said:
            who = ", ".join(login.conn_id for login in self.logins)
            return push_failure(reference, said.removeprefix("error: "), who or None)
        return build_failure(named, log, said)
