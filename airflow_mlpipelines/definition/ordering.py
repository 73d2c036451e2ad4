"""Which steps a pipeline has, and in what order: edges found from data, sequences and ``run_after``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from airflow_mlpipelines.definition.data import Handle, InputBinding, PipelineData
from airflow_mlpipelines.definition.steps import PipelineStep, StepSequence
from airflow_mlpipelines.exceptions import DefinitionError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


class CycleError(DefinitionError):
    """Steps wait for each other.

    Attributes:
        path: The steps of the cycle, the first one again at the end.
    """

    def __init__(self, path: Sequence[PipelineStep]) -> None:
        self.path = tuple(path)
        names = " -> ".join(repr(step.name) for step in path)
        super().__init__(f"steps wait for each other in a circle: {names}")


class StepOrder:
    """The steps of a pipeline and what comes before what.

    Attributes:
        listed: The steps that the author named, flat, in order.
        predecessors: By the identity of a step: the steps directly before it, for data or for order.
    """

    def __init__(self, steps: Sequence[Any], *, resolve_closure: bool) -> None:
        self._sequence: dict[int, list[PipelineStep]] = {}
        self.listed = list(dict.fromkeys(self._flatten(steps)))
        self._only = None if resolve_closure else {id(step) for step in self.listed}

    def predecessors(self, step: PipelineStep) -> list[PipelineStep]:
        """Return the steps directly before ``step``, each once."""
        before = [producer for data in read_by(step) for producer in data.producers]
        before += self.waits_for(step)
        unique = {
            id(item): item for item in before if item is not step or item in step.predecessors
        }
        return [item for key, item in unique.items() if self._only is None or key in self._only]

    def waits_for(self, step: PipelineStep) -> list[PipelineStep]:
        """Return the steps that come before ``step`` for the order alone."""
        before = [*step.predecessors, *self._sequence.get(id(step), ())]
        return [item for item in before if self._only is None or id(item) in self._only]

    def sort(self) -> list[PipelineStep]:
        """Return all steps, each after those before it; the same order every time.

        Raises:
            CycleError: There is none.
        """
        done: dict[int, PipelineStep] = {}
        for start in self.listed:
            # Depth first without recursion: a chain may be longer than Python's stack is deep.
            path: list[PipelineStep] = []
            on_path: set[int] = set()
            stack: list[tuple[PipelineStep, Iterator[PipelineStep]]] = []
            following: PipelineStep | None = start
            while following is not None or stack:
                if following is not None and id(following) not in done:
                    if id(following) in on_path:
                        first = next(i for i, item in enumerate(path) if item is following)
                        raise CycleError([*reversed(path[first:]), path[-1]])
                    path.append(following)
                    on_path.add(id(following))
                    stack.append((following, iter(self.predecessors(following))))
                if not stack:
                    break
                step, remaining = stack[-1]
                following = next(remaining, None)
                if following is None:
                    stack.pop()
                    path.pop()
                    on_path.discard(id(step))
                    done[id(step)] = step
        return list(done.values())

    def _flatten(self, items: Sequence[Any]) -> list[PipelineStep]:
        """Return the steps in nested lists and sequences; note what sequences put after what."""
        flat: list[PipelineStep] = []
        for item in items:
            if isinstance(item, PipelineStep):
                flat.append(item)
            elif isinstance(item, StepSequence):
                before: list[PipelineStep] = []
                for member in item.steps:
                    group = self._flatten([member])
                    for step in group:
                        self._sequence.setdefault(id(step), []).extend(before)
                    flat += group
                    before = group
            elif isinstance(item, (list, tuple)):
                flat += self._flatten(item)
            else:
                raise DefinitionError(
                    "a pipeline's steps are steps, lists of steps and StepSequences, not "
                    f"{type(item).__name__}: {item!r}"
                )
        return flat


def find_handles(step: PipelineStep) -> list[Handle]:
    """Return the data handles in a step's arguments that may stand for data it reads or makes."""
    return [
        argument
        for argument in (*step.make_command(), *step.arguments)
        if isinstance(argument, Handle)
    ]


def read_by(step: PipelineStep) -> list[PipelineData]:
    """Return the data of other steps that a step reads, from its inputs and its arguments."""
    own = {id(data) for data in step.outputs}
    read = []
    for handle in (*step.inputs, *find_handles(step)):
        data = handle.data if isinstance(handle, InputBinding) else handle
        if isinstance(data, PipelineData) and (handle in step.inputs or id(data) not in own):
            read.append(data)
    return read
