"""Requests to an S3 server for the bytes of objects, signed and sent without the client library between.

For each request botocore takes five times the processor time, which with thousands of small files decides how long
a transfer takes (docs/decisions/s3-requests.md). Only what is plain is served here. A proxy, requester pays,
an answer that is none of the expected ones: :class:`NotServedError` says that s3fs is to be asked, which knows all of it.
"""

from __future__ import annotations

import hashlib
import hmac
import http.client
import os
import ssl
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import quote, urlsplit
from weakref import WeakKeyDictionary

from airflow_mlpipelines.exceptions import DataError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from airflow_mlpipelines.storage.parts import Part
    from airflow_mlpipelines.storage.stores import Store

_PROBE = "mlpipelines-probe"
_TIMEOUT_SECONDS = 60.0
_CREDENTIALS_SECONDS = 60.0
_OK, _PARTIAL, _NOT_FOUND, _CHANGED, _TOO_MANY = 200, 206, 404, 412, 429
_SERVER_ERRORS = 500


class NotServedError(Exception):
    """The request has to be made through s3fs."""


class ChangedError(DataError):
    """An object is not the one that was listed."""


class _Answer(NamedTuple):
    status: int
    etag: str
    body: bytearray


class _Credentials(NamedTuple):
    access_key: str
    secret_key: str
    token: str | None


class S3Requests:
    """Reads and writes the objects of one datastore. Any number of threads may use it at once."""

    def __init__(self, store: Store) -> None:
        """Learn how the store is asked.

        Raises:
            NotServedError: It is one that this module does not serve.
        """
        from fsspec.asyn import sync

        filesystem: Any = store.filesystem
        self._filesystem = filesystem
        bucket = store.remote_path("").partition("/")[0]
        client = sync(filesystem.loop, filesystem.get_s3, bucket)
        config = client.meta.config
        self._signer = client._request_signer  # noqa: SLF001 - where s3fs' settings and the session's come together
        if (
            self._signer._credentials is None  # noqa: SLF001
            or (config.signature_version or "s3v4") != "s3v4"
            or config.proxies
            or filesystem.req_kw
            or filesystem.s3_additional_kwargs
        ):
            raise NotServedError
        url = urlsplit(filesystem.url(f"{bucket}/{_PROBE}").partition("?")[0])
        if not url.path.endswith(f"/{_PROBE}") or url.hostname is None or _has_proxy(url.hostname):
            raise NotServedError
        self._host, self._address = url.netloc, (url.hostname, url.port)
        self._base = url.path.removesuffix(_PROBE)
        self._context = _make_context(filesystem) if url.scheme == "https" else None
        self._region = client.meta.region_name or "us-east-1"
        self._bucket = bucket
        self._idle: deque[http.client.HTTPConnection] = deque()
        self._lock = threading.Lock()
        self._known: tuple[float, _Credentials] | None = None
        self._key: tuple[str, str, bytes] | None = None
        self._refused = False

    def read(self, path: str, part: Part, *, whole: bool, etag: str | None) -> bytearray:
        """Return a part of an object.

        Args:
            path: Bucket and key.
            part: Which one.
            whole: Whether it is all of the object.
            etag: The version of the object that is wanted, as the server tells it.

        Raises:
            NotServedError: It can't be read this way.
            ChangedError: The object has another version, or another size.
        """
        headers = {} if etag is None else {"If-Match": etag}
        if not whole:
            headers["Range"] = f"bytes={part.start}-{part.start + part.size - 1}"
        answer = self._ask("GET", path, headers=headers, size=part.size)
        if answer.status == _CHANGED:
            raise ChangedError(f"s3://{path} was changed while it was read. Start a new run.")
        if answer.status != (_OK if whole else _PARTIAL):
            self._give_up(answer.status)
        return answer.body

    def write(
        self,
        path: str,
        data: bytes | bytearray,
        *,
        query: Mapping[str, str] | None = None,
        content_type: str | None = None,
    ) -> str:
        """Write an object, or with a query one part of it; return the etag that the server told.

        Raises:
            NotServedError: It can't be written this way.
        """
        headers = {} if content_type is None else {"Content-Type": content_type}
        answer = self._ask("PUT", path, headers=headers, data=data, query=query)
        if answer.status != _OK or not answer.etag:
            self._give_up(answer.status)
        return answer.etag

    def _give_up(self, status: int) -> None:
        """Raise; and if the server would refuse other requests alike, ask it nothing more."""
        if status not in (_NOT_FOUND, _TOO_MANY) and status < _SERVER_ERRORS:
            self._refused = True
        raise NotServedError(f"the server answered {status}")

    # ---- HTTP ------------------------------------------------------------------------------

    def _ask(
        self,
        method: str,
        path: str,
        *,
        headers: dict[str, str],
        data: bytes | bytearray = b"",
        query: Mapping[str, str] | None = None,
        size: int = 0,
    ) -> _Answer:
        bucket, _, key = path.partition("/")
        if self._refused or bucket != self._bucket or "?versionId=" in key:
            raise NotServedError
        place = self._base + quote(key, safe="/~")
        asked = "&".join(
            f"{quote(name, safe='~')}={quote(value, safe='~')}"
            for name, value in sorted((query or {}).items())
        )
        headers |= self._sign(method, place, asked, hashlib.sha256(data).hexdigest())
        target = f"{place}?{asked}" if asked else place
        while True:
            try:
                connection, fresh = self._idle.pop(), False
            except IndexError:
                connection, fresh = self._connect(), True
            try:
                connection.request(method, target, body=data or None, headers=headers)
                answer, again = _take(connection.getresponse(), size)
            except (OSError, http.client.HTTPException) as error:
                connection.close()
                if fresh:
                    raise NotServedError(str(error)) from error
                continue  # the server has closed a connection that lay idle
            if again:
                self._idle.append(connection)
            else:
                connection.close()
            return answer

    def _connect(self) -> http.client.HTTPConnection:
        host, port = self._address
        if self._context is None:
            return http.client.HTTPConnection(host, port, timeout=_TIMEOUT_SECONDS)
        return http.client.HTTPSConnection(
            host, port, timeout=_TIMEOUT_SECONDS, context=self._context
        )

    # ---- AWS's signature, version 4 --------------------------------------------------------

    def _sign(self, method: str, place: str, asked: str, content: str) -> dict[str, str]:
        """Return the headers that say who asks."""
        own = self._credentials()
        now = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        signed = {"host": self._host, "x-amz-content-sha256": content, "x-amz-date": now}
        if own.token:
            signed["x-amz-security-token"] = own.token
        names = ";".join(signed)
        lines = "".join(f"{name}:{value}\n" for name, value in signed.items())
        request = f"{method}\n{place}\n{asked}\n{lines}\n{names}\n{content}"
        scope = f"{now[:8]}/{self._region}/s3/aws4_request"
        digest = hashlib.sha256(request.encode()).hexdigest()
        text = f"AWS4-HMAC-SHA256\n{now}\n{scope}\n{digest}"
        signature = hmac.digest(self._signing_key(own, now[:8]), text.encode(), "sha256").hex()
        del signed["host"]  # which the HTTP library writes itself
        credential = f"Credential={own.access_key}/{scope}"
        signed["Authorization"] = (
            f"AWS4-HMAC-SHA256 {credential}, SignedHeaders={names}, Signature={signature}"
        )
        return signed

    def _signing_key(self, own: _Credentials, day: str) -> bytes:
        known = self._key
        if known is not None and known[:2] == (day, own.secret_key):
            return known[2]
        key = f"AWS4{own.secret_key}".encode()
        for text in (day, self._region, "s3", "aws4_request"):
            key = hmac.digest(key, text.encode(), "sha256")
        self._key = day, own.secret_key, key
        return key

    def _credentials(self) -> _Credentials:
        """Return them as they are now: those of a role are renewed by whoever gave them to us."""
        from fsspec.asyn import sync

        known = self._known
        if known is not None and time.monotonic() - known[0] < _CREDENTIALS_SECONDS:
            return known[1]
        with self._lock:
            source = self._signer._credentials  # noqa: SLF001
            frozen = sync(self._filesystem.loop, source.get_frozen_credentials)
            found = _Credentials(frozen.access_key, frozen.secret_key, frozen.token)
            self._known = time.monotonic(), found
        return found


def _take(response: http.client.HTTPResponse, size: int) -> tuple[_Answer, bool]:
    """Return what the server answered, and whether its connection can be used again."""
    status, length = response.status, response.length
    if status not in (_OK, _PARTIAL):
        response.read()
        return _Answer(status, "", bytearray()), not response.will_close
    if size and length is not None and length != size:
        return _Answer(_CHANGED, "", bytearray()), False
    body = bytearray(size)
    view, got = memoryview(body), 0
    while got < size:
        count = response.readinto(view[got:])
        if not count:
            raise http.client.IncompleteRead(b"", size - got)
        got += count
    response.read()
    return _Answer(status, response.getheader("ETag", ""), body), not response.will_close


def _has_proxy(host: str) -> bool:
    from urllib.request import getproxies, proxy_bypass

    return bool({"http", "https", "all"} & getproxies().keys()) and not proxy_bypass(host)


def _make_context(filesystem: Any) -> ssl.SSLContext:
    from botocore.httpsession import where  # type: ignore[import-untyped]

    verify = filesystem.client_kwargs.get("verify")
    if verify is False:
        raise NotServedError
    bundle = verify if isinstance(verify, str) else os.environ.get("AWS_CA_BUNDLE")
    return ssl.create_default_context(cafile=bundle or where())


_requests: WeakKeyDictionary[Store, S3Requests | None] = WeakKeyDictionary()


def find_requests(store: Store) -> S3Requests | None:
    """Return what asks this datastore, or None if only its fsspec driver can."""
    if store not in _requests:
        found = None
        if store.protocol.name == "S3":
            try:
                found = S3Requests(store)
            except (NotServedError, AttributeError):  # or an s3fs whose inside is another one
                found = None
        _requests[store] = found
    return _requests[store]
