"""Images built from environments, on a real daemon: packages made here, so that no network is needed."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import multiprocessing
import os
import shutil
import subprocess
import tarfile
import threading
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from airflow_mlpipelines.caching.index import MetadataIndex
from airflow_mlpipelines.compute.docker import DockerLauncher, builds
from airflow_mlpipelines.definition.graph import DockerComputeSpec, EnvironmentSpec, RegistrySpec
from airflow_mlpipelines.exceptions import ComputeUnavailableError, EnvironmentBuildError
from airflow_mlpipelines.execution.build_leases import make_build_guard
from tests.channels import make_package
from tests.integration.docker.cli import docker_cli
from tests.integration.docker.registry import PASSWORD, USER
from tests.parts import missing
from tests.wheels import make_wheel

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.integration.docker.conftest import DockerStep
    from tests.integration.docker.registry import Registry

pytestmark = pytest.mark.docker
CONN_ID = "test_builds_registry"
LABEL = "mlpipelines-test"


@dataclass
class Workshop:
    """A base image of one test's own: whatever is built upon it has its label, and goes with it."""

    image: str
    name: str = field(default_factory=lambda: f"mlpipelines-test/{uuid.uuid4().hex[:12]}:1")
    lines: list[str] = field(default_factory=list)

    def make_base(self, *changes: str) -> None:
        """Give the base's name to an image that differs from the one before."""
        container = docker_cli("create", self.image, "none")
        options = [f"--change=LABEL {LABEL}={self.name}", f"--change=ENV TURN={uuid.uuid4().hex}"]
        try:
            docker_cli(
                "commit", *options, *(f"--change={item}" for item in changes), container, self.name
            )
        finally:
            docker_cli("rm", container)

    def build_base(self, dockerfile: str, **files: bytes) -> None:
        """Give the base's name to an image with files in it."""
        archive = io.BytesIO()
        text = f"FROM {self.name}\n{dockerfile}".encode()
        with tarfile.open(fileobj=archive, mode="w") as tar:
            for name, data in {"Dockerfile": text, **files}.items():
                entry = tarfile.TarInfo(name.replace("__", "."))
                entry.size, entry.mode = len(data), 0o755
                tar.addfile(entry, io.BytesIO(data))
        subprocess.run(
            ["docker", "build", "-q", "-t", self.name, "-"],
            input=archive.getvalue(),
            env={"DOCKER_BUILDKIT": "0", "PATH": "/usr/local/bin:/usr/bin:/bin"},
            check=True,
            capture_output=True,
            timeout=120,
        )

    def launcher(self, registry: RegistrySpec | None = None) -> DockerLauncher:
        return DockerLauncher(DockerComputeSpec(name="d", image=self.name, registry=registry))

    def prepare(
        self, environment: EnvironmentSpec, registry: RegistrySpec | None = None
    ) -> tuple[str, list[str]]:
        """Return the image of an environment, and the lines that told how it was come by."""
        launcher, lines = self.launcher(registry), list[str]()
        resolved = launcher.resolve_environment(environment)
        prepared = launcher.prepare_environment(environment, resolved, emit=lines.append)
        assert prepared.digest == resolved.digest
        assert prepared.image is not None
        return prepared.image, lines

    def clean(self) -> None:
        remove_labelled(f"{LABEL}={self.name}")


def remove_labelled(label: str) -> None:
    for _ in range(5):  # an image goes only after those that were built upon it
        found = docker_cli("images", "-a", "-q", "--filter", f"label={label}").split()
        for image in dict.fromkeys(found):
            docker_cli("rmi", "-f", image)


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIRFLOW_HOME", str(tmp_path / "airflow"))


BUILT_BY_THE_DAEMON = pytest.mark.parametrize("workshop", ["the daemon"], indirect=True)
"""For tests of what comes before a build and after it, which whoever builds has no part in."""


@pytest.fixture(params=["the daemon", "buildx"])
def workshop(
    request: pytest.FixtureRequest, image: str, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Workshop]:
    with_buildx = request.param == "buildx"
    if with_buildx and not builds.has_buildx():
        missing("no docker buildx (.ci/buildx.sh builds it)")
    monkeypatch.setattr(builds, "has_buildx", lambda: with_buildx)
    made = Workshop(image)
    try:
        made.make_base()
        yield made
    finally:
        made.clean()


@pytest.fixture
def wheels(tmp_path: Path) -> Path:
    directory = tmp_path / "wheels"
    directory.mkdir()
    make_wheel(directory, "1.0")
    return directory


def with_wheels(wheels: Path, *pip: str, **fields: Any) -> EnvironmentSpec:
    return EnvironmentSpec(
        name="tiny", pip=("--no-index", f"--find-links={wheels}", *(pip or ("tinypkg",))), **fields
    )


def run_in(image: str, *command: str) -> str:
    return docker_cli("run", "--rm", image, *command)


# ---- built once --------------------------------------------------------------------------------


def test_a_step_runs_on_the_packages_of_its_environment(
    workshop: Workshop, wheels: Path, step: DockerStep
) -> None:
    image, lines = workshop.prepare(with_wheels(wheels, python_version="3.11"))
    step.run(step.python("import tinypkg; print('version', tinypkg.VERSION)", image=image))
    assert step.lines == ["version 1.0"]
    assert any("Successfully installed tinypkg-1.0" in line for line in lines)
    assert any("1 of 3 requirement lines name no exact version" in line for line in lines)


@BUILT_BY_THE_DAEMON
def test_an_image_that_was_built_is_not_built_again(workshop: Workshop, wheels: Path) -> None:
    environment = with_wheels(wheels)
    launcher = workshop.launcher()
    resolved = launcher.resolve_environment(environment)
    assert resolved.cacheable
    assert launcher.is_prepared(environment, resolved) is False
    image, _ = workshop.prepare(environment)
    assert launcher.is_prepared(environment, resolved) is True
    assert workshop.prepare(environment) == (image, [])


def test_two_steps_at_once_build_one_image(workshop: Workshop, wheels: Path) -> None:
    environment = with_wheels(wheels)
    made: list[tuple[str, list[str]]] = []
    threads = [
        threading.Thread(target=lambda: made.append(workshop.prepare(environment)))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert len({image for image, _ in made}) == 1
    lines = [line for _, own in made for line in own]
    assert sum(line.startswith("Building image") for line in lines) == 1
    assert sum(line.startswith("Waiting for whoever is building") for line in lines) == 2


@BUILT_BY_THE_DAEMON
def test_a_base_that_moved_is_another_environment(workshop: Workshop, wheels: Path) -> None:
    environment = with_wheels(wheels)
    launcher = workshop.launcher()
    before = launcher.resolve_environment(environment)
    workshop.make_base()
    # What a launcher has told to be the environment, it builds: a plan holds for its run.
    prepared = launcher.prepare_environment(environment, before, emit=print)
    after = workshop.launcher().resolve_environment(environment)
    assert prepared.digest == before.digest != after.digest
    packages = (before.description["packages"], after.description["packages"])
    assert packages[0]["base image"] != packages[1]["base image"]


@BUILT_BY_THE_DAEMON
def test_a_package_that_changed_is_another_environment(workshop: Workshop, wheels: Path) -> None:
    environment = with_wheels(wheels)
    one, _ = workshop.prepare(environment)
    make_wheel(wheels, "2.0")
    two, _ = workshop.prepare(environment)
    show = ("python3", "-c", "import tinypkg; print(tinypkg.VERSION)")
    assert (run_in(one, *show), run_in(two, *show)) == ("1.0", "2.0")


def test_a_dockerfile_is_built_on_its_base_by_digest(workshop: Workshop) -> None:
    dockerfile = f"ARG BASE={workshop.name}\nFROM $BASE AS tools\nRUN echo made > /made\n"
    dockerfile += f"FROM {workshop.name}\nCOPY --from=tools /made /copied\n"
    environment = EnvironmentSpec(name="own", dockerfile=dockerfile)
    image, _ = workshop.prepare(environment)
    assert run_in(image, "cat", "/copied") == "made"
    before = workshop.launcher().resolve_environment(environment).digest
    workshop.make_base()
    assert workshop.launcher().resolve_environment(environment).digest != before


def test_a_base_whose_user_may_install_nothing_is_no_hindrance(
    workshop: Workshop, wheels: Path
) -> None:
    workshop.make_base("USER 1000")
    image, _ = workshop.prepare(with_wheels(wheels))
    assert run_in(image, "python3", "-c", "import tinypkg; print(tinypkg.VERSION)") == "1.0"


# ---- other packages ----------------------------------------------------------------------------


def make_deb(directory: Path) -> bytes:
    """Return a Debian package of one file, ``/usr/share/mlp-tool``."""
    if shutil.which("dpkg-deb") is None:
        missing("no dpkg-deb")
    root = directory / "deb"
    (root / "DEBIAN").mkdir(parents=True)
    (root / "usr" / "share").mkdir(parents=True)
    (root / "usr" / "share" / "mlp-tool").write_text("a tool\n")
    control = (
        "Package: mlp-tool\nVersion: 1.0\nArchitecture: all\nMaintainer: none <none@example.com>\n"
    )
    (root / "DEBIAN" / "control").write_text(f"{control}Description: nothing\n")
    subprocess.run(["dpkg-deb", "--build", root, directory / "tool.deb"], check=True)
    return (directory / "tool.deb").read_bytes()


def test_apt_packages_are_installed(workshop: Workshop, tmp_path: Path) -> None:
    deb = make_deb(tmp_path)
    index = "Package: mlp-tool\nVersion: 1.0\nArchitecture: all\nFilename: ./tool.deb\n"
    index += f"Size: {len(deb)}\nSHA256: {hashlib.sha256(deb).hexdigest()}\n"
    workshop.build_base(
        "COPY Packages tool.deb /repository/\n"
        "RUN rm -rf /etc/apt/sources.list* && "
        "echo 'deb [trusted=yes] file:/repository ./' > /etc/apt/sources.list\n",
        Packages=index.encode(),
        tool__deb=deb,
    )
    image, _ = workshop.prepare(EnvironmentSpec(apt=("mlp-tool=1.0",)))
    assert run_in(image, "cat", "/usr/share/mlp-tool") == "a tool"
    with pytest.raises(EnvironmentBuildError, match="Unable to locate package nothing") as error:
        workshop.prepare(EnvironmentSpec(name="e", apt=("nothing",)))
    assert str(error.value).startswith("environment 'e' can't be built")
    assert "Correct apt=" in str(error.value)


@BUILT_BY_THE_DAEMON
def test_a_conda_file_is_for_bases_that_have_conda(workshop: Workshop) -> None:
    environment = EnvironmentSpec(name="e", conda={"dependencies": ["numpy=2.*"]})
    with pytest.raises(EnvironmentBuildError, match="neither conda nor mamba nor micromamba") as e:
        workshop.prepare(environment)
    assert "Name one that has, or give pip requirements" in str(e.value).partition("\n")[0]


# No package registry has micromamba itself, but it has the library whose solver and installer conda's own tools use.
MICROMAMBA = b"""#!/usr/bin/python3
import asyncio, json, subprocess, sys
sys.path.insert(0, "/opt/rattler")
import rattler
with open(sys.argv[-1]) as file:
    asked = json.load(file)
assert sys.argv[1:-1] == ["install", "-y", "-n", "base", "-f"]
async def install():
    channels = [rattler.Channel(channel) for channel in asked["channels"]]
    specs = [rattler.MatchSpec(item) for item in asked["dependencies"] if isinstance(item, str)]
    await rattler.install(await rattler.solve(channels, specs), "/opt/conda", show_progress=False)
asyncio.run(install())
for item in asked["dependencies"]:
    if isinstance(item, dict):
        subprocess.run(["python3", "-m", "pip", "install", "--no-index", *item["pip"]], check=True)
"""


def pack(directory: Path) -> bytes:
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        tar.add(directory, directory.name)
    return archive.getvalue()


@BUILT_BY_THE_DAEMON
def test_conda_packages_are_installed_and_on_the_path(
    workshop: Workshop, wheels: Path, tmp_path: Path
) -> None:
    found = importlib.util.find_spec("rattler")
    if found is None or found.origin is None:
        missing("no py-rattler (the extra 'conda')")
    channel = tmp_path / "channel"
    files = {"bin/mlp-tool": "#!/bin/sh\necho a tool 1.5\n"}
    make_package(channel, "mlp-tool", "1.5", files, depends=("mlp-base",))
    make_package(channel, "mlp-tool", "2.0", files)
    make_package(channel, "mlp-base", "1.0", {"share/mlp-base": "a base\n"})
    workshop.build_base(
        "ADD channel.tar /\nADD rattler.tar /opt/rattler/\nCOPY micromamba /usr/bin/\n",
        channel__tar=pack(channel),
        rattler__tar=pack(Path(str(found.origin)).parent),
        micromamba=MICROMAMBA,
    )
    pip = {"pip": [str(wheels / "tinypkg-1.0-py3-none-any.whl")]}
    conda = {"channels": ["file:///channel"], "dependencies": ["mlp-tool=1.*", pip]}
    image, _ = workshop.prepare(EnvironmentSpec(name="e", conda=conda))
    assert run_in(image, "mlp-tool") == "a tool 1.5"
    assert run_in(image, "cat", "/opt/conda/share/mlp-base") == "a base"
    assert run_in(image, "python3", "-c", "import tinypkg; print(tinypkg.VERSION)") == "1.0"
    nowhere = {**conda, "dependencies": ["mlp-tool=9.*"]}
    with pytest.raises(EnvironmentBuildError, match="environment 'e' can't be built"):
        workshop.prepare(EnvironmentSpec(name="e", conda=nowhere))


# ---- what can't be built -----------------------------------------------------------------------


def test_a_build_that_fails_names_the_instruction_and_the_end_of_its_log(
    workshop: Workshop,
) -> None:
    dockerfile = f"FROM {workshop.name}\nRUN echo one; echo two >&2; exit 7\n"
    with pytest.raises(EnvironmentBuildError) as error:
        workshop.prepare(EnvironmentSpec(name="e", dockerfile=dockerfile))
    assert error.value.instruction == "RUN echo one; echo two >&2; exit 7"
    assert not error.value.retryable
    first, _, log = str(error.value).partition("\n")
    assert first == (
        "environment 'e' can't be built: it ended with exit code 7. "
        "The instruction was: RUN echo one; echo two >&2; exit 7"
    )
    assert "one" in log
    assert "two" in log


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"python_version": "3.99"}, r"has Python 3\.11\.\d+, and 3\.99 is asked for\. Name an im"),
        ({"pip": ("--no-index", "nopkg==9")}, r"pip finds no nopkg==9\. Correct"),
        ({"dockerfile": "FROM scratch\nRUNN x\n"}, "can't be read: .*unknown instruction: RUNN"),
        ({"dockerfile": "FROM scratch\nCOPY a /b\n"}, "can only copy what it makes itself"),
    ],
)
def test_a_build_that_fails_says_what_to_do(
    workshop: Workshop, fields: dict[str, Any], said: str
) -> None:
    with pytest.raises(EnvironmentBuildError, match=said) as error:
        workshop.prepare(EnvironmentSpec(name="e", **fields))
    assert not error.value.retryable


def test_a_network_that_fails_is_worth_another_try(workshop: Workshop) -> None:
    said = "Temporary failure in name resolution"
    dockerfile = f"FROM {workshop.name}\nRUN echo 'pip: {said}'; exit 1\n"
    with pytest.raises(EnvironmentBuildError) as error:
        workshop.prepare(EnvironmentSpec(dockerfile=dockerfile))
    assert error.value.retryable


def test_a_base_that_is_nowhere_is_told_before_anything_is_built(workshop: Workshop) -> None:
    dockerfile = "FROM 127.0.0.1:9/nowhere:1\n"
    environment = EnvironmentSpec(dockerfile=dockerfile)
    resolved = workshop.launcher().resolve_environment(environment)
    assert not resolved.cacheable
    assert "127.0.0.1:9/nowhere:1" in str(resolved.problem)
    with pytest.raises(ComputeUnavailableError, match="can't be pulled"):
        workshop.prepare(environment)


# ---- a registry --------------------------------------------------------------------------------


@pytest.fixture
def shared(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> RegistrySpec:
    """The registry as a workspace names it, with a repository of this test's own."""
    connection = {
        "conn_type": "docker",
        "host": registry.address,
        "login": USER,
        "password": PASSWORD,
    }
    monkeypatch.setenv(f"AIRFLOW_CONN_{CONN_ID.upper()}", json.dumps(connection))
    return RegistrySpec(url=f"{registry.address}/team/{uuid.uuid4().hex}", conn_id=CONN_ID)


def forget_builds(registry: Registry) -> None:
    """Take all that was built off the daemon, as if it were another machine's."""
    registry.forget()
    found = docker_cli("images", "-q", "mlpipelines/env").split()
    if found:
        docker_cli("rmi", "-f", *found)


def test_what_one_machine_built_another_one_pulls(
    workshop: Workshop, wheels: Path, registry: Registry, shared: RegistrySpec
) -> None:
    environment = with_wheels(wheels)
    launcher = workshop.launcher(shared)
    resolved = launcher.resolve_environment(environment)
    assert launcher.is_prepared(environment, resolved) is False
    built, lines = workshop.prepare(environment, shared)
    assert built.startswith(f"{shared.url}@sha256:")
    assert any(line.startswith(f"Pushed image {shared.url}:") for line in lines)
    forget_builds(registry)
    assert launcher.is_prepared(environment, resolved) is True
    pulled, lines = workshop.prepare(environment, shared)
    assert pulled == built
    assert any(line.startswith(f"Pulled image {shared.url}:") for line in lines)
    assert not any(line.startswith("Building") for line in lines)
    assert workshop.prepare(environment, shared) == (built, [])


def test_a_base_in_a_registry_is_built_upon_by_its_digest(
    workshop: Workshop, wheels: Path, registry: Registry, shared: RegistrySpec
) -> None:
    base = f"{registry.address}/team/base:1"
    docker_cli("tag", workshop.name, base)
    registry.push_from_daemon(base)
    environment = with_wheels(wheels, image=base)
    image, _ = workshop.prepare(environment, shared)
    assert run_in(image, "python3", "-c", "import tinypkg; print(tinypkg.VERSION)") == "1.0"
    # Its name gone from the daemon, as it would be on another machine, it is still the same.
    known = workshop.launcher(shared).resolve_environment(environment)
    docker_cli("rmi", base)
    compute = DockerComputeSpec(name="d", registry=shared)
    there = DockerLauncher(compute).resolve_environment(environment)
    assert (there.cacheable, there.digest) == (True, known.digest)


@BUILT_BY_THE_DAEMON
def test_who_may_not_push_is_told_and_the_image_is_kept_for_the_next_try(
    workshop: Workshop, wheels: Path, shared: RegistrySpec
) -> None:
    environment = with_wheels(wheels)
    stranger = RegistrySpec(url=shared.url)
    with pytest.raises((EnvironmentBuildError, ComputeUnavailableError)) as error:
        workshop.prepare(environment, stranger)
    assert "conn_id of the workspace's registry" in str(error.value)
    image, lines = workshop.prepare(environment, shared)
    assert image.startswith(f"{shared.url}@sha256:")
    assert any(line.startswith("Pushed image") for line in lines)


@BUILT_BY_THE_DAEMON
def test_a_push_that_failed_is_made_up_for_without_building_again(
    workshop: Workshop, wheels: Path, shared: RegistrySpec
) -> None:
    environment = with_wheels(wheels)
    workshop.prepare(environment)
    image, lines = workshop.prepare(environment, shared)
    assert image.startswith(f"{shared.url}@sha256:")
    assert not any(line.startswith("Building") for line in lines)


@BUILT_BY_THE_DAEMON
def test_a_digest_on_the_daemon_is_no_sign_that_the_registry_has_the_image(
    workshop: Workshop,
    wheels: Path,
    registry: Registry,
    shared: RegistrySpec,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    environment = with_wheels(wheels)
    image, _ = workshop.prepare(environment, shared)
    # With containerd's image store, every tag has a digest; here it stays from what the registry has lost.
    stored = registry.config / "data" / "docker" / "registry" / "v2" / "repositories"
    shutil.rmtree(stored / shared.url.partition("/")[2])
    assert workshop.prepare(environment, shared) == (image, [])  # this machine has pushed it
    monkeypatch.setenv("AIRFLOW_HOME", str(tmp_path / "another worker of the same daemon"))
    again, lines = workshop.prepare(environment, shared)
    assert again == image
    assert any(line.startswith("Pushed image") for line in lines)
    assert not any(line.startswith("Building") for line in lines)
    forget_builds(registry)
    assert workshop.prepare(environment, shared)[0] == image


@BUILT_BY_THE_DAEMON
def test_a_registry_that_does_not_answer_is_no_fault_of_the_environment(
    workshop: Workshop, wheels: Path
) -> None:
    with pytest.raises(ComputeUnavailableError, match="can't be asked"):
        workshop.prepare(with_wheels(wheels), RegistrySpec(url="127.0.0.1:9/team/env"))


def test_two_machines_with_one_metadata_database_build_an_image_once(
    workshop: Workshop, shared: RegistrySpec, tmp_path: Path
) -> None:
    dockerfile = f"FROM {workshop.name}\nRUN echo {uuid.uuid4().hex}; sleep 3\n"
    environment = EnvironmentSpec(name="slow", dockerfile=dockerfile)
    url = f"sqlite:///{tmp_path}/metadata.db"
    MetadataIndex(url).get_contents([])  # its tables are there

    def build(machine: str, into: Any) -> None:
        os.environ["AIRFLOW_HOME"] = str(tmp_path / machine)  # and so the locks on files
        launcher, lines = workshop.launcher(shared), list[str]()
        launcher.build_guard = make_build_guard(MetadataIndex(url), f"the step on {machine}")
        resolved = launcher.resolve_environment(environment)
        prepared = launcher.prepare_environment(environment, resolved, emit=lines.append)
        into.put((prepared.image, lines))

    context = multiprocessing.get_context("fork")
    made: Any = context.Queue()
    machines = [context.Process(target=build, args=(name, made)) for name in ("one", "two")]
    for machine in machines:
        machine.start()
    try:
        results = [made.get(timeout=120) for _ in machines]
    finally:
        for machine in machines:
            machine.kill()
            machine.join()
    assert len({image for image, _ in results}) == 1
    (builder, _), (waiter, _) = sorted(
        ((lines, image) for image, lines in results),
        key=lambda made: not any(line.startswith("Building image") for line in made[0]),
    )
    assert any(line.startswith("Pushed image") for line in builder)
    assert not any(line.startswith(("Building image", "Pushed image")) for line in waiter)
    assert any(
        line.startswith("Waiting for the step on ") and ", which is building mlp" in line
        for line in waiter
    )
