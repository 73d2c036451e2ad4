from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from airflow_mlpipelines import (
    CommandStep,
    DataReference,
    Datastore,
    Environment,
    LocalCompute,
    Pipeline,
    PipelineData,
    PipelineGraph,
    PipelineParameter,
    PythonScriptStep,
    PyTorch,
    Resources,
    StepSequence,
)
from airflow_mlpipelines.definition.graph import (
    ExternalDataSpec,
    InputPart,
    LiteralPart,
    OutputPart,
    ParameterRef,
    ParameterSpec,
    StepOutputRef,
)
from airflow_mlpipelines.definition.pipeline import collect_pipelines
from airflow_mlpipelines.exceptions import DefinitionError, PipelineCheckError
from tests.helpers import make_graph, make_step

SCHEMA = Path(__file__).parents[3] / "docs" / "pipeline-graph.schema.json"


def command(name, *, inputs=(), outputs=(), **options):
    """Return a step that runs ``true``."""
    return CommandStep(["true"], name=name, inputs=list(inputs), outputs=list(outputs), **options)


def messages(pipeline):
    """Return all problems of a pipeline as text."""
    return [str(problem) for problem in pipeline.validate()]


class TestEdges:
    def test_azure_ml_s_program_makes_a_graph(self, ws, code):
        store = Datastore(ws, "store")
        raw = DataReference(
            datastore=store, data_reference_name="raw", path_on_datastore="flights/2013.csv"
        )
        clean = PipelineData("clean", datastore=store, output_name="clean_flights")
        step = PythonScriptStep(
            script_name="prepare.py",
            arguments=["--in", raw, "--out", clean],
            inputs=[raw],
            outputs=[clean],
            compute_target=ws.compute_targets["local"],
            source_directory=code,
        )

        spec = Pipeline(workspace=ws, steps=[step]).graph.steps[0]

        assert (spec.id, spec.name, spec.type) == ("prepare", "prepare.py", "PythonScriptStep")
        assert spec.inputs[0].source == ExternalDataSpec(
            name="raw", datastore="store", path="flights/2013.csv"
        )
        assert spec.outputs[0].name == "clean_flights"
        assert spec.arguments == (
            (LiteralPart(text="--in"),),
            (InputPart(name="raw"),),
            (LiteralPart(text="--out"),),
            (OutputPart(name="clean_flights"),),
        )

    def test_naming_the_last_step_is_enough(self, ws):
        table, model = PipelineData("table"), PipelineData("model")
        command("prepare", outputs=[table])
        command("train", inputs=[table], outputs=[model])
        last = command("report", inputs=[model])

        graph = Pipeline(ws, [last]).graph

        assert [step.id for step in graph.steps] == ["prepare", "train", "report"]

    def test_a_handle_in_the_arguments_alone_is_an_edge(self, ws):
        table = PipelineData("table")
        command("prepare", outputs=[table])
        train = CommandStep(["cat", table], name="train")

        graph = Pipeline(ws, [train]).graph

        assert graph.step("train").inputs[0].source == StepOutputRef(step="prepare", output="table")
        assert graph.step("train").command[1] == (InputPart(name="table"),)

    def test_a_renamed_and_downloaded_input_keeps_its_edge(self, ws):
        table = PipelineData("table")
        first = command("prepare", outputs=[table])
        second = command("train", inputs=[table.as_download("rows")])

        item = Pipeline(ws, [first, second]).graph.step("train").inputs[0]

        assert (item.name, item.mode, item.source.step) == ("rows", "download", "prepare")

    def test_run_after_and_sequences_order_without_data(self, ws):
        a, b, c, d = (command(name) for name in "abcd")
        d.run_after(a)

        graph = Pipeline(ws, [StepSequence([a, [b, c]]), d]).graph

        assert {step.id: set(step.run_after) for step in graph.steps} == {
            "a": set(),
            "b": {"a"},
            "c": {"a"},
            "d": {"a"},
        }

    def test_nested_lists_run_side_by_side(self, ws):
        graph = Pipeline(ws, [[command("a"), command("b")], command("c")]).graph

        assert all(not step.upstream for step in graph.steps)

    def test_repeated_names_get_ids_that_stay(self, ws):
        steps = [command("train") for _ in range(3)]

        first = [step.id for step in Pipeline(ws, steps[:2]).graph.steps]
        more = [step.id for step in Pipeline(ws, steps).graph.steps]

        assert first == ["train", "train_2"]
        assert more == ["train", "train_2", "train_3"]

    def test_the_ids_of_the_tasks_around_the_steps_are_taken(self, ws):
        graph = Pipeline(ws, [command("finish"), command("cache_sensor")]).graph

        assert [step.id for step in graph.steps] == ["finish_step", "cache_sensor_step"]

    def test_only_the_listed_steps_without_closure(self, ws):
        table = PipelineData("table")
        first = command("prepare", outputs=[table])
        second = command("train")
        second.run_after(first)

        graph = Pipeline(ws, [second], resolve_closure=False).graph

        assert [step.id for step in graph.steps] == ["train"]

    def test_a_chain_longer_than_the_stack_is_deep(self, ws):
        steps = [command(f"s{number}") for number in range(3000)]
        for earlier, later in itertools.pairwise(steps):
            later.run_after(earlier)

        assert len(Pipeline(ws, [steps[-1]]).graph.steps) == 3000


class TestArguments:
    def test_a_token_inside_text_stands_for_the_path(self, ws):
        raw = DataReference(ws.default_datastore, "raw")
        out = PipelineData("out")
        step = command("s", inputs=[raw], outputs=[out])
        step.arguments = [f"--in={raw}/part.csv", f"{raw}:{out}"]

        spec = Pipeline(ws, [step]).graph.steps[0]

        assert spec.arguments == (
            (LiteralPart(text="--in="), InputPart(name="raw"), LiteralPart(text="/part.csv")),
            (InputPart(name="raw"), LiteralPart(text=":"), OutputPart(name="out")),
        )

    def test_a_parameter_is_declared_once_and_used_everywhere(self, ws):
        rate = PipelineParameter("rate", 0.1, minimum=0, maximum=1)
        steps = [command("a", params={"rate": rate}), CommandStep(["echo", rate], name="b")]

        graph = Pipeline(ws, steps).graph

        assert graph.parameters == (
            ParameterSpec(name="rate", type="float", default=0.1, minimum=0, maximum=1),
        )
        assert graph.step("a").params == {"rate": ParameterRef(name="rate")}
        assert graph.step("b").parameter_names == {"rate"}

    def test_a_command_as_text_is_split_and_never_a_shell(self, ws):
        step = CommandStep("python -c 'print(1; 2)'")

        spec = Pipeline(ws, [step]).graph.steps[0]

        assert [part[0].text for part in spec.command] == ["python", "-c", "print(1; 2)"]
        assert spec.name == "python"


class TestProblems:
    def test_all_problems_come_at_once(self, ws, code):
        lost = PipelineData("lost")
        steps = [
            PythonScriptStep("prepar.py", source_directory=code, compute_target="gpu-clustr"),
            command("train", inputs=[lost], outputs=["model"]),
        ]

        pipeline = Pipeline(ws, steps, name="churn training")

        with pytest.raises(PipelineCheckError) as caught:
            pipeline.graph  # noqa: B018 - asking for it is what raises
        text = str(caught.value)
        assert caught.value.pipeline == "churn training"
        assert len(caught.value.problems) == 5
        assert "Did you mean 'gpu-cluster'?" in text
        assert "Did you mean 'prepare.py'?" in text
        assert "step 'train', input 'lost': no step makes it" in text
        assert "str can't be an output" in text
        assert "How about 'churn_training'?" in text

    def test_a_cycle_is_shown_with_its_path(self, ws):
        a, b, c = PipelineData("a"), PipelineData("b"), PipelineData("c")
        command("first", inputs=[c], outputs=[a])
        command("second", inputs=[a], outputs=[b])
        last = command("third", inputs=[b], outputs=[c])

        assert messages(Pipeline(ws, [last]))[0].startswith(
            "step 'first': steps wait for each other in a circle: "
            "'first' -> 'second' -> 'third' -> 'first'"
        )

    def test_two_producers_of_one_output(self, ws):
        table = PipelineData("table")
        steps = [command("a", outputs=[table]), command("b", outputs=[table])]

        assert "steps 'a' and 'b' both make it" in messages(Pipeline(ws, steps))[0]

    def test_an_argument_that_cannot_be_rendered(self, ws):
        steps = [CommandStep(["echo", {"a": 1}], name="a"), CommandStep(["echo", object], name="b")]

        found = messages(Pipeline(ws, steps))

        assert "{'a': 1} of type dict can't be rendered" in found[0]
        assert len(found) == 2

    def test_a_parameter_inside_text_is_noticed(self, ws):
        rate = PipelineParameter("rate", 0.1)

        assert (
            "holds a PipelineParameter as text"
            in messages(Pipeline(ws, [CommandStep(["echo", f"--rate={rate}"])]))[0]
        )

    def test_two_parameters_of_one_name(self, ws):
        steps = [
            CommandStep(["echo", PipelineParameter("rate", 0.1)], name="a"),
            CommandStep(["echo", PipelineParameter("rate", 0.2)], name="b"),
        ]

        assert "parameter 'rate': is defined in two ways" in messages(Pipeline(ws, steps))[0]

    @pytest.mark.parametrize(
        ("compute", "gpus", "message"),
        [
            ("local", 64, None),  # how many there are, only the worker's machine knows
            ("local-gpus", 3, "has only 2"),
            ("local-gpus", 2, None),
            ("no-gpus", 1, "has none"),
            ("docker-gpus", 2, "has only 1"),
            ("cpu-docker", 1, "has none"),
            ("gpu-cluster", 3, "has only 2"),
            ("gpu-cluster", 2, None),
        ],
    )
    def test_gpus_have_to_be_there(self, ws, compute, gpus, message):
        step = command("train", compute_target=compute, resources=Resources(gpus=gpus))

        found = messages(Pipeline(ws, [step]))

        assert len(found) == (0 if message is None else 1)
        assert message is None or message in found[0]

    @pytest.mark.parametrize(("nodes", "count"), [(4, 0), (5, 1)])
    def test_a_step_needs_no_more_nodes_than_its_compute_may_have(self, ws, nodes, count):
        gang = PyTorch(nodes=nodes)
        step = command("train", compute_target="gpu-cluster", distributed=gang)

        found = messages(Pipeline(ws, [step]))

        assert len(found) == count
        assert all("over 5 nodes" in message and "max_nodes 4" in message for message in found)

    def test_a_container_needs_an_image(self, ws):
        from airflow_mlpipelines import DockerCompute

        bare = DockerCompute("bare")
        steps = [
            command("a", compute_target=bare),
            command("b", compute_target=bare, environment=Environment(image="python:3.11-slim")),
        ]

        found = messages(Pipeline(ws, steps))

        assert len(found) == 1
        assert "step 'a'" in found[0]
        assert "needs an image" in found[0]

    def test_a_python_version_brings_the_image_of_that_python(self, ws):
        from airflow_mlpipelines import DockerCompute

        environment = Environment(python_version="3.12", pip=["rich"])
        steps = [command("a", compute_target=DockerCompute("bare"), environment=environment)]

        assert messages(Pipeline(ws, steps)) == []

    def test_apt_packages_are_for_containers(self, ws):
        environment = Environment(apt=["git"])
        steps = [
            command("a", compute_target="local", environment=environment),
            command("b", compute_target="cpu-docker", environment=environment),
        ]

        found = messages(Pipeline(ws, steps))

        assert len(found) == 1
        assert "step 'a'" in found[0]
        assert "apt packages" in found[0]

    def test_what_pods_run_is_built_for_a_registry(self, ws):
        from airflow_mlpipelines import KubernetesCompute

        registry = {"url": "registry.example.com/team/env"}
        pods = KubernetesCompute("pods", image="python:3.12")
        shared = KubernetesCompute("shared", image="python:3.12", registry=registry)
        built, image = Environment(pip=["rich"]), Environment(image="python:3.13")
        steps = [
            command("a", compute_target=pods, environment=built),
            command("b", compute_target=shared, environment=built),
            command("c", compute_target=pods, environment=image),
            command("d", compute_target=pods),
        ]

        found = messages(Pipeline(ws, steps))

        assert len(found) == 1
        assert "step 'a'" in found[0]
        assert "no registry is named for the nodes of compute 'pods'" in found[0]

    def test_an_environment_without_apt_packages_has_the_digest_that_it_had(self):
        assert Environment("any", pip=["pandas==2.2.3"]).digest == (
            "3a83beaa358b5e4aa1ed593c03e913ed98b3ac7d156919cbb21d67f0e6bc4332"
        )
        one, two = Environment(apt=["git"]).digest, Environment(apt=["curl"]).digest
        assert len({one, two, Environment().digest}) == 3

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"retries": -1}, "retries is -1"),
            ({"timeout": 0}, "timeout is 0"),
            ({"ignore": ["loglevel"], "params": {"log_level": 1}}, "Did you mean 'log_level'?"),
            ({"params": {"x": [1]}}, "param 'x': is of type list"),
            ({"environment": "sklern"}, "Did you mean 'sklearn'?"),
            ({"source_directory": "nowhere"}, "source_directory 'nowhere' is not there"),
            ({"compute_target": 3}, "compute_target is a int"),
        ],
    )
    def test_wrong_options_are_named(self, ws, options, message):
        assert message in messages(Pipeline(ws, [command("s", **options)]))[0]

    def test_pipeline_output_names_are_unique(self, ws):
        steps = [
            command(name, outputs=[PipelineData(name, pipeline_output_name="model")])
            for name in ("a", "b")
        ]

        assert "is that of step 'a' already" in messages(Pipeline(ws, steps))[0]

    @pytest.mark.parametrize("path", ["/data", "../data", "a/../../b", "", "."])
    def test_an_input_stays_below_the_working_directory(self, ws, path):
        raw = DataReference(Datastore(ws, "store"), "raw", path_on_compute=path)

        problems = messages(Pipeline(ws, [command("use", inputs=[raw])]))

        assert len(problems) == 1
        assert "step 'use', input 'raw': path_on_compute" in problems[0]

    def test_two_inputs_of_one_name(self, ws):
        one = DataReference(ws.default_datastore, "raw", "a.csv")
        two = DataReference(ws.default_datastore, "raw", "b.csv")

        assert (
            "is the name of two inputs"
            in messages(Pipeline(ws, [command("s", inputs=[one, two])]))[0]
        )

    @pytest.mark.parametrize(
        "make",
        [
            lambda: PipelineData("my data"),
            lambda: PipelineData("data", output_mode="teleport"),
            lambda: PipelineParameter("rate", None),
            lambda: PipelineParameter("rate", 2.0, maximum=1),
            lambda: PipelineParameter("kind", "z", choices=["x", "y"]),
            lambda: PipelineParameter("kind", "z", minimum=1),
            lambda: PipelineParameter("1st", 1),
            lambda: Resources(cpus=-1),
            lambda: Resources(memory="much"),
            lambda: Environment(image="a", dockerfile="FROM b"),
            lambda: Environment(pip="pandas"),
            lambda: Environment(apt="git"),
            lambda: Environment(apt=["git; rm -rf /"]),
            lambda: Environment(apt=["--allow-downgrades"]),
            lambda: CommandStep([]),
            lambda: CommandStep(["x"], inputs="raw"),
            lambda: CommandStep(["x"]).run_after("y"),
        ],
    )
    def test_what_is_wrong_by_itself_is_refused_where_it_stands(self, make):
        with pytest.raises(DefinitionError):
            make()


class TestGraph:
    def test_a_graph_survives_json(self, ws, code):
        rate = PipelineParameter("rate", 0.1, choices=[0.1, 0.2])
        table = PipelineData("table", is_directory=True)
        first = PythonScriptStep(
            "prepare.py",
            arguments=[rate, table],
            outputs=[table],
            source_directory=code,
            environment="sklearn",
            secrets={"TOKEN": "my_connection"},
            resources=Resources(cpus=1.5, memory="512M"),
        )
        second = command("train", inputs=[table], compute_target=LocalCompute("big", max_nodes=2))
        graph = Pipeline(ws, [first, second], name="p").graph

        assert PipelineGraph.model_validate_json(graph.model_dump_json()) == graph

    @given(
        params=st.dictionaries(
            st.text(min_size=1),
            st.text() | st.integers() | st.floats(allow_nan=False) | st.booleans(),
        )
    )
    def test_values_keep_their_types_through_json(self, params):
        graph = make_graph(make_step("a", params=params))

        back = PipelineGraph.model_validate_json(graph.model_dump_json())

        assert back == graph
        kinds = {name: type(value) for name, value in back.steps[0].params.items()}
        assert kinds == {name: type(value) for name, value in params.items()}

    def test_the_published_schema_is_current(self):
        assert json.loads(SCHEMA.read_text()) == PipelineGraph.json_schema(), (
            "run: python -m airflow_mlpipelines.definition.schema docs/pipeline-graph.schema.json"
        )

    def test_source_directories_are_relative_to_the_file(self, ws):
        here = Path(__file__).parent

        pipeline = Pipeline(ws, [command("s", source_directory=".")])

        assert pipeline.root == here
        assert pipeline.name == "test_pipeline"
        assert pipeline.graph.steps[0].source_directory == "."

    def test_pipelines_of_a_file_can_be_collected(self, ws):
        with collect_pipelines() as found:
            first = Pipeline(ws, [command("s")], name="first")
        Pipeline(ws, [command("s")], name="second")

        assert found == [first]


def test_an_input_may_be_its_address_and_then_has_no_path(ws):
    raw = DataReference(ws.default_datastore, "raw", "raw")
    data = PipelineData("data")
    make = CommandStep(["touch", data], outputs=[data])
    address, other = raw.as_direct(), data.as_direct()
    show = CommandStep(["echo", address, other], inputs=[address, other])

    spec = Pipeline(ws, [make, show]).graph.step("echo")

    assert [item.mode for item in spec.inputs] == ["direct", "direct"]
    address.path_on_compute = "raw"
    with pytest.raises(PipelineCheckError, match="in mode 'direct' nothing is put there"):
        _ = Pipeline(ws, [make, show]).graph
