"""The house: each file imports only from its left, and support says how threads wait before torch starts any."""
import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROGRAMS = ["prepare", "train", "sample", "eval"]
ROOMS = [["configurator"], ["support"], ["model"], ["checkpoint"], PROGRAMS, ["experiments"], ["experiments.gpu_check"]]
FILES = sorted(path for folder in (".", "support", "experiments") for path in (ROOT / folder).glob("*.py"))


def room(module):
    """The place of a module in the order of imports; None where it is not ours. gpu_check runs bench on all presets."""
    last = len(ROOMS) - 1
    if module in ROOMS[last]:
        return last
    return next((i for i, names in enumerate(ROOMS) if module.split(".")[0] in names), None)


def module_of(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def imported(path):
    """The modules that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are written in full"
            yield node.module


def test_every_file_has_a_room():
    assert [path for path in FILES if room(module_of(path)) is None] == []


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_a_file_imports_only_from_the_rooms_to_its_left(path):
    mine = module_of(path)
    for other in imported(path):
        if room(other) is not None:
            inside_support = mine.startswith("support.") and other.startswith("support")
            assert room(other) < room(mine) or inside_support, f"{mine} imports {other}"


def test_of_the_programs_only_bench_and_compare_take_from_train_and_eval():
    taken = {module_of(path): {*imported(path)} & {*PROGRAMS} for path in FILES}
    assert {mine: theirs for mine, theirs in taken.items() if theirs} == {
        "experiments.bench": {"train"}, "experiments.compare": {"train", "eval"}}


def test_a_name_is_imported_from_the_file_that_defines_it():
    """Not from one that imports it itself."""
    trees = {module_of(path): ast.parse(path.read_text()) for path in FILES}
    for mine, tree in trees.items():
        for node in [node for node in tree.body if isinstance(node, ast.ImportFrom) and node.module in trees]:
            passed_on = {alias.name for other in trees[node.module].body if isinstance(other, ast.ImportFrom)
                         for alias in other.names}
            taken = {alias.name for alias in node.names} & passed_on
            assert not taken, f"{mine} imports {taken} from {node.module}"


@pytest.mark.parametrize("name", ["configurator", "support.files", "support.dataset", "prepare"])
def test_these_leave_torch_unimported(name):
    script = f"import sys, {name}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)


WATCH = """if True:
    import importlib, os, sys
    class Watch:
        def find_spec(self, name, path=None, target=None):
            if name == "torch":
                print(os.environ.get("OMP_WAIT_POLICY"), os.environ.get("GOMP_SPINCOUNT"))
                os._exit(0)
    sys.meta_path.insert(0, Watch())
    importlib.import_module(sys.argv[1])"""


@pytest.mark.parametrize("name", [*map(module_of, FILES)])
def test_how_threads_wait_is_said_before_torch_is_imported(name):
    def seen(**given):
        clean = {key: value for key, value in os.environ.items() if key not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
        return subprocess.check_output([sys.executable, "-c", WATCH, name], cwd=ROOT, env=clean | given, text=True)
    assert seen() in ("passive 1000\n", "")
    assert seen(OMP_WAIT_POLICY="active") in ("active None\n", "")


def test_where_torch_is_there_already_its_threads_are_left_alone():
    script = "import os, sys; sys.modules['torch'] = None; import support; assert 'GOMP_SPINCOUNT' not in os.environ"
    clean = {key: value for key, value in os.environ.items() if key not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT, env=clean)
