"""The cluster that the tests run on does what the tests of steps on it rely on."""

from __future__ import annotations

import http.server
import threading
from base64 import b64encode

import pytest

from tests.integration.kubernetes.conftest import GPU, PYTHON

pytestmark = pytest.mark.kubernetes


def test_a_pod_runs_and_its_log_is_read(cluster, pods):
    name = pods.start("python3", "-c", "print('grüße'); raise SystemExit(3)", image=PYTHON)

    pod = cluster.wait_for_phase(name, "Succeeded", "Failed")

    assert pod.status.container_statuses[0].state.terminated.exit_code == 3
    assert cluster.read_log(name) == "grüße\n"


def test_a_pod_that_takes_more_memory_than_its_limit_is_killed(cluster, pods):
    take = ("dd", "if=/dev/zero", "of=/dev/null", "bs=100M", "count=1")
    large, small = (
        pods.start(*take, limits={"memory": "200Mi"}),
        pods.start(*take, limits={"memory": "32Mi"}),
    )

    assert cluster.wait_for_phase(large, "Succeeded", "Failed").status.phase == "Succeeded"
    pod = cluster.wait_for_phase(small, "Succeeded", "Failed")

    ended = pod.status.container_statuses[0].state.terminated
    assert (ended.reason, ended.exit_code) == ("OOMKilled", 137)


def test_a_pod_waits_until_another_gives_its_gpus_back(cluster, pods, gpus):
    first = pods.start("sleep", "600", limits={GPU: str(gpus)})
    cluster.wait_for_phase(first, "Running")

    second = pods.start("true", limits={GPU: str(gpus)})
    waits = cluster.wait_for_condition(second, "PodScheduled", "False")
    assert waits.reason == "Unschedulable"
    assert f"Insufficient {GPU}" in waits.message
    assert cluster.read_pod(second).status.phase == "Pending"

    pods.delete(first)
    cluster.wait_for_phase(second, "Succeeded")


def test_a_pod_that_wants_more_gpus_than_the_node_has_never_starts(cluster, pods, gpus):
    name = pods.start("true", limits={GPU: str(gpus * 4)})

    waits = cluster.wait_for_condition(name, "PodScheduled", "False")

    assert waits.reason == "Unschedulable"
    assert f"Insufficient {GPU}" in waits.message


def test_a_pod_finds_another_by_the_name_of_its_service(cluster, pods):
    server = pods.start(
        *("sh", "-c", "mkdir /www && echo found >/www/index.html && exec httpd -f -p 8080 -h /www"),
        labels={"app": "finder"},
        readinessProbe={"httpGet": {"path": "/", "port": 8080}, "periodSeconds": 1},
    )
    ports = [{"port": 80, "targetPort": 8080}]
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "finder"},
        "spec": {"selector": {"app": "finder"}, "ports": ports},
    }
    cluster.create(service)
    try:
        cluster.wait_for_condition(server, "Ready", "True")
        # The node's rules follow the pod's readiness within a second.
        ask = (
            "for _ in 1 2 3 4 5 6 7 8; do timeout 2 wget -qO- http://finder && exit; sleep 1; done;"
            "exit 1"
        )

        client = pods.start("sh", "-c", ask)

        assert cluster.wait_for_phase(client, "Succeeded", "Failed").status.phase == "Succeeded"
        assert cluster.read_log(client).endswith("found\n")
    finally:
        cluster.core.delete_namespaced_service("finder", cluster.namespace)


def test_a_pod_reads_a_secret_from_a_file_and_from_its_environment(cluster, pods):
    password = {"password": b64encode(b"s3cret").decode()}
    cluster.create(
        {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "login"}, "data": password}
    )
    try:
        name = pods.start(
            *("sh", "-c", 'cat /login/password; echo; echo "$PASSWORD"; mount | grep " /login "'),
            volumes=({"name": "login", "secret": {"secretName": "login"}},),
            volumeMounts=[{"name": "login", "mountPath": "/login"}],
            env=[
                {
                    "name": "PASSWORD",
                    "valueFrom": {"secretKeyRef": {"name": "login", "key": "password"}},
                }
            ],
        )

        cluster.wait_for_phase(name, "Succeeded", "Failed")

        file, variable, mount = cluster.read_log(name).splitlines()
        assert (file, variable) == ("s3cret", "s3cret")
        assert "tmpfs" in mount  # never on a disk
    finally:
        cluster.core.delete_namespaced_secret("login", cluster.namespace)


def test_a_pod_reaches_a_server_of_this_machine(cluster, pods):
    if cluster.host_address is None:
        pytest.skip("not known how pods of this cluster reach this machine")

    class Hello(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"hello\n")

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer((cluster.host_address, 0), Hello) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            url = f"http://{cluster.host_address}:{server.server_port}/"
            name = pods.start("timeout", "10", "wget", "-qO-", url)

            cluster.wait_for_phase(name, "Succeeded", "Failed")

            assert cluster.read_log(name) == "hello\n"
        finally:
            server.shutdown()
