"""The pins are whole and fresh; the two commands make, keep and repair the environment."""

import ast
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
import zipfile
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

import helpers.__main__ as commands
from tests.validation import clean_environment, refused

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PINNED_FILES = [
    "requirements.txt",
    "tests/requirements.txt",
    "benchmarks/requirements.txt",
    "binder/requirements.txt",
]


def requirements(name):
    """The requirements of one file, without comments and lines that include other files."""
    lines = [line.split(" #")[0].strip() for line in (ROOT / name).read_text("utf-8").splitlines()]
    return [Requirement(line) for line in lines if line and line[0] not in "#-"]


def pins(name, here=False):
    """{(package, marker): version}; with `here` {package: version} for this platform alone."""
    found = {}
    for requirement in requirements(name):
        (specifier,) = requirement.specifier
        assert specifier.operator == "==", f"{name}: {requirement} is not pinned with =="
        key = canonicalize_name(requirement.name)
        if not here:
            found[key, str(requirement.marker)] = specifier.version
        elif requirement.marker is None or requirement.marker.evaluate():
            found[key] = specifier.version
    return found


def closure(wanted):
    """The names of all packages that these requirements need on this platform, as installed."""
    found, seen = set(), set()
    waiting = [(requirement, "") for requirement in wanted]
    while waiting:
        requirement, extra = waiting.pop()
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(requirement.name)
        found.add(name)
        for of_extra in {"", *requirement.extras}:
            if (name, of_extra) not in seen:
                seen.add((name, of_extra))
                needs = importlib.metadata.requires(name) or []
                waiting += [(Requirement(text), of_extra) for text in needs]
    return found


# ---------------------------------------------------------------- the pins


def test_each_package_of_the_course_is_pinned_by_hand_and_resolved_to_the_same_version():
    resolved = pins("requirements.txt", here=True)
    direct = [Requirement(text) for text in PROJECT["dependencies"]]
    for requirement in direct:
        assert re.fullmatch(r"==[\d.]+", str(requirement.specifier)), f"{requirement}: pin with =="
        if requirement.marker is None or requirement.marker.evaluate():
            version = resolved.get(canonicalize_name(requirement.name))
            assert version is not None, f"requirements.txt lacks {requirement}"
            assert requirement.specifier.contains(version), f"requirements.txt has {version}"


@pytest.mark.parametrize("folder", ["tests", "benchmarks", "binder"])
def test_what_is_chosen_by_hand_for_a_folder_is_in_its_resolved_file(folder):
    resolved = pins(f"{folder}/requirements.txt", here=True)
    for name, version in pins(f"{folder}/requirements.in", here=True).items():
        assert resolved.get(name) == version


@pytest.mark.parametrize("name", PINNED_FILES[1:])
def test_no_two_files_pin_different_versions(name):
    course = pins("requirements.txt", here=True)
    other = pins(name, here=True)
    conflicts = {key: (course[key], other[key]) for key in course.keys() & other.keys()}
    assert {key: both for key, both in conflicts.items() if both[0] != both[1]} == {}


def test_binder_gets_every_package_of_the_course():
    course, binder = pins("requirements.txt"), pins("binder/requirements.txt")
    binder_names = {name for name, _ in binder}
    assert {name for name, _ in course} <= binder_names


@pytest.mark.parametrize("name", PINNED_FILES)
def test_pins_name_no_index_and_no_file(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    assert re.findall(r"https?://|file:|--(?:extra-)?index-url|--find-links| @ ", text) == []


@pytest.mark.parametrize(
    ("direct", "name"),
    [(PROJECT["dependencies"], "requirements.txt"), (None, "tests/requirements.txt")],
)
def test_what_is_installed_is_what_is_pinned(direct, name):
    wanted = [Requirement(text) for text in direct] if direct else requirements(name)
    pinned = pins(name, here=True)
    wrong = []
    for package in sorted(closure(wanted)):
        installed = importlib.metadata.version(package)
        if pinned.get(package) != installed:
            wrong.append(f"{package}: pinned {pinned.get(package)}, installed {installed}")
    assert wrong == []


@pytest.mark.network
@pytest.mark.parametrize("name", PINNED_FILES)
def test_pins_are_not_stale(name, tmp_path):
    """Resolving anew over the existing file changes nothing: no line is missing or too many."""
    for file in ["pyproject.toml", *PINNED_FILES]:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / file, tmp_path / file)
        if file.endswith("/requirements.txt"):
            shutil.copy(ROOT / file.replace(".txt", ".in"), (tmp_path / file).with_suffix(".in"))
    before = (ROOT / name).read_text(encoding="utf-8")
    command = re.search(r"#    uv (pip compile .*)", before)[1].split()
    done = subprocess.run(
        [sys.executable, "-m", "uv", *command, "--quiet"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    signs = (
        "error sending request",
        "Failed to fetch",
        "timed out",
        "dns error",
        "Could not connect",
    )
    if done.returncode and any(sign in done.stderr for sign in signs):
        pytest.skip("PyPI does not answer, so nothing can be resolved anew")
    assert done.returncode == 0, done.stderr
    after = (tmp_path / name).read_text(encoding="utf-8")
    assert after == before, f"{name} is stale: run uv {' '.join(command)}"


def test_the_limits_of_python_are_the_same_everywhere():
    allowed = SpecifierSet(PROJECT["requires-python"])
    for minor in range(8, 20):
        fits = commands.OLDEST <= (3, minor) < commands.TOO_NEW
        assert allowed.contains(f"3.{minor}") == fits


# ---------------------------------------------------------------- sentences


@pytest.mark.parametrize("name", ["__init__.py", "__main__.py"])
def test_an_old_python_can_read_the_commands(name):
    source = (ROOT / "helpers" / name).read_text(encoding="utf-8")
    ast.parse(source, feature_version=(3, 8))


def test_the_commands_need_only_the_standard_library():
    tree = ast.parse((ROOT / "helpers" / "__main__.py").read_text(encoding="utf-8"))
    names = {a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names}
    names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in names} <= sys.stdlib_module_names


def one_sentence(capsys):
    """What was printed for the reader: one line on the error stream, and nothing else."""
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    return printed.err


@pytest.mark.parametrize("version", [(3, 8), (3, 10), (3, 15)])
def test_an_unfit_python_gets_one_sentence(version, monkeypatch, capsys):
    monkeypatch.setattr(commands.sys, "version_info", (*version, 0))
    assert commands.main(["lab"]) == 1
    said = one_sentence(capsys)
    assert "3.11 to 3.14" in said
    assert "this is Python {}.{}".format(*version) in said


def test_an_unknown_command_gets_one_sentence(capsys):
    assert commands.main(["labb"]) == 1
    assert "'labb'" in one_sentence(capsys)


def test_no_command_shows_both(capsys):
    assert commands.main([]) == 2
    assert "helpers lab" in (said := capsys.readouterr().out)
    assert "helpers test" in said


def test_help_is_no_mistake(capsys):
    assert commands.main(["--help"]) == 0
    assert "JupyterLab" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("programs", "sentence"),
    [({"apt-get", "sudo"}, "sudo apt-get install python3"), (set(), "python.org")],
)
def test_a_python_without_venv_gets_one_sentence(programs, sentence, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MANY_HANDS_VENV", str(tmp_path / "new"))
    monkeypatch.setattr(commands, "said", lambda *a, **k: None)  # no module, no sudo
    monkeypatch.setattr(commands.os, "geteuid", lambda: 1000, raising=False)
    monkeypatch.setattr(commands.shutil, "which", lambda name: name if name in programs else None)
    assert commands.main(["lab"]) == 1
    assert sentence in one_sentence(capsys)
    assert not (tmp_path / "new").exists()


def test_debian_s_package_is_installed_for_root(monkeypatch, capsys):
    asked, has_module = [], iter([False, True])
    monkeypatch.setattr(commands, "has_venv_module", lambda: next(has_module))
    monkeypatch.setattr(commands.os, "geteuid", lambda: 0, raising=False)
    monkeypatch.setattr(commands.shutil, "which", lambda name: name)
    monkeypatch.setattr(commands.subprocess, "run", lambda command, **k: asked.append(command))
    commands.ensure_venv_module()
    package = "python{}.{}-venv".format(*sys.version_info[:2])
    assert [command[:2] for command in asked] == [["apt-get", "update"], ["apt-get", "install"]]
    assert asked[1][-1] == package
    assert package in capsys.readouterr().out


def test_a_full_disk_gets_one_sentence_before_anything_is_done(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MANY_HANDS_VENV", str(tmp_path / "new"))
    usage = shutil.disk_usage(tmp_path)._replace(free=300_000_000)
    monkeypatch.setattr(commands.shutil, "disk_usage", lambda path: usage)
    assert commands.main(["test"]) == 1
    assert "there are 0.3 GB" in one_sentence(capsys)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("pip_says", "sentence", "unfinished"),
    [
        ("WARNING: Retrying ... NewConnectionError('...')\nERROR: none", "does not answer", False),
        ("ERROR: Could not install: [Errno 28] No space left on device", "disk became full", True),
        ("ERROR: No matching distribution found for numpy==9\n", "found for numpy==9", True),
        ("", "it said nothing", True),
    ],
)
def test_a_failed_install_gets_one_sentence(pip_says, sentence, unfinished, tmp_path):
    (tmp_path / commands.UNFINISHED).touch()
    with pytest.raises(commands.Refusal) as refusal:
        commands.explain_failed_install(tmp_path, pip_says)
    assert sentence in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert (tmp_path / commands.UNFINISHED).exists() == unfinished


def test_a_folder_of_other_things_is_not_touched(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MANY_HANDS_VENV", str(tmp_path))
    (tmp_path / "letter.txt").write_text("mine")
    assert commands.main(["lab"]) == 1
    assert "not a Python environment" in one_sentence(capsys)
    assert (tmp_path / "letter.txt").read_text() == "mine"


def test_an_interrupted_install_says_how_to_go_on(monkeypatch, capsys):
    def interrupted(wanted):
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "ensure_environment", interrupted)
    assert commands.main(["lab"]) == 130
    assert "Give the same command again" in capsys.readouterr().err


# ---------------------------------------------------------------- what is started


def started(monkeypatch, tmp_path, arguments):
    """The command that would replace the process, and its environment variables."""
    seen = []

    def become(command, settings):
        seen.extend([command, settings])
        return 7

    monkeypatch.setattr(commands, "ensure_environment", lambda wanted: tmp_path)
    monkeypatch.setattr(commands, "become", become)
    assert commands.main(arguments) == 7
    return seen


def test_lab_opens_the_first_notebook_and_passes_arguments_on(monkeypatch, tmp_path):
    command, _ = started(monkeypatch, tmp_path, ["lab", "--no-browser", "--port", "0"])
    assert command[:3] == [str(commands.python_of(tmp_path)), "-m", "jupyterlab"]
    assert command[-4:] == [commands.FIRST_NOTEBOOK, "--no-browser", "--port", "0"]


def test_lab_opens_another_notebook_when_it_is_named(monkeypatch, tmp_path):
    command, _ = started(monkeypatch, tmp_path, ["lab", "notebooks/02.ipynb"])
    assert [part for part in command if part.endswith(".ipynb")] == ["notebooks/02.ipynb"]


def test_the_environment_comes_first_and_foreign_settings_are_dropped(monkeypatch, tmp_path):
    for name in ("PYTHONPATH", "PYTHONHOME", "PIP_USER"):
        monkeypatch.setenv(name, "elsewhere")
    monkeypatch.setenv("JUPYTER_PATH", "elsewhere")
    command, settings = started(monkeypatch, tmp_path, ["test", "-k", "one"])
    assert command[1:] == ["-m", "pytest", "-k", "one"]
    assert {"PYTHONPATH", "PYTHONHOME", "PIP_USER"} & settings.keys() == set()
    assert settings["PATH"].startswith(str(commands.python_of(tmp_path).parent))
    assert settings["JUPYTER_PATH"].startswith(str(tmp_path))
    assert settings["JUPYTER_PATH"].endswith("elsewhere")


def test_on_windows_the_exit_status_is_passed_on_and_ctrl_c_left_to_the_program(monkeypatch):
    windows = SimpleNamespace(name="nt", chdir=lambda folder: None)
    monkeypatch.setattr(commands, "os", windows)
    ignored = []
    monkeypatch.setattr(commands.signal, "signal", lambda *both: ignored.append(both))
    status = commands.become([sys.executable, "-c", "raise SystemExit(5)"], dict(os.environ))
    assert status == 5
    assert ignored == [(commands.signal.SIGINT, commands.signal.SIG_IGN)]


# ---------------------------------------------------------------- made, kept, repaired


def write_wheel(folder):
    """A wheel named pytest, with nothing to download: it prints its arguments, ends with 7."""
    code = "import os, sys\nprint('ran', sys.argv[1:], os.getcwd())\nsys.exit(7)\n"
    about = "pytest-1.dist-info"
    files = {
        "pytest.py": code,
        f"{about}/METADATA": "Metadata-Version: 2.1\nName: pytest\nVersion: 1\n",
        f"{about}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{name},,\n" for name in [*files, f"{about}/RECORD"])
    with zipfile.ZipFile(folder / "pytest-1-py3-none-any.whl", "w") as wheel:
        for name, content in {**files, f"{about}/RECORD": record}.items():
            wheel.writestr(name, content)


@pytest.fixture
def small_course(tmp_path):
    """A course of the same form whose packages take no time to install; with é in its path."""
    course = tmp_path / "café course"
    (course / "helpers").mkdir(parents=True)
    (course / "tests").mkdir()
    for name in ("__init__.py", "__main__.py"):
        shutil.copy(ROOT / "helpers" / name, course / "helpers" / name)
    write_wheel(course)
    (course / "requirements.txt").write_text("# nothing\n")
    (course / "tests" / "requirements.txt").write_text("./pytest-1-py3-none-any.whl\n")
    return course


def call(course, *arguments):
    """Give the command in a course, offline; return what came of it, and the seconds."""
    variables = {k: v for k, v in os.environ.items() if k != "MANY_HANDS_VENV"}
    begin = time.perf_counter()
    done = subprocess.run(
        [sys._base_executable, "-m", "helpers", *arguments],
        cwd=course,
        env=variables,
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done, time.perf_counter() - begin


def test_the_environment_is_made_kept_and_repaired(small_course):
    venv = small_course / ".venv"

    made, _ = call(small_course, "test", "-x", "some words")
    assert made.returncode == 7, made.stderr
    assert "Installing" in made.stdout
    assert made.stdout.splitlines()[-1] == f"ran ['-x', 'some words'] {small_course}"

    again = [call(small_course, "test") for _ in range(5)]
    assert {done.returncode for done, _ in again} == {7}
    assert {done.stdout for done, _ in again} == {f"ran [] {small_course}\n"}
    assert min(seconds for _, seconds in again) < 0.3

    # helpers are found from any working directory.
    elsewhere = [str(commands.python_of(venv)), "-c", "import helpers; print(helpers.__file__)"]
    found = subprocess.run(elsewhere, cwd=venv, capture_output=True, text=True, check=True).stdout
    assert Path(found.strip()) == small_course / "helpers" / "__init__.py"

    # JupyterLab is told not to ask whether it may fetch news.
    overrides = venv / "share" / "jupyter" / "lab" / "settings" / "overrides.json"
    assert "fetchNews" in overrides.read_text()

    # A requirement that changed is installed, into the same environment.
    (venv / "kept").touch()
    (small_course / "tests" / "requirements.txt").write_text(
        "# changed\n./pytest-1-py3-none-any.whl\n"
    )
    changed, _ = call(small_course, "test")
    assert "Installing the tests' packages" in changed.stdout
    assert (venv / "kept").exists()

    # An install that was interrupted is begun again from nothing.
    (venv / commands.UNFINISHED).touch()
    shutil.rmtree(next(venv.glob("[lL]ib*/**/site-packages")) / "pip")
    repaired, _ = call(small_course, "test")
    assert repaired.returncode == 7, repaired.stderr
    assert "Making the course's environment" in repaired.stdout
    assert not (venv / "kept").exists()
    assert not (venv / commands.UNFINISHED).exists()


def finished_environment(folder, files):
    """The folder as it is after an install of these files, without any package."""
    python = commands.python_of(folder)
    python.parent.mkdir(parents=True)
    python.touch()
    stamp = {
        "python": "{}.{}".format(*sys.version_info[:2]),
        "files": {name: commands.fingerprint(name) for name in files},
    }
    (folder / commands.STAMP).write_text(json.dumps(stamp))
    return stamp


def test_the_second_call_starts_no_program_and_asks_no_network(tmp_path, monkeypatch):
    venv = tmp_path / "venv"
    finished_environment(venv, [commands.COURSE, commands.TESTS])
    monkeypatch.setenv("MANY_HANDS_VENV", str(venv))
    monkeypatch.setattr(commands.subprocess, "run", lambda *a, **k: pytest.fail("ran a program"))
    assert commands.ensure_environment([commands.COURSE]) == venv
    assert commands.ensure_environment([commands.COURSE, commands.TESTS]) == venv


@pytest.mark.parametrize("damage", ["unfinished", "no stamp", "bad stamp", "no python", "no tests"])
def test_what_is_half_made_is_not_taken_for_whole(damage, tmp_path, monkeypatch):
    venv = tmp_path / "venv"
    files = [commands.COURSE] if damage == "no tests" else [commands.COURSE, commands.TESTS]
    finished_environment(venv, files)
    if damage == "unfinished":
        (venv / commands.UNFINISHED).touch()
    elif damage == "no stamp":
        (venv / commands.STAMP).unlink()
    elif damage == "bad stamp":
        (venv / commands.STAMP).write_text('{"python"')
    elif damage == "no python":
        commands.python_of(venv).unlink()
    done = []
    monkeypatch.setenv("MANY_HANDS_VENV", str(venv))
    monkeypatch.setattr(commands, "make_empty", lambda folder: done.append("made"))
    monkeypatch.setattr(commands, "install", lambda *a: done.append("installed"))
    commands.ensure_environment([commands.COURSE, commands.TESTS])
    assert done[-1] == "installed"


def test_line_endings_of_windows_do_not_count_as_a_change(tmp_path, monkeypatch):
    monkeypatch.setattr(commands, "ROOT", tmp_path)
    (tmp_path / "a").write_bytes(b"one==1\ntwo==2\n")
    (tmp_path / "b").write_bytes(b"one==1\r\ntwo==2\r\n")
    assert commands.fingerprint("a") == commands.fingerprint("b")


# ---------------------------------------------------------------- from anywhere, in any program


def test_helpers_are_found_from_any_working_directory(tmp_path):
    variables = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    code = "import helpers.classroom, sys; print(helpers.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=variables, capture_output=True, text=True
    )
    assert done.stdout.strip() == str(ROOT / "helpers" / "__init__.py"), done.stderr


def test_a_foreign_kernel_of_the_same_name_does_not_come_first(tmp_path):
    foreign = tmp_path / "data" / "kernels" / "python3"
    foreign.mkdir(parents=True)
    spec = {"argv": ["foreign"], "display_name": "Foreign", "language": "python"}
    (foreign / "kernel.json").write_text(json.dumps(spec))
    variables = commands.child_settings(Path(sys.prefix))
    variables.update(JUPYTER_DATA_DIR=str(tmp_path / "data"), JUPYTER_PREFER_ENV_PATH="0")
    code = (
        "from jupyter_client import KernelManager as K; print(K(kernel_name='python3')"
        ".format_kernel_cmd()[0])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=variables, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == sys.executable


def run_papermill(notebook, folder):
    """Run a notebook with papermill from another working directory, offline."""
    variables = clean_environment(folder)
    command = [sys.executable, "-m", "papermill", str(notebook), str(folder / "out.ipynb")]
    done = subprocess.run(
        [*command, "--no-progress-bar", "-k", "python3"],
        cwd=folder,
        env=variables,
        capture_output=True,
        text=True,
        timeout=240,
    )
    return done, refused(variables)


def test_helpers_are_found_under_papermill(short_folder):
    notebook = new_notebook(
        cells=[new_code_cell("from helpers.cluster import usable_cores\nusable_cores() >= 1")]
    )
    nbformat.write(notebook, short_folder / "in.ipynb")
    done, asked = run_papermill(short_folder / "in.ipynb", short_folder)
    assert done.returncode == 0, done.stderr
    assert asked == []
    (cell,) = nbformat.read(short_folder / "out.ipynb", 4).cells
    assert cell.outputs[0]["data"]["text/plain"] == "True"


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.timeout(900)
def test_a_fresh_environment_is_made_and_serves_jupyterlab(tmp_path):
    """The whole of the first command, with the real packages, in an empty folder."""
    variables = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    variables["MANY_HANDS_VENV"] = str(tmp_path / "venv")
    command = [sys._base_executable, "-m", "helpers", "lab", "--version"]
    made = subprocess.run(
        command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=800
    )
    if "does not answer" in made.stderr:
        pytest.skip("PyPI does not answer, so nothing can be installed")
    assert made.returncode == 0, made.stderr
    assert made.stdout.splitlines()[-1] == importlib.metadata.version("jupyterlab")
    again = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True)
    assert len(again.stdout.splitlines()) == 1
    listed = subprocess.run(
        [commands.python_of(tmp_path / "venv"), "-m", "pip", "list", "--format=json"],
        env=variables,
        capture_output=True,
        text=True,
        check=True,
    )
    found = {canonicalize_name(line["name"]): line["version"] for line in json.loads(listed.stdout)}
    found.pop("pip")
    found.pop("setuptools", None)
    assert found == pins("requirements.txt", here=True)
