"""What every launcher promises, as one set of tests.

A launcher passes it by a subclass with :meth:`LauncherContract.make_launcher`, in a test module of its
own. Nothing in here knows where the program runs: it looks only at what lies in the step's directories,
which every launcher shares with the program, or brings from it. What the tests tell a running program, and
how they see that it is dead, is up to the :class:`Workbench`.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import textwrap
import threading
import time
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import pytest

from airflow_mlpipelines.compute.base import Launcher, ProcessPaths, Stage, StepLaunch
from airflow_mlpipelines.definition.graph import EnvironmentSpec, ResourcesSpec
from airflow_mlpipelines.exceptions import StepFailedError
from airflow_mlpipelines.execution.handles import FileHandle
from airflow_mlpipelines.runtime.contract import step_environment
from airflow_mlpipelines.runtime.stage import stage_runtime

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

# Writes a new number into a file of the run directory, over and over: while it changes, it is alive.
BEAT = """
    import os, time

    RUN = os.environ.get("MLP_RUN_DIR")

    def beat(name, until=lambda: False):
        file = os.path.join(RUN, "beat-" + name)
        number = 0
        while not until():
            number += 1
            with open(file + ".new", "w") as new:
                new.write(str(number))
            os.replace(file + ".new", file)
            time.sleep(0.02)
"""

# Starts three processes that do their best to escape, and waits until all of them are alive.
BROOD = """
    import os, subprocess, sys, time
    from beat import beat

    RUN = os.environ["MLP_RUN_DIR"]
    HERE = os.path.dirname(os.path.abspath(__file__))

    def child(name, **options):
        code = "import sys; sys.path.insert(0, %r); import beat; beat.RUN = %r; beat.beat(%r)"
        code = "import signal; signal.signal(15, signal.SIG_IGN); " + code % (HERE, RUN, name)
        nothing = subprocess.DEVNULL
        return subprocess.Popen(
            [sys.executable, "-c", code], stdin=nothing, stdout=nothing, stderr=nothing, **options
        )

    child("background")
    child("session", start_new_session=True)
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            child("daemon", start_new_session=True, env={})
        os._exit(0)
    names = ["background", "session", "daemon"]
    while not all(os.path.exists(os.path.join(RUN, "beat-" + name)) for name in names):
        time.sleep(0.01)
    open(os.path.join(RUN, "brood"), "w").close()
    print("all are alive")
    if sys.argv[1] == "wait":
        beat("program")
"""


class Workbench:
    """A step run's directories, and a launcher to run programs there.

    Attributes:
        lines: What the program has printed so far.
    """

    def __init__(
        self,
        root: Path,
        make_launcher: Callable[[], Launcher],
        environment: EnvironmentSpec | None,
        step_run_id: str,
    ) -> None:
        self.root = root
        self.step_run_id = step_run_id
        self.lines: list[str] = []
        self.on_line: Callable[[str], None] = lambda _line: None
        self._make_launcher = make_launcher
        self._environment = environment
        self.handle = FileHandle(root / "handle.json")
        self.inputs: dict[str, Path] = {}
        self.restage()
        self.launcher = make_launcher()

    def restage(self) -> None:
        """Make the directories anew, as for a try that adopts nothing."""
        base = self.root / "stage"
        shutil.rmtree(base, ignore_errors=True)
        outputs = self.root / "outputs"
        shutil.rmtree(outputs, ignore_errors=True)
        for directory in (base / "code", base / "run", outputs):
            directory.mkdir(parents=True)
        self.stage = Stage(
            root=base,
            code=base / "code",
            runtime=stage_runtime(self.root / "runtime"),
            run=base / "run",
            inputs=self.inputs,
            outputs={"table": outputs / "table"},
            outputs_root=outputs,
        )
        self.write("beat.py", BEAT)
        self.write("brood.py", BROOD)

    def write(self, name: str, text: str) -> None:
        """Write a file of the step's code."""
        (self.stage.code / name).write_text(textwrap.dedent(text), encoding="utf-8")

    def run(
        self,
        script: str | None = None,
        *arguments: str | None,
        argv: Sequence[str] | None = None,
        name: str = "script.py",
        env: Mapping[str, str] | None = None,
        **options: Any,
    ) -> None:
        """Run a script, given as text or by its ``name``, or ``argv``; return as the launcher does."""
        if script is not None:
            self.write(name, script)
        launcher = self.launcher
        ready = launcher.prepare_environment(
            self._environment,
            launcher.resolve_environment(self._environment),
            emit=lambda _line: None,
        )
        self.paths: ProcessPaths = launcher.process_paths(self.stage, ready)
        variables = step_environment(
            run_id=self.step_run_id,
            step="the step",
            pipeline="the pipeline",
            run_directory=self.paths.run,
            runtime=self.paths.runtime,
            inputs=self.paths.inputs,
            outputs=self.paths.outputs,
            params={},
        )
        launch = StepLaunch(
            step_run_id=self.step_run_id,
            step_name="the step",
            argv=tuple(argv or [self.paths.python, name, *arguments]),
            env={**variables, **(env or {})},
            secrets=options.pop("secrets", {}),
            stage=self.stage,
            resources=options.pop("resources", ResourcesSpec()),
            image=ready.image,
            labels={"dag_id": "a_dag", "task_id": "the step", "try_number": "1"},
            **options,
        )
        launcher.run(launch, emit=self._emit, handle=self.handle)
        assert launcher.release(self.step_run_id, self.handle)

    def next_try(self) -> None:
        """Take a new launcher, as the next try of the same task instance does."""
        self.launcher = self._make_launcher()
        self.lines = []

    def start(self, *arguments: str | None, **options: Any) -> Running:
        """Run a program in a thread."""
        return Running(self, arguments, options)

    def run_in_lost_worker(
        self, until: Callable[[], bool], *arguments: str | None, **options: Any
    ) -> None:
        """Run a program from another process, and kill that with SIGKILL in the middle of it.

        With its process group, as Airflow's supervisor does.
        """
        worker = os.fork()
        if worker == 0:
            try:
                os.setpgid(0, 0)
                self.run(*arguments, **options)
            finally:
                os._exit(0)
        wait_until(until)
        os.killpg(worker, signal.SIGKILL)
        os.waitpid(worker, 0)

    def path(self, name: str) -> Path:
        """Return a file of the run directory."""
        return self.stage.run / name

    def touch(self, name: str) -> None:
        """Make an empty file in the run directory, where the program sees it."""
        self.path(name).touch()

    def read(self, name: str) -> Any:
        """Return what a program has left in the run directory as JSON."""
        return json.loads(self.path(name).read_text(encoding="utf-8"))

    def is_quiet(self) -> bool:
        """Return whether nothing beats any more."""
        before = self._beats()
        time.sleep(0.3)
        return before == self._beats()

    def _beats(self) -> dict[str, str]:
        found = {}
        for file in sorted(self.stage.run.glob("beat-*")):
            if file.suffix != ".new":
                found[file.name] = file.read_text()
        return found

    def _emit(self, line: str) -> None:
        self.lines.append(line)
        self.on_line(line)


class Running:
    """A program that runs in a thread."""

    def __init__(
        self, bench: Workbench, arguments: tuple[str | None, ...], options: dict[str, Any]
    ) -> None:
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(bench, arguments, options))
        self._thread.start()

    def wait(self) -> None:
        """Return or raise as the launcher has."""
        self._thread.join(timeout=30)
        assert not self._thread.is_alive()
        if self.error is not None:
            raise self.error

    def _run(
        self, bench: Workbench, arguments: tuple[str | None, ...], options: dict[str, Any]
    ) -> None:
        try:
            bench.run(*arguments, **options)
        except BaseException as error:  # noqa: BLE001 - handed to the test's own thread
            self.error = error


def wait_until(condition: Callable[[], bool], *, seconds: float = 30) -> None:
    """Return as soon as ``condition`` holds; fail if it does not in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


class LauncherContract(ABC):
    """The tests. Programs are Python scripts for 3.8 and later."""

    environment: EnvironmentSpec | None = None
    killed_within_seconds = 3.0

    @abstractmethod
    def make_launcher(self) -> Launcher:
        """Return a launcher for one try of one step run."""

    def make_unprivileged_launcher(self) -> Launcher:
        """Return a launcher whose programs run as :attr:`unprivileged_uid`."""
        return self.make_launcher()

    @property
    def unprivileged_uid(self) -> int:
        """Whom a program runs as that must not be root, as far as the compute has a choice.

        A local one has none: its programs are the worker's own user, who must not be root then.
        """
        return os.getuid()

    def make_step_run_id(self, tmp_path: Path) -> str:
        """Return an id that no other test uses."""
        return f"mlp-test-{os.getpid()}-{abs(hash(tmp_path)) % 10**8}"

    def make_bench(self, tmp_path: Path) -> Workbench:
        """Return the directories of a step run and a launcher for it."""
        return Workbench(
            tmp_path, self.make_launcher, self.environment, self.make_step_run_id(tmp_path)
        )

    @pytest.fixture
    def bench(self, tmp_path: Path) -> Workbench:
        return self.make_bench(tmp_path)

    # ---- its end ---------------------------------------------------------------------------

    def test_run_returns_when_the_program_ends_well(self, bench: Workbench) -> None:
        bench.run("print('done')")
        assert bench.lines == ["done"]
        assert bench.handle.get() is None

    def test_a_failure_has_the_exit_code_and_the_end_of_the_log(self, bench: Workbench) -> None:
        with pytest.raises(StepFailedError) as failure:
            bench.run("import sys\nfor i in range(500): print('line', i)\nsys.exit(3)")
        assert failure.value.exit_code == 3
        assert failure.value.log_tail[-1] == "line 499"
        assert 10 < len(failure.value.log_tail) < 500
        assert failure.value.retryable
        assert "the step" in str(failure.value)
        assert bench.handle.get() is None

    def test_a_traceback_is_in_the_end_of_the_log(self, bench: Workbench) -> None:
        with pytest.raises(StepFailedError, match="ZeroDivisionError"):
            bench.run("print('a')\n1 / 0")

    def test_a_program_that_is_not_there_is_not_tried_again(self, bench: Workbench) -> None:
        with pytest.raises(StepFailedError, match="no-such-program") as failure:
            bench.run(argv=["no-such-program", "x"])
        assert not failure.value.retryable

    def test_the_same_step_run_can_be_tried_again(self, bench: Workbench) -> None:
        with pytest.raises(StepFailedError):
            bench.run("import sys; sys.exit(1)")
        bench.next_try()
        assert bench.launcher.recover(bench.step_run_id, bench.handle) is False
        bench.run("print('second')")
        assert bench.lines == ["second"]

    # ---- its surroundings ------------------------------------------------------------------

    def test_arguments_arrive_byte_for_byte(self, bench: Workbench) -> None:
        arguments = [
            "",
            " ",
            "$(touch x)",
            "`id`",
            "a;b",
            "a\nb",
            "{{ ds }}",
            "--flag",
            "*",
            "'\"\\",
            "ü€🎈",
        ]
        bench.run(
            "import json, os, sys\n"
            "json.dump(sys.argv[1:], open(os.environ['MLP_RUN_DIR'] + '/argv', 'w'))",
            *arguments,
        )
        assert bench.read("argv") == arguments

    def test_variables_arrive_byte_for_byte(self, bench: Workbench) -> None:
        env = {"PLAIN": "x", "EMPTY": "", "ODD": "a b\n$HOME `id` ' \" \\ ü€🎈"}
        bench.run(
            "import json, os\n"
            "json.dump(dict(os.environ), open(os.environ['MLP_RUN_DIR'] + '/env', 'w'))",
            env=env,
        )
        seen = bench.read("env")
        assert {name: seen[name] for name in env} == env
        assert seen["MLP_STEP"] == "the step"

    def test_secrets_arrive_and_are_nowhere_else(
        self, bench: Workbench, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level("DEBUG")
        secret = "canary ' \" $HOME \\ 4711"
        with pytest.raises(StepFailedError) as failure:
            bench.run(
                "import json, os, sys\n"
                "json.dump(os.environ['PASSWORD'], open(os.environ['MLP_RUN_DIR'] + '/secret', 'w'))\n"
                "sys.exit(1)",
                secrets={"PASSWORD": secret},
            )
        assert bench.read("secret") == secret
        assert "4711" not in f"{caplog.text}{failure.value}{bench.lines}"
        for file in bench.root.rglob("*"):
            if file.is_file() and file != bench.path("secret"):
                assert b"4711" not in file.read_bytes(), file

    def test_the_working_directory_is_the_code_and_can_be_written(self, bench: Workbench) -> None:
        bench.run("import os\nos.makedirs('outputs')\nopen('outputs/a', 'w').write(os.getcwd())")
        assert (bench.stage.code / "outputs" / "a").read_text() == bench.paths.code

    def test_inputs_are_found_and_outputs_appear_where_they_should(self, tmp_path: Path) -> None:
        file = tmp_path / "data" / "table.csv"
        folder = tmp_path / "data" / "images"
        folder.mkdir(parents=True)
        file.write_text("a,b")
        (folder / "1.txt").write_text("one")
        bench = self.make_bench(tmp_path)
        bench.inputs.update(table=file, images=folder)
        bench.run(
            """
            import os
            read = lambda path: open(path).read()
            assert os.environ["MLP_INPUT_TABLE"].endswith("table.csv")
            images = os.environ["MLP_INPUT_IMAGES"]
            output = os.environ["MLP_OUTPUT_TABLE"]
            assert not os.path.exists(output) and os.path.isdir(os.path.dirname(output))
            with open(output, "w") as file:
                file.write(read(os.environ["MLP_INPUT_TABLE"]) + read(images + "/1.txt"))
            """
        )
        assert bench.stage.outputs["table"].read_text() == "a,bone"
        assert bench.stage.outputs["table"].stat().st_uid == os.getuid()

    def test_a_program_that_is_not_root_may_write_all_that_is_its_own(
        self, bench: Workbench
    ) -> None:
        bench.launcher = self.make_unprivileged_launcher()
        bench.write("given.txt", "given")
        bench.run(
            """
            import json, os, pathlib
            home = pathlib.Path.home()
            (home / ".cache").mkdir(exist_ok=True)
            (home / ".cache" / "x").touch()
            os.makedirs("outputs")
            with open("given.txt", "a") as file:
                file.write(", and changed")
            output = os.environ["MLP_OUTPUT_TABLE"]
            os.makedirs(output)
            pathlib.Path(output, "part").write_text("made")
            with open(os.environ["MLP_RUN_DIR"] + "/user", "w") as file:
                json.dump([os.getuid(), os.geteuid()], file)
            """,
            env=self.home_variables(bench),
        )
        assert bench.read("user") == [self.unprivileged_uid] * 2
        output = bench.stage.outputs["table"]
        assert (output / "part").read_text() == "made"
        shutil.rmtree(output)  # the worker may do with it what it likes

    def home_variables(self, bench: Workbench) -> Mapping[str, str]:
        """Return where a program finds its home, if the launcher does not give it one."""
        del bench
        return {}

    def test_the_runtime_package_is_importable(self, bench: Workbench) -> None:
        bench.run(
            """
            from airflow_mlpipelines import Run
            from airflow_mlpipelines.azureml.core import Run as AzureRun
            assert Run is AzureRun
            run = Run.get_context(allow_offline=False)
            run.log("accuracy", 0.5)
            print(run.id, run.name, run.experiment.name)
            """
        )
        assert bench.lines == [f"{bench.step_run_id} the step the pipeline"]
        assert '"accuracy"' in bench.path("metrics.jsonl").read_text()

    # ---- its log ---------------------------------------------------------------------------

    def test_lines_arrive_while_the_program_runs(self, bench: Workbench) -> None:
        # The program goes on only once its line has arrived.
        bench.on_line = lambda _line: bench.touch("seen")
        bench.run(
            """
            import os, time
            print("are you there?")
            while not os.path.exists(os.environ["MLP_RUN_DIR"] + "/seen"):
                time.sleep(0.01)
            """,
            timeout_seconds=20,
        )

    def test_both_streams_arrive_and_the_last_line_needs_no_line_end(
        self, bench: Workbench
    ) -> None:
        bench.run("import sys\nprint('out', flush=True)\nsys.stderr.write('err')")
        assert sorted(bench.lines) == ["err", "out"]

    def test_any_bytes_become_text(self, bench: Workbench) -> None:
        bench.run(
            r"import sys; sys.stdout.buffer.write(b'\xc3\xbc\xe2\x82\xac \xff\xfe \x00|\nnext\r\n')"
        )
        assert bench.lines[0].startswith("ü€ \ufffd\ufffd ")
        assert bench.lines[1] == "next"

    def test_of_a_progress_bar_the_last_state_stays(self, bench: Workbench) -> None:
        bench.run(
            "import sys\nfor i in range(1001): sys.stderr.write('\\r%d/1000' % i)\nprint(file=sys.stderr)"
        )
        assert bench.lines == ["1000/1000"]

    def test_a_line_that_does_not_end_comes_in_pieces(self, bench: Workbench) -> None:
        bench.run("import sys\nsys.stdout.write('ü' * 1000000)")
        assert "".join(bench.lines) == "ü" * 1_000_000
        assert max(map(len, bench.lines)) < 300_000

    def test_a_large_log_arrives_whole_and_in_order(self, bench: Workbench) -> None:
        bench.run("import sys\nsys.stdout.write(''.join('line %d\\n' % i for i in range(200000)))")
        assert bench.lines == [f"line {i}" for i in range(200_000)]

    # ---- stopping it -----------------------------------------------------------------------

    def test_a_program_is_killed_when_its_time_is_up(self, bench: Workbench) -> None:
        started = time.monotonic()
        with pytest.raises(StepFailedError, match="timeout of 1 seconds"):
            bench.run("import beat; beat.beat('program')", timeout_seconds=1)
        assert time.monotonic() - started < 15
        assert bench.is_quiet()
        assert bench.handle.get() is None

    def test_kill_lets_the_program_end_by_itself_first(self, bench: Workbench) -> None:
        running = bench.start(
            """
            import os, signal, sys
            from beat import beat

            def end(*_):
                print("ending")
                open(os.environ["MLP_RUN_DIR"] + "/ended", "w").close()
                sys.exit(0)

            signal.signal(signal.SIGTERM, end)
            beat("program")
            """
        )
        wait_until(bench.path("beat-program").exists)
        bench.launcher.kill()
        with pytest.raises(StepFailedError, match="killed"):
            running.wait()
        assert bench.path("ended").exists()
        assert bench.is_quiet()

    def test_kill_ends_a_program_that_does_not_want_to(self, bench: Workbench) -> None:
        running = bench.start(
            "import signal; signal.signal(15, signal.SIG_IGN); import beat; beat.beat('program')"
        )
        wait_until(bench.path("beat-program").exists)
        started = time.monotonic()
        bench.launcher.kill()
        assert time.monotonic() - started < self.killed_within_seconds
        with pytest.raises(StepFailedError, match="killed"):
            running.wait()
        assert bench.is_quiet()

    def test_kill_before_the_start_starts_nothing(self, bench: Workbench) -> None:
        bench.launcher.kill()
        with pytest.raises(StepFailedError, match="killed"):
            bench.run("import os; open(os.environ['MLP_RUN_DIR'] + '/ran', 'w')")
        assert not bench.path("ran").exists()

    def test_kill_after_the_end_does_nothing(self, bench: Workbench) -> None:
        bench.run("print('done')")
        bench.launcher.kill()

    def test_nothing_outlives_a_program_that_has_ended(self, bench: Workbench) -> None:
        bench.run(None, "leave", name="brood.py")
        assert bench.path("brood").exists()
        assert bench.is_quiet()

    def test_nothing_outlives_a_timeout(self, bench: Workbench) -> None:
        with pytest.raises(StepFailedError, match="timeout"):
            bench.run(None, "wait", name="brood.py", timeout_seconds=3)
        assert bench.path("brood").exists()
        assert bench.is_quiet()

    def test_nothing_outlives_a_kill(self, bench: Workbench) -> None:
        running = bench.start(None, "wait", name="brood.py")
        wait_until(bench.path("beat-program").exists)
        bench.launcher.kill()
        with pytest.raises(StepFailedError, match="killed"):
            running.wait()
        assert bench.is_quiet()

    def test_nothing_outlives_an_interrupted_worker(self, bench: Workbench) -> None:
        def interrupt(_line: str) -> None:
            raise KeyboardInterrupt

        bench.on_line = interrupt
        with pytest.raises(KeyboardInterrupt):
            bench.run(
                "import signal; signal.signal(15, signal.SIG_IGN)\n"
                "print('go')\nimport beat; beat.beat('program')"
            )
        assert bench.is_quiet()
        assert bench.handle.get() is None

    # ---- after a worker was lost -----------------------------------------------------------

    def test_the_next_try_after_a_lost_worker_runs_or_adopts_and_is_alone(
        self, bench: Workbench
    ) -> None:
        script = """
            import os
            from beat import beat
            finish = os.environ["MLP_RUN_DIR"] + "/finish"
            print("started")
            beat("program", until=lambda: os.path.exists(finish))
            print("finished")
            """
        bench.run_in_lost_worker(bench.path("beat-program").exists, script)
        bench.next_try()
        adopted = bench.launcher.recover(bench.step_run_id, bench.handle)
        if not adopted:
            assert bench.is_quiet()
            bench.restage()
        bench.touch("finish")
        bench.run(script)
        assert bench.lines == ["started", "finished"]
        assert bench.is_quiet()
        assert bench.handle.get() is None

    def test_all_that_a_lost_worker_has_left_can_still_be_killed(self, bench: Workbench) -> None:
        bench.run_in_lost_worker(bench.path("beat-program").exists, None, "wait", name="brood.py")
        bench.next_try()
        if bench.launcher.recover(bench.step_run_id, bench.handle):
            running = bench.start(None, "wait", name="brood.py")
            wait_until(lambda: bool(bench.lines))
            bench.launcher.kill()
            with pytest.raises(StepFailedError):
                running.wait()
        assert bench.is_quiet()
