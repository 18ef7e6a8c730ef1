"""The course's two commands: ``python3 -m helpers lab`` and ``python3 -m helpers test``.

Both first make sure that the course's own environment exists, in ``.venv`` beside this package or
in the folder that MANY_HANDS_VENV names. Only the standard library is used here, and no syntax
that Python 3.8 cannot read, so that an old Python gets a sentence and not a traceback.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OLDEST, TOO_NEW = (3, 11), (3, 15)  # as requires-python in pyproject.toml; a test compares them
FIRST_NOTEBOOK = "notebooks/00-start-here.ipynb"
COURSE = "requirements.txt"
TESTS = "tests/requirements.txt"
STAMP = "many-hands.json"  # in the environment: what was installed, written last
UNFINISHED = "many-hands-unfinished"  # in the environment: there while an install is under way
LOG = "many-hands-install.log"  # in the environment: all that pip said
SPACE_NEEDED = 1_500_000_000  # bytes: the packages, and pip's copies of them on the way

USAGE = """Give one of these in the folder that holds README.md (Windows: py instead of python3):

  python3 -m helpers lab  [arguments for JupyterLab]   opens the course
  python3 -m helpers test [arguments for pytest]       runs all checks
"""


class Refusal(Exception):
    """One sentence for the reader: what is wrong and what to do."""


def main(arguments: list[str]) -> int:
    """Run one command; return the exit status for the shell."""
    try:
        refuse_unfit_python(sys.version_info[:2])
        command, rest = arguments[:1], arguments[1:]
        if command == ["lab"]:
            return open_lab(rest)
        if command == ["test"]:
            return run_tests(rest)
        if command in ([], ["-h"], ["--help"], ["help"]):
            print(USAGE, end="")
            return 0 if command else 2
        raise Refusal(f"There is no command {command[0]!r}: the commands are lab and test.")
    except Refusal as refusal:
        print(refusal, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nStopped. Give the same command again to go on.", file=sys.stderr)
        return 130


def open_lab(arguments: list[str]) -> int:
    """Open JupyterLab on the first notebook, or on the one named in the arguments."""
    venv = ensure_environment([COURSE])
    command = [str(python_of(venv)), "-m", "jupyterlab"]
    # Nothing is looked up on the internet while the course runs.
    command += ["--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]
    command += ["--LabApp.news_url=", "--LabApp.extension_manager=readonly"]
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        command.append("--allow-root")  # in a container everybody is root
    if not any(a.endswith(".ipynb") and not a.startswith("-") for a in arguments):
        command.append(FIRST_NOTEBOOK)
    return become(command + arguments, child_settings(venv))


def run_tests(arguments: list[str]) -> int:
    """Run pytest with the arguments given: all checks if there are none."""
    venv = ensure_environment([COURSE, TESTS])
    return become([str(python_of(venv)), "-m", "pytest", *arguments], child_settings(venv))


def refuse_unfit_python(version: tuple[int, ...]) -> None:
    """Refuse a Python for which the course's packages do not exist."""
    if not OLDEST <= tuple(version) < TOO_NEW:
        raise Refusal(
            "Many Hands needs Python 3.{} to 3.{} and this is Python {}.{}: install one of those "
            "and name it, for example python3.13 -m helpers lab.".format(
                OLDEST[1], TOO_NEW[1] - 1, *version
            )
        )


# ---- the environment ------------------------------------------------------------------------


def ensure_environment(wanted: list[str]) -> Path:
    """Return the environment's folder, with the packages of the wanted files in it.

    When the stamp says that they are there, this reads three small files and does nothing else.
    """
    venv = environment_folder()
    stamp = read_stamp(venv)
    missing = [name for name in wanted if stamp["files"].get(name) != fingerprint(name)]
    finished = not (venv / UNFINISHED).exists()
    if finished and not missing and is_whole(venv, stamp):
        return venv
    if not finished or not runs_pip(venv):
        refuse_own_python(venv)
        make_empty(venv)
        missing = wanted
    install(venv, wanted if COURSE in missing else [COURSE, *missing], missing)
    return venv


def environment_folder() -> Path:
    """Return the folder of the environment: .venv, or what MANY_HANDS_VENV names."""
    return Path(os.path.abspath(os.environ.get("MANY_HANDS_VENV") or ROOT / ".venv"))


def python_of(venv: Path) -> Path:
    """Return the path of an environment's Python."""
    return venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def fingerprint(name: str) -> str:
    """Return a checksum of a file of the course, the same whatever its line endings."""
    content = (ROOT / name).read_bytes().replace(b"\r\n", b"\n")
    return hashlib.sha256(content).hexdigest()


def read_stamp(venv: Path) -> dict:
    """Return what was installed, or an empty stamp when none can be read."""
    try:
        stamp = json.loads((venv / STAMP).read_text(encoding="utf-8"))
        return {"python": str(stamp["python"]), "files": dict(stamp["files"])}
    except (OSError, ValueError, KeyError, TypeError):
        return {"python": "", "files": {}}


def is_whole(venv: Path, stamp: dict) -> bool:
    """Say whether the environment still runs on the Python that it was made with."""
    if not python_of(venv).exists():
        return False
    ours = "{}.{}".format(*sys.version_info[:2])
    # Asking takes some time, and is needed only when the system's Python may have changed.
    return stamp["python"] == ours or stamp["python"] == version_of(venv)


def version_of(venv: Path) -> str:
    """Return the version of the environment's Python as 3.x, or "" when it does not start."""
    ask = "import sys; print('{}.{}'.format(*sys.version_info[:2]))"
    return said([str(python_of(venv)), "-c", ask]) or ""


def runs_pip(venv: Path) -> bool:
    """Say whether the folder holds an environment whose Python and pip work."""
    return python_of(venv).exists() and said([str(python_of(venv)), "-m", "pip", "-V"]) is not None


def refuse_own_python(venv: Path) -> None:
    """Refuse to make the environment again with its own Python, which is in use."""
    if os.path.realpath(sys.prefix) == os.path.realpath(venv):
        raise Refusal(
            f"The environment {venv} is not whole: leave it (deactivate), delete that folder, "
            "and give the command again."
        )


def make_empty(venv: Path) -> None:
    """Make an environment without packages in place of whatever was begun there before."""
    is_ours = (venv / "pyvenv.cfg").exists() or (venv / UNFINISHED).exists()
    if venv.exists() and any(venv.iterdir()) and not is_ours:
        raise Refusal(
            f"{venv} is not a Python environment: name an empty or new folder in MANY_HANDS_VENV."
        )
    refuse_full_disk(venv)
    ensure_venv_module()
    print(f"Making the course's environment in {venv}", flush=True)
    try:
        shutil.rmtree(venv, ignore_errors=True)
        venv.mkdir(parents=True, exist_ok=True)
        (venv / UNFINISHED).touch()
    except OSError as error:
        raise Refusal(f"Cannot write to {venv} ({error.strerror}): set MANY_HANDS_VENV.") from error
    base = getattr(sys, "_base_executable", None) or sys.executable
    made = subprocess.run(
        [base, "-m", "venv", str(venv)],
        env=clean_settings(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )
    if made.returncode:
        raise Refusal(f"Could not make the environment {venv}: {last_line(made.stdout)}")


def refuse_full_disk(venv: Path) -> None:
    """Refuse to begin where the packages would not fit."""
    there = next(folder for folder in [venv, *venv.parents] if folder.exists())
    free = shutil.disk_usage(there).free
    if free < SPACE_NEEDED:
        raise Refusal(
            f"The course needs {SPACE_NEEDED / 1e9:.1f} GB of free disk in {there} and there are "
            f"{free / 1e9:.1f} GB: free some, or name another folder in MANY_HANDS_VENV."
        )


def ensure_venv_module() -> None:
    """Install Debian's package of the venv module where Python came without it, or say how."""
    if has_venv_module():
        return
    package = "python{}.{}-venv".format(*sys.version_info[:2])
    if not shutil.which("apt-get"):
        raise Refusal("This Python has no venv module: install Python from python.org.")
    is_root = hasattr(os, "geteuid") and os.geteuid() == 0
    sudo = [] if is_root else ["sudo", "-n"]
    if is_root or said(["sudo", "-n", "true"]) is not None:
        print(f"This Python has no venv module: installing Debian's {package}", flush=True)
        settings = dict(os.environ, DEBIAN_FRONTEND="noninteractive")
        for action in (["update", "-qq"], ["install", "-qq", "-y", package]):
            subprocess.run(
                [*sudo, "apt-get", *action],
                env=settings,
                check=False,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
    if not has_venv_module():
        raise Refusal(
            f"This Python has no venv module: run sudo apt-get install {package} "
            "and give the command again."
        )


def has_venv_module() -> bool:
    """Say whether the Python that makes the environment has venv and ensurepip, asking it anew."""
    base = getattr(sys, "_base_executable", None) or sys.executable
    return said([base, "-c", "import ensurepip, venv"]) is not None


# ---- the packages ---------------------------------------------------------------------------


def install(venv: Path, files: list[str], missing: list[str]) -> None:
    """Install the pinned packages of the files, put the course itself on the path, and stamp."""
    refuse_full_disk_unless_small(venv, missing)
    what = "course's" if COURSE in missing else "tests'"
    print(f"Installing the {what} packages: about 1 minute, up to 1 GB ...", flush=True)
    begin = time.monotonic()
    stamp = read_stamp(venv)
    (venv / UNFINISHED).touch()
    # Every pin has a wheel; without one, compiling would fail late and with pages of text.
    command = [str(python_of(venv)), "-m", "pip", "install", "--only-binary=:all:"]
    command += ["--quiet", "--no-input", "--disable-pip-version-check", "--progress-bar=off"]
    command += ["--retries=2"]
    for name in files:
        command += ["-r", name]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=clean_settings(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode:
        explain_failed_install(venv, done.stdout)
    point_to_course(venv)
    leave_out_news(venv)
    stamp["python"] = version_of(venv)
    stamp["files"].update({name: fingerprint(name) for name in files})
    (venv / STAMP).write_text(json.dumps(stamp, indent=1) + "\n", encoding="utf-8")
    (venv / UNFINISHED).unlink()
    print(f"Installed in {time.monotonic() - begin:.0f} s.", flush=True)


def refuse_full_disk_unless_small(venv: Path, missing: list[str]) -> None:
    """Refuse a full disk before the course's packages come; the tests' own are small."""
    if COURSE in missing and not read_stamp(venv)["files"]:
        refuse_full_disk(venv)


def explain_failed_install(venv: Path, text: str) -> None:
    """Turn what pip said into one sentence."""
    signs = ("No space left", "Errno 28", "not enough space")
    if any(sign in text for sign in signs):
        raise Refusal(f"The disk became full: free {SPACE_NEEDED / 1e9:.1f} GB and try again.")
    signs = ("Connection", "NameResolution", "ProxyError", "Timeout", "SSLError", "Max retries")
    if any(sign in text for sign in signs):
        # pip downloads everything before it changes anything, so the environment is as it was.
        (venv / UNFINISHED).unlink()
        raise Refusal(
            "The package index does not answer: check the network (and the proxy, in the "
            "environment variable HTTPS_PROXY), then give the command again."
        )
    with contextlib.suppress(OSError):
        (venv / LOG).write_text(text, encoding="utf-8")
    raise Refusal(f"pip could not install the packages: {last_line(text)} (all in {venv / LOG})")


def point_to_course(venv: Path) -> None:
    """Make ``from helpers import ...`` work in this environment from any working directory.

    A .pth file does what an editable install does, without a build tool to download first.
    """
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = Path(said([str(python_of(venv)), "-c", ask]) or "")
    try:
        line = os.path.relpath(ROOT, packages)  # stays right when the whole folder is moved
    except ValueError:  # on Windows, another drive
        line = str(ROOT)
    # Python reads such a file in the system's own encoding up to 3.12, as UTF-8 from 3.13.
    encoding = "utf-8" if sys.version_info >= (3, 13) else None
    (packages / "many-hands.pth").write_text(line + "\n", encoding=encoding)
    if said([str(python_of(venv)), "-c", "import helpers"], cwd=venv) is None:
        raise Refusal(
            f"Python does not find the course in {ROOT}: move it to a folder whose "
            "path has only plain letters."
        )


def leave_out_news(prefix: Path) -> None:
    """Keep JupyterLab from asking, at its first start, whether it may fetch news."""
    quiet = {"fetchNews": "false", "checkForUpdates": False}
    settings = prefix / "share" / "jupyter" / "lab" / "settings"
    settings.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"@jupyterlab/apputils-extension:notification": quiet}, indent=1)
    (settings / "overrides.json").write_text(text + "\n", encoding="utf-8")


# ---- other programs -------------------------------------------------------------------------


def said(command: list[str], cwd: Path | None = None) -> str | None:
    """Return what a short command printed, or None when it cannot run or fails."""
    try:
        done = subprocess.run(
            command,
            cwd=cwd,
            env=clean_settings(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            check=False,
        )
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def last_line(text: str) -> str:
    """Return the last error that a program reported, or its last line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.upper().startswith("ERROR")]
    return (errors or lines or ["it said nothing"])[-1]


def clean_settings() -> dict:
    """Return the environment variables without those that lead Python or pip astray."""
    astray = (
        "PYTHONHOME",
        "PYTHONPATH",
        "PIP_USER",
        "PIP_TARGET",
        "PIP_PREFIX",
        "PIP_QUIET",
        "PIP_VERBOSE",
        "PIP_CONSTRAINT",
        "PIP_NO_BINARY",
        "__PYVENV_LAUNCHER__",
    )
    return {name: value for name, value in os.environ.items() if name not in astray}


def child_settings(venv: Path) -> dict:
    """Return the environment variables for JupyterLab and pytest: the environment's own first."""
    settings = clean_settings()
    settings["VIRTUAL_ENV"] = str(venv)
    settings["PATH"] = os.pathsep.join([str(python_of(venv).parent), settings.get("PATH", "")])
    # Else a kernel named python3 that some other Python left in the home folder comes first.
    kernels = [str(venv / "share" / "jupyter"), settings.get("JUPYTER_PATH", "")]
    settings["JUPYTER_PATH"] = os.pathsep.join(filter(None, kernels))
    return settings


def become(command: list[str], settings: dict) -> int:
    """Go on as another program, in the course's folder; its exit status is ours.

    Where the system allows it the process is replaced, so that signals and Ctrl-C reach the
    program itself. Windows does not, so we wait there and leave Ctrl-C to the program.
    """
    sys.stdout.flush()
    os.chdir(ROOT)
    if os.name != "nt":
        os.execve(command[0], command, settings)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    return subprocess.call(command, env=settings)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
