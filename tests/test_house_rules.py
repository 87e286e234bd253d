"""Rules of the house: one list of ops, rooms whose arrows run down, sizes of files, no unsafe loading."""

import ast
import inspect
import re
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import rana_kernels
from rana_kernels import ops
from rana_kernels.ops import checks, gradients, mlp, reference
from tests.cases import SMALL
from tests.subprocesses import python
from tests.test_compress import make_model, tokens

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "rana_kernels"
SOURCES = sorted(PACKAGE.rglob("*.py"))
KERNELS = [
    p
    for d in ("cpu", "cuda")
    for p in sorted((ROOT / "csrc" / d).glob(f"*.{'cpp' if d == 'cpu' else 'cu'}"))
    if p.stem != "all_ops"
]
UNCOUNTED = {"__init__.py", "version.py", "py.typed", "__pycache__"}

# Which other rooms each room may import. Every arrow runs to a room above, so there is no circle.
ARROWS = {
    "system": set(),
    "ops": set(),
    "backends": {"ops", "system"},
    "nn": {"ops"},
    "model": {"nn"},
    "checkpoint": {"nn", "model", "system"},
    "evaluation": {"model", "system"},
    "statistics": {"ops", "model", "system"},
    "rotation": {"model", "statistics", "system"},
    "quantization": {"ops", "nn", "model", "statistics"},
    "allocation": {"nn", "model", "checkpoint", "evaluation", "statistics", "quantization", "system"},
    "compression": {"ops", "nn", "model", "checkpoint", "statistics", "quantization", "allocation", "system"},
    "recovery": {
        "ops", "nn", "model", "checkpoint", "evaluation", "statistics", "quantization", "allocation",
        "system",
    },
    "integrations": {"ops", "nn", "model", "checkpoint", "system"},
    "cli": {
        "backends", "model", "checkpoint", "evaluation", "statistics", "allocation", "compression",
        "recovery", "rotation", "integrations", "system",
    },
}  # fmt: skip
# Only these rooms call the ops. The others see kernels through modules.
CALLERS = {"ops", "nn", "integrations"}
# Rooms that a process that loads a checkpoint never imports.
UNUSED_BY_LOADING = (
    "statistics", "rotation", "quantization", "allocation", "compression", "recovery", "evaluation", "cli",
)  # fmt: skip


def file_name(path: Path) -> str:
    """Return the dotted name of a file of the package, "" for the package itself."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(p for p in parts if p != "__init__")


FILES = {file_name(p): p for p in SOURCES}
every_file = pytest.mark.parametrize("name", [n for n in FILES if n not in ("", "version")], ids=str)


def room(name: str) -> str:
    return name.partition(".")[0]


def imports(path: Path, top_level_only: bool = False) -> set[str]:
    """Return the full names of the modules that a file imports."""
    tree = ast.parse(path.read_text())
    found = set()
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            full = {f"{node.module}.{a.name}" for a in node.names}
            found |= {n if n.removeprefix("rana_kernels.") in FILES else node.module for n in full}
    return found


COMPILED = {"_C", "_held"}  # modules


def own_imports(name: str) -> set[str]:
    """Return the files of the package that one of them imports."""
    found = {n for n in imports(FILES[name]) if n.startswith("rana_kernels.")}
    return {n.removeprefix("rana_kernels.") for n in found} - {"version", *COMPILED}


# ops


@pytest.mark.parametrize("op", ops.SCHEMAS)
def test_an_op_has_its_name_in_every_room(op):
    for place in (ops, reference, checks, gradients):
        assert callable(getattr(place, op)), place.__name__
    assert op in SMALL, "tests/cases.py has no case"
    assert ops.__dict__[op].__doc__
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    for key in ("CompositeExplicitAutograd", "Meta", "Autograd", "AutocastCPU", "AutocastCUDA"):
        assert has(f"rana::{op}", key) or has(f"rana::{op}", key + "CPU"), key


@pytest.mark.parametrize("op", ops.SCHEMAS)
def test_arguments_have_one_order_and_one_name(op):
    schema = [a.name for a in getattr(torch.ops.rana, op).default._schema.arguments]
    for function in (getattr(ops, op), getattr(reference, op), getattr(checks, op)):
        assert list(inspect.signature(function).parameters) == schema, function


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_compiled_backends_answer_the_same_list(device):
    sources = [p for p in KERNELS if p.parent.name == device]
    if not sources:
        pytest.skip(f"no csrc/{device}")
    assert {p.stem for p in sources} == set(ops.SCHEMAS)
    for path in sources:
        registered = re.findall(r'm\.impl\("(\w+)"', path.read_text())
        assert registered == [path.stem], path.name


@pytest.mark.parametrize("op", ops.SCHEMAS)
@pytest.mark.parametrize("place", ["backends/triton/{op}.py", "integrations/onnx.py"])
def test_triton_and_onnx_answer_the_same_list(place, op):
    tree = ast.parse((PACKAGE / place.format(op=op)).read_text())
    functions = {n.name: n for n in tree.body if isinstance(n, ast.FunctionDef)}
    schema = [a.name for a in getattr(torch.ops.rana, op).default._schema.arguments]
    assert [a.arg for a in functions[op].args.args] == schema


def test_the_reference_has_no_other_ops():
    own = {
        n for n, f in vars(reference).items() if inspect.isfunction(f) and f.__module__ == reference.__name__
    }
    assert {n for n in own if not n.startswith("_")} == {*ops.SCHEMAS, "keep", "activate"}
    assert inspect.getmodule(mlp.combine) is mlp, "what an MLP does between its linears is written once"


def test_schemas_are_written_once():
    for path in [*SOURCES, *KERNELS]:
        if path != FILES["ops.registration"]:
            assert not re.search(r"\.define\(|custom_op\(|m\.def\(", path.read_text()), path


# rooms


def test_the_root_holds_rooms_and_little_else():
    entries = {p.name for p in PACKAGE.iterdir() if p.name not in UNCOUNTED and p.suffix != ".so"}
    assert entries == set(ARROWS) and len(entries) <= 15


def test_no_public_name_is_also_a_module():
    clashes = [name for name in rana_kernels.__all__ if find_spec(f"rana_kernels.{name.strip('_')}")]
    assert clashes in ([], ["__version__"]), clashes


def test_the_arrows_of_the_table_run_down():
    above: set[str] = set()
    for name, allowed in ARROWS.items():
        if name != "cli":
            assert allowed <= above, f"{name} may import {allowed - above}, which comes after it"
        above.add(name)


@every_file
def test_arrows_run_down(name):
    seen = {room(n) for n in own_imports(name)} - {room(name)}
    extra = seen - ARROWS[room(name)]
    assert not extra, f"{name} imports {sorted(extra)}, wanted only {sorted(ARROWS[room(name)])}"
    if room(name) == "backends" and "." in name:
        backend = ".".join(name.split(".")[:2])
        others = {n for n in own_imports(name) if room(n) == "backends" and not n.startswith(backend)}
        assert others <= {"backends"} or name == "backends.info", f"{name} imports {others}"
    if room(name) not in CALLERS:
        assert "torch.ops.rana." not in FILES[name].read_text(), f"{name} calls an op, wanted a module of nn"


def test_no_file_imports_itself_in_a_circle():
    left = {name: own_imports(name) & set(FILES) - {name} for name in FILES if name}
    while done := [name for name, needs in left.items() if not needs & set(left)]:
        for name in done:
            del left[name]
    assert not left, f"a circle of imports in {sorted(left)}"


@every_file
def test_no_private_name_crosses_a_file(name):
    """`from other import _name`, or `other._name` of an imported module or of a class of the package."""
    tree = ast.parse(FILES[name].read_text())
    modules = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("rana_kernels"):
            names = {a.name for a in node.names} - COMPILED
            private = {n for n in names if n.startswith("_") and n != "__version__"}
            assert not private, f"{name} imports {private} from {node.module}"
            modules |= {a.asname or a.name for a in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
            dunder = node.attr.startswith("__")
            assert dunder or not node.attr.startswith("_"), f"{name}: {node.value.id}.{node.attr}"


def test_loading_imports_neither_calibration_nor_allocation(tmp_path):
    model = make_model()
    rana_kernels.compress(model, [tokens(2)], flops_reduction=0.3, method="paper", progress=False)
    rana_kernels.save(model, tmp_path / "model")
    code = (
        f"import sys, rana_kernels as rana; rana.load({str(tmp_path / 'model')!r})\n"
        f"rooms = {{name.split('.')[1] for name in sys.modules if name.startswith('rana_kernels.')}}\n"
        f"print(*sorted(rooms & set({UNUSED_BY_LOADING!r})))"
    )
    loaded = python("-c", code)
    assert loaded.returncode == 0, loaded.stderr
    assert not loaded.stdout.strip(), f"rana.load imports {loaded.stdout.strip()}"


@every_file
def test_transformers_stays_in_its_rooms(name):
    if room(name) in ("integrations", "cli"):
        return
    heavy = {n.split(".")[0] for n in imports(FILES[name], top_level_only=True)}
    heavy &= {"transformers", "vllm", "triton"}
    assert not heavy or name.startswith("backends.triton"), f"{name} imports {heavy}"


def test_the_package_imports_without_transformers():
    """Importing transformers would more than double the time of `import rana_kernels`."""
    found = python("-c", "import sys, rana_kernels; print('transformers' in sys.modules)")
    assert found.stdout.strip() == "False", found.stdout + found.stderr


# files


def test_files_stay_small():
    kernels = [p for p in (ROOT / "csrc").rglob("*") if p.suffix in {".h", ".cpp", ".cu", ".cuh"}]
    for paths, budget in ((SOURCES, 350), (kernels, 400)):
        over = {p.name: n for p in paths if (n := len(p.read_text().splitlines())) > budget}
        assert not over, f"more than {budget} lines: {over}"


def test_public_names_are_documented():
    for name in rana_kernels.__all__:
        value = getattr(rana_kernels, name)
        assert isinstance(value, str) or inspect.getdoc(value), f"{name} has no docstring"


@every_file
def test_modules_say_what_they_are_for(name):
    tree = ast.parse(FILES[name].read_text())
    assert len(tree.body) == 0 or ast.get_docstring(tree), name


UNSAFE = re.compile(
    r"^\s*(import|from) pickle\b|\bpickle\.|\btorch\.load\(|trust_remote_code=True", re.MULTILINE
)


@pytest.mark.parametrize(
    "line", ["import pickle", "from pickle import load", "torch.load(p)", "trust_remote_code=True"]
)
def test_the_pattern_for_unsafe_loading_finds(line):
    assert UNSAFE.search(line)


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.name)
def test_nothing_is_loaded_that_can_run_code(path):
    assert not UNSAFE.search(path.read_text())


def test_tests_skip_for_packages_of_others_only():
    """A skip for a module of our own would hide the tests of a module that was moved."""
    own = re.compile(r"importorskip\(\s*[\"']rana_kernels")
    files = sorted((ROOT / "tests").rglob("*.py"))
    assert len(files) > 20 and not [path.name for path in files if own.search(path.read_text())]
