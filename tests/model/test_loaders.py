"""Who loads an exported model: the table in docs/checkpoints.md is what the layouts give, and the export prints it."""

from __future__ import annotations

from collections import defaultdict

import pytest

from conf.keys import FOLDER
from conf.shape import Shape, shape_of
from model.export import main
from model.huggingface.layout import CLASSES, FORMULA, transformers_layout
from model.huggingface.loaders import LLAMA_CPP, PREFIX_OPTION, VLLM, loaders
from tests.model.conftest import ARMS, config_of

PAGE = FOLDER.parent / "docs" / "checkpoints.md"


def shape(arm: str, qk_norm: bool) -> Shape:
    return shape_of(config_of(arm, qk_norm=qk_norm))


def rows() -> list[str]:
    """Return the lines of the table: arms of which both classes and both other programs are the same."""
    groups = defaultdict(list)
    for arm in ARMS:
        layouts = [transformers_layout(shape(arm, qk_norm)) for qk_norm in (False, True)]
        others = [each for each in layouts if {VLLM, LLAMA_CPP} <= set(loaders(each))]
        word = {0: "", 1: f"as `{CLASSES[others[0].model_type]}`" if others else "", 2: "yes"}[len(others)]
        groups[(*(f"`{CLASSES[each.model_type]}`" for each in layouts), word)].append(arm)
    return [
        f"| `{' '.join(arms)}` | {' | '.join(key).rstrip()} |".replace("|  |", "| |") for key, arms in groups.items()
    ]


def test_the_documented_table_holds_every_arm():
    documented = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if "ForCausalLM` | " in line]
    assert sorted(documented) == sorted(rows())


@pytest.mark.parametrize(
    ("arm", "qk_norm", "name", "printed"),
    [
        ("swiglu", False, "LlamaForCausalLM", ["loads in Transformers, vLLM, llama.cpp"]),
        ("swiglu", True, "Qwen3ForCausalLM", ["loads in Transformers, vLLM, llama.cpp", PREFIX_OPTION]),
        ("geglu", True, "Qwen3ForCausalLM", ["does not load in llama.cpp, which would compute silu instead of gelu"]),
        ("relu2", False, "ArceeForCausalLM", ["loads in Transformers, vLLM, llama.cpp"]),
        (
            "relu2",
            True,
            "ApertusForCausalLM",
            ["does not load in llama.cpp, which would compute xielu instead of relu2"],
        ),
        ("xielu", True, "ApertusForCausalLM", ["loads in Transformers, vLLM, llama.cpp"]),
        ("xielu", False, "FormulaForCausalLM", ["loads in Transformers with trust_remote_code=True"]),
        ("xielu_positive", True, "FormulaForCausalLM", ["loads in Transformers with trust_remote_code=True"]),
    ],
)
def test_the_export_says_who_loads_it(make_run, arm, qk_norm, name, printed, tmp_path, capsys):
    main([f"run={make_run(arm, qk_norm=qk_norm)}", f"to={tmp_path / 'hf'}"])
    output = capsys.readouterr().out
    assert f": {'an' if name[0] == 'A' else 'a'} {name}" in output
    assert all(line in output for line in printed)
    assert ("trust_remote_code=True)" in output) == (name == CLASSES[FORMULA])


def test_a_plain_from_pretrained_opens_every_native_class(transformers, make_run, tmp_path):
    for arm, qk_norm in (("swiglu", True), ("prelu", True), ("xielu", True), ("relu2", False)):
        folder = tmp_path / f"{arm}-{qk_norm}"
        main([f"run={make_run(arm, name=folder.name, qk_norm=qk_norm)}", f"to={folder}"])
        _, report = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not any(report.values()), (arm, report)
        assert not list(folder.glob("*.py"))
