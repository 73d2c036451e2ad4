"""The kinds of stores that a datastore's URL can name, and how each behaves."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Protocol:
    """One kind of store.

    Attributes:
        name: For people.
        extra: The extra of this package that installs its driver; None where none is needed.
        read_only: Whether nothing can be written there.
        whole_objects: Whether a file is visible there only when it is whole, and directories are only
            names. Elsewhere a file is written under another name first, in a directory that is made.
        copies: Whether the store copies within itself. Other drivers have a copy that goes through here.
        buckets: Whether the first part of a path is a bucket or container, which has to be there.
        per_thread: Whether every thread needs a connection of its own.
        ranges: Whether any part of a file can be read, with certainty.
    """

    name: str
    extra: str | None = None
    read_only: bool = False
    whole_objects: bool = False
    copies: bool = False
    buckets: bool = False
    per_thread: bool = False
    ranges: bool = True


_S3 = Protocol("S3", "s3", whole_objects=True, copies=True, buckets=True)
_GCS = Protocol("Google Cloud Storage", "gcs", whole_objects=True, copies=True, buckets=True)
_AZURE = Protocol("Azure Blob Storage", "azure", whole_objects=True, copies=True, buckets=True)
_HDFS = Protocol("HDFS", "hdfs")
_WEBHDFS = Protocol("WebHDFS", "http")
_SFTP = Protocol("SFTP", "sftp", per_thread=True)
_HTTP = Protocol("HTTP", "http", read_only=True, ranges=False)
_UNKNOWN = Protocol("a store of fsspec's")

PROTOCOLS = {
    "file": Protocol("a directory"),
    "s3": _S3,
    "s3a": _S3,
    "gs": _GCS,
    "gcs": _GCS,
    "abfs": _AZURE,
    "abfss": _AZURE,
    "az": _AZURE,
    "hdfs": _HDFS,
    "webhdfs": _WEBHDFS,
    "sftp": _SFTP,
    "ssh": _SFTP,
    "http": _HTTP,
    "https": _HTTP,
    "memory": Protocol("memory of this process", copies=True),
}
"""By the scheme of the URL. Others that fsspec knows work too, without what is said here."""


def scheme_of(url: str) -> str:
    """Return the scheme of a URL: what stands before ``://``."""
    return url.partition("://")[0].lower()


def find_protocol(url: str) -> Protocol:
    """Return how the store of a URL behaves."""
    return PROTOCOLS.get(scheme_of(url), _UNKNOWN)
