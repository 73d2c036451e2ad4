"""docker-compose.yml brought up under a name of its own, and taken down again with all that came of it."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import uuid
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from airflow_mlpipelines.submission.rest import AirflowClient
from tests.integration.docker.cli import docker_cli
from tests.parts import missing

ROOT = Path(__file__).parents[3]
PARTS = ROOT / "tests" / "compose"
DAGS = (ROOT / "dags", Path(__file__).parent / "dags")
BUILD_SECONDS = 900
_BUILT = ("prepare", "step-image", "mlflow")
_IMAGES = ("airflow", "steps", "mlflow")
_AIRFLOW = ("scheduler", "dag-processor", "triggerer", "worker")
_MEMBER = "com.docker.compose.project"


def find_programs() -> Path:
    """Return the folder with what the test needs that no package brings; build it if need be, or skip."""
    if shutil.which("go") is None:
        os.environ["PATH"] += ":/usr/local/go/bin"  # where Go's own installer puts it
    done = subprocess.run(
        [PARTS / "build.sh"], stdout=subprocess.PIPE, text=True, timeout=BUILD_SECONDS
    )
    if done.returncode != 0:
        missing("tests/compose/build.sh could not build docker compose; it says why")
    return Path(done.stdout.strip())


def make_images(programs: Path) -> None:
    """Leave the base images on the daemon, or skip."""
    done = subprocess.run([PARTS / "images.sh", programs], timeout=BUILD_SECONDS)
    if done.returncode != 0:
        missing("tests/compose/images.sh could not make the base images; it says why")


@dataclass
class Deployment:
    """The services of docker-compose.yml, with images, ports, networks and data of their own.

    ``folder`` must be empty; the Docker daemon has to see it at the same path.
    """

    compose: list[str]
    folder: Path
    name: str = field(default_factory=lambda: f"mlp-compose-{uuid.uuid4().hex[:8]}")

    def __post_init__(self) -> None:
        self.folder.chmod(0o755)
        made = self.folder / "secrets"
        subprocess.run(["sh", ROOT / "compose" / "make-env.sh", made], check=True)
        secrets = dict(line.split("=", 1) for line in made.read_text().splitlines())
        own = {
            "PYTHON_VERSION": "3.11",  # Debian's, of which the stand-ins are made
            **{f"{name.upper()}_IMAGE": self.image(name) for name in _IMAGES},
            "STEPS_NETWORK": self.steps_network,
            "MLPIPELINES_DATA": str(self.folder / "data"),
            **{f"{name}_PORT": str(_find_free_port()) for name in ("AIRFLOW", "MLFLOW", "S3")},
            "WORKER_CONCURRENCY": "1",  # so that two steps at once take two workers
            "TASK_HEARTBEAT_TIMEOUT": "45",
        }
        self.settings = {**secrets, **own}
        self._write_files()

    @property
    def steps_network(self) -> str:
        return f"{self.name}-steps"

    def image(self, name: str) -> str:
        return f"mlpipelines-tests/{name}:{self.name}"

    def _write_files(self) -> None:
        lines = [f"{name}={value}\n" for name, value in self.settings.items()]
        (self.folder / "env").write_text("".join(lines))
        for source in DAGS:
            shutil.copytree(source, self.folder / "dags", dirs_exist_ok=True)
        mounts = [f"{self.folder}/dags:/opt/airflow/dags:ro"]
        services = {service: {"volumes": mounts} for service in _AIRFLOW}
        (self.folder / "override.yml").write_text(yaml.safe_dump({"services": services}))

    def run(self, *arguments: str, seconds: float = 300) -> str:
        """Run a command of docker compose and return what it prints."""
        command = [
            *self.compose,
            *("--project-name", self.name, "--env-file", str(self.folder / "env")),
            *("--file", str(ROOT / "docker-compose.yml")),
            *("--file", str(self.folder / "override.yml")),
            *arguments,
        ]
        environment = {
            name: value for name, value in os.environ.items() if name not in self.settings
        }
        environment |= {"DOCKER_BUILDKIT": "1", "COMPOSE_BAKE": "false"}
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=seconds
        )
        assert done.returncode == 0, f"{' '.join(arguments)}: {done.stderr[-4000:]}\n{self.logs()}"
        return done.stdout

    def start(self) -> None:
        """Build the images and start all services."""
        self.run("build", "--quiet", *_BUILT, seconds=BUILD_SECONDS)
        self.run("up", "--detach", seconds=400)

    def logs(self) -> str:
        """Return the last lines of every container, for a failure's message."""
        told = []
        for container in self.containers():
            name, state = container["Name"].lstrip("/"), container["State"]["Status"]
            done = subprocess.run(
                ["docker", "logs", "--tail", "15", container["Id"]],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
            )
            told.append(f"--- {name} ({state})\n{done.stdout}")
        return "\n".join(told)

    def containers(self, service: str | None = None) -> list[dict[str, Any]]:
        """Return what the daemon knows of the services' containers, or of those of one service."""
        chosen = ["--filter", f"label={_MEMBER}={self.name}"]
        if service is not None:
            chosen += ["--filter", f"label=com.docker.compose.service={service}"]
        ids = docker_cli("ps", "--all", "--quiet", *chosen).split()
        found: list[dict[str, Any]] = json.loads(docker_cli("inspect", *ids)) if ids else []
        return found

    def find_step(self, task_id: str) -> str | None:
        """Return the id of the running container of a step, or None."""
        return (
            docker_cli(
                *("ps", "--quiet", "--no-trunc", "--filter", f"network={self.steps_network}"),
                *("--filter", f"label=airflow-mlpipelines.task_id={task_id}"),
                *("--filter", "status=running"),
            )
            or None
        )

    @cached_property
    def airflow(self) -> AirflowClient:
        return AirflowClient(
            f"http://127.0.0.1:{self.settings['AIRFLOW_PORT']}",
            username="admin",
            password=self.settings["AIRFLOW_PASSWORD"],
        )

    @cached_property
    def s3(self) -> Any:
        """The S3 server's files, read from outside."""
        from s3fs import S3FileSystem

        return S3FileSystem(
            key=self.settings["S3_ACCESS_KEY"],
            secret=self.settings["S3_SECRET_KEY"],
            endpoint_url=f"http://127.0.0.1:{self.settings['S3_PORT']}",
        )

    def remove(self) -> None:
        """Remove containers, those of steps as well, networks, volumes, images and data."""
        of_steps = docker_cli(
            "ps", "--all", "--quiet", "--filter", f"network={self.steps_network}"
        ).split()
        if of_steps:
            docker_cli("rm", "--force", "--volumes", *of_steps)
        self.run("down", "--volumes", "--remove-orphans", "--timeout", "1")
        # The files belong to the user of the containers.
        mount = ("--volume", f"{self.folder}:/folder")
        docker_cli("run", "--rm", *mount, "busybox:1.36", "rm", "-rf", "/folder/data")
        docker_cli("rmi", *(self.image(name) for name in _IMAGES))


def _find_free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
