"""Artifact: what some data is. The value that travels between steps."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

from airflow_mlpipelines._digest import DIGEST_PREFIX
from airflow_mlpipelines.exceptions import DataError

if TYPE_CHECKING:
    from collections.abc import Mapping

ARTIFACT_TAG = "$artifact"
ARTIFACT_VERSION = 1

ArtifactKind = Literal["dir", "file", "object"]
_KINDS = ("dir", "file", "object")
_DIGEST = re.compile(r"(blake3:[0-9a-f]{64}|version:[0-9a-f]{64})")


@dataclass(frozen=True, slots=True)
class Artifact:
    """Some immutable data: where it is, and what identifies its content.

    Attributes:
        uri: Where it is: ``<datastore URL>/<path>``.
        digest: ``blake3:`` and 64 hex digits of the content; ``version:`` and 64 hex digits where
            the author asked that the store's own version of the data identifies it.
        size: Bytes in all.
        files: Number of files in all; 1 for a file.
        kind: A directory, a file, or a Python object written as one file.
        media_type: The format of an object, such as ``application/vnd.apache.parquet``.
        step_run: The id of the step run that made it; None for external data.
        version: What the store told of it then, ``version:`` and 64 hex digits; None where nobody but its
            step run writes.
    """

    uri: str
    digest: str
    size: int
    files: int
    kind: ArtifactKind
    media_type: str | None = None
    step_run: str | None = None
    version: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the tagged JSON form, the one in XCom."""
        data: dict[str, Any] = {
            ARTIFACT_TAG: ARTIFACT_VERSION,
            "uri": self.uri,
            "digest": self.digest,
            "size": self.size,
            "files": self.files,
            "kind": self.kind,
        }
        if self.media_type is not None:
            data["media_type"] = self.media_type
        if self.step_run is not None:
            data["step_run"] = self.step_run
        if self.version is not None:
            data["version"] = self.version
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Artifact:
        """Return the artifact that :meth:`to_dict` described.

        Raises:
            DataError: It is none, is of a newer version, or a field is wrong. People can edit XComs.
        """
        if not is_artifact(data):
            raise DataError("not an artifact: the value lacks the tag '$artifact'")
        if data[ARTIFACT_TAG] != ARTIFACT_VERSION:
            raise DataError(
                f"artifact of version {data[ARTIFACT_TAG]!r}; this release reads version "
                f"{ARTIFACT_VERSION}. Upgrade airflow_mlpipelines on this machine."
            )
        uri, digest = data.get("uri"), data.get("digest")
        size, files, kind = data.get("size"), data.get("files"), data.get("kind")
        if not isinstance(uri, str) or not uri:
            raise DataError("artifact without a uri")
        if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
            raise DataError(f"artifact with a malformed digest ({DIGEST_PREFIX}<64 hex> is wanted)")
        if not isinstance(size, int) or not isinstance(files, int) or size < 0 or files < 0:
            raise DataError("artifact whose size or number of files is no count")
        if kind not in _KINDS:
            raise DataError(f"artifact of an unknown kind; known are {_KINDS}")
        optional = [data.get(name) for name in ("media_type", "step_run", "version")]
        if any(value is not None and not isinstance(value, str) for value in optional):
            raise DataError("artifact whose media_type, step_run or version is no string")
        return cls(uri, digest, size, files, cast("ArtifactKind", kind), *optional)


def is_artifact(value: object) -> bool:
    """Whether ``value`` is the JSON form of an artifact, of any version."""
    return isinstance(value, dict) and ARTIFACT_TAG in value
