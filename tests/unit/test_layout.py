"""The shape of the tree: what lint and import contracts cannot see."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "dsmoe_ray"
SOURCES = sorted(PACKAGE.rglob("*.py"))
# Environments of other engines lie in a hidden folder there.
TESTS = sorted(path for path in (ROOT / "tests").rglob("*.py") if "/." not in str(path.relative_to(ROOT)))

MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 70
MAX_INIT_LINES = 50

TOP_LEVEL = {
    *(".ci", ".gitignore", "LICENSE", "README.md", "pyproject.toml"),
    *("cluster", "docs", "dsmoe_ray", "examples", "ops", "tests"),
}
TEST_FOLDERS = {"contract", "fakes", "integration", "numerics", "performance", "unit"}
EMPTY_NAMES = {"utils", "helpers", "common", "misc", "manager", "util", "helper"}

# Outside thing -> the files (or folders) that may import it; everything else goes through them.
DOORS = {
    "time": ("clock.py",),
    "datetime.datetime": (),
    "pickle": (),
    "cloudpickle": (),
    "dill": (),
    "marshal": (),
    "shelve": (),
    "ray": (
        *("data/prepare.py", "training/expert_shard.py", "training/ray_session.py", "training/ray_shard_group.py"),
        *("serving/app.py", "serving/on_ray/"),
    ),
    "grpc": ("serving/wire/grpc_transport.py", "serving/grpc_api.py", "bench/bare_echo.py"),
    "torch.distributed": ("parallel/", "training/checkpoint.py"),
}
TORCH_FREE = ("config_io", "config_messages", "errors", "cli.main", "cli.validate", "training.validation")


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imported_names(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def length(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def is_allowed(path: Path, doors: tuple[str, ...]) -> bool:
    relative = str(path.relative_to(PACKAGE))
    return any(relative == door or (door.endswith("/") and relative.startswith(door)) for door in doors)


def test_every_package_says_what_it_owns_and_imports_nothing():
    folders = {path.parent for path in SOURCES}
    assert all((folder / "__init__.py").is_file() for folder in folders)
    wrong = []
    for path in PACKAGE.rglob("__init__.py"):
        tree = parse(path)
        if len(tree.body) != 1 or not ast.get_docstring(tree):
            wrong.append(name_of(path))
    assert not wrong


def test_no_file_or_function_outgrows_its_limit():
    too_long = []
    for path in SOURCES:
        num_lines = len(path.read_text(encoding="utf-8").splitlines())
        if num_lines > MAX_FILE_LINES:
            too_long.append(f"{name_of(path)}: {num_lines} lines")
        for node in functions(parse(path)):
            limit = MAX_INIT_LINES if node.name == "__init__" else MAX_FUNCTION_LINES
            if length(node) > limit:
                too_long.append(f"{name_of(path)}:{node.lineno} {node.name}: {length(node)} lines")
    assert not too_long


def test_no_module_has_a_name_that_means_nothing():
    assert not [name_of(path) for path in SOURCES if {*path.stem.split("_"), path.parent.name} & EMPTY_NAMES]


def test_no_class_is_a_manager():
    classes = [node for path in SOURCES for node in ast.walk(parse(path)) if isinstance(node, ast.ClassDef)]
    assert not [node.name for node in classes if node.name.endswith("Manager")]


@pytest.mark.parametrize("outside", DOORS)
def test_outside_things_come_in_by_their_doors(outside):
    wrong = []
    for path in SOURCES:
        found = [name for name in imported_names(parse(path)) if f"{name}.".startswith(f"{outside}.")]
        if found and not is_allowed(path, DOORS[outside]):
            wrong.append(f"{name_of(path)} imports {found[0]}")
    assert not wrong


def test_imports_stand_at_the_top_except_in_the_command_line():
    wrong = []
    for path in SOURCES:
        if path.parent == PACKAGE / "cli":
            continue
        wrong += [f"{name_of(path)}: {node.name}" for node in functions(parse(path)) if any(imported_names(node))]
    assert not wrong


def test_the_ground_stays_free_of_torch_and_ray():
    script = (
        "import importlib, sys\n"
        f"for name in {TORCH_FREE}: importlib.import_module('dsmoe_ray.' + name)\n"
        "assert not {'torch', 'ray', 'numpy'} & set(sys.modules), 'a heavy library was loaded'"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_the_top_level_holds_only_what_was_agreed():
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    assert {line.split("/")[0] for line in listed.splitlines()} <= TOP_LEVEL


def test_tests_lie_in_the_agreed_folders_and_are_no_package():
    folders = {path.relative_to(ROOT / "tests").parts[0] for path in TESTS if path.parent != ROOT / "tests"}
    assert folders <= TEST_FOLDERS
    assert not [name_of(path) for path in TESTS if path.name == "__init__.py"]


def test_unit_tests_mirror_the_package():
    units = ROOT / "tests" / "unit"
    packages = {path.parent.relative_to(units) for path in units.rglob("test_*.py")}
    assert not [str(package) for package in packages if not (PACKAGE / package).is_dir()]


def test_source_text_is_ascii():
    assert not [name_of(path) for path in SOURCES + TESTS if not path.read_text(encoding="utf-8").isascii()]


def test_nothing_is_left_for_later():
    words = ("TO" + "DO", "FIX" + "ME", "XX" + "X", "NotImplemented" + "Error")
    left = [(name_of(path), word) for path in SOURCES for word in words if word in path.read_text("utf-8")]
    assert not left
