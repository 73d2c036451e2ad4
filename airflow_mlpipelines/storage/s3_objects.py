"""The bytes of S3 objects, through obstore instead of s3fs.

For each request s3fs and botocore take five times the processor time, which with thousands of small files decides how
long a transfer takes (docs/decisions/s3-objects.md). Only what is plain is served here; :class:`NotServedError` says that
s3fs is to be asked, which knows the rest.
"""

from __future__ import annotations

import os
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any
from urllib.request import getproxies, proxy_bypass
from weakref import WeakKeyDictionary

from airflow_mlpipelines.exceptions import DataError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from obstore import GetOptions
    from obstore.store import S3Credential, S3Store

    from airflow_mlpipelines.storage.parts import Part
    from airflow_mlpipelines.storage.stores import Store

_CREDENTIALS_KEPT = timedelta(seconds=60)
_CONNECT_TIMEOUT = timedelta(seconds=10)
_TIMEOUT = timedelta(seconds=120)
_TRIES = 2
_PLAIN_SIGNATURES = (None, "s3v4")


class NotServedError(Exception):
    """The request has to be made through s3fs."""


class ChangedError(DataError):
    """An object is not the one that was listed."""


class S3Objects:
    """Reads and writes the objects of one datastore. Any number of threads may use it at once."""

    def __init__(self, store: Store) -> None:
        """Prepare to ask as the store's filesystem does; nothing is asked yet.

        Raises:
            NotServedError: Its settings are none that this module serves.
        """
        self._bucket = store.remote_path("").partition("/")[0]
        self._objects = _open(store.filesystem, self._bucket)
        self._refused = False

    def read(self, path: str, part: Part, *, whole: bool, etag: str | None) -> memoryview:
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
        import obstore

        options: GetOptions = {}
        if etag is not None:
            options["if_match"] = etag
        if not whole:
            options["range"] = (part.start, part.start + part.size)
        with self._translate_errors(path):
            answer = obstore.get(self._objects, self._key(path), options=options)
            data = memoryview(answer.bytes())
        if len(data) != part.size:
            raise _changed(path)
        return data

    def write(self, path: str, data: bytes, *, content_type: str | None = None) -> None:
        """Write an object.

        Raises:
            NotServedError: It can't be written this way.
        """
        import obstore

        kind = {"Content-Type": content_type} if content_type is not None else {}
        with self._translate_errors(path):
            obstore.put(self._objects, self._key(path), data, attributes=kind, use_multipart=False)

    def _key(self, path: str) -> str:
        bucket, _, key = path.partition("/")
        if self._refused or bucket != self._bucket or "?versionId=" in key:
            raise NotServedError
        return key

    @contextmanager
    def _translate_errors(self, path: str) -> Iterator[None]:
        """After a refusal, which other requests would meet as well, nothing more is asked."""
        from obstore.exceptions import BaseError, NotFoundError, PreconditionError

        try:
            yield
        except PreconditionError as error:
            raise _changed(path) from error
        except NotFoundError as error:
            raise NotServedError from error
        except BaseError as error:
            self._refused = True
            raise NotServedError(str(error)) from error


def _changed(path: str) -> ChangedError:
    return ChangedError(f"s3://{path} was changed while it was read. Start a new run.")


def _open(filesystem: Any, bucket: str) -> S3Store:
    """Return the bucket as obstore sees it, with address, region and credentials of the s3fs filesystem."""
    from obstore.store import S3Store

    client = filesystem.connect()
    config, endpoint = client.meta.config, client.meta.endpoint_url
    secure = endpoint.startswith("https:")
    own_certificates = filesystem.client_kwargs.get("verify") or os.environ.get("AWS_CA_BUNDLE")
    host = endpoint.partition("://")[2].partition("/")[0].partition(":")[0]
    if (
        filesystem.anon
        or filesystem.req_kw
        or filesystem.s3_additional_kwargs
        or (config.signature_version or None) not in _PLAIN_SIGNATURES
        or (secure and own_certificates)
        or _has_proxy(host, config)
    ):
        raise NotServedError
    return S3Store(
        bucket,
        config={
            "endpoint": endpoint,
            "region": client.meta.region_name or "us-east-1",
            "virtual_hosted_style_request": False,
        },
        client_options={
            "allow_http": not secure,
            "allow_invalid_certificates": filesystem.client_kwargs.get("verify") is False,
            "connect_timeout": _CONNECT_TIMEOUT,
            "timeout": _TIMEOUT,
        },
        retry_config={"max_retries": _TRIES, "retry_timeout": _TIMEOUT},
        credential_provider=_credentials_of(filesystem),
    )


def _credentials_of(filesystem: Any) -> Callable[[], S3Credential]:
    """Return what gives the credentials as they are now: those of a role are renewed by the session."""
    from fsspec.asyn import sync

    async def ask_session() -> S3Credential:
        found = await filesystem.session.get_credentials()
        frozen = await found.get_frozen_credentials()
        return _credential(frozen.access_key, frozen.secret_key, frozen.token)

    def provide() -> S3Credential:
        if filesystem.key and filesystem.secret:
            return _credential(filesystem.key, filesystem.secret, filesystem.token)
        given: S3Credential = sync(filesystem.loop, ask_session)
        return given

    return provide


def _credential(key: str, secret: str, token: str | None) -> S3Credential:
    return {
        "access_key_id": key,
        "secret_access_key": secret,
        "token": token,
        "expires_at": datetime.now(UTC) + _CREDENTIALS_KEPT,
    }


def _has_proxy(host: str, config: Any) -> bool:
    proxies = {"http", "https", "all"} & getproxies().keys()
    return bool(config.proxies) or (bool(proxies) and not proxy_bypass(host))


_opened: WeakKeyDictionary[Store, S3Objects | None] = WeakKeyDictionary()


def find_objects(store: Store) -> S3Objects | None:
    """Return what reads and writes this datastore's objects, or None if only its fsspec driver can."""
    if store not in _opened:
        found = None
        if store.protocol.name == "S3":
            try:
                found = S3Objects(store)
            except (NotServedError, AttributeError):  # or an s3fs whose attributes are others
                found = None
        _opened[store] = found
    return _opened[store]
