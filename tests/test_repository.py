"""Formatting, spelling, links, orphan files, arrows between modules, scripts, metadata."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = [".ci/run", "binder/postBuild", "binder/start"]
TEST_COMMAND = "python3 -m helpers test"


def git(*arguments):
    """What git prints; the test is skipped where there is no git or no clone."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("needs git and a clone of the repository")
    command = ["git", "-c", f"safe.directory={ROOT}", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


@cache
def tracked():
    """All files in git that exist, as paths with forward slashes."""
    names = git("ls-files", "-z").split("\0")
    return [name for name in names if name and (ROOT / name).exists()]


@cache
def text_of(name):
    """A file's text; of a notebook its sources, without outputs."""
    if not name.endswith(".ipynb"):
        return (ROOT / name).read_text(encoding="utf-8")
    return "\n\n".join(cell.source for cell in cells_of(name))


@cache
def cells_of(name):
    """The cells of a notebook."""
    return nbformat.read(ROOT / name, 4).cells


@cache
def prose_of(name):
    """The markdown of a .md file or of a notebook's markdown cells."""
    if name.endswith(".md"):
        return text_of(name)
    return "\n\n".join(c.source for c in cells_of(name) if c.cell_type == "markdown")


def with_prose():
    return [name for name in tracked() if name.endswith((".md", ".ipynb"))]


def without_code(markdown):
    """Markdown without fenced blocks and code spans, whose content is not prose."""
    markdown = re.sub(r"^(```+|~~~+).*?^\1\s*$", "", markdown, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"(`+)(?!`).+?(?<!`)\1(?!`)", "", markdown, flags=re.DOTALL)


# ---------------------------------------------------------------- form and spelling


@pytest.mark.parametrize("action", ["check", "format --check"])
def test_ruff_finds_nothing(action, tmp_path):
    files = [name for name in tracked() if name.endswith((".py", ".ipynb"))]
    command = [sys.executable, "-m", "ruff", *action.split(), "--no-cache", *files]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_spelling(tmp_path):
    """No word is misspelt in texts, code, and the sources of notebooks."""
    for name in tracked():
        if name.endswith((".md", ".py", ".ipynb", ".cff", ".toml", ".in")) or name in SCRIPTS:
            copy = tmp_path / name.replace(".ipynb", ".ipynb.md")
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_text(text_of(name), encoding="utf-8")
    command = [sys.executable, "-m", "codespell_lib", "--toml", str(ROOT / "pyproject.toml"), "."]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


AMERICAN = re.compile(
    r"\b(?:(?:optim|normal|parallel|synchron|initial|general|organ|minim|maxim|regular|"
    r"local|serial|vector|visual|random|real|recogn|util|central|decentral|personal|special|"
    r"standard|emphas|custom|penal)iz(?:e[sdr]?|ing|ation)|behaviors?|colors?|colored|favor|honor|"
    r"labor|neighbors?|centers?|centered|labeled|labeling|modeled|modeling|traveled|canceled|"
    r"catalog|gray|analyze[sd]?|fulfill|skeptical)\b"
)


def test_spelling_is_british():
    """Prose says optimise and colour. A title in italics, or a line with an address, is quoted."""
    found = []
    for name in with_prose():
        prose = re.sub(r"\*(?! )[^*]+\*", "", without_code(prose_of(name)).replace("**", ""))
        for line in prose.splitlines():
            if "http" not in line and "<" not in line:
                found += [f"{name}: {word} in {line.strip()!r}" for word in AMERICAN.findall(line)]
    assert not found, "\n".join(found)


# ---------------------------------------------------------------- links

MARKDOWN_LINK = re.compile(
    r"\]\(\s*<?([^()\s<>]*(?:\([^()\s]*\)[^()\s<>]*)*)>?(?:\s+\"[^\"]*\")?\s*\)"
)
REFERENCE = re.compile(r"^\[[^\]]+\]:\s*<?(\S+?)>?(?:\s|$)", re.MULTILINE)
HTML_LINK = re.compile(r"<(?:a|img)\b[^>]*?\b(?:href|src)\s*=\s*[\"']([^\"']*)[\"']")
AUTOLINK = re.compile(r"<([a-z][a-z+.-]*:[^\s>]+)>")


def links_in(markdown):
    """All targets of links and pictures in markdown, in all forms in which they are written."""
    text = without_code(markdown)
    return [
        target
        for pattern in (MARKDOWN_LINK, REFERENCE, HTML_LINK, AUTOLINK)
        for target in pattern.findall(text)
    ]


@cache
def anchors_of(name):
    """All anchors of a document: its headings' as GitHub and JupyterLab name them, and its own."""
    text = prose_of(name)
    found = set(re.findall(r"<\w+[^>]*\b(?:id|name)\s*=\s*[\"']([^\"']+)[\"']", text))
    outside_code = re.sub(r"^(```+|~~~+).*?^\1\s*$", "", text, flags=re.MULTILINE | re.DOTALL)
    for heading in re.findall(r"^#{1,6}\s+(.+?)\s*#*$", outside_code, flags=re.MULTILINE):
        heading = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        found.add(heading.replace(" ", "-"))
        slug = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        number = 0
        while (unique := f"{slug}-{number}" if number else slug) in found:
            number += 1
        found.add(unique)
    return found


def problem_with_link(name, target):
    """One sentence when a link in a file leads nowhere, else None."""
    parts = urlsplit(target)
    if parts.scheme == "mailto":
        return None
    if parts.scheme or parts.netloc:
        if parts.scheme != "https" or not re.fullmatch(r"[\w-]+(\.[\w-]+)+(:\d+)?", parts.netloc):
            return f"{name}: {target!r} is not a well-formed https address"
        return None
    path = unquote(parts.path)
    there = (ROOT / name).parent.joinpath(path).resolve() if path else ROOT / name
    if path.startswith("/") or not there.exists() or not there.is_relative_to(ROOT):
        return f"{name}: {target!r} does not exist"
    inside = there.relative_to(ROOT).as_posix()
    if there.is_file() and inside not in tracked():
        return f"{name}: {target!r} is not in git"
    if parts.fragment:
        if not inside.endswith((".md", ".ipynb")):
            return f"{name}: {target!r} names an anchor of something that is no text"
        if unquote(parts.fragment) not in anchors_of(inside):
            return f"{name}: {target!r} names an anchor that does not exist"
    return None


def test_links_lead_somewhere():
    problems = [
        problem
        for name in with_prose()
        for target in links_in(prose_of(name))
        if (problem := problem_with_link(name, target))
    ]
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize(
    ("markdown", "targets"),
    [
        ("see [a](b.md#c) and ![d](e.png 'x')", ["b.md#c"]),
        ('![d](e.png "title") [f](https://g.org/h_(i))', ["e.png", "https://g.org/h_(i)"]),
        (
            "[![badge](https://a.org/b.svg)](https://c.org)",
            ["https://a.org/b.svg", "https://c.org"],
        ),
        ('<a href="x.md">y</a> <img alt="z" src="p.png">', ["x.md", "p.png"]),
        ("<https://a.org> [n]\n\n[n]: m.md", ["m.md", "https://a.org"]),
        ("`[a](b)`\n\n```\n[c](d)\n```\n", []),
    ],
)
def test_links_are_found(markdown, targets):
    assert links_in(markdown) == targets


@pytest.mark.parametrize(
    ("target", "good"),
    [
        ("README.md", True),
        ("README.md#no-such-heading", False),
        ("no-such-file.md", False),
        ("../outside.md", False),
        ("/README.md", False),
        ("https://example.org/a", True),
        ("http://example.org/a", False),
        ("https://example", False),
    ],
)
def test_dead_links_are_noticed(target, good):
    assert (problem_with_link("CONTRIBUTING.md", target) is None) == good


# ---------------------------------------------------------------- orphan files

# Files that a program reads by their name.
READ_BY_NAME = {
    *(".ci/run", ".gitignore", "CITATION.cff", "LICENSE", "README.md"),
    *("pyproject.toml", "requirements.txt", "data/SHA256SUMS", "data/LICENSE", "data/make.py"),
    *("binder/postBuild", "binder/start", "binder/runtime.txt"),
    *(
        f"{folder}/requirements.{end}"
        for folder in ("binder", "benchmarks", "tests")
        for end in ("in", "txt")
    ),
    *(
        "benchmarks/__main__.py",
        "benchmarks/__init__.py",
        "helpers/__main__.py",
        "tests/conftest.py",
    ),
    *("tests/__init__.py", "tests/wrong_answers/__init__.py"),
}


@cache
def python_sources():
    """{file: Python source} of modules and notebooks; of solutions in notebooks too."""
    sources = {}
    for name in tracked():
        if name.endswith(".py"):
            sources[name] = text_of(name)
        elif name.endswith(".ipynb"):
            code = [cell.source for cell in cells_of(name) if cell.cell_type == "code"]
            code += re.findall(r"```python\n(.*?)```", prose_of(name), flags=re.DOTALL)
            sources[name] = code
    return sources


@cache
def imports_of(name):
    """The full names of all modules that a file imports, and of what it takes from them."""
    source = python_sources()[name]
    found = set()
    for part in [source] if isinstance(source, str) else source:
        plain = "\n".join(
            line for line in part.splitlines() if not line.lstrip().startswith(("%", "!"))
        )
        try:
            tree = ast.parse(plain)
        except SyntaxError:
            continue  # a cell for IPython alone
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                base = node.module or ""
                if node.level:
                    package = name.removesuffix(".py").split("/")[: -node.level]
                    base = ".".join([*package, *filter(None, [base])])
                found |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    return found


def is_module_reached(name):
    """A module is imported by another file, run with -m, or of a kind that is found by its name."""
    path = Path(name)
    if path.name == "__init__.py":
        return any(
            other != name and other.startswith(f"{path.parent.as_posix()}/") for other in tracked()
        )
    if path.name.startswith("test_"):
        return True
    number = re.fullmatch(r"nb(\d\d)", path.stem)
    if number and path.parent.name in ("exercises", "wrong_answers"):
        return any(other.startswith(f"notebooks/{number[1]}-") for other in tracked())
    module = name.removesuffix(".py").replace("/", ".")
    if any(module in imports_of(other) for other in python_sources() if other != name):
        return True
    said = rf"-m[\s\"',]+{re.escape(module)}\b|{re.escape(name)}\b"
    if path.parent.name == "benchmarks":
        said += rf"|-m benchmarks {path.stem}\b"
    if path.parent.name == "peers":  # a process of its own, started by its name
        said += rf"|[\"']{re.escape(module)}[\"']"
    if path.parent.name == "studies":
        said += rf"|-m helpers.studies {path.stem}\b"
    if path.name == "__main__.py":
        said += rf"|-m {re.escape(module.removesuffix('.__main__'))}\b"
    elsewhere = [n for n in tracked() if n != name and n.endswith((".py", ".md", ".ipynb"))]
    if path.name in ("sitecustomize.py",):  # Python imports it when its folder is on the path
        said = re.escape(path.stem)
    return any(re.search(said, text_of(other)) for other in elsewhere)


def is_reached(name):
    """Whether a reader, a test or a program comes to this file from another one."""
    if name in READ_BY_NAME or Path(name).name == ".gitattributes":
        return True
    if name.endswith(".py"):
        return is_module_reached(name)
    if name.startswith("data/") and not name.endswith(".md"):
        sums = text_of("data/SHA256SUMS")
        return bool(
            re.search(rf"\s\*?{re.escape(name.removeprefix('data/'))}$", sums, re.MULTILINE)
        )
    if re.fullmatch(r"notebooks/.+\.ipynb", name):
        return name in linked_from("notebooks/README.md") and name in linked_from("README.md")
    if name.endswith(".md") or name.startswith("docs/"):
        return any(name in linked_from(other) for other in with_prose() if other != name)
    if name.startswith("tests/"):
        others = [n for n in tracked() if n.startswith("tests/") and n.endswith(".py")]
        return any(Path(name).name in text_of(other) for other in others)
    return False


@cache
def linked_from(name):
    """The files that a document links to, as paths in the repository."""
    if not (ROOT / name).exists():
        return set()
    paths = [unquote(urlsplit(target).path) for target in links_in(prose_of(name))]
    there = [(ROOT / name).parent.joinpath(path).resolve() for path in paths if path]
    return {path.relative_to(ROOT).as_posix() for path in there if path.is_relative_to(ROOT)}


def test_no_file_is_an_orphan():
    """Every file is used: linked, imported, summed, or read by its name."""
    orphans = [name for name in tracked() if not is_reached(name)]
    assert not orphans, "\n".join(orphans)


# ---------------------------------------------------------------- arrows between modules

# What the modules on the left never import, here or by way of a package they belong to.
FORBIDDEN = {
    "helpers.datasets": ["dask", "distributed", "helpers.cluster", "helpers.engine"],
    "helpers.cluster": ["helpers.engine"],
    "helpers.engine": [
        *("sklearn", "helpers.datasets", "helpers.nn", "helpers.parallel", "helpers.learning"),
    ],
    "helpers.nn": [
        *("dask", "distributed", "sklearn", "helpers.cluster", "helpers.engine"),
        *("helpers.datasets", "helpers.parallel", "helpers.learning"),
    ],
    "helpers.parallel": ["helpers.studies", "helpers.learning"],
    "helpers.learning": ["helpers.studies", "helpers.cluster", "helpers.datasets"],
    "helpers.studies": ["helpers.cluster"],
    "helpers.parallel.schedules": ["dask", "distributed", "helpers.engine", "helpers.cluster"],
    "helpers.planner": [
        *("dask", "distributed", "helpers.cluster", "helpers.datasets", "helpers.engine.spmd"),
        *("helpers.engine.groups", "helpers.engine.ranks", "helpers.engine.transport"),
    ],
    "helpers.classroom.plots": ["dask", "distributed", "helpers.cluster", "helpers.datasets"],
    "helpers.classroom.timeline": ["helpers.datasets"],
}


def module_name(name):
    return name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def starts_with(module, prefix):
    return module == prefix or module.startswith(f"{prefix}.")


def test_arrows_between_helpers_point_one_way():
    problems = []
    for name in [n for n in tracked() if n.startswith("helpers/") and n.endswith(".py")]:
        module = module_name(name)
        never = [bad for key, bads in FORBIDDEN.items() if starts_with(module, key) for bad in bads]
        if not starts_with(module, "helpers.classroom"):
            never.append("helpers.classroom")
        for imported in imports_of(name):
            problems += [
                f"{module} imports {imported}" for bad in never if starts_with(imported, bad)
            ]
    assert not problems, "\n".join(problems)


def test_helpers_import_only_what_is_pinned_by_hand():
    """A package that helpers or notebooks import themselves is a requirement of the course."""
    project = tomllib.loads(text_of("pyproject.toml"))["project"]
    direct = {re.match(r"[\w-]+", text)[0].lower() for text in project["dependencies"]}
    direct |= {"distributed"}  # dask[distributed]
    direct |= {"optuna"}  # shown if a reader has it; a study was made with it
    # Parts of a pinned package that stand under a name of their own: what they belong to.
    belongs = {
        **{"sklearn": "scikit-learn", "ipython": "ipykernel", "jupyter_client": "ipykernel"},
        **{"packaging": "dask", "cloudpickle": "dask", "toolz": "dask", "tornado": "distributed"},
        **{"traitlets": "ipywidgets", "scipy": "scikit-learn", "joblib": "scikit-learn"},
        **{"mpl_toolkits": "matplotlib", "pil": "matplotlib", "jupyter_server": "jupyterlab"},
    }
    missing = set()
    for name in python_sources():
        if name.startswith(("helpers/", "notebooks/")):
            for module in {imported.split(".")[0] for imported in imports_of(name)} - {
                "helpers",
                "",
            }:
                owner = belongs.get(module.lower(), module.lower().replace("_", "-"))
                if module not in sys.stdlib_module_names and owner not in direct:
                    missing.add(f"{name} imports {module}")
    assert not missing, "\n".join(sorted(missing))


# ---------------------------------------------------------------- stored outputs

PRIVATE = re.compile(
    r"/(?:root|work|home|tmp|Users|private|opt|mnt)/|[A-Za-z]:\\{1,2}Users|"
    r"\b(?:tcp|tls|ucx|inproc)://(?!address)|127\.0\.0\.1|0\.0\.0\.0|\[::1\]|localhost:\d+|https?://[\w.-]+:\d+|"
    r"\bat 0x[0-9a-f]+|\b(?:192\.168|10\.\d+|172\.(?:1[6-9]|2\d|3[01]))\.\d+\.\d+\b"
)


def texts_of(output):
    """All text of a stored output; pictures in base64 hold none."""
    if output.output_type == "stream":
        yield output.text
    elif output.output_type == "error":
        yield "\n".join([output.ename, output.evalue, *output.traceback])
    else:
        for kind, value in output.data.items():
            if kind == "image/svg+xml" or not kind.startswith("image/"):
                yield value if isinstance(value, str) else repr(value)


def test_stored_outputs_name_no_machine():
    found = []
    for name in [n for n in tracked() if n.endswith(".ipynb")]:
        for number, cell in enumerate(cells_of(name)):
            for output in cell.get("outputs", []):
                for text in texts_of(output):
                    found += [f"{name}, cell {number}: {hit}" for hit in PRIVATE.findall(text)]
    assert not found, "\n".join(found)


# ---------------------------------------------------------------- scripts and metadata


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_can_be_run(name):
    assert text_of(name).startswith("#!/usr/bin/env bash\n")
    assert "set -euo pipefail" in text_of(name)
    assert git("ls-files", "--stage", name).startswith("100755 ")
    if shutil.which("bash"):
        subprocess.run(["bash", "-n", str(ROOT / name)], check=True)


def test_the_build_server_runs_the_command_of_the_readme():
    assert TEST_COMMAND in text_of("README.md")
    assert "python3 -m helpers lab" in text_of("README.md")
    assert text_of(".ci/run").rstrip().endswith(f"exec {TEST_COMMAND} </dev/null")


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize(
    ("prefix", "link"),
    [("/user/a/", "{JUPYTERHUB_SERVICE_PREFIX}proxy/{port}/status"), ("", None), (None, None)],
)
def test_binder_s_dashboard_link_is_set_only_behind_a_hub(prefix, link):
    variables = {k: v for k, v in os.environ.items() if k != "JUPYTERHUB_SERVICE_PREFIX"}
    if prefix is not None:
        variables["JUPYTERHUB_SERVICE_PREFIX"] = prefix
    name = "DASK_DISTRIBUTED__DASHBOARD__LINK"
    code = f"import os, sys; print(os.environ.get({name!r})); sys.exit(3)"
    done = subprocess.run(
        ["bash", str(ROOT / "binder" / "start"), sys.executable, "-c", code],
        env=variables,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 3
    assert done.stdout.strip() == str(link)


def test_binder_runs_a_python_that_the_course_takes():
    """repo2docker takes python-3.11, and not a third number."""
    assert re.fullmatch(r"python-3\.1[1-4]\n", text_of("binder/runtime.txt"))


def test_metadata_agree():
    project = tomllib.loads(text_of("pyproject.toml"))["project"]
    citation = yaml.safe_load(text_of("CITATION.cff"))
    assert citation["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= citation.keys()
    assert all({"name"} <= author.keys() for author in citation["authors"])
    assert citation["version"] == project["version"]
    assert citation["repository-code"] == project["urls"]["Homepage"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", str(citation["date-released"]))
    owner_and_name = urlsplit(project["urls"]["Homepage"]).path.strip("/")
    assert f"mybinder.org/v2/gh/{owner_and_name}/" in text_of("README.md")


def test_the_readme_maps_all_sixteen_notebooks():
    """Those that exist are links with minutes; the others are marked as planned."""
    rows = re.findall(r"^\| (\d\d) \| (.+?) \| (.+?) \|", text_of("README.md"), re.MULTILINE)
    assert [number for number, _, _ in rows] == [f"{number:02}" for number in range(16)]
    there = {Path(n).name[:2] for n in tracked() if re.fullmatch(r"notebooks/\d\d-.+\.ipynb", n)}
    for number, title, time in rows:
        if number in there:
            assert f"(notebooks/{number}-" in title
            minutes = re.fullmatch(r"(\d+) min", time)[1]
            (file,) = [n for n in tracked() if n.startswith(f"notebooks/{number}-")]
            opener = prose_of(file)[:3000]
            assert re.search(rf"\b{minutes} min", opener), f"{file} does not say {minutes} min"
        else:
            assert "(" not in title
            assert time == "planned"
