"""What is typed after the command's name: steps to regenerate, and values of parameters."""

from __future__ import annotations

import pytest

from airflow_mlpipelines.cli import join_regenerate
from airflow_mlpipelines.cli.files import load_pipeline, parse_parameters, parse_regenerate
from airflow_mlpipelines.exceptions import DefinitionError


@pytest.mark.parametrize(
    ("typed", "joined"),
    [
        ("run words.py --regenerate", "run words.py --regenerate all"),
        ("run --regenerate words.py", "run --regenerate all words.py"),
        ("run words.py --regenerate --json", "run words.py --regenerate all --json"),
        ("run --regenerate tidy count words.py", "run --regenerate tidy,count words.py"),
        ("run words.py --regenerate tidy count", "run words.py --regenerate tidy,count"),
        ("run words.py --regenerate tidy,count", "run words.py --regenerate tidy,count"),
        ("run words.py --regenerate tidy -p top=1", "run words.py --regenerate tidy -p top=1"),
        ("check a.py b.py --json", "check a.py b.py --json"),
    ],
)
def test_the_steps_after_regenerate_are_its_value_and_alone_it_means_all(typed, joined):
    assert join_regenerate(typed.split()) == joined.split()


@pytest.mark.parametrize(
    "texts", [["tidy", "count"], ["tidy,count"], ["tidy, count"], ["tidy,,", "count"]]
)
def test_regenerate_takes_commas_and_repetition(words, texts):
    assert parse_regenerate(load_pipeline(words, None), texts) == ["tidy", "count"]


def decisions(answer):
    assert answer.code == 0, answer.err
    return {step["name"]: step["reason"] for step in answer.json["steps"]}


@pytest.mark.usefixtures("index")
def test_the_command_takes_regenerate_in_all_its_forms(mlpipelines, words):
    everything = decisions(mlpipelines("plan", words, "--json", "--regenerate"))
    assert everything == {"tidy": everything["tidy"], "count": everything["tidy"]}
    assert "regenerate_outputs" in everything["tidy"]
    for form in (["tidy", "count"], ["tidy,count"], ["all"]):
        assert decisions(mlpipelines("plan", "--regenerate", *form, words, "--json")) == everything
    one = decisions(mlpipelines("plan", words, "--regenerate=count", "--json"))
    assert one == {"tidy": "never ran before in this pipeline", "count": everything["count"]}


@pytest.mark.parametrize("command", ["plan", "run", "submit"])
def test_regenerate_of_a_step_that_is_not_there_names_those_that_are(mlpipelines, words, command):
    answer = mlpipelines(command, words, "--regenerate", "tidi")

    assert answer.code == 2
    assert answer.err == (
        "error: --regenerate: pipeline 'words' has no step 'tidi'; it has ['count', 'tidy'], and "
        "'all' means every step. Did you mean 'tidy'?\n"
    )


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("rate=0.25", 0.25),
        ("rate=1", 1.0),
        ("top=7", 7),
        ("top=-7", -7),
        ("mode=exact", "exact"),
        ("dry=true", True),
        ("dry=No", False),
        ("dry=1", True),
    ],
)
def test_a_value_gets_the_type_of_its_parameter(words, text, value):
    parsed = parse_parameters(load_pipeline(words, None), [text])

    (found,) = parsed.values()
    assert found == value
    assert type(found) is type(value)


def test_several_values_stand_side_by_side_and_the_last_of_a_name_wins(words):
    pipeline = load_pipeline(words, None)

    assert parse_parameters(pipeline, ["top=1", "rate=1", "top=2"]) == {"top": 2, "rate": 1.0}


def test_a_text_may_hold_an_equals_sign(write):
    file = write(
        "from airflow_mlpipelines import *\n"
        "query = PipelineParameter('query', '')\n"
        "step = CommandStep(['echo', query], 'ask')\n"
        "Pipeline(Workspace.from_config(), [step])\n"
    )

    assert parse_parameters(load_pipeline(file, None), ["query=a=b"]) == {"query": "a=b"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rate", r"-p 'rate': write NAME=VALUE"),
        ("raet=1", r"pipeline 'words' has no parameter 'raet'.*Did you mean 'rate'\?"),
        ("rate=fast", r"-p rate='fast': the value is to be of type float"),
        ("top=1.5", r"-p top='1.5': the value is to be of type int"),
        ("dry=perhaps", r"-p dry='perhaps': the value is to be of type bool"),
        ("rate=1.5", r"-p rate='1.5': the value 1.5 is more than the maximum 1.0"),
        ("rate=-1", r"-p rate='-1': the value -1.0 is less than the minimum 0.0"),
        ("rate=nan", r"-p rate='nan': the value"),
        ("mode=slow", r"-p mode='slow': the value 'slow' is not among \['fast', 'exact'\]"),
    ],
)
def test_a_value_that_does_not_fit_is_refused_with_the_reason(words, text, message):
    with pytest.raises(DefinitionError, match=message):
        parse_parameters(load_pipeline(words, None), [text])


@pytest.mark.parametrize("command", ["plan", "run", "submit"])
def test_a_wrong_parameter_ends_each_command_with_code_2(mlpipelines, words, command):
    answer = mlpipelines(command, words, "-p", "raet=1")

    assert answer.code == 2
    assert answer.out == ""
    assert answer.err.count("\n") == 1
    assert answer.err.startswith("error: -p 'raet=1': pipeline 'words' has no parameter 'raet'")
