"""Rules of the house: one list of ops, arrows between rooms, sizes of files, no unsafe loading."""

import ast
import inspect
import re
from pathlib import Path

import pytest

import rana_kernels
from rana_kernels import ops
from rana_kernels.ops import checks, gradients, reference
from tests.cases import SMALL

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "rana_kernels"
SOURCES = sorted(PACKAGE.rglob("*.py"))
KERNELS = [
    p for d in ("cpu", "cuda") for p in sorted((ROOT / "csrc" / d).glob(f"*.{'cpp' if d == 'cpu' else 'cu'}"))
]

# whom the rooms under the modules may import, of the package; nothing else
KERNEL_ROOMS = {
    "checks": set(),
    "backends.reference": {"checks"},
    "gradients": {"backends.reference", "checks"},
    "ops": {"checks", "gradients", "backends.reference"},
    "backends": {"ops", "backends.reference", "backends.triton"},
    "modules": {"ops", "backends.reference", "checks"},
    "dense": {"ops"},
}
# the rooms above them see kernels through modules; the reference also gives them masks to count
HIDDEN = {"ops", "gradients", "backends"}
# these may: the package itself forwards names, and a command line reports what serves the ops
DOORS = {"", "info"}


def room(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(p for p in parts if p != "__init__")


ROOMS = {room(p): p for p in SOURCES}
every_room = pytest.mark.parametrize("name", [n for n in ROOMS if n], ids=str)


def imports(path: Path, top_level_only: bool = False) -> set[str]:
    """Full names of the modules that a file imports."""
    tree = ast.parse(path.read_text())
    found = set()
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            full = {f"{node.module}.{a.name}" for a in node.names}
            found |= {n if n.removeprefix("rana_kernels.") in ROOMS else node.module for n in full}
    return found


def own_imports(name: str) -> set[str]:
    return {
        n.removeprefix("rana_kernels").removeprefix(".")
        for n in imports(ROOMS[name])
        if n.startswith("rana_kernels")
    }


@pytest.mark.parametrize("op", ops.SCHEMAS)
def test_an_op_has_its_name_in_every_room(op):
    for place in (ops, reference, checks, gradients):
        assert callable(getattr(place, op)), place.__name__
    assert op in SMALL, "tests/cases.py has no case"
    assert ops.__dict__[op].__doc__
    has = rana_kernels.ops.torch._C._dispatch_has_kernel_for_dispatch_key
    for key in ("CompositeExplicitAutograd", "Meta", "Autograd", "AutocastCPU", "AutocastCUDA"):
        assert has(f"rana::{op}", key) or has(f"rana::{op}", key + "CPU"), key


@pytest.mark.parametrize("op", ops.SCHEMAS)
def test_arguments_have_one_order_and_one_name(op):
    schema = [a.name for a in getattr(ops.torch.ops.rana, op).default._schema.arguments]
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
    schema = [a.name for a in getattr(ops.torch.ops.rana, op).default._schema.arguments]
    assert [a.arg for a in functions[op].args.args] == schema


def test_the_reference_has_no_other_ops():
    public = {n for n, f in vars(reference).items() if inspect.isfunction(f) and not n.startswith("_")}
    assert public == {*ops.SCHEMAS, "keep", "activate"}


def test_schemas_are_written_once():
    for path in [*SOURCES, *KERNELS]:
        if path != ROOMS["ops"]:
            assert not re.search(r"\.define\(|custom_op\(|m\.def\(", path.read_text()), path


@every_room
def test_arrows_point_down(name):
    seen = own_imports(name) - {"version"}
    if name in KERNEL_ROOMS or name.startswith("backends."):
        allowed = KERNEL_ROOMS.get(name, {"checks"})
        own = ".".join(name.split(".")[:2])  # a backend may be a package
        extra = {n for n in seen if n not in allowed and n != own and not n.startswith(own + ".")}
        assert not extra, f"{name} imports {extra}, allowed are {allowed}"
    elif name not in DOORS and not name.startswith(("integrations", "cli")):
        assert not seen & HIDDEN, f"{name} imports {seen & HIDDEN}, but sees kernels through modules"
        assert not {n for n in seen if n.startswith(("integrations", "cli"))}, name
        assert "torch.ops.rana" not in ROOMS[name].read_text(), name
    if not name.startswith("cli"):
        assert not {n for n in seen if n.startswith("cli")}, name


@every_room
def test_transformers_stays_in_its_rooms(name):
    if name.startswith(("integrations", "cli")):
        return
    heavy = {n.split(".")[0] for n in imports(ROOMS[name], top_level_only=True)} & {
        "transformers",
        "vllm",
        "triton",
    }
    assert not heavy or name.startswith("backends.triton"), f"{name} imports {heavy}"


def test_the_package_imports_without_transformers():
    """Only an import inside a function or a guard may reach them from `import rana_kernels`."""
    assert not {n.split(".")[0] for n in imports(PACKAGE / "__init__.py", top_level_only=True)} & {
        "transformers"
    }


def test_files_stay_small():
    kernels = [p for p in (ROOT / "csrc").rglob("*") if p.suffix in {".h", ".cpp", ".cu", ".cuh"}]
    for paths, budget in ((SOURCES, 350), (kernels, 400)):
        over = {p.name: n for p in paths if (n := len(p.read_text().splitlines())) > budget}
        assert not over, f"more than {budget} lines: {over}"


def test_public_names_are_documented():
    for name in rana_kernels.__all__:
        value = getattr(rana_kernels, name)
        assert isinstance(value, str) or inspect.getdoc(value), f"{name} has no docstring"


@every_room
def test_modules_say_what_they_are_for(name):
    tree = ast.parse(ROOMS[name].read_text())
    assert len(tree.body) < 2 or ast.get_docstring(tree), name


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
