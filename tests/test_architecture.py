"""The house: who may import whom, how long a file may be, what no file does. All by parsing."""

import ast
import importlib.metadata
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "jaxseg"
LONGEST = 500  # lines

# Floor of every module or folder of the package; an import goes to a lower one.
FLOORS = {
    "errors": 0,
    "faults": 0,
    "ops": 0,
    "data": 0,
    "config": 1,
    "sharding": 1,
    "distributed": 1,
    "optim": 1,
    "recipes": 1,
    "checkpoint": 1,
    "compiler": 1,
    "guard": 1,
    "life": 1,
    "log": 1,
    "plots": 1,
    "weights": 1,
    "backbones": 2,
    "models": 3,
    "remat": 3,
    "macs": 4,
    "experiment": 4,
    "pretrained": 4,
    "workdir": 4,
    "windows": 4,
    "inference": 4,
    "found": 4,
    "scoring": 4,
    "saver": 4,
    "report": 4,
    "evaluate": 4,
    "train": 4,
    "verbs": 5,
    "hub": 6,
    "main": 6,
}
# Inside, imports are free but acyclic.
ROOMS = ("ops", "data", "weights", "backbones", "models", "verbs")
# Floor 4: a later one may import an earlier one.
ORDER = ("experiment", "pretrained", "workdir", "windows", "inference", "found", "scoring", "saver")
ORDER += ("report", "evaluate", "train")
TOP_LEVEL = {"LICENSE", "README.md", "experiments", "jaxseg", "pyproject.toml", "scripts", "tests"}
HEAVY = ("jax", "flax", "orbax", "grain", "tensorflow_datasets", "tensorflow", "matplotlib")
UNSAFE_MODULES = {"pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "torch"}


def _files(*folders: str) -> list[Path]:
    return sorted(p for folder in folders for p in (ROOT / folder).rglob("*.py"))


SOURCES = _files("jaxseg")
EVERYTHING = _files("jaxseg", "experiments", "scripts", "tests")


def _id(path: Path) -> str:
    return str(path.relative_to(ROOT))


@cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def _name(path: Path) -> str:
    """ "jaxseg.data.catalog"; "jaxseg.data" for its __init__."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {_name(path): path for path in SOURCES}


def _imports(path: Path) -> Iterator[str]:
    """Every imported module, at the top or inside a function; a submodule by its own name."""
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{_id(path)}, line {node.lineno}: a relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in MODULES else node.module


def _inside(path: Path) -> set[str]:
    return {name for name in _imports(path) if name.split(".")[0] == "jaxseg"}


def _room(module: str) -> str:
    """The key of FLOORS for a module; "" for the package itself."""
    return (module.split(".") + [""])[1]


def _outside(path: Path) -> set[str]:
    """The distributions that a file imports: neither jaxseg nor the standard library."""
    roots = {name.split(".")[0] for name in _imports(path)}
    return {root for root in roots if root not in sys.stdlib_module_names and root != "jaxseg"}


def test_every_module_has_a_floor():
    rooms = {_room(name) for name in MODULES} - {""}
    assert rooms == set(FLOORS)


@pytest.mark.parametrize("path", SOURCES, ids=_id)
def test_imports_go_down(path):
    room = _room(_name(path))
    if not room:
        return
    for target in _inside(path):
        other = _room(target)
        if other == "errors" or (other == room and room in ROOMS):
            continue
        later = room in ORDER and other in ORDER and ORDER.index(other) < ORDER.index(room)
        down = other in FLOORS and FLOORS[other] < FLOORS[room]
        assert down or later, f"{_id(path)} must not import {target}"


def test_verbs_do_not_import_each_other():
    """But the regions, which predict as networks do."""
    verbs = {name for name in MODULES if name.startswith("jaxseg.verbs.")}
    importers = {name for name in verbs if verbs & _inside(MODULES[name])}
    assert importers == {"jaxseg.verbs.regions"}


def test_nothing_imports_main():
    assert [n for n, path in MODULES.items() if "jaxseg.main" in _inside(path)] == []


def test_imports_are_acyclic():
    graph = {name: _inside(path) - {name, "jaxseg"} for name, path in MODULES.items()}
    while leaves := {name for name, targets in graph.items() if not targets & graph.keys()}:
        graph = {name: targets for name, targets in graph.items() if name not in leaves}
    assert not graph, f"modules that import each other: {sorted(graph)}"


def test_papers_import_only_earlier_papers():
    def year(name: str) -> int:
        return int(re.search(r"\b(?:19|20)\d\d\b", ast.get_docstring(_tree(MODULES[name])))[0])

    papers = {name for name in MODULES if name.startswith("jaxseg.models.")}
    for name in papers:
        for earlier in papers & _inside(MODULES[name]):
            assert year(earlier) <= year(name), f"{name} imports {earlier}"


@pytest.mark.parametrize(
    ("folder", "allowed"),
    [
        ("ops", {"jax", "numpy"}),
        ("weights", {"numpy"}),
        (
            "data",
            {
                "numpy",
                "scipy",
                "grain",
                "PIL",
                "cv2",
                "ml_collections",
                "absl",
                "tensorflow_datasets",
            },
        ),
    ],
)
def test_the_ground_floor_uses_few_libraries(folder, allowed):
    """data/ never touches a device, ops/ knows neither parameters nor config."""
    for path in _files(f"jaxseg/{folder}"):
        assert _outside(path) <= allowed, _id(path)


@pytest.mark.parametrize("path", _files("experiments"), ids=_id)
def test_experiments_import_only_the_config_and_the_shared_recipes(path):
    assert _inside(path) <= {"jaxseg", "jaxseg.config", "jaxseg.recipes"} and not _outside(path)


@pytest.mark.parametrize("path", _files("jaxseg", "experiments"), ids=_id)
def test_nothing_imports_scripts_tests_or_experiments(path):
    roots = {name.split(".")[0] for name in _imports(path)}
    assert not roots & {"scripts", "tests", "experiments", "conftest"}


@pytest.mark.parametrize("path", EVERYTHING, ids=_id)
def test_no_file_is_too_long(path):
    assert len(path.read_text().splitlines()) <= LONGEST


def _configs(tree: ast.AST) -> Iterator[tuple[ast.AST, set[str]]]:
    """(function, its names of configs): parameters said to be one, and what is called config."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            given = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
            marked = {
                a.arg for a in given if a.annotation and "ConfigDict" in ast.dump(a.annotation)
            }
            yield node, marked | {"config"}


def _root(node: ast.AST) -> str:
    while isinstance(node, ast.Attribute | ast.Subscript):
        if isinstance(node, ast.Attribute) and node.attr == "config":
            return "config"
        node = node.value
    return node.id if isinstance(node, ast.Name) else ""


@pytest.mark.parametrize("path", _files("jaxseg", "experiments"), ids=_id)
def test_no_default_hides_a_misspelt_config_key(path):
    for function, names in _configs(_tree(path)):
        for call in (n for n in ast.walk(function) if isinstance(n, ast.Call)):
            get = isinstance(call.func, ast.Attribute) and call.func.attr == "get"
            subject = call.func.value if get else (call.args or [None])[0]
            fallback = get or (ast.unparse(call.func) == "getattr" and len(call.args) == 3)
            assert not (fallback and _root(subject) in names), f"{_id(path)}, line {call.lineno}"


@pytest.mark.parametrize("path", _files("jaxseg", "experiments", "scripts"), ids=_id)
def test_nothing_runs_code_that_it_reads(path):
    roots = {name.split(".")[0] for name in _imports(path)}
    peers = {"torch"} if path.parent.name == "scripts" else set()  # what ours is compared with
    assert not roots & (UNSAFE_MODULES - peers)
    for call in (n for n in ast.walk(_tree(path)) if isinstance(n, ast.Call)):
        name, keywords = (
            ast.unparse(call.func),
            {k.arg: ast.unparse(k.value) for k in call.keywords},
        )
        where = f"{_id(path)}, line {call.lineno}: {name}"
        assert name not in ("eval", "exec", "compile", "__import__", "yaml.load", "os.system"), (
            where
        )
        assert keywords.get("shell", "False") == "False", where
        if name in ("np.load", "numpy.load"):
            assert keywords.get("allow_pickle") == "False", where
        assert name not in ("torch.load", "torch.jit.load", "shutil.unpack_archive"), where
        if name.split(".")[-1] in ("extract", "extractall"):  # each member's place and size is read
            assert "_checked" in ast.unparse(call) or keywords.get("filter") == "'data'", where


def test_no_limit_on_the_size_of_pictures_is_lifted():
    """Beyond twice the limit Pillow itself refuses; `read_image` refuses beyond the limit."""
    set_to = re.compile(r"^[\w.]*MAX_IMAGE_PIXELS = (.*)", re.MULTILINE)
    found = {_id(path): set_to.findall(path.read_text()) for path in EVERYTHING}
    assert {k: v for k, v in found.items() if v} == {"jaxseg/data/files.py": ["MAX_PIXELS"]}


def test_the_top_level_is_the_story():
    if not (ROOT / ".git").exists():
        pytest.skip("needs git: the folder may hold what is not the project's")
    files = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files"], capture_output=True, text=True, check=True
    )
    here = {line.split("/")[0] for line in files.stdout.splitlines()}
    assert {name for name in here if not name.startswith(".")} == TOP_LEVEL


def _undocumented(body: list[ast.stmt], prefix: str, exempt: set[str]) -> Iterator[str]:
    for node in body:
        if not isinstance(node, ast.FunctionDef | ast.ClassDef):
            continue
        name, long = f"{prefix}{node.name}", len(node.body) > 1
        if not node.name.startswith("_") and name not in exempt and long:
            if not ast.get_docstring(node):
                yield f"{name}, line {node.lineno}"
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from _undocumented(node.body, f"{name}.", exempt)


@pytest.mark.parametrize("path", SOURCES, ids=_id)
def test_what_is_public_has_a_docstring(path):
    """Of one-line bodies the name says it all; a paper's Model has the docstring of its file."""
    tree = _tree(path)
    assert not tree.body or ast.get_docstring(tree), "the module has none"
    exempt = {"models": {"Model"}, "backbones": {"Backbone"}}.get(path.parent.name, set())
    assert not list(_undocumented(tree.body, "", exempt))


@pytest.mark.parametrize("start", ["import jaxseg", "run_module('jaxseg.main')"])
def test_the_start_is_light(start):
    code = f"""
import contextlib, io, json, sys
from runpy import run_module as load
def run_module(name):
    sys.argv = ["jaxseg", "--help"]
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
        load(name, run_name="__main__")
{start}
print(json.dumps(sorted(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(json.loads(done.stdout))
    assert "jaxseg" in loaded and not loaded & set(HEAVY)


def test_the_installed_command_is_main():
    (script,) = importlib.metadata.entry_points(group="console_scripts", name="jaxseg")
    assert script.value == "jaxseg.main:main"
