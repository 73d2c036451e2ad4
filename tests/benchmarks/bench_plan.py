"""What deciding costs: the plan of large pipelines, in an index that remembers many others.

Run: ``python tests/benchmarks/bench_plan.py [--json] [--entries 100000]``. For each shape: the time to
fingerprint, look up and explain every step, the SQL statements, and the size of the plan in XCom.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import tempfile
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from airflow_mlpipelines.caching.decision import Decision, RunPlan
from airflow_mlpipelines.caching.fingerprint import step_fingerprint
from airflow_mlpipelines.caching.index import CacheEntry, MetadataIndex, StepRunRecord
from airflow_mlpipelines.caching.planner import PlanRequest, StepEnvironment, plan_steps
from airflow_mlpipelines.definition.graph import (
    DatastoreSpec,
    InputSpec,
    LocalComputeSpec,
    OutputSpec,
    PipelineGraph,
    StepOutputRef,
    StepSpec,
)
from airflow_mlpipelines.storage.artifact import Artifact

if TYPE_CHECKING:
    from collections.abc import Sequence

LIMIT_SECONDS = {1000: 0.5, 10_000: 5.0}
LIMIT_STATEMENTS = 30
LIMIT_PLAN_BYTES = 500_000
"""For 1000 steps."""


def make_graph(steps: int, width: int) -> PipelineGraph:
    """Return layers of ``width`` steps; each step takes the output of one step of the layer before."""
    specs = []
    for number in range(steps):
        before = f"step_{number - width}"
        inputs = (InputSpec(name="table", source=StepOutputRef(step=before, output="out")),)
        specs.append(
            StepSpec(
                id=f"step_{number}",
                name=f"step_{number}",
                type="CommandStep",
                operator="airflow_mlpipelines.operators.steps:CommandOperator",
                inputs=inputs if number >= width else (),
                outputs=(OutputSpec(name="out", datastore="store"),),
                compute="local",
                params={"number": number},
            )
        )
    return PipelineGraph(
        name=f"bench_{steps}_{width}",
        workspace="bench",
        root="/nowhere",
        default_datastore="store",
        datastores={"store": DatastoreSpec(name="store", url="file:///data/store")},
        computes={"local": LocalComputeSpec(name="local")},
        steps=tuple(specs),
    )


def remember(graph: PipelineGraph, request: PlanRequest, index: MetadataIndex) -> None:
    """Be as after a run of the whole pipeline."""
    digests: dict[str, str] = {}
    entries, runs = [], []
    for number, step in enumerate(graph.steps):
        fingerprint = step_fingerprint(
            step,
            code=None,
            environment=request.environments[step.id].digest,
            parameters={},
            inputs={item.name: digests[item.source.step] for item in step.inputs},
            destinations={name: spec.url for name, spec in graph.datastores.items()},
        )
        digests[step.id] = f"blake3:{number:064x}"
        uri = f"file:///data/store/{graph.name}/{step.id}/mlp-{number:020x}/out"
        output = Artifact(uri, digests[step.id], 1, 1, "file", step_run=f"mlp-{number:020x}")
        common: dict[str, Any] = {
            "fingerprint": fingerprint.digest,
            "pipeline": graph.name,
            "step": step.id,
            "outputs": {"out": output},
            "ingredients": fingerprint.ingredients,
            "seconds": 1.0,
            "step_run": f"mlp-{number:020x}",
        }
        entries.append(CacheEntry(step_type=step.type, writer="bench", **common))
        runs.append(
            StepRunRecord(
                dag_id=graph.name, run_id="1", task_id=step.id, state="ran", reason="", **common
            )
        )
    index.put_entries(entries)
    index.record_step_runs(runs)


def fill(index: MetadataIndex, entries: int) -> None:
    """Let the index remember many other entries and runs."""
    with index.engine.begin() as connection:
        connection.execute(
            sa.text(
                "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < :count) "
                "INSERT INTO mlp_cache_entries SELECT printf('f%063x', i), 'other_' || (i % 100), "
                "'step_' || (i % 1000), 'CommandStep', '{}', '{}', 1.0, 'bench', 'mlp-' || i, i FROM n"
            ),
            {"count": entries},
        )


def measure(steps: int, width: int, change: str, entries: int, rounds: int) -> dict[str, Any]:
    """Return the figures of one shape."""
    with tempfile.TemporaryDirectory() as home:
        index = MetadataIndex(f"sqlite:///{home}/metadata.db")
        fill(index, entries)
        graph = make_graph(steps, width)
        request = PlanRequest(
            graph=graph,
            parameters={},
            code=dict.fromkeys(step.id for step in graph.steps),
            environments={step.id: StepEnvironment("e" * 64) for step in graph.steps},
            external={},
            snapshots={},
        )
        remember(graph, request, index)
        if change == "everything":
            changed = {step.id: StepEnvironment("f" * 64) for step in graph.steps}
            request = replace(request, environments=changed)
        statements: list[str] = []
        sa.event.listen(
            index.engine, "before_cursor_execute", lambda *call: statements.append(call[2])
        )
        times, plan = [], None
        for _ in range(rounds):
            statements.clear()
            started = time.perf_counter()
            plan = plan_steps(request, index=index, verify=_all_there)
            times.append(time.perf_counter() - started)
        assert plan is not None
        reused = sum(item.decision is Decision.REUSE for item in plan.steps.values())
        assert reused == (steps if change == "nothing" else 0)
        return {
            "steps": steps,
            "layers": steps // width,
            "changed": change,
            "seconds": round(statistics.median(times), 3),
            "limit_seconds": LIMIT_SECONDS[steps],
            "statements": sum(text.startswith(("SELECT", "WITH")) for text in statements),
            "plan_bytes": _size(plan),
        }


def _all_there(_artifacts: Sequence[Artifact]) -> list[tuple[Artifact, str]]:
    """Find every output in its place: what stores cost is measured elsewhere."""
    return []


def _size(plan: RunPlan) -> int:
    return len(json.dumps(plan.to_dict()))


def main() -> int:
    """Print the figures; return 1 if one is over its limit."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--entries", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()

    shapes = [(1000, 1000), (1000, 100), (1000, 1), (10_000, 10_000), (10_000, 500), (10_000, 1)]
    good = True
    for steps, width in shapes:
        for change in ("nothing", "everything"):
            result = measure(steps, width, change, args.entries, args.rounds)
            result["peak_rss_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
            good = good and result["seconds"] <= result["limit_seconds"]
            good = good and result["statements"] <= LIMIT_STATEMENTS
            good = good and (steps > 1000 or result["plan_bytes"] <= LIMIT_PLAN_BYTES)
            print(
                json.dumps(result)
                if args.json
                else "  ".join(f"{k}={v}" for k, v in result.items())
            )
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
