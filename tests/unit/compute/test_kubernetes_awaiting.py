"""A trigger and an API server that breaks off, forgets and refuses: what a real one does too seldom to wait for."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from aiohttp import web

from airflow_mlpipelines.compute.kubernetes import awaiting
from airflow_mlpipelines.compute.kubernetes.async_cluster import AsyncCluster
from airflow_mlpipelines.compute.kubernetes.awaiting import PodAwaiter, remove_pods
from airflow_mlpipelines.compute.kubernetes.detaching import Awaited, PodNews, Reason
from tests.unit.compute.test_kubernetes_deferral import WATCH, make_pod

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from pathlib import Path

RUNNING = {"running": {"startedAt": "2100-01-01T00:00:00Z"}}  # its time is never up
ENDED = {"terminated": {"exitCode": 0}}
PODS = "/api/v1/namespaces/ml/pods"


class ApiServer:
    """Answers for one pod, as a test tells it to.

    Attributes:
        watches: What each watch tells, one after the other; the last one stays open.
        watch_seconds: How long the others stay open after what they tell.
        refusals: The statuses of the first answers.
        token: Who may ask.
    """

    def __init__(self, kubeconfig: Path) -> None:
        self.kubeconfig = kubeconfig
        self.stage: dict[str, Any] = ENDED
        self.step: dict[str, Any] = RUNNING
        self.watches: list[list[dict[str, Any]]] = []
        self.refusals: list[int] = []
        self.watch_seconds = 0.0
        self.token = "first"
        self.on_refusal: Callable[[], None] = lambda: None
        self.asked: list[str] = []
        self.deleted: list[str] = []
        self.contacted: set[str] = set()
        self.owner = ""

    def pod(self) -> dict[str, Any]:
        pod = make_pod(stage=self.stage, step=self.step)
        pod["metadata"]["annotations"] = {"airflow-mlpipelines.owner": self.owner}
        return pod

    def write_kubeconfig(self, token: str, port: int) -> None:
        self._port = port
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "c", "cluster": {"server": f"http://127.0.0.1:{port}"}}],
            "users": [{"name": "u", "user": {"token": token}}],
            "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
            "current-context": "x",
        }
        self.kubeconfig.write_text(yaml.safe_dump(config))

    def renew(self) -> None:
        self.write_kubeconfig(self.token, self._port)

    async def answer(self, request: web.Request) -> web.StreamResponse:
        self.asked.append(f"{request.method} {request.path.rpartition('/')[2]}")
        if request.headers.get("authorization") != f"Bearer {self.token}":
            self.on_refusal()
            return web.json_response({"message": "Unauthorized"}, status=401)
        if self.refusals:
            return web.json_response({"message": "not now"}, status=self.refusals.pop(0))
        if request.method == "DELETE":
            self.deleted.append(request.path.rpartition("ml/")[2])
            return web.json_response({})
        if request.method == "PATCH":
            body = json.loads(await request.text())
            self.owner = body["metadata"]["annotations"]["airflow-mlpipelines.owner"]
            return web.json_response({})
        if request.path.endswith("/exec"):
            self.contacted.add(request.query["container"])
            return web.json_response({"message": "no container runs"}, status=400)
        if request.path.endswith("/log"):
            return web.Response(body=b"")
        if "watch" in request.query:
            return await self._watch(request)
        listed = {"metadata": {"resourceVersion": "7"}, "items": [self.pod()]}
        return web.json_response(listed)

    async def _watch(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        changes = self.watches.pop(0) if self.watches else None
        for change in changes or ():
            await response.write(json.dumps(change).encode() + b"\n")
        if changes is None:
            await asyncio.sleep(60)
        await asyncio.sleep(self.watch_seconds)
        return response


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ApiServer:
    made = ApiServer(tmp_path / "kubeconfig")
    monkeypatch.setenv("KUBECONFIG", str(made.kubeconfig))
    monkeypatch.setattr(awaiting, "_FIRST_PAUSE", 0.01)
    return made


async def serve(server: ApiServer, work: Coroutine[Any, Any, Any]) -> Any:
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", server.answer)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    server.write_kubeconfig("first", site._server.sockets[0].getsockname()[1])
    try:
        return await asyncio.wait_for(work, 30)
    finally:
        await runner.cleanup()


def wait(server: ApiServer, token: str = "mine") -> PodNews:
    watch = replace(WATCH, conn_id=None, in_cluster=False)
    return asyncio.run(serve(server, PodAwaiter(watch, print, token=token).wait()))


def change(kind: str, step: dict[str, Any]) -> dict[str, Any]:
    return {"type": kind, "object": make_pod(stage=ENDED, step=step)}


def test_it_takes_the_pod_over_and_sees_the_end_in_one_watch(server: ApiServer) -> None:
    server.watches = [[change("MODIFIED", RUNNING), change("MODIFIED", ENDED)]]
    assert wait(server).reason is Reason.ENDED
    assert server.owner == "mine"
    assert [asked for asked in server.asked if not asked.endswith("log")] == [
        "GET pods",
        "PATCH mlp-1",
        "GET pods",
    ]


def test_a_version_that_is_too_old_is_looked_up_anew(server: ApiServer) -> None:
    gone = {"type": "ERROR", "object": {"kind": "Status", "code": 410, "reason": "Expired"}}
    server.watches = [[gone], [change("MODIFIED", ENDED)]]
    assert wait(server).reason is Reason.ENDED
    assert server.asked.count("GET pods") == 4


def test_a_deleted_pod_is_told_with_what_was_seen_last(server: ApiServer) -> None:
    deleted = change("DELETED", RUNNING)
    deleted["object"]["status"]["conditions"].append(
        {"type": "DisruptionTarget", "status": "True", "reason": "PreemptionByScheduler"}
    )
    server.watches = [[deleted]]
    news = wait(server)
    assert news.reason is Reason.GONE
    assert "PreemptionByScheduler" in str(news.pods["mlp-1"])


def test_a_server_that_is_not_well_is_waited_for(server: ApiServer) -> None:
    server.refusals = [500, 429, 503]
    server.watches = [[], [change("MODIFIED", ENDED)]]
    assert wait(server).reason is Reason.ENDED


def test_a_token_that_was_renewed_is_read_anew(server: ApiServer) -> None:
    server.token = "second"
    server.on_refusal = server.renew
    server.watches = [[change("MODIFIED", ENDED)]]
    assert wait(server).reason is Reason.ENDED


def test_a_renewed_token_breaks_nothing_that_goes_on_beside_it(server: ApiServer) -> None:
    watch = replace(WATCH, conn_id=None, in_cluster=False)
    began = asyncio.Event()

    async def follow(cluster: AsyncCluster) -> bytes:
        async with cluster.open("pods", query={"watch": "true"}, silence=20) as pieces:
            began.set()
            return b"".join([piece async for piece in pieces])

    async def work() -> tuple[list[Any], bytes]:
        async with AsyncCluster(watch.access) as cluster:
            following = asyncio.create_task(follow(cluster))
            await began.wait()
            server.token, server.on_refusal = "second", server.renew
            answers = [cluster.ask("GET", "pods") for _ in range(20)]
            return await asyncio.gather(*answers), await following

    server.watches, server.watch_seconds = [[change("MODIFIED", ENDED)]], 2.0
    answers, followed = asyncio.run(serve(server, work()))
    assert len(answers) == 20
    assert b"MODIFIED" in followed


def test_a_token_that_stays_expired_calls_for_a_worker(
    server: ApiServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(awaiting, "REFUSED_SECONDS", 0.2)
    server.token = "another"
    news = wait(server)
    assert news.reason is Reason.UNSEEN
    assert news.message.startswith("401")


def test_a_triggerer_without_a_way_to_the_cluster_calls_for_a_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "nowhere"))
    watch = replace(WATCH, conn_id=None, in_cluster=False)
    news = asyncio.run(PodAwaiter(watch, print).wait())
    assert news.reason is Reason.UNSEEN
    assert "no way to its Kubernetes cluster" in news.message


@pytest.mark.parametrize(("awaits", "helper"), [("files", "stage"), ("end", "outputs")])
def test_the_helper_that_runs_hears_that_somebody_will_come(
    server: ApiServer, monkeypatch: pytest.MonkeyPatch, awaits: str, helper: str
) -> None:
    monkeypatch.setattr(awaiting, "_FIRST_CONTACT_SECONDS", (0.0, 0.0))
    server.stage = {"waiting": {}} if awaits == "files" else ENDED
    came = make_pod(stage=RUNNING if awaits == "files" else ENDED, step=ENDED)
    server.watches = [[], [{"type": "MODIFIED", "object": came}]]
    server.watch_seconds = 1.0
    watch = replace(WATCH, conn_id=None, in_cluster=False, awaits=Awaited(awaits))
    watch = replace(watch, startup_seconds=1e9)
    news = asyncio.run(serve(server, PodAwaiter(watch, print, token="mine").wait()))
    assert news.reason in (Reason.READY, Reason.ENDED)
    assert server.contacted == {helper}


def test_only_who_owns_a_pod_removes_it(server: ApiServer) -> None:
    watch = replace(WATCH, conn_id=None, in_cluster=False)
    server.owner = "somebody else"
    assert asyncio.run(serve(server, remove_pods(watch, token="mine"))) is False
    assert server.deleted == []
    server.owner = "mine"
    assert asyncio.run(serve(server, remove_pods(watch, token="mine"))) is True
    assert server.deleted == ["pods/mlp-1", "secrets/mlp-1"]
