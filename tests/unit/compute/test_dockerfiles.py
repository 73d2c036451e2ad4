"""The images that a Dockerfile starts from."""

from __future__ import annotations

import pytest

from airflow_mlpipelines.compute.dockerfiles import find_bases, pin_bases

DOCKERFILE = """\
# syntax=docker/dockerfile:1
ARG VERSION=3.12
ARG REPO="team"
FROM --platform=linux/amd64 python:${VERSION}-slim AS build
ARG VERSION=9
RUN echo \\
    # a comment
FROM nothing
RUN <<EOF
FROM nowhere
EOF
COPY --from=build /a /b
COPY --chown=1 --from=ghcr.io/${REPO:-x}/tools:1 /c /d
COPY --from=0 /e /f
RUN --mount=type=cache,target=/x --mount=type=bind,from=ghcr.io/astral-sh/uv:1,source=/uv,target=/uv \\
    --mount=from=build,target=/b --network=none \\
    --mount=from=busybox,target=/c \\
    echo --mount=from=nothing
from build as last
FROM scratch
FROM ${UNKNOWN}
"""


def test_bases_are_what_is_started_from_or_copied_from() -> None:
    assert find_bases(DOCKERFILE) == [
        "python:3.12-slim",
        "ghcr.io/team/tools:1",
        "ghcr.io/astral-sh/uv:1",
        "busybox",
        "${UNKNOWN}",
    ]


def test_pinning_changes_the_names_of_bases_and_nothing_else() -> None:
    pinned = pin_bases(
        DOCKERFILE,
        {
            "python:3.12-slim": "python@sha256:1",
            "ghcr.io/team/tools:1": "tools@sha256:2",
            "ghcr.io/astral-sh/uv:1": "uv@sha256:3",
        },
    )
    assert "--mount=type=bind,from=uv@sha256:3,source=/uv,target=/uv \\\n" in pinned
    assert "FROM --platform=linux/amd64 python@sha256:1 AS build\n" in pinned
    assert "COPY --chown=1 --from=tools@sha256:2 /c /d\n" in pinned
    changed = [
        line
        for line, was in zip(pinned.splitlines(), DOCKERFILE.splitlines(), strict=True)
        if line != was
    ]
    assert len(changed) == 3


@pytest.mark.parametrize("text", ["", "RUN x\n", "FROM scratch\n"])
def test_a_dockerfile_may_have_no_base(text: str) -> None:
    assert find_bases(text) == []
