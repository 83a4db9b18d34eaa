"""An exported run: Transformers computes our logits and writes our text, for every arm; and what is refused."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from kernels import activation
from kernels.common.errors import UserError
from kernels.formula.grammar import FUNCTIONS, REDUCTIONS
from model import export as command
from model.export import export, main
from model.generate import generate, load_run
from model.huggingface.layout import TransformersLayout
from model.weights import checkpoints
from tests.model.conftest import ARMS, UNLIKE
from tests.selection import quick

# fp32 sums in another order: 1.2e-6 of the largest logit was the most that any arm differed by.
TOLERANCE = 1e-5
LLAMA, ARCEE, FORMULA = "LlamaForCausalLM", "ArceeForCausalLM", "FormulaForCausalLM"
WITH_QK_NORM = {LLAMA: "Qwen3ForCausalLM", ARCEE: "ApertusForCausalLM"}
QWEN3, APERTUS = WITH_QK_NORM.values()
CLASSES = {
    **dict.fromkeys(("bilinear", "geglu", "glu", "reglu", "reglu2", "swiglu"), LLAMA),
    **dict.fromkeys(("gelu", "gelu_tanh", "leaky_relu", "mish", "prelu", "relu", "relu2"), ARCEE),
    **dict.fromkeys(("sigmoid", "silu", "tanh"), ARCEE),
    **dict.fromkeys(("elu", "leaky_relu2", "maxout", "selu", "silu_plus_relu", "situ_glu", "smooth_relu2"), FORMULA),
    **dict.fromkeys(
        ("softplus", "swiglu_clamped", "swish", "tanh_relu2", "threshold", "xielu", "xielu_positive"), FORMULA
    ),
    **dict.fromkeys(("double_swiglu", "drelu", "golu", "mixture_glu", "polyrelu", "powglu", "sigmoid_tanh"), FORMULA),
    **dict.fromkeys(("gaussian_topk", "polynorm", "subnorm_glu"), FORMULA),
    **dict.fromkeys(("singlu", "swiglu_clamped_output", "swiglu_clamped_silu", "telu", "xiprelu", "xswiglu"), FORMULA),
}
XIELU = "where(x > 0, softplus(a) * x * x + 0.5 * x, 0.5 * x + (0.5 + softplus(b)) * (expm1(min(x, -1e-6)) - x))"
SHARED = {"init": 0.25, "share": "layer"}
XIELU_LEARNED = {"b": SHARED, "a": SHARED}
# The checkpoints are of step 7.
FADED = {"t": {"schedule": "linear", "from": 0, "to": 1, "steps": 7}, "c": SHARED}
OTHERS = {  # what else can differ: (the arm, values of its group, values of model=), and the class
    "heads that do not divide d_model": (("swiglu", None, {"d_model": 33, "head_dim": 8}), FORMULA),
    "one key head": (("swiglu", None, {"n_kv_heads": 1}), LLAMA),
    "as many key heads": (("relu2", None, {"n_kv_heads": None}), ARCEE),
    "tied": (("swiglu", None, {"tie_embeddings": True}), LLAMA),
    "tied, custom": (("swish", None, {"tie_embeddings": True}), FORMULA),
    "qk_norm": (("swiglu", None, {"qk_norm": True}), QWEN3),
    "soft cap": (("swiglu", None, {"logit_softcap": 2.0}), FORMULA),
    "soft cap, tied": (("relu2", None, {"logit_softcap": 2.0, "tie_embeddings": True, "qk_norm": True}), FORMULA),
    "qk_norm, tied": (("geglu", None, {"qk_norm": True, "tie_embeddings": True, "rope_theta": 30.0}), QWEN3),
    "qk_norm, heads that do not divide d_model": (
        ("swiglu", None, {"qk_norm": True, "d_model": 33, "head_dim": 8}),
        QWEN3,
    ),
    "qk_norm, ungated": (("relu2", None, {"qk_norm": True, "norm_eps": 0.3, "rope_theta": 30.0}), APERTUS),
    "qk_norm, ungated, wide heads": (("relu", None, {"qk_norm": True, "d_model": 33, "head_dim": 6}), APERTUS),
    "qk_norm, layers that differ": (("swiglu", {"per_layer": {0: "relu2"}}, {"qk_norm": True}), FORMULA),
    "qk_norm, a gated xielu": (
        (
            "custom",
            {"formula": f"({XIELU.replace('x', 'gate').replace('egatep', 'exp')}) * up", "parameters": XIELU_LEARNED},
            {"qk_norm": True},
        ),
        FORMULA,
    ),
    "rope_theta and norm_eps": (("geglu", None, {"rope_theta": 30.0, "norm_eps": 0.3}), LLAMA),
    "rope_theta and norm_eps, custom": (("elu", None, {"rope_theta": 30.0, "norm_eps": 0.3, "qk_norm": True}), FORMULA),
    "another slope": (("leaky_relu", {"parameters": {"slope": 0.3}}, {}), FORMULA),
    "a slope a channel": (("prelu", {"parameters": {"slope": {"init": 0.2, "share": "channel"}}}, {}), FORMULA),
    "a slope a group": (
        ("prelu", {"parameters": {"slope": {"init": 0.2, "share": "group", "groups": 4}}}, {}),
        FORMULA,
    ),
    "a schedule that has ended": (
        ("custom", {"formula": "(1-t)*where(gate>0, gate, c*gate)*up + t*(relu(gate)*up)", "parameters": FADED}, {}),
        LLAMA,
    ),
    "a schedule that has not": (
        ("custom", {"formula": "relu(x) + t*x", "parameters": {"t": FADED["t"] | {"steps": 28}}}, {}),
        FORMULA,
    ),
    "a learned gate": (
        ("custom", {"formula": "up * where(gate > 0, gate, k*gate)", "parameters": {"k": SHARED}}, {}),
        LLAMA,
    ),
    # Arcee rounds its two numbers to bf16; Apertus keeps them.
    "xielu of Transformers": (("custom", {"formula": XIELU, "parameters": XIELU_LEARNED}, {}), FORMULA),
    "xielu of Apertus": (("custom", {"formula": XIELU, "parameters": XIELU_LEARNED}, {"qk_norm": True}), APERTUS),
    "swiglu by hand": (("custom", {"formula": "up * (gate * sigmoid(gate))"}, {}), LLAMA),
    "relu2 by hand": (("custom", {"formula": "max(0, x) * relu(x)"}, {}), ARCEE),
    "a name that is a word of Python": (
        ("custom", {"formula": "lambda *\n x - -007.50", "parameters": {"lambda": SHARED}}, {}),
        FORMULA,
    ),
    "layers that differ": (("swiglu", {"per_layer": {0: "relu2", "last": "xielu"}}, {"n_layers": 3}), FORMULA),
    "layers alike by another name": (("swiglu", {"per_layer": {"last": {"formula": "up * silu(gate)"}}}, {}), LLAMA),
}


def loaded(transformers, folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()


def difference(model, run, tokens) -> float:
    """Return the largest difference of logits, as a share of the largest logit."""
    ours, _, _ = load_run(run)
    with torch.inference_mode():
        expected, actual = ours(tokens), model(tokens).logits
    return float((actual - expected).abs().max() / expected.abs().max())


def test_the_table_names_every_arm(arm):
    assert arm in CLASSES


@pytest.mark.parametrize("arm", quick(ARMS, *UNLIKE))
def test_every_arm_gives_our_logits(transformers, make_run, arm, tokens, tmp_path):
    run = make_run(arm)
    assert export(run, tmp_path / "hf") == CLASSES[arm]
    model = loaded(transformers, tmp_path / "hf")
    assert type(model).__name__ == CLASSES[arm]
    assert model.dtype == torch.float32
    assert difference(model, run, tokens) < TOLERANCE


# One arm of each class and one with learned parameters: `test_every_arm_gives_our_logits` has all of them without QK-norm.
OF_EACH_CLASS = ("swiglu", "relu2", "xielu", "geglu", "swish")


@pytest.mark.parametrize(
    "arm", [pytest.param(a, marks=() if a in OF_EACH_CLASS else pytest.mark.slow) for a in CLASSES]
)
def test_every_arm_of_nano_gives_our_logits(transformers, make_run, arm, tokens, tmp_path):
    expected = APERTUS if arm == "xielu" else WITH_QK_NORM.get(CLASSES[arm], FORMULA)
    run = make_run(arm, qk_norm=True)
    assert export(run, tmp_path / "hf") == expected
    native = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=expected == FORMULA)
    assert difference(native.eval(), run, tokens) < TOLERANCE


def test_qwen3_gives_the_logits_of_the_formula_class_to_the_bit(transformers, make_run, tokens, tmp_path, monkeypatch):
    run = make_run("swiglu", qk_norm=True)
    export(run, tmp_path / "qwen3")
    monkeypatch.setattr(command, "transformers_layout", lambda _: TransformersLayout("formula_ffn"))
    assert export(run, tmp_path / "formula") == FORMULA
    models = [loaded(transformers, tmp_path / name) for name in ("qwen3", "formula")]
    with torch.inference_mode():
        assert torch.equal(*(model(tokens).logits for model in models))


@pytest.mark.parametrize("case", OTHERS)
def test_every_kind_of_decoder_gives_our_logits(transformers, make_run, case, tokens, tmp_path):
    (arm, ffn, sizes), expected = OTHERS[case]
    run = make_run("swiglu" if arm == "custom" else arm, ffn=ffn, **sizes)
    assert export(run, tmp_path / "hf") == expected
    model = loaded(transformers, tmp_path / "hf")
    assert type(model).__name__ == expected
    assert difference(model, run, tokens) < TOLERANCE


@pytest.mark.parametrize(
    ("arm", "swapped"),
    [
        ("swiglu", ("mlp.gate_proj", "mlp.up_proj")),
        ("swiglu_clamped", ("mlp.gate_proj", "mlp.up_proj")),
        ("swiglu", ("self_attn.k_proj", "self_attn.v_proj")),
        ("relu2", ("input_layernorm", "post_attention_layernorm")),
        ("xielu", ("mlp.learned.an", "mlp.learned.ap")),
    ],
)
def test_two_tensors_swapped_are_noticed(transformers, make_run, arm, swapped, tokens, tmp_path):
    run, folder = make_run(arm), tmp_path / "hf"
    export(run, folder)
    tensors = load_file(folder / "model.safetensors")
    ends = "" if "learned" in swapped[0] else ".weight"
    one, other = (f"model.layers.1.{name}{ends}" for name in swapped)
    tensors[one], tensors[other] = tensors[other], tensors[one]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert difference(loaded(transformers, folder), run, tokens) > 100 * TOLERANCE


class Ids:
    """A tokenizer that decodes ids to themselves."""

    def __init__(self, tokenizer) -> None:
        self.encode, self.vocab_size = tokenizer.encode, tokenizer.vocab_size
        self.eos_id, self.start_id = tokenizer.eos_id, tokenizer.start_id

    def decode(self, ids):
        return list(ids)


# A class of Transformers and ours with learned parameters; logits of the others: `test_every_arm_gives_our_logits`.
@pytest.mark.parametrize("arm", quick(["swiglu", "prelu", "relu2", "xielu", "swiglu_clamped"], "swiglu", "xielu"))
def test_it_writes_what_we_write(transformers, make_run, arm, tmp_path):
    run, folder = make_run(arm), tmp_path / "hf"
    export(run, folder)
    model, tokenizer = loaded(transformers, folder), transformers.AutoTokenizer.from_pretrained(folder)
    ours, ids, _ = load_run(run)
    for prompt in ("", "def f(x):\n    return"):
        with torch.inference_mode():
            expected = generate(lambda t, cache: ours(t, None, cache), Ids(ids), 2, prompt, 64, temperature=0.0)
            actual = model.generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=64, do_sample=False)[0]
        written = actual.tolist()[1:]
        assert (written[:-1] if written[-1] == ids.eos_id else written) == expected
        assert len(expected) > len(ids.encode(prompt))


def test_half_precision_is_the_weights_rounded(transformers, make_run, tmp_path):
    run = make_run("swish")
    export(run, tmp_path / "32")
    export(run, tmp_path / "16", dtype="bf16")
    whole, rounded = (load_file(tmp_path / name / "model.safetensors") for name in ("32", "16"))
    assert whole.keys() == rounded.keys()
    assert all(torch.equal(rounded[name], whole[name].bfloat16()) for name in whole)
    assert loaded(transformers, tmp_path / "16").dtype == torch.bfloat16


def test_a_large_model_is_written_in_shards(transformers, make_run, tokens, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "_SHARD_BYTES", 20_000)
    run = make_run("swiglu")
    export(run, tmp_path / "hf")
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "hf").glob("*.safetensors"))
    assert files == sorted(set(index["weight_map"].values()))
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert len(files) > 5
    assert all(name in load_file(tmp_path / "hf" / file) for name, file in index["weight_map"].items())
    assert difference(loaded(transformers, tmp_path / "hf"), run, tokens) < TOLERANCE


# ---- the code that carries a formula


@pytest.fixture(scope="session")
def modeling(transformers):
    assert transformers
    from model.huggingface import modeling

    return modeling


def test_every_function_of_the_grammar_is_ours(modeling):
    assert modeling.FUNCTIONS.keys() == FUNCTIONS.keys()
    x = torch.linspace(-45, 45, 999, dtype=torch.float64)
    for name, count in FUNCTIONS.items():
        safe = "x**2 + 0.1" if name in ("sqrt", "log", "log1p") else "x"
        arguments = {1: safe, 2: "x, 0.3 * x - 1", 3: "x, -2, pi"}[count]
        text = f"{name}({'x <= -.5' if name == 'where' else arguments.split(', ')[0]}" + "".join(
            f", {each}" for each in arguments.split(", ")[1:]
        )
        text = f"{text}) / 3 - -x**2 * 1e-1"
        expected = activation(text, backend="reference")(x)
        torch.testing.assert_close(modeling.evaluate(modeling.parse(text), {"x": x}), expected, rtol=1e-12, atol=1e-12)


def test_every_reduction_of_the_grammar_is_ours(modeling):
    assert modeling.REDUCTIONS.keys() == REDUCTIONS.keys()
    x = torch.randn(3, 40, dtype=torch.float64)
    for name, with_epsilon in REDUCTIONS.items():
        for text in (f"{name}(x**2 + x) - x", *([f"{name}(x, 0.5)*tanh(x)"] if with_epsilon else [])):
            expected = activation(text, backend="reference")(x)
            mine = modeling.evaluate(modeling.parse(text), {"x": x})
            torch.testing.assert_close(mine, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "text",
    ["__import__('os')", "x.device", "[x][0]", "x if x > 0 else 1", "open(x)", "max(x, key=x)", "y", "'a'", "x[0]"],
)
def test_what_is_no_formula_is_not_computed(modeling, text):
    with pytest.raises((ValueError, SyntaxError, TypeError)):
        modeling.evaluate(modeling.parse(text), {"x": torch.ones(3)})


def test_learned_numbers_start_where_the_formula_says(make_run, modeling, tmp_path):
    export(make_run("xielu"), tmp_path / "hf")
    config = modeling.FormulaConfig.from_pretrained(tmp_path / "hf")
    fresh = modeling.FormulaForCausalLM(config)
    assert fresh.model.layers[1].mlp.learned["an"].item() == pytest.approx(-1.05022)


# ---- the command


def test_the_command_says_how_to_load_it(make_run, tmp_path, capsys):
    run = make_run("swish")
    main([f"run={run}", f"to={tmp_path / 'hf'}", "step=7", "dtype=bf16"])
    output = capsys.readouterr().out
    assert f"wrote {tmp_path / 'hf'}: a FormulaForCausalLM" in output
    assert f"from_pretrained('{tmp_path / 'hf'}', trust_remote_code=True)" in output


def test_an_empty_folder_is_filled_and_a_full_one_refused(make_run, tmp_path):
    run, folder = make_run(), tmp_path / "hf"
    folder.mkdir()
    export(run, folder)
    before = sorted(path.name for path in folder.iterdir())
    with pytest.raises(UserError, match="exists and is not an empty folder"):
        export(run, folder)
    assert sorted(path.name for path in folder.iterdir()) == before


def test_a_link_to_an_empty_folder_leads_there_and_the_current_folder_is_kept(make_run, tmp_path, monkeypatch):
    run, scratch = make_run(), tmp_path / "scratch"
    (scratch / "hf").mkdir(parents=True)
    (tmp_path / "hf").symlink_to(scratch / "hf")
    export(run, tmp_path / "hf")
    assert (tmp_path / "hf").is_symlink()
    assert (scratch / "hf" / "config.json").is_file()
    (scratch / "empty").mkdir()
    monkeypatch.chdir(scratch / "empty")
    with pytest.raises(UserError, match="is the folder that you are in, and it would be replaced"):
        main([f"runs={run.parent}", f"run={run.name}", "to=."])


def test_nothing_is_left_of_an_export_that_fails(make_run, tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(command, "save_file", full)
    with pytest.raises(UserError, match="the disk is full"):
        export(make_run(), tmp_path / "out" / "hf")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["too=x"], "unknown option 'too': did you mean 'to'?"),
        (["run"], "run needs a value: run=VALUE"),
        (["step=-3"], "step=-3: expected a whole number"),
        (["run=run"], "missing to=FOLDER, the folder for the model"),
        (["to=x"], "missing run=NAME, the run to export"),
        (["run=none", "to=x"], "there is no run 'none'"),
        (["run=run", "to=x", "dtype=fp16"], "unknown dtype 'fp16': did you mean 'bf16'?"),
        (["run=run", "to=x", "step=8"], "has no checkpoint of step 8: there are 7"),
    ],
)
def test_bad_input_is_refused_in_a_sentence(make_run, words, sentence, tmp_path, monkeypatch):
    run = make_run()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        main([f"runs={run.parent}", *words])
    assert sentence in str(caught.value)


def test_a_damaged_checkpoint_is_not_exported(make_run, tmp_path):
    run = make_run()
    (next(checkpoints(run / "checkpoints")) / "state.json").write_text("{}")
    with pytest.raises(UserError, match="is damaged"):
        export(run, tmp_path / "hf")


def test_help_names_every_option():
    printed = command.__doc__
    assert [name for name in command._DEFAULTS if f"{name}=" not in printed] == []


def test_the_configuration_is_in_the_words_of_transformers(make_run, tmp_path):
    run = make_run(n_kv_heads=1, rope_theta=500.0)
    export(run, tmp_path / "hf", dtype="bf16")
    actual = json.loads((tmp_path / "hf" / "config.json").read_text())
    expected = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 1}
    expected |= {"rope_theta": 500.0, "hidden_act": "silu", "torch_dtype": "bfloat16", "vocab_size": 384}
    assert actual.items() >= expected.items()
    assert actual["bos_token_id"] == actual["eos_token_id"] == 2
    assert actual["max_position_embeddings"] == yaml.safe_load((run / "config.yaml").read_text())["sequence_length"]
    assert "modeling_formula.py" not in {path.name for path in (tmp_path / "hf").iterdir()}
