"""The tree for Hugging Face's `kernels` library: the library's rules, and the ops without a compiler.

`tests/stacks/test_hub_kernel.py` compiles the tree and loads it with the library itself.
"""

import ast
import base64
import hashlib
import importlib.util
import inspect
import json
import re
import shutil
import sys

import pytest
import torch
from torch import nn

from hub_kernel.tree import NAME, ROOT, write_tree
from hub_kernel.variant import OPS_PY, complete, fingerprint
from rana_kernels.nn.adapters import RanaLinear, RanaNeuronLinear
from rana_kernels.nn.dense import DenseLinear, QuantizedLinear
from rana_kernels.nn.mlp import RanaMLP
from rana_kernels.ops import SCHEMAS, reference
from setup import INSTRUCTION_SETS
from tests.cases import FORMS, QUANTIZED_FORMS, make_inputs

MODULES = {
    "Linear": DenseLinear,
    "QuantizedLinear": QuantizedLinear,
    "RanaLinear": RanaLinear,
    "RanaNeuronLinear": RanaNeuronLinear,
    "RanaMLP": RanaMLP,
}


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return write_tree(tmp_path_factory.mktemp("hub") / "tree")


@pytest.fixture(scope="module")
def kernel(tree, tmp_path_factory):
    """A variant without a library: PyTorch serves its ops. It is imported as the kernels library does it."""
    name = "_rana_kernels_without_library"
    folder = tmp_path_factory.mktemp("build") / "variant"
    shutil.copytree(tree / "torch-ext" / NAME, folder)
    complete(folder, name)
    (folder / "_ops.py").write_text(OPS_PY.format(id=name).replace(f"from . import {name}\n", ""))
    spec = importlib.util.spec_from_file_location(name, folder / "__init__.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def python_files(tree):
    files = sorted((tree / "torch-ext").rglob("*.py"))
    assert {"functions.py", "layers.py", "reference.py"} <= {path.name for path in files}
    return [*files, ROOT / "hub_kernel" / "shipped" / "compat.py"]


def test_python_is_that_of_version_3_9(tree):
    for path in python_files(tree):
        parsed = ast.parse(path.read_text(), feature_version=(3, 9))
        hints = [ast.unparse(n) for n in ast.walk(parsed) if isinstance(n, ast.ImportFrom)]
        if " | None" in path.read_text():
            assert "from __future__ import annotations" in hints, path.name


def test_only_torch_the_standard_library_and_the_kernel_itself_are_imported(tree):
    for path in python_files(tree):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            else:
                continue
            roots = {name.partition(".")[0] for name in names}
            assert roots <= {"torch", *sys.stdlib_module_names}, f"{path.name} imports {roots}"


def test_ops_are_registered_in_the_namespace_of_the_build_alone(tree):
    for path in [*(tree / "csrc").rglob("*.*"), *(tree / "torch-ext").glob("*.*")]:
        found = set(re.findall(r"STABLE_TORCH_LIBRARY\w*\((\w+)", path.read_text()))
        assert found <= {"TORCH_EXTENSION_NAME"}, path.name
    for path in python_files(tree):
        called = [ast.unparse(n) for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
        assert not [
            c for c in called if re.search(r"torch\.ops\.rana|Library\(['\"]|register_\w+\(f?['\"]", c)
        ]


def test_another_source_has_another_namespace(tree, tmp_path):
    assert fingerprint(tree) == fingerprint(write_tree(tmp_path / "same"))
    changed = write_tree(tmp_path / "changed")
    with open(changed / "csrc" / "cpu" / "mask.h", "a") as header:
        header.write("\n")
    assert fingerprint(changed) != fingerprint(tree)


def test_build_toml_lists_the_files_that_are_there(tree):
    tomllib = pytest.importorskip("tomllib", reason="new in Python 3.11")
    build = tomllib.loads((tree / "build.toml").read_text())
    general, kernels = build["general"], build["kernel"]
    assert general["edition"] == 5 and general["name"].replace("-", "_") == NAME
    assert {kernel["backend"] for kernel in kernels.values()} == set(general["backends"])
    listed = {path for part in (build["torch"], *kernels.values()) for path in part["src"]}
    there = {str(p.relative_to(tree)) for part in ("csrc", "torch-ext") for p in (tree / part).rglob("*.*")}
    assert listed == {path for path in there if not path.endswith(".py")}
    compiled = [path for path in kernels["rana_cpu"]["src"] if path.endswith(".cpp")]
    assert compiled == [f"csrc/cpu/for_{name}.cpp" for name in INSTRUCTION_SETS["x86_64"]]


@pytest.mark.parametrize("name", ["thesis.txt", "build.toml"])
def test_a_folder_of_something_else_is_not_touched(name, tmp_path):
    (tmp_path / name).write_text('name = "years-of-work"')
    with pytest.raises(ValueError, match="holds something other than this kernel repository"):
        write_tree(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_an_older_tree_is_replaced_and_its_git_repository_stays(tmp_path):
    tree = write_tree(tmp_path / "tree")
    for name in (".git/config", "csrc/gone.h"):
        (tree / name).parent.mkdir(exist_ok=True)
        (tree / name).write_text("")
    write_tree(tree)
    assert (tree / ".git/config").exists() and not (tree / "csrc/gone.h").exists()


def test_metadata_says_what_the_variant_is(kernel):
    folder = kernel.__spec__.origin.removesuffix("__init__.py")
    with open(folder + "metadata.json") as file:
        metadata = json.load(file)
    assert metadata["id"] == kernel.__name__ == kernel.functions.ops.name and metadata["id"].isidentifier()
    assert metadata["backend"] == {"type": "cpu"} and metadata["license"] == "Apache-2.0"
    with open(folder + "layers.py", "rb") as file:
        digest = base64.b64encode(hashlib.sha256(file.read()).digest()).decode()
    assert metadata["digest"]["files"]["layers.py"] == digest


def test_older_versions_of_the_library_find_the_same_functions(kernel):
    path = kernel.__spec__.origin.replace("__init__.py", f"{NAME}/__init__.py")
    spec = importlib.util.spec_from_file_location("_rana_kernels_older", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert all(getattr(module, name) is getattr(kernel, name) for name in kernel.__all__)


@pytest.mark.parametrize("form", [*FORMS, *QUANTIZED_FORMS])
def test_ops_are_the_reference(kernel, form):
    case = {**FORMS, **QUANTIZED_FORMS}[form]
    args = make_inputs(case, torch.bfloat16)
    found = getattr(kernel, case.op)(**args)
    torch.testing.assert_close(found, getattr(reference, case.op)(**args), rtol=0, atol=0)


def test_all_ops_and_layers_are_public(kernel):
    assert set(kernel.__all__) == {"layers", *SCHEMAS}
    own = {n: c for n, c in vars(kernel.layers).items() if inspect.isclass(c) and issubclass(c, nn.Module)}
    assert set(own) == set(MODULES)


@pytest.mark.parametrize("name", MODULES)
def test_layers_are_pure_and_fit_the_modules(kernel, name):
    layer = getattr(kernel.layers, name)
    own = {n for n in vars(layer) if not n.startswith("__")}
    assert own == {"forward", "has_backward", "can_torch_compile"} and layer.__init__ is nn.Module.__init__
    ours, theirs = (inspect.signature(c.forward).parameters.values() for c in (layer, MODULES[name]))
    assert [p.kind for p in ours] == [p.kind for p in theirs]
