"""How the processes of one step find each other: MPI, PyTorch's or TensorFlow's way."""

from __future__ import annotations

from typing import Any

from airflow_mlpipelines.definition.graph import DistributedSpec
from airflow_mlpipelines.exceptions import DefinitionError


class Distribution:
    """What ``distributed=`` of a step takes: :class:`Mpi`, :class:`PyTorch` or :class:`TensorFlow`."""

    def __init__(self, spec: DistributedSpec) -> None:
        self.spec = spec

    def __repr__(self) -> str:
        fields = self.spec.model_dump(exclude={"framework"}, exclude_defaults=True)
        return f"{type(self).__name__}({', '.join(f'{name}={value}' for name, value in fields.items())})"


class Mpi(Distribution):
    """Runs the program under ``mpirun``, which the step's environment has to have.

    Args:
        nodes: Machines; a local compute runs the processes of all of them on its own.
        processes_per_node: Processes on each.

    Raises:
        DefinitionError: A number is less than 1.
    """

    def __init__(self, nodes: int = 1, processes_per_node: int = 1) -> None:
        _check(nodes=nodes, processes_per_node=processes_per_node)
        super().__init__(
            DistributedSpec(framework="mpi", nodes=nodes, processes_per_node=processes_per_node)
        )


class PyTorch(Distribution):
    """Runs the program once per process with the variables of ``torchrun``.

    These are ``MASTER_ADDR``, ``MASTER_PORT``, ``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK``, ``LOCAL_WORLD_SIZE`` and
    ``NODE_RANK``: ``torch.distributed.init_process_group()`` needs nothing else.

    Args:
        nodes: Machines; a local compute runs the processes of all of them on its own.
        processes_per_node: Processes on each, most often as many as it has GPUs.

    Raises:
        DefinitionError: A number is less than 1.
    """

    def __init__(self, nodes: int = 1, processes_per_node: int = 1) -> None:
        _check(nodes=nodes, processes_per_node=processes_per_node)
        super().__init__(
            DistributedSpec(framework="pytorch", nodes=nodes, processes_per_node=processes_per_node)
        )


class TensorFlow(Distribution):
    """Runs the program once per worker and parameter server, with ``TF_CONFIG``.

    The step is done when all workers have ended with exit code 0, or the chief has, if there is one: the
    others, which serve for ever, are ended then.

    Args:
        workers: Worker processes, over all nodes.
        parameter_servers: Parameter servers beside them, dealt out to the nodes in turn.
        chief: Whether there is one more process, on node 0, whose task in ``TF_CONFIG`` is ``chief``: the
            coordinator of TensorFlow 2's ``ParameterServerStrategy``, whose workers only serve. Without
            one, as with Azure ML, worker 0 is what TensorFlow takes for the chief.
        nodes: Machines; a local compute runs the processes of all of them on its own.

    Raises:
        DefinitionError: There is no worker, a number is negative, or the nodes can't have the same number of
            workers.
    """

    def __init__(
        self,
        workers: int = 1,
        parameter_servers: int = 0,
        *,
        nodes: int = 1,
        chief: bool = False,
    ) -> None:
        _check(workers=workers, nodes=nodes)
        if workers % nodes:
            raise DefinitionError(
                f"TensorFlow: {workers} workers can't be spread evenly over {nodes} nodes; take a multiple of {nodes}"
            )
        if parameter_servers < 0:
            raise DefinitionError(
                f"TensorFlow: parameter_servers is {parameter_servers}; it has to be 0 or more"
            )
        super().__init__(
            DistributedSpec(
                framework="tensorflow",
                nodes=nodes,
                processes_per_node=workers // nodes,
                parameter_servers=parameter_servers,
                chief=chief,
            )
        )


def _check(**numbers: Any) -> None:
    for name, number in numbers.items():
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise DefinitionError(
                f"distributed: {name} is {number!r}; it has to be a whole number from 1 on"
            )
