"""Registries of images, asked over their HTTP API: no Docker daemon is needed to know what a tag means."""

from __future__ import annotations

import base64
import hashlib
import ipaddress
import json
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from airflow_mlpipelines.compute.images import (
    DOCKER_HUB,
    ImageIdentity,
    ImageName,
    normal_registry,
    pinned_image,
    repository_of,
)
from airflow_mlpipelines.exceptions import ComputeUnavailableError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

    from httpx import Client, Response

_HUB_API = "registry-1.docker.io"
_HUB_LOGIN = "https://index.docker.io/v1/"
_CONNECT_SECONDS = 5.0
_ANSWER_SECONDS = 10.0
# An index of many platforms first: its digest is the same for every node.
_MANIFESTS = ", ".join(
    (
        "application/vnd.oci.image.index.v1+json",
        "application/vnd.docker.distribution.manifest.list.v2+json",
        "application/vnd.oci.image.manifest.v1+json",
        "application/vnd.docker.distribution.manifest.v2+json",
    )
)
_DIGEST_HEADER = "docker-content-digest"
_DIGEST = re.compile(r"^sha256:[0-9a-f]{64}$")
_CHALLENGE = re.compile(
    r"(?:^|,\s*)(Bearer|Basic)\b([^,]*(?:,\s*\w+=(?:\"[^\"]*\"|[^\",]*))*)", re.I
)
_PARAMETER = re.compile(r"(\w+)=(?:\"([^\"]*)\"|([^\",\s]+))")
_UNAUTHORIZED, _FORBIDDEN, _NOT_FOUND, _NO_METHOD, _TOO_MANY = 401, 403, 404, 405, 429
_SHOWN = 200


@dataclass(frozen=True)
class Login:
    """Who one is at one registry, from an Airflow connection of type docker.

    Attributes:
        conn_id: The connection.
        registry: The host that it is for; nobody else gets to see the password.
    """

    conn_id: str
    registry: str
    user: str
    password: str = field(repr=False)


def read_login(conn_id: str) -> Login:
    """Return what an Airflow connection of type docker says.

    Raises:
        ComputeUnavailableError: There is no such connection, or it names no registry or no user.
    """
    from airflow.sdk import Connection
    from airflow.sdk.exceptions import AirflowNotFoundException, AirflowRuntimeError

    try:
        found: Any = Connection.get(conn_id)
    except (AirflowNotFoundException, AirflowRuntimeError) as error:
        raise ComputeUnavailableError(
            f"the Airflow connection {conn_id!r} with a registry's credentials does not exist. Add it with "
            f"`airflow connections add {conn_id} --conn-type docker --conn-host … --conn-login … --conn-password …`."
        ) from error
    if not found.host or not found.login:
        raise ComputeUnavailableError(
            f"the Airflow connection {conn_id!r} names no registry as its host, or no login. It is to be of type "
            "docker, with host, login and password."
        )
    host = normal_registry(found.host)
    return Login(
        conn_id,
        f"{host}:{found.port}" if found.port else host,
        found.login,
        found.password or "",
    )


def make_docker_config(logins: Iterable[Login]) -> str:
    """Return the configuration of a Docker client that is logged in at these registries: JSON, with the passwords."""
    auths = {}
    for login in logins:
        token = base64.b64encode(f"{login.user}:{login.password}".encode()).decode()
        auths[_HUB_LOGIN if login.registry == DOCKER_HUB else login.registry] = {"auth": token}
    return json.dumps({"auths": auths})


def look_up_image(
    name: str, *, conn_ids: Sequence[str] = (), insecure: Collection[str] = ()
) -> ImageIdentity:
    """Return what ``name`` means in its registry at this moment; where that can't be known, the reason.

    Args:
        name: The image, as people write it.
        conn_ids: Airflow connections of type docker; the first one whose host is the image's registry counts.
        insecure: Registries that are asked over plain HTTP, beside those of this machine.
    """
    pinned = pinned_image(name)
    if pinned is not None:
        return pinned
    try:
        digest = find_digest(name, conn_ids=conn_ids, insecure=insecure)
    except ComputeUnavailableError as error:
        return ImageIdentity(name, None, str(error))
    if digest is None:
        registry = ImageName.parse(name).registry
        return ImageIdentity(name, None, f"the registry {registry} has no image {name!r}")
    return ImageIdentity(f"{repository_of(name)}@{digest}", digest)


def find_digest(
    name: str, *, conn_ids: Sequence[str] = (), insecure: Collection[str] = ()
) -> str | None:
    """Return the digest (``sha256:…``) of what ``name`` means in its registry, or None if it has none.

    Of an image for several kinds of processors it is the digest of the index, which they share.
    The arguments are those of :func:`look_up_image`.

    Raises:
        ComputeUnavailableError: The registry does not answer, or does not tell whoever asks.
    """
    import httpx

    image = ImageName.parse(name)
    logins = [read_login(conn_id) for conn_id in conn_ids]
    login = next((one for one in logins if one.registry == image.registry), None)
    plain = image.registry in insecure or _is_this_machine(image.registry)
    host = _HUB_API if image.registry == DOCKER_HUB else image.registry
    url = f"{'http' if plain else 'https'}://{host}/v2/{image.repository}/manifests/{image.version}"
    timeout = httpx.Timeout(_ANSWER_SECONDS, connect=_CONNECT_SECONDS)
    try:
        # A proxy is not asked for what is on this machine.
        with httpx.Client(timeout=timeout, trust_env=not plain, follow_redirects=True) as client:
            return _Conversation(client, image, login, plain=plain).find_digest(url)
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
        hint = "" if plain else " If it has no TLS, name it as `registry` with `insecure: true`."
        raise ComputeUnavailableError(
            f"the registry {image.registry} of image {name!r} does not answer: "
            f"{str(error)[:_SHOWN] or type(error).__name__}.{hint}"
        ) from error


class _Conversation:
    """One question to one registry: asked without credentials, then with those that it wants."""

    def __init__(
        self, client: Client, image: ImageName, login: Login | None, *, plain: bool
    ) -> None:
        self._client = client
        self._image = image
        self._login = login
        self._plain = plain
        self._headers: dict[str, str] = {"Accept": _MANIFESTS}

    def find_digest(self, url: str) -> str | None:
        response = self._ask("HEAD", url)
        digest = str(response.headers.get(_DIGEST_HEADER, ""))
        if response.status_code == _NO_METHOD or (response.is_success and not digest):
            response = self._ask("GET", url)  # the digest is that of the very bytes
            digest = f"sha256:{hashlib.sha256(response.content).hexdigest()}"
        if response.status_code == _NOT_FOUND:
            return None
        if not response.is_success:
            raise self._refusal(response)
        if not _DIGEST.match(digest):
            raise ValueError(f"it names {digest[:_SHOWN]!r} as a digest")
        return digest

    def _ask(self, method: str, url: str) -> Response:
        response = self._client.request(method, url, headers=self._headers)
        if response.status_code == _UNAUTHORIZED and "Authorization" not in self._headers:
            authorization = self._authorize(response.headers.get_list("www-authenticate"))
            if authorization is not None:
                self._headers["Authorization"] = authorization
                response = self._client.request(method, url, headers=self._headers)
        return response

    def _authorize(self, headers: Sequence[str]) -> str | None:
        """Return what to send as ``Authorization``, or None if there is nothing to send."""
        import httpx

        challenges = _read_challenges(headers)
        if "bearer" in challenges:
            return f"Bearer {self._fetch_token(challenges['bearer'])}"
        if "basic" in challenges and self._login is not None:
            request = httpx.Request("GET", "http://unused")
            auth = httpx.BasicAuth(self._login.user, self._login.password)
            return str(next(auth.auth_flow(request)).headers["Authorization"])
        return None

    def _fetch_token(self, challenge: Mapping[str, str]) -> str:
        realm = challenge.get("realm", "")
        if not realm.startswith("https://") and not (self._plain and realm.startswith("http://")):
            raise ValueError(
                f"it sends us for a token to {realm[:_SHOWN]!r}, which is not encrypted"
            )
        query = {
            "service": challenge.get("service", ""),
            "scope": challenge.get("scope") or f"repository:{self._image.repository}:pull",
        }
        login = self._login
        response = self._client.get(
            realm,
            params={key: value for key, value in query.items() if value},
            auth=(login.user, login.password) if login is not None else None,
        )
        if not response.is_success:
            raise self._refusal(response)
        answer = response.json()
        token = (
            answer.get("token") or answer.get("access_token") if isinstance(answer, dict) else None
        )
        if not isinstance(token, str):
            raise ValueError(f"{realm[:_SHOWN]!r} gives no token")
        return token

    def _refusal(self, response: Response) -> ComputeUnavailableError:
        """Return the error that says in words why the registry did not tell."""
        registry, status = self._image.registry, response.status_code
        what = f"{self._image.repository}:{self._image.version}"
        if status == _TOO_MANY:
            return ComputeUnavailableError(
                f"the registry {registry} has had too many requests (429), and does not tell what {what} is. "
                "Name an Airflow connection with an account there, or come back later."
            )
        if status in (_UNAUTHORIZED, _FORBIDDEN):
            who = (
                f"the Airflow connection {self._login.conn_id!r} may not look there. Check its login and password"
                if self._login is not None
                else "nobody may without credentials, or there is no such image. Name an Airflow connection of type "
                f"docker, whose host is {registry}, as the compute's image_conn_id or the registry's conn_id"
            )
            return ComputeUnavailableError(
                f"the registry {registry} does not tell what {what} is ({status}): {who}."
            )
        return ComputeUnavailableError(
            f"the registry {registry} does not tell what {what} is: it answers with status {status}."
        )


def _read_challenges(headers: Sequence[str]) -> dict[str, dict[str, str]]:
    """Return the parameters of each way to identify oneself that a registry offers, by its name."""
    return {
        scheme.lower(): {
            name.lower(): quoted or bare for name, quoted, bare in _PARAMETER.findall(rest)
        }
        for header in headers
        for scheme, rest in _CHALLENGE.findall(header)
    }


def _is_this_machine(registry: str) -> bool:
    host = re.sub(r":\d+$", "", registry).strip("[]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
