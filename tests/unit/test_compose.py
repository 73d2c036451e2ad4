"""The compose file: well formed, complete, and honest about the Docker socket."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from cryptography.fernet import Fernet

from airflow_mlpipelines.definition.workspace import Workspace
from tests.parts import find_compose

ROOT = Path(__file__).parents[2]
COMPOSE = ROOT / "docker-compose.yml"


@pytest.fixture(scope="module")
def services():
    return yaml.safe_load(COMPOSE.read_text())["services"]


@pytest.fixture(scope="module")
def env_file(tmp_path_factory):
    """What the one command makes that users run before `up`."""
    file = tmp_path_factory.mktemp("env") / "env"
    make_env(file)
    return file


def make_env(*arguments, script=ROOT / "compose" / "make-env.sh", **environment):
    """Run the script, and return what it says."""
    done = subprocess.run(
        ["sh", script, *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == ""
    assert done.returncode == 0, done.stderr
    return done.stderr


def read_env(file):
    return dict(line.split("=", 1) for line in file.read_text().splitlines())


def test_every_component_of_airflow_is_there(services):
    commands = {name: service.get("command", []) for name, service in services.items()}
    of_airflow = {
        name: " ".join(command) for name, command in commands.items() if command[:1] == ["airflow"]
    }

    assert of_airflow == {
        "migrate": "airflow db migrate",
        "api-server": "airflow api-server",
        "scheduler": "airflow scheduler",
        "dag-processor": "airflow dag-processor",
        "triggerer": "airflow triggerer",
        "worker": "airflow celery worker",
    }
    others = {"postgres", "redis", "s3", "mlflow", "prepare", "buckets", "step-image"}
    assert services.keys() - of_airflow.keys() == others
    assert services["worker"]["deploy"]["replicas"] == 2


def test_what_runs_on_is_checked_and_started_again(services):
    once = {"prepare", "migrate", "buckets", "step-image"}

    for name, service in services.items():
        lasting = name not in once
        assert ("healthcheck" in service) == lasting, name
        assert service["restart"] == ("unless-stopped" if lasting else "no"), name


def test_every_password_and_key_is_the_deployment_s_own(env_file, tmp_path):
    needed = set(re.findall(r"\$\{(\w+):\?", COMPOSE.read_text()))
    first = read_env(env_file)
    make_env(tmp_path / "env")
    second = read_env(tmp_path / "env")

    assert needed == first.keys() - {"AIRFLOW_UID", "DOCKER_SOCKET", "DOCKER_GID"}
    for name in needed:
        assert len(first[name]) >= 16
        assert first[name] != second[name]
    Fernet(first["AIRFLOW_FERNET_KEY"])


def test_passwords_and_keys_are_written_beside_the_compose_file_for_its_owner_only(tmp_path):
    (tmp_path / "compose").mkdir()
    script = shutil.copy(ROOT / "compose" / "make-env.sh", tmp_path / "compose")
    said = make_env(script=script)
    made = read_env(tmp_path / ".env")

    assert stat.S_IMODE((tmp_path / ".env").stat().st_mode) == 0o600
    assert set(said.split()) >= made.keys()
    assert not [name for name, value in made.items() if len(value) >= 16 and value in said]


def test_what_a_deployment_has_already_stays(env_file, tmp_path):
    file = tmp_path / "env"
    shutil.copy(env_file, file)
    before = file.read_bytes()
    assert "has everything" in make_env(file)
    assert file.read_bytes() == before


def test_what_is_missing_is_added_and_nothing_else_changed(tmp_path):
    file = tmp_path / "env"
    before = (
        "# ours\nexport POSTGRES_PASSWORD = 'first one'\nAIRFLOW_FERNET_KEY: \"a=b\"\n"
        "#AIRFLOW_SECRET=no\nS3_ACCESS_KEY=\nMY_AIRFLOW_PASSWORD=x\nWORKER_CONCURRENCY=2"
    )
    file.write_text(before)
    file.chmod(0o644)
    make_env(file)
    kept, added = file.read_text()[: len(before)], file.read_text()[len(before) :]

    assert kept == before
    assert re.findall(r"^(\w+)=.+$", added, re.MULTILINE) == [
        "AIRFLOW_UID",
        "AIRFLOW_PASSWORD",
        "AIRFLOW_SECRET",
        "S3_ACCESS_KEY",
        "S3_SECRET_KEY",
        "DOCKER_SOCKET",
        "DOCKER_GID",
    ]
    assert added.startswith("\n")
    assert not file.stat().st_mode & stat.S_IRWXO
    assert "has everything" in make_env(file)


def test_the_compose_file_s_remedy_is_a_command_that_changes_no_secret():
    remedies = set(re.findall(r"\$\{\w+:\?([^}]*)\}", COMPOSE.read_text()))

    assert remedies == {"run sh compose/make-env.sh"}


def test_another_socket_than_the_one_in_the_file_is_refused(tmp_path):
    file = tmp_path / "env"
    make_env(file, DOCKER_SOCKET="/one.sock")
    before = file.read_text()
    with pytest.raises(AssertionError, match="names another DOCKER_SOCKET"):
        make_env(file, DOCKER_SOCKET="/two.sock")
    assert file.read_text() == before


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give files away")
@pytest.mark.parametrize(
    ("owner", "expected"), [((0, 998), ("50000", "998")), ((1000, 1000), ("0", "0"))]
)
def test_the_workers_may_use_the_socket_of_a_daemon_of_root_or_of_a_user(tmp_path, owner, expected):
    stand_in = tmp_path / "docker.sock"
    stand_in.touch()
    os.chown(stand_in, *owner)
    make_env(tmp_path / "env", DOCKER_SOCKET=str(stand_in))
    made = read_env(tmp_path / "env")

    assert (made["AIRFLOW_UID"], made["DOCKER_GID"]) == expected


PIN = re.compile(r"^([\w.-]+)==(\S+)(.*)$", re.MULTILINE)
APART = "# not as in constraints.txt: "


def test_images_have_the_versions_of_the_workers_or_say_why_not():
    """MLflow holds some packages back, so that its image can't be installed by constraints.txt as it is."""
    workers = {}
    for name, version, _ in PIN.findall((ROOT / "constraints.txt").read_text()):
        workers.setdefault(name, set()).add(version)  # several, if they depend on the Python
    pins = [
        pin
        for file in ("steps-requirements.txt", "mlflow-requirements.txt")
        for pin in PIN.findall((ROOT / "compose" / file).read_text())
    ]
    differ = {name for name, version, _ in pins if version not in workers.get(name, {version})}
    versions = {name: version for name, version, _ in pins}

    assert {"boto3", "pandas", "pyarrow"} <= workers.keys() & versions.keys()
    assert differ == {name for name, _, rest in pins if APART in rest}
    assert versions["mlflow"] == versions["mlflow-skinny"]


def make_workspace(tmp_path, **names):
    """Write the workspace as `prepare` does, and return its default compute."""
    target = tmp_path / "mlpipelines.yaml"
    script = ROOT / "compose" / "make_workspace.py"
    subprocess.run(
        [sys.executable, script, ROOT / "compose" / "mlpipelines.yaml", target],
        env={**os.environ, **names},
        check=True,
    )
    assert os.listdir(tmp_path) == ["mlpipelines.yaml"]
    return Workspace.from_config(tmp_path).default_compute.spec


def test_steps_are_on_the_network_and_the_image_that_the_file_makes(services, tmp_path):
    text = COMPOSE.read_text()
    given = services["prepare"]["environment"]
    names = {name: given[name] for name in ("STEPS_IMAGE", "STEPS_NETWORK")}
    compute = make_workspace(tmp_path, **names)

    assert compute.image == services["step-image"]["image"]
    assert compute.network_mode == yaml.safe_load(text)["networks"]["steps"]["name"]


def test_every_service_of_airflow_sees_the_workspace_that_prepare_writes(services):
    (command,) = services["prepare"]["command"]
    *_, written = re.findall(r"make_workspace\.py (\S+) (\S+)", command)[0]

    for name, service in services.items():
        if service.get("command", [])[:1] == ["airflow"] and name != "api-server":
            assert service["environment"]["MLPIPELINES_CONFIG"] == written, name
            assert f"workspace:{os.path.dirname(written)}:ro" in service["volumes"], name


def test_steps_reach_no_database_and_no_broker(services):
    on_network = {
        name for name, service in services.items() if "steps" in service.get("networks", ())
    }

    assert on_network == {"s3", "mlflow"}


def test_only_the_worker_has_the_docker_socket(services):
    with_socket = {
        name
        for name, service in services.items()
        if any("docker.sock" in volume for volume in service.get("volumes", []))
    }

    assert with_socket == {"worker"}
    assert "ROOT ON ITS HOST" in COMPOSE.read_text()


def test_files_that_it_mounts_are_there(services):
    for service in services.values():
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            if source.startswith("./"):
                assert (ROOT / source).exists(), source


def test_the_ui_is_published_to_this_machine_only(services):
    published = [port for service in services.values() for port in service.get("ports", [])]

    assert all(port.startswith("127.0.0.1:") for port in published)


def test_compose_itself_accepts_it(env_file):
    done = subprocess.run(
        [*find_compose(), "--env-file", env_file, "-f", COMPOSE, "config", "--quiet"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
