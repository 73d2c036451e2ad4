"""The checked, serializable form of a pipeline: what every front end makes and the compiler takes.

All models are frozen and survive JSON: ``PipelineGraph.model_validate_json(g.model_dump_json()) == g``.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue

GRAPH_VERSION: Literal[1] = 1
REGENERATE_OUTPUTS = "regenerate_outputs"
"""The run parameter that every pipeline has: step ids to run again, or :data:`REGENERATE_ALL`."""
REGENERATE_ALL = "all"

ParameterValue = str | int | float | bool
ParameterType = Literal["string", "int", "float", "bool"]
Mode = Literal["mount", "download", "direct"]
ReferenceMode = Literal["mount", "download", "direct", "upload"]
OutputMode = Literal["mount", "upload"]
Gpus = int | tuple[str, ...] | None
"""The GPUs of one machine: their number, or their ids (``GPU-…``, or numbers as text)."""


class SpecModel(BaseModel):
    """Base of the graph's models: frozen, and strict about unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")


# ---- where things are and where they run -------------------------------------------------------


class DatastoreSpec(SpecModel):
    """A named place for data.

    Attributes:
        name: Its name in the workspace.
        url: The root, as fsspec understands it: ``file:///data``, ``s3://bucket/prefix``.
        conn_id: The Airflow connection that holds its credentials, if it needs any.
        options: Arguments for the fsspec filesystem that are no secrets, such as ``endpoint_url``.
    """

    name: str
    url: str
    conn_id: str | None = None
    options: dict[str, JsonValue] = {}


class ResourcesSpec(SpecModel):
    """What one step may use of its compute; None leaves the choice to the compute.

    Attributes:
        cpus: CPU cores; fractions are allowed.
        memory: Bytes.
        gpus: Number of GPUs.
        gpu_type: A model of GPU, where the compute offers several.
        shm_size: Bytes of shared memory (``/dev/shm``).
    """

    cpus: float | None = None
    memory: int | None = None
    gpus: int | None = None
    gpu_type: str | None = None
    shm_size: int | None = None


class RegistrySpec(SpecModel):
    """Where images that were built are kept for other machines.

    Attributes:
        url: Registry and repository, such as ``registry.example.com/team/env``; tags are ours.
        conn_id: The Airflow connection of type docker that may pull and push there.
        insecure: Whether it is asked over plain HTTP; a registry of this machine always is.
    """

    url: str
    conn_id: str | None = None
    insecure: bool = False


class LocalComputeSpec(SpecModel):
    """Processes on the machine of the Airflow worker.

    Attributes:
        gpus: The GPUs that it hands out to steps that ask for some: their ids; or how many of the
            machine's; or None for all that the machine has.
    """

    type: Literal["local"] = "local"
    name: str
    gpus: Gpus = None
    max_nodes: int | None = None


class DockerComputeSpec(SpecModel):
    """Containers of a Docker daemon.

    Attributes:
        image: The image of steps whose environment names none.
        docker_url: The daemon; None is the provider's default (the local socket).
        conn_id: The Airflow connection with the credentials of a registry.
        gpus: GPUs that the host has, as a number or as ids; steps may ask for at most as many.
        user: ``uid[:gid]`` or a name; None is the user of the Airflow worker.
        network_mode: As Docker's ``--network``.
        registry: Where images that are built for it are kept; None is the workspace's.
    """

    type: Literal["docker"] = "docker"
    name: str
    image: str | None = None
    docker_url: str | None = None
    conn_id: str | None = None
    cpus: float | None = None
    memory: int | None = None
    gpus: Gpus = None
    shm_size: int | None = None
    user: str | None = None
    network_mode: str | None = None
    extra_hosts: dict[str, str] = {}
    registry: RegistrySpec | None = None
    max_nodes: int | None = None


class KubernetesComputeSpec(SpecModel):
    """Pods of a Kubernetes cluster.

    Attributes:
        conn_id: The Airflow connection to the cluster; None goes by ``in_cluster``, or by ``$KUBECONFIG``.
        image: The image of steps whose environment names none.
        image_conn_id: The Airflow connection of type docker to look up with what the tags of images mean, and for
            nodes to pull them with.
        image_pull_secrets: Secrets of the namespace for nodes to pull images with, in place of the Airflow
            connections of ``image_conn_id`` and ``registry``.
        docker_url: The Docker daemon that builds its images and pushes them to ``registry``; None is the
            worker's own.
        buildkit_host: The BuildKit daemon that builds them in place of a Docker daemon, and pushes them there:
            ``tcp://host:port``, or ``unix://`` with the path of a socket. The worker needs ``buildctl``.
        buildkit_tls: A directory on the worker with ``ca.pem``, ``cert.pem`` and ``key.pem`` for it.
        helper_image: What carries the files of a step into its pod and out of it: any image with ``sh``, ``tar``,
            ``gzip`` and ``sha256sum``.
        agent_image: What carries data between datastores and a pod by itself, past worker and API server: the image
            of ``images/agent/Dockerfile``, of the workers' release. None lets ``helper_image`` and the worker
            carry everything.
        shared_volumes: Directories that the workers share with the pods, and the PersistentVolumeClaim that each
            is the root of: ``claim``, or ``claim/path`` for a directory in it. What lies there is mounted and not
            copied.
        security_context: By Kubernetes' own names, those of a pod and those of a container together. What
            it leaves open is as for a user without rights: not root, no capabilities.
        gpu_resource: What the cluster calls its GPUs.
        gpu_type_label: The node label that names the model of a node's GPUs; None is ``<gpu_resource>.product``, which
            NVIDIA's feature discovery sets.
        pod_template_file: A Pod manifest on the worker that a step's pod is laid over.
        queue: The Kueue queue that pods wait in.
        startup_timeout_seconds: How long images may be pulled for, once a node was found.
        schedule_timeout_seconds: How long a pod may wait for a node.
        deferrable: Whether a step that takes long is left to its pod, so that it holds no worker slot.
        defer_after_seconds: How long a worker stays with its pod before.
        registry: Where images that are built for it are kept; None is the workspace's.
    """

    type: Literal["kubernetes"] = "kubernetes"
    name: str
    namespace: str = "default"
    conn_id: str | None = None
    in_cluster: bool | None = None
    image: str | None = None
    image_conn_id: str | None = None
    docker_url: str | None = None
    buildkit_host: str | None = Field(default=None, pattern=r"^(tcp://[^/\s@]+:\d+|unix:///\S+)$")
    buildkit_tls: str | None = None
    helper_image: str = "busybox:1.36"
    agent_image: str | None = None
    shared_volumes: dict[str, str] = {}
    service_account: str | None = None
    image_pull_secrets: tuple[str, ...] = ()
    node_selector: dict[str, str] = {}
    tolerations: tuple[dict[str, JsonValue], ...] = ()
    affinity: dict[str, JsonValue] = {}
    priority_class: str | None = None
    runtime_class: str | None = None
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}
    security_context: dict[str, JsonValue] = {}
    cpus: float | None = None
    memory: int | None = None
    ephemeral_storage: int | None = None
    gpus: int | None = None
    gpu_resource: str = "nvidia.com/gpu"
    gpu_type_label: str | None = None
    shm_size: int | None = None
    pod_template_file: str | None = None
    registry: RegistrySpec | None = None
    queue: str | None = None
    startup_timeout_seconds: int = 1800
    schedule_timeout_seconds: int = 3600
    deferrable: bool = True
    defer_after_seconds: int = Field(default=30, ge=0)
    max_nodes: int | None = None


ComputeSpec = Annotated[
    LocalComputeSpec | DockerComputeSpec | KubernetesComputeSpec, Field(discriminator="type")
]


class EnvironmentSpec(SpecModel):
    """The software that a step runs on: an image, or packages, or both.

    Attributes:
        name: A name for people; it does not count in the digest.
        image: A container image.
        dockerfile: The text of a Dockerfile to build the image from.
        python_version: Such as ``3.12``; None is the worker's own, or the image's.
        pip: Requirement lines, in pip's own form.
        conda: The content of a conda environment file.
        apt: Packages of the image's distribution (Debian, Ubuntu): ``libgomp1``, ``git=1:2.39.*``.
        environment_variables: Set for the step's process; they count in the digest.
    """

    name: str | None = None
    image: str | None = None
    dockerfile: str | None = None
    python_version: str | None = None
    pip: tuple[str, ...] = ()
    conda: dict[str, JsonValue] | None = None
    apt: tuple[str, ...] = ()
    environment_variables: dict[str, str] = {}

    @property
    def has_packages(self) -> bool:
        """Whether a Python has to be made for it before a step can run in it."""
        return bool(self.pip or self.conda or self.python_version)

    @property
    def needs_build(self) -> bool:
        """Whether a container can only run on it after an image was built."""
        return bool(self.has_packages or self.apt or self.dockerfile is not None)


# ---- parameters --------------------------------------------------------------------------------


class ParameterSpec(SpecModel):
    """A value that whoever starts a run may choose."""

    name: str
    type: ParameterType
    default: ParameterValue
    choices: tuple[ParameterValue, ...] | None = None
    minimum: float | None = None
    maximum: float | None = None
    description: str | None = None


class ParameterRef(SpecModel):
    """The place of a pipeline parameter's value, known when a run starts."""

    kind: Literal["parameter"] = "parameter"
    name: str


# ---- data --------------------------------------------------------------------------------------


class ExternalDataSpec(SpecModel):
    """Data that is there before the pipeline runs (a ``DataReference``).

    Attributes:
        pin: How its state is found when a run starts: by its content, or, faster, by what the
            store says of it (etag, generation, or modification time with size).
    """

    kind: Literal["external"] = "external"
    name: str
    datastore: str
    path: str
    pin: Literal["content", "version"] = "content"


class StepOutputRef(SpecModel):
    """An output of another step of the same graph, by that step's id."""

    kind: Literal["step_output"] = "step_output"
    step: str
    output: str


InputSource = Annotated[ExternalDataSpec | StepOutputRef, Field(discriminator="kind")]


class InputSpec(SpecModel):
    """A named input of a step.

    Attributes:
        mode: ``mount`` for the data in place, ``download`` for a copy of the step's own, ``direct`` for
            their address alone.
        path_on_compute: Where in the working directory it is found, besides the path that the process is
            given.
    """

    name: str
    source: InputSource
    mode: Mode = "mount"
    path_on_compute: str | None = None


class UploadSpec(SpecModel):
    """A place that others may know, to which a step's files are uploaded once it has succeeded.

    Attributes:
        path: The directory on the datastore.
        path_on_compute: Where the step's process writes them, besides the path that it is given.
        overwrite: Whether files of the same names that are there are replaced; else they are an error.
    """

    path: str
    path_on_compute: str | None = None
    overwrite: bool = False


class OutputSpec(SpecModel):
    """A named output of a step.

    Attributes:
        is_directory: True or False where the author says so; None takes what the program makes.
        pipeline_output_name: The name under which the run as a whole offers it.
        upload: Where it goes; None for a place of the step run's own.
    """

    name: str
    datastore: str
    is_directory: bool | None = None
    mode: OutputMode = "mount"
    data_type: str | None = None
    pipeline_output_name: str | None = None
    upload: UploadSpec | None = None


# ---- steps -------------------------------------------------------------------------------------


class LiteralPart(SpecModel):
    """Text of an argument that is the same in every run."""

    kind: Literal["literal"] = "literal"
    text: str


class InputPart(SpecModel):
    """The path at which the step's process finds an input."""

    kind: Literal["input"] = "input"
    name: str


class OutputPart(SpecModel):
    """The path at which the step's process puts an output."""

    kind: Literal["output"] = "output"
    name: str


ArgumentPart = Annotated[
    LiteralPart | InputPart | OutputPart | ParameterRef, Field(discriminator="kind")
]
Argument = tuple[ArgumentPart, ...]
"""One element of argv: its parts are joined without anything between them."""


class DistributedSpec(SpecModel):
    """Several processes that work as one step.

    Attributes:
        framework: Whose way of finding each other they have.
        nodes: Machines.
        processes_per_node: Processes on each; for TensorFlow, its workers.
        parameter_servers: TensorFlow's, beside the workers.
        chief: Whether TensorFlow's cluster has a chief of its own, which coordinates the workers.
    """

    framework: Literal["mpi", "pytorch", "tensorflow"]
    nodes: int = 1
    processes_per_node: int = 1
    parameter_servers: int = 0
    chief: bool = False


class StepSpec(SpecModel):
    """One unit of work.

    Attributes:
        id: Unique in the graph, stable, and the Airflow task id.
        name: The author's name for it; names may repeat.
        type: The class of the step, such as ``PythonScriptStep``.
        operator: ``module:Class`` of the Airflow operator that runs it.
        script: The Python script, relative to the source directory; None for other programs.
        command: argv before the arguments; for a Python script, empty.
        arguments: argv after the script or the command.
        source_directory: Relative to the graph's ``root`` where it lies inside, else absolute; None
            if the step has no files of its own.
        params: Exported as ``AML_PARAMETER_<name>`` and ``MLP_PARAM_<name>``.
        environment_variables: Set for the process; they count in the fingerprint.
        secrets: Environment variable -> Airflow connection id (its password). Never digested or shown.
        code: ``closure`` digests what the script reaches; ``folder`` the whole source directory.
        ignore: Names of params and parameters that leave the outputs unchanged.
        run_after: Ids of steps that must be over first, beyond those it takes data from.
        distributed: The processes that it consists of; None for a single one.
        config: What a step type of the user's own needs beyond all this. Part of the fingerprint.
        timeout_seconds: How long the program may run.
    """

    id: str
    name: str
    type: str
    operator: str
    script: str | None = None
    command: tuple[Argument, ...] = ()
    arguments: tuple[Argument, ...] = ()
    source_directory: str | None = None
    inputs: tuple[InputSpec, ...] = ()
    outputs: tuple[OutputSpec, ...] = ()
    params: dict[str, ParameterValue | ParameterRef] = {}
    environment_variables: dict[str, str] = {}
    secrets: dict[str, str] = {}
    compute: str
    environment: EnvironmentSpec | None = None
    resources: ResourcesSpec = ResourcesSpec()
    distributed: DistributedSpec | None = None
    allow_reuse: bool = True
    version: str | None = None
    code: Literal["closure", "folder"] = "closure"
    ignore: tuple[str, ...] = ()
    run_after: tuple[str, ...] = ()
    retries: int | None = None
    retry_delay_seconds: float | None = None
    timeout_seconds: float | None = None
    config: dict[str, JsonValue] = {}
    description: str | None = None

    @property
    def parameter_names(self) -> frozenset[str]:
        """The pipeline parameters that this step uses, in arguments or ``params``."""
        parts = [part for argument in (*self.command, *self.arguments) for part in argument]
        refs = [part for part in parts if isinstance(part, ParameterRef)]
        refs += [value for value in self.params.values() if isinstance(value, ParameterRef)]
        return frozenset(ref.name for ref in refs)

    @property
    def upstream(self) -> frozenset[str]:
        """Ids of the steps that come before this one, for data or for order."""
        sources = [item.source for item in self.inputs]
        data = {source.step for source in sources if isinstance(source, StepOutputRef)}
        return frozenset(data | set(self.run_after))


class PipelineGraph(SpecModel):
    """A whole pipeline.

    Attributes:
        version: The version of this format.
        name: The pipeline's name, and the default DAG id.
        root: Absolute directory that relative source directories start from. It differs between
            machines and counts in no digest.
        default_datastore: Where snapshots and large values go.
        steps: In an order in which every step comes after those it depends on.
    """

    version: Literal[1] = GRAPH_VERSION
    name: str
    description: str | None = None
    workspace: str
    root: str
    default_datastore: str
    datastores: dict[str, DatastoreSpec]
    computes: dict[str, ComputeSpec]
    parameters: tuple[ParameterSpec, ...] = ()
    steps: tuple[StepSpec, ...] = ()

    def step(self, step_id: str) -> StepSpec:
        """Return the step with this id.

        Raises:
            KeyError: There is none.
        """
        for step in self.steps:
            if step.id == step_id:
                return step
        raise KeyError(step_id)

    @property
    def offers(self) -> dict[str, tuple[str, str]]:
        """The step and the output behind each output that the pipeline as a whole offers, by its name."""
        return {
            output.pipeline_output_name: (step.id, output.name)
            for step in self.steps
            for output in step.outputs
            if output.pipeline_output_name
        }

    @classmethod
    def json_schema(cls) -> dict[str, Any]:
        """Return the JSON Schema of this format, as published in ``docs/pipeline-graph.schema.json``."""
        return cls.model_json_schema()
