"""The folder as a package: installed as `formula_ffn`, and beside Hugging Face's package that is called `kernels` too."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(code: str, folder: Path, path: Path | None = None) -> str:
    """Run Python code in a process of its own, in `folder`, with `path` before the installed packages."""
    environment = os.environ | {"PYTHONPATH": str(path) if path else "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_folder_is_in_the_wheel():
    listed = re.findall(r'"(formula_ffn[a-z_.]*)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    folders = {path.parent.relative_to(ROOT / "kernels") for path in (ROOT / "kernels").rglob("*.py")}
    packages = [".".join(("formula_ffn", *folder.parts)) for folder in folders]
    assert sorted(set(listed)) == sorted([*packages, "formula_ffn.arms"])  # the files of conf/ffn


@pytest.fixture
def installed(tmp_path):
    """A folder of installed packages in which the library is, as the wheel lays it out."""
    (tmp_path / "formula_ffn").symlink_to(ROOT / "kernels")
    return tmp_path


@pytest.mark.slow  # tests/docs/test_docs.py runs the README's example
def test_the_library_works_from_another_folder(installed, tmp_path):
    """Under its own name, without the repository on the path; and operators registered under either name live side by side."""
    code = f"""
import sys, torch, formula_ffn
assert "kernels" not in sys.modules
f = formula_ffn.activation("silu(gate) * up")
pre = torch.randn(3, 2, 8, requires_grad=True)
f(pre).sum().backward()
compiled = torch.compile(f, backend="aot_eager", fullgraph=True)
torch.testing.assert_close(compiled(pre), f(pre))
sys.path.insert(0, {str(ROOT)!r})
import kernels
torch.testing.assert_close(torch.compile(kernels.activation("silu(gate) * up"), backend="aot_eager")(pre), f(pre))
assert formula_ffn.FormulaMLP is not kernels.FormulaMLP
print(sorted(set(dir(formula_ffn)) & set(formula_ffn.__all__)) and all(hasattr(formula_ffn, n) for n in formula_ffn.__all__))
"""
    assert run(code, tmp_path, installed) == "True\n"


def test_the_library_needs_none_of_the_training_packages(installed, tmp_path):
    code = """
import sys
for name in ("deepspeed", "hydra", "omegaconf", "scipy", "rich", "wandb", "matplotlib", "transformers", "triton"):
    sys.modules[name] = None  # importing it fails
import torch, formula_ffn
mlp = formula_ffn.FormulaMLP(8, 16, "relu(x)**2")
mlp(torch.randn(2, 8)).sum().backward()
"""
    run(code, tmp_path, installed)


@pytest.fixture
def hub_package(tmp_path):
    """Where Hugging Face's `kernels` is installed; a stand-in of that name where it is not."""
    try:
        importlib.metadata.distribution("kernels")
        return None
    except importlib.metadata.PackageNotFoundError:
        pass
    package = tmp_path / "site" / "kernels"
    (package / "layer").mkdir(parents=True)
    # Every name that a version of Transformers may import from it; a submodule, absolute and relative imports of its own.
    (package / "__init__.py").write_text(
        "from kernels.layer import LayerRepository\nfrom .layer import Mode\n__version__ = '0.99.0'\n"
        "def get_kernel(*_, **__): return 'the hub'\n"
        "def __getattr__(name):\n"
        "    if name.startswith('_'): raise AttributeError(name)\n"
        "    return type(name, (), {'__init__': lambda self, *_, **__: None})\n"
    )
    (package / "layer" / "__init__.py").write_text(
        "import kernels\nclass LayerRepository:\n    def __init__(self, *_, **__): pass\n"
        "class Mode:\n    TRAINING = INFERENCE = 1\n"
    )
    information = tmp_path / "site" / "kernels-0.99.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.99.0\n")
    return tmp_path / "site"


@pytest.mark.slow
def test_hugging_faces_package_of_the_same_name_is_found_behind_this_folder(hub_package):
    """From the repository, ours comes first and theirs fills in; `import transformers` works, and so does what uses it here."""
    pytest.importorskip("transformers")
    code = """
import kernels
from kernels import activation, get_kernel, LayerRepository
import kernels.layer
assert kernels.layer.LayerRepository is LayerRepository and kernels.layer.__name__ == "kernels.layer"
try:
    from kernels import _no_such_name
except ImportError:
    pass
import transformers, torch
from transformers import LlamaConfig, LlamaForCausalLM
config = LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=64)
model = LlamaForCausalLM(config)
assert model(torch.zeros(1, 4, dtype=torch.long)).logits.shape == (1, 4, 64)
import model.export, model.huggingface.modeling
print(activation("relu(x)")(torch.ones(1, 4)).tolist())
"""
    assert run(code, ROOT, hub_package).endswith("[[1.0, 1.0, 1.0, 1.0]]\n")


def test_without_that_package_a_name_that_is_not_ours_is_an_attribute_error(tmp_path):
    code = """
import sys
sys.path[1:] = [entry for entry in sys.path[1:] if not __import__("os").path.exists(f"{entry}/kernels/_versions.py")]
import kernels
assert not hasattr(kernels, "get_kernel")
import kernels.formula
"""
    run(code, ROOT, tmp_path)
