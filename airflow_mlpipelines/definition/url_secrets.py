"""Secrets in URLs, found before they get into a DAG, an image or a lock file, which many people can read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from airflow_mlpipelines.exceptions import DefinitionError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from airflow_mlpipelines.definition.graph import DatastoreSpec, EnvironmentSpec

PACKAGES_REMEDY = (
    "Leave it out. Steps on a local compute get it from the ~/.netrc of the worker's user; for an image, name a base "
    "image that knows the package index, or pass the packages as local files."
)
_DATASTORE_REMEDY = "Put it into an Airflow connection, and name that as the datastore's conn_id."
_URL = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)://(?P<authority>[^\s/?#'\"]*)(?P<rest>\S*)")
_WEB = ("http", "https")
_VARIABLE = re.compile(r"\$\{\w+\}")
_FILLED_IN = "*"
_NO_SECRET_USERS = frozenset({"", "git", _FILLED_IN})
_PORT = re.compile(r"[\d*]*$")
# Signed addresses of object stores and tokens of code hosts; and Anaconda's tokens, which are part of the path.
_IN_QUERY = re.compile(
    r"[?&;](sig|x-amz-signature|x-goog-signature|access_token|private_token)=[^&#\s*]", re.I
)
_IN_PATH = re.compile(r"^/t/[^/*]+/")


def find_secret(text: str) -> str | None:
    """Return the first URL in ``text`` that has a secret, without it; None if there is none.

    A secret is a password; what stands before the ``@`` of a web address alone, as that is how tokens are
    passed; a signature or a token among the parameters; and a token of Anaconda's. A name alone is none
    where names are needed, as in ``ssh://git@host``, nor is a variable in braces, ``${TOKEN}``.

    Example:
        >>> find_secret("tool @ git+https://s3cret@github.com/team/tool@v1")
        'git+https://…@github.com'
        >>> find_secret("tool @ git+ssh://git@github.com/team/tool@v1")
    """
    for match in _URL.finditer(text):
        scheme = match["scheme"]
        authority, rest = (_VARIABLE.sub(_FILLED_IN, match[part]) for part in ("authority", "rest"))
        userinfo, at, host = authority.rpartition("@")
        user, _, password = userinfo.partition(":")
        is_web = scheme.rpartition("+")[2].lower() in _WEB
        is_token = is_web and not password and user not in _NO_SECRET_USERS
        if password not in ("", _FILLED_IN) or is_token:
            return f"{scheme}://…@{host}"
        # A password with a slash in it looks like a port that is none.
        if not at and "@" in rest and not authority.startswith("["):
            _, colon, port = authority.partition(":")
            if colon and not _PORT.match(port):
                return f"{scheme}://…"
        if _IN_QUERY.search(rest) or (is_web and _IN_PATH.match(rest)):
            return f"{scheme}://{host}/…"
    return None


def check_environment(where: str, spec: EnvironmentSpec) -> None:
    """Return, unless a requirement line or the conda file has a URL with a secret.

    Raises:
        DefinitionError: One has; the secret is not in the message.
    """
    for what, value in (("a pip requirement", spec.pip), ("its conda file", spec.conda)):
        for text in _texts(value):
            _refuse(f"{where}: {what}", text, PACKAGES_REMEDY)


def check_datastore(where: str, spec: DatastoreSpec) -> None:
    """Return, unless a datastore's URL, or one among its options, has a secret.

    Raises:
        DefinitionError: One has; the secret is not in the message.
    """
    for text in _texts((spec.url, spec.options)):
        _refuse(where, text, _DATASTORE_REMEDY)


def _refuse(where: str, text: str, remedy: str) -> None:
    found = find_secret(text)
    if found is not None:
        raise DefinitionError(
            f"{where} has a URL with a password or a token in it ({found}), which everybody who may see the DAG "
            f"could read. {remedy}"
        )


def _texts(value: Any) -> Iterator[str]:
    """Yield every text in a value as it stands in a JSON or YAML file."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.items():
            yield from _texts(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _texts(item)
