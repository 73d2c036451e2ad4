"""The page of what a step ran, on a real api-server: who sees it, what it says, how one gets there."""

from __future__ import annotations

import shutil
import time
from urllib.parse import quote

import httpx
import pytest

from tests.parts import missing

pytestmark = pytest.mark.stack

DAG = '''
"""A step whose text wants to be markup. A dag of airflow."""
from airflow_mlpipelines import CommandStep, Pipeline, PipelineData, PipelineParameter, Workspace

word = PipelineParameter("word", "<script>alert(1)</script>")
said = PipelineData("said")
say = CommandStep(["echo", word], name="say")
fail = CommandStep(["sh", "-c", "exit 3"], name="fail")
dag = Pipeline(Workspace.from_config(), [say, fail], name="pages").to_dag()
'''


@pytest.fixture(scope="module")
def run_id(stack, client):
    """A run of the DAG that is over."""
    (stack.dags_folder / "pages.py").write_text(DAG)
    deadline = time.monotonic() + 60
    while client.find_dag("pages") is None:
        assert time.monotonic() < deadline, client.list_import_errors()
        time.sleep(0.2)
    client.unpause("pages")
    run_id = client.trigger("pages")
    while client.get_run("pages", run_id)["state"] not in ("success", "failed"):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    return run_id


@pytest.fixture(scope="module")
def http(stack):
    """A client that has logged in."""
    login = {"username": stack.username, "password": stack.password}
    token = httpx.post(f"{stack.url}/auth/token", json=login).json()["access_token"]
    with httpx.Client(
        base_url=stack.url, headers={"Authorization": f"Bearer {token}"}, timeout=30
    ) as client:
        yield client


def page(run_id, task_id, **query):
    options = "&".join(f"{name}={value}" for name, value in query.items())
    return f"/mlpipelines/step-runs/pages/{quote(run_id, safe='')}/{task_id}?{options}"


def test_nobody_sees_it_without_a_login(stack, run_id):
    assert httpx.get(stack.url + page(run_id, "say")).status_code == 401


def test_airflow_links_each_step_to_its_page(http, run_id):
    links = http.get(f"/api/v2/dags/pages/dagRuns/{run_id}/taskInstances/say/links").json()

    link = links["extra_links"]["What it ran"]
    assert http.get(f"/{link}").status_code == 200


def test_it_says_what_ran_and_why_and_escapes_it(http, run_id):
    text = http.get(page(run_id, "say")).text

    assert "never ran before" in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert "<script" not in text


def test_the_same_comes_as_json(http, run_id):
    facts = http.get(page(run_id, "fail", format="json")).json()

    assert facts["state"] == "failed"
    assert "exit code 3" in facts["reason"]
    assert facts["command"] == "sh -c 'exit 3'"


def test_of_what_never_was_it_says_so(http, run_id):
    answer = http.get(page(run_id, "nobody"))

    assert answer.status_code == 404
    assert "Nothing is known of task" in answer.text
    assert http.get(page(run_id, "nobody", format="json")).json()["detail"]


@pytest.mark.browser
def test_a_person_gets_there_from_the_task(stack, run_id):
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        missing("no chromium")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(
            executable_path=chromium, args=["--no-sandbox", "--disable-gpu", "--headless"]
        )
        try:
            tab = browser.new_page()
            tab.goto(f"{stack.url}/auth/login")
            tab.fill("input[name=username]", stack.username)
            tab.fill("input[name=password]", stack.password)
            tab.keyboard.press("Enter")
            tab.wait_for_url(lambda url: "login" not in url)
            tab.goto(f"{stack.url}/dags/pages/runs/{quote(run_id)}/tasks/say/details")
            tab.get_by_role("link", name="What it ran").click()
            tab.wait_for_url("**/mlpipelines/step-runs/pages/**")

            assert tab.locator("h1").inner_text().startswith("say")
            assert "never ran before" in tab.locator("body").inner_text()
        finally:
            browser.close()
