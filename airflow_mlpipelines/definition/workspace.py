"""Workspaces: what names datastores, computes and environments for pipelines.

A workspace is a file, ``mlpipelines.yaml``. Without one there is an embedded workspace: one datastore,
``workspaceblobstore``, and one compute, ``local``, both on this machine.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from airflow_mlpipelines import settings
from airflow_mlpipelines._naming import list_options, suggest
from airflow_mlpipelines.definition.computes import (
    ComputeTarget,
    LocalCompute,
    make_compute_spec,
    make_registry,
    wrap_compute_spec,
)
from airflow_mlpipelines.definition.environment import Environment
from airflow_mlpipelines.definition.graph import DatastoreSpec, RegistrySpec
from airflow_mlpipelines.definition.url_secrets import check_datastore
from airflow_mlpipelines.exceptions import DefinitionError

if TYPE_CHECKING:
    from types import FrameType

EMBEDDED_DATASTORE = "workspaceblobstore"
EMBEDDED_COMPUTE = "local"
_KEYS = frozenset(
    {
        "name",
        "default_datastore",
        "default_compute",
        "datastores",
        "computes",
        "environments",
        "registry",
    }
)
_DATASTORE_KEYS = frozenset({"url", "conn_id", "options"})
_ENVIRONMENT_KEYS = frozenset(
    {"image", "dockerfile", "python_version", "pip", "conda", "apt", "environment_variables"}
)
_PACKAGE = Path(__file__).parent.parent

Named = TypeVar("Named")


class Registry(Mapping[str, Named]):
    """Named things of a workspace; asking for an unknown name tells which there are."""

    def __init__(self, kind: str, workspace: str, items: Mapping[str, Named]) -> None:
        self._kind = kind
        self._workspace = workspace
        self._items = dict(items)

    def __getitem__(self, name: str) -> Named:
        """Return the thing of this name.

        Raises:
            DefinitionError: There is none.
        """
        try:
            return self._items[name]
        except KeyError:
            raise DefinitionError(
                f"{self._kind} {name!r} is not in {self._workspace}, which has "
                f"{list_options(self._items)}.{suggest(name, self._items)}"
            ) from None

    def __contains__(self, name: object) -> bool:
        return name in self._items

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)


class Workspace:
    """The datastores, computes and environments that pipelines may name.

    Make one with :meth:`from_config`.

    Raises:
        DefinitionError: A default is none of what there is, or a datastore's URL has a password in it.

    Attributes:
        name: Its name.
        config_file: The file that it comes from; None for the embedded one.
        datastores: By name.
        compute_targets: By name.
        environments: By name.
        registry: Where images that were built are kept for other machines; None if nowhere.
    """

    def __init__(  # noqa: PLR0913 - one argument for each thing that there can be
        self,
        name: str,
        *,
        datastores: Mapping[str, DatastoreSpec],
        computes: Mapping[str, ComputeTarget],
        environments: Mapping[str, Environment] | None = None,
        default_datastore: str | None = None,
        default_compute: str | None = None,
        config_file: Path | None = None,
        registry: RegistrySpec | None = None,
    ) -> None:
        self.name = name
        self.registry = registry
        self.config_file = config_file
        where = f"workspace {name!r}" + (f" ({config_file.name})" if config_file else " (embedded)")
        for key, spec in datastores.items():
            check_datastore(f"{where}: datastore {key!r}", spec)
        made = {key: Datastore._of(self, spec) for key, spec in datastores.items()}  # noqa: SLF001
        self.datastores: Registry[Datastore] = Registry("datastore", where, made)
        self.compute_targets: Registry[ComputeTarget] = Registry("compute", where, computes)
        self.environments: Registry[Environment] = Registry(
            "environment", where, environments or {}
        )
        self._default_datastore = default_datastore or next(iter(datastores))
        self._default_compute = default_compute or next(iter(computes))
        self.datastores[self._default_datastore]
        self.compute_targets[self._default_compute]

    @classmethod
    def from_config(cls, path: str | Path | None = None) -> Workspace:
        """Return the workspace of a file, or the embedded one.

        Args:
            path: The file, or a directory with a ``mlpipelines.yaml``. None looks at
                ``$MLPIPELINES_CONFIG``, then for a ``mlpipelines.yaml`` beside the calling file and in
                each directory above it; without any, the workspace is the embedded one.

        Raises:
            DefinitionError: The file is not there, or something in it is wrong.
        """
        file = _find_config(path)
        return cls.embedded() if file is None else _read_config(file)

    @classmethod
    def embedded(cls) -> Workspace:
        """Return the workspace that needs no file: everything on this machine."""
        store = DatastoreSpec(name=EMBEDDED_DATASTORE, url=(settings.home() / "data").as_uri())
        return cls(
            "embedded",
            datastores={EMBEDDED_DATASTORE: store},
            computes={EMBEDDED_COMPUTE: LocalCompute(EMBEDDED_COMPUTE)},
        )

    @property
    def default_datastore(self) -> Datastore:
        """Where outputs go that name no datastore."""
        return self.datastores[self._default_datastore]

    @property
    def default_compute(self) -> ComputeTarget:
        """Where steps run that name no compute."""
        return self.compute_targets[self._default_compute]

    def get_default_datastore(self) -> Datastore:
        """Return where outputs go that name no datastore."""
        return self.default_datastore

    def __repr__(self) -> str:
        return f"Workspace({self.name!r})"


class Datastore:
    """A named place for data, of a workspace.

    Args:
        workspace: The workspace.
        name: The datastore's name there; None is the default datastore.

    Raises:
        DefinitionError: The workspace has none of this name.
    """

    spec: DatastoreSpec
    workspace: Workspace

    def __init__(self, workspace: Workspace, name: str | None = None) -> None:
        found = workspace.default_datastore if name is None else workspace.datastores[name]
        self.workspace = workspace
        self.spec = found.spec

    @classmethod
    def _of(cls, workspace: Workspace, spec: DatastoreSpec) -> Datastore:
        store = object.__new__(cls)
        store.workspace = workspace
        store.spec = spec
        return store

    @staticmethod
    def get(workspace: Workspace, datastore_name: str) -> Datastore:
        """Return a workspace's datastore by name.

        Raises:
            DefinitionError: There is none of this name.
        """
        return workspace.datastores[datastore_name]

    @staticmethod
    def get_default(workspace: Workspace) -> Datastore:
        """Return a workspace's default datastore."""
        return workspace.default_datastore

    @property
    def name(self) -> str:
        """Its name."""
        return self.spec.name

    def path(self, path: str) -> Any:
        """Return a reference to a path on it."""
        from airflow_mlpipelines.definition.data import DataReference

        return DataReference(self, path_on_datastore=path)

    def __repr__(self) -> str:
        return f"Datastore({self.name!r})"


def _find_config(path: str | Path | None) -> Path | None:
    chosen = path or os.environ.get(settings.CONFIG_VARIABLE)
    if chosen is not None:
        file = Path(chosen).expanduser().absolute()
        if file.is_dir():
            file = file / settings.CONFIG_FILE_NAME
        if not file.is_file():
            said = "" if path else f" (named by ${settings.CONFIG_VARIABLE})"
            raise DefinitionError(f"workspace file {file}{said} is not there")
        return file
    start = find_calling_directory()
    for directory in (start, *start.parents):
        file = directory / settings.CONFIG_FILE_NAME
        if file.is_file():
            return file
    return None


def find_calling_file() -> Path | None:
    """Return the file of the code outside this package that called into it; None in a notebook."""
    frame: FrameType | None = sys._getframe(1)  # noqa: SLF001 - the one way to know it
    while frame is not None:
        name = frame.f_code.co_filename
        if not name.startswith(f"{_PACKAGE}{os.sep}"):
            return Path(name).absolute() if Path(name).is_file() else None
        frame = frame.f_back
    return None


def find_calling_directory() -> Path:
    """Return the directory of the calling file, or the current one in a notebook."""
    file = find_calling_file()
    return file.parent if file is not None else Path.cwd()


def _read_config(file: Path) -> Workspace:
    import yaml

    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise DefinitionError(f"workspace file {file} can't be read: {error}") from error
    where = f"workspace file {file}"
    content = _check_mapping(where, content, _KEYS)
    datastores = {}
    for name, fields in _check_mapping(f"{where}: datastores", content.get("datastores")).items():
        place = f"{where}: datastore {name!r}"
        fields = _check_mapping(place, fields, _DATASTORE_KEYS)  # noqa: PLW2901 - checked
        if not isinstance(fields.get("url"), str):
            raise DefinitionError(
                f"{place}: it needs a url, such as 'file:///data' or 's3://bucket/path'"
            )
        datastores[name] = DatastoreSpec(
            name=name,
            url=_absolute_url(fields["url"], file.parent),
            conn_id=fields.get("conn_id"),
            options=fields.get("options") or {},
        )
    computes = {
        name: wrap_compute_spec(
            make_compute_spec(name, _check_mapping(f"{where}: compute {name!r}", fields))
        )
        for name, fields in _check_mapping(f"{where}: computes", content.get("computes")).items()
    }
    environments = {
        name: _read_environment(f"{where}: environment {name!r}", name, fields, file.parent)
        for name, fields in _check_mapping(
            f"{where}: environments", content.get("environments")
        ).items()
    }
    embedded = Workspace.embedded()
    return Workspace(
        content.get("name") or file.parent.name,
        datastores=datastores or {EMBEDDED_DATASTORE: embedded.default_datastore.spec},
        computes=computes or {EMBEDDED_COMPUTE: embedded.default_compute},
        environments=environments,
        default_datastore=content.get("default_datastore"),
        default_compute=content.get("default_compute"),
        config_file=file,
        registry=_read_registry(where, content.get("registry")),
    )


def _read_registry(where: str, fields: Any) -> RegistrySpec | None:
    if fields is None:
        return None
    place = f"{where}: registry"
    return make_registry(place, _check_mapping(place, fields))


def _absolute_url(url: str, base: Path) -> str:
    """Return the URL; a plain path is a directory, relative to the workspace file."""
    if "://" in url:
        return url
    return (base / Path(url).expanduser()).absolute().as_uri()


def _read_environment(where: str, name: str, fields: Any, base: Path) -> Environment:
    fields = _check_mapping(where, fields, _ENVIRONMENT_KEYS)
    for key in ("dockerfile", "conda"):
        if isinstance(fields.get(key), str):
            fields = {**fields, key: base / fields[key]}
    return Environment(name, **fields)


def _check_mapping(where: str, value: Any, known: frozenset[str] | None = None) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise DefinitionError(
            f"{where}: names with values are wanted here, not {type(value).__name__}"
        )
    for key in value:
        if known is not None and key not in known:
            raise DefinitionError(
                f"{where}: there is no {key!r}; there can be {list_options(known)}.{suggest(str(key), known)}"
            )
    return value
