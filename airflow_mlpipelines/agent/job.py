"""The job document: what the agent has to carry for one step run, and the datastores it may touch for it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from airflow_mlpipelines.exceptions import DataError
from airflow_mlpipelines.storage.artifact import Artifact
from airflow_mlpipelines.storage.portable import describe_store, open_described
from airflow_mlpipelines.storage.stores import StoreSet

if TYPE_CHECKING:
    from collections.abc import Mapping

    from airflow_mlpipelines.storage.stores import Store

VERSION = 1
Json = dict[str, Any]


@dataclass(frozen=True)
class WantedInput:
    """An input to fetch.

    Attributes:
        target: Where the step finds it, below the directory of inputs: ``table``, or ``table/2013.csv``.
    """

    artifact: Artifact
    target: str


@dataclass(frozen=True)
class WantedOutput:
    """An output to commit.

    Attributes:
        datastore: Where it goes.
        path: Where it goes there.
        source: Where the step makes it, below the directory of outputs.
        is_directory: What it was declared as; None takes either.
    """

    datastore: str
    path: str
    source: str
    is_directory: bool | None = None


@dataclass(frozen=True)
class Job:
    """What the agent has to do for one step run.

    Attributes:
        release: The release of the worker that wrote it.
        step: The step's name, for errors.
        step_run: The id of the step run.
        datastores: What is needed to open each, secrets included.
        snapshot: The datastore and the digest of the step's code; None if the worker sends the code.
        links: What the step finds in its working directory: each input's name with the place of a link there, and
            the path that it leads to in the step's container. Only with ``snapshot``.
        kept: The datastore and the directory that ``./outputs`` and ``./logs`` are kept in; None if the
            worker keeps them.
    """

    release: str
    step: str
    step_run: str
    datastores: Mapping[str, Json] = field(repr=False)
    snapshot: tuple[str, str] | None = None
    inputs: Mapping[str, WantedInput] = field(default_factory=dict)
    outputs: Mapping[str, WantedOutput] = field(default_factory=dict)
    links: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    kept: tuple[str, str] | None = None

    def open_stores(self) -> StoreSet:
        """Return the datastores.

        Raises:
            DataError: One can't be opened here, for lack of its driver above all.
        """
        stores = [open_described(each) for each in self.datastores.values()]
        return StoreSet(stores, default=stores[0].name if stores else "")

    def renewed(self, datastores: Mapping[str, Json]) -> Job:
        """Return the same job, with its datastores as somebody knows them now: their credentials may have changed.

        Nothing goes to another place by that: what has another URL by now stays as it was.
        """
        known = dict(self.datastores)
        for name, own in self.datastores.items():
            newer = datastores.get(name)
            if newer is not None and newer["url"] == own["url"]:
                known[name] = newer
        return replace(self, datastores=known)

    def to_json(self) -> str:
        """Return the document; it is as secret as the datastores' credentials."""
        inputs = {
            name: {"artifact": item.artifact.to_dict(), "target": item.target}
            for name, item in self.inputs.items()
        }
        outputs = {
            name: {
                "datastore": item.datastore,
                "path": item.path,
                "source": item.source,
                "is_directory": item.is_directory,
            }
            for name, item in self.outputs.items()
        }
        return json.dumps(
            {
                "version": VERSION,
                "release": self.release,
                "step": self.step,
                "step_run": self.step_run,
                "datastores": dict(self.datastores),
                "snapshot": self.snapshot,
                "inputs": inputs,
                "outputs": outputs,
                "links": dict(self.links),
                "kept": self.kept,
            }
        )

    @classmethod
    def from_json(cls, text: str, *, release: str) -> Job:
        """Return the job that a document describes.

        Args:
            text: The document.
            release: The release that reads it, for errors.

        Raises:
            DataError: It is of another version, or no such document.
        """
        try:
            data: Json = json.loads(text)
            version, written = data["version"], data["release"]
            if version != VERSION:
                raise DataError(
                    f"the worker's airflow_mlpipelines {written} writes job documents of version {version}, but "
                    f"the agent's image has {release}, which reads version {VERSION}. Build the image of the "
                    "compute's agent_image from the worker's release."
                )
            return cls(
                release=written,
                step=data["step"],
                step_run=data["step_run"],
                datastores=data["datastores"],
                snapshot=_pair(data["snapshot"]),
                inputs={name: _read_input(item) for name, item in data["inputs"].items()},
                outputs={name: WantedOutput(**item) for name, item in data["outputs"].items()},
                links={name: _two(item) for name, item in data["links"].items()},
                kept=_pair(data["kept"]),
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            # What it says is not shown: keys are in it.
            raise DataError(f"the job document can't be read ({type(error).__name__})") from None


def describe_all(stores: Mapping[str, Store]) -> dict[str, Json]:
    """Return what opens each of the datastores elsewhere.

    Raises:
        DataError: One of them can't be opened elsewhere.
    """
    described = {}
    for name, store in stores.items():
        description = describe_store(store)
        if description is None:
            raise DataError(f"datastore {name!r} can only be opened on the worker")
        described[name] = description
    return described


def _read_input(data: Json) -> WantedInput:
    return WantedInput(artifact=Artifact.from_dict(data["artifact"]), target=data["target"])


def _pair(value: Any) -> tuple[str, str] | None:
    return None if value is None else _two(value)


def _two(value: Any) -> tuple[str, str]:
    first, second = value
    return str(first), str(second)
