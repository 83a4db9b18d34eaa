"""A run that starts from a Hugging Face folder has its weights and tokenizer; unsupported ones are refused by name."""

from __future__ import annotations

import json
import runpy
import shlex
import shutil
import sys

import pytest
import tokenizers
import torch
from safetensors.torch import load_file, save_file

from conf.load import from_yaml, load
from conf.shape import shape_of
from data.tokenizer import load_tokenizer
from kernels.common.errors import UserError
from model import export as export_command
from model.export import export
from model.generate import load_run
from model.huggingface.config import key_of
from model.import_hf import main
from tests.model.conftest import ARMS
from tests.selection import quick

LEARNED = {"init": 0.25, "share": "channel"}
PLAIN = {"rope_parameters": {"rope_type": "default", "rope_theta": 30.0}}  # Apertus' own are llama3
OTHERS = {
    "tied": {"tie_embeddings": True},
    "qk_norm": {"arm": "relu2", "qk_norm": True},
    "qk_norm, gated": {"qk_norm": True, "tie_embeddings": True},
    "qk_norm, of a formula": {"arm": "swish", "qk_norm": True},
    "xielu of Apertus": {"arm": "xielu", "qk_norm": True},
    "heads that do not divide d_model": {"d_model": 33, "head_dim": 8},
    "one key head": {"n_kv_heads": 1, "rope_theta": 77.0, "norm_eps": 0.01},
    "one width for all layers": {"ffn": {"per_layer": {0: "relu2", "last": "swish"}}, "n_layers": 3, "d_ff": 40},
    "layers that differ": {
        "ffn": {"per_layer": {0: "xielu", 1: {"formula": "up*sin(k*gate)", "parameters": {"k": LEARNED}}}},
        "n_layers": 3,
    },
    "a value a group": {
        "ffn": {"formula": "sin(k*gate)*up", "parameters": {"k": {"init": 0.25, "share": "group", "groups": 4}}}
    },
    "nobody has named it": {
        "ffn": {"formula": "where(x > 0, x, c * x) * tanh(k*x)", "parameters": {"k": LEARNED, "c": 1e-05}}
    },
}


def begin(source, runs, *arguments: str):
    """Import a folder as the run `new`, and return the run's folder."""
    main([f"from={source}", "run=new", f"runs={runs}", "steps=5", "logger=none", *arguments])
    return runs / "new"


def arms_of(run):
    config = from_yaml(run / "config.yaml")
    return [(key_of(ffn.arm.formula, ffn.arm.parameters), ffn.d_ff) for ffn in shape_of(config).ffn]


def assert_same(before, after) -> None:
    (ours, tokenizer, _), (actual, tokenizer_found, state) = load_run(before), load_run(after)
    for (name, expected), (other, parameter) in zip(ours.named_parameters(), actual.named_parameters(), strict=True):
        assert name == other
        assert torch.equal(parameter, expected), name
    assert tokenizer_found.hash == state["tokenizer_hash"] == tokenizer.hash
    assert arms_of(after) == arms_of(before)
    tokens = torch.arange(40).view(1, 40)
    with torch.inference_mode():
        assert torch.equal(ours(tokens), actual(tokens))  # what is no weight is the same too: rope_theta, norm_eps


# What else is UNLIKE comes back in another decoder: xielu, relu2, swiglu and a swish below.
@pytest.mark.parametrize("arm", quick(ARMS, "maxout", "prelu", "swiglu_clamped"))
def test_every_arm_comes_back_bit_for_bit(make_run, arm, tmp_path):
    run = make_run(arm)
    export(run, tmp_path / "hf")
    new = begin(tmp_path / "hf", tmp_path / "imported")
    assert_same(run, new)
    assert from_yaml(new / "config.yaml").ffn == from_yaml(run / "config.yaml").ffn


@pytest.mark.parametrize("case", OTHERS)
def test_every_kind_of_decoder_comes_back_bit_for_bit(make_run, case, tmp_path, monkeypatch):
    monkeypatch.setattr(export_command, "_SHARD_BYTES", 20_000)
    run = make_run(**OTHERS[case])
    export(run, tmp_path / "hf")
    assert_same(run, begin(tmp_path / "hf", tmp_path / "imported"))


def test_a_tokenizer_of_hugging_face_comes_back(make_run, tmp_path):
    run = make_run()
    (run / "tokenizer" / "tokenizer.model").unlink()
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={"</s>": 0, "a": 1, "b": 2}, merges=[]))
    made.save(str(run / "tokenizer" / "tokenizer.json"))
    export(run, tmp_path / "hf")
    new = begin(tmp_path / "hf", tmp_path / "imported")
    assert_same(run, new)
    actual = from_yaml(new / "config.yaml").tokenizer
    assert (actual.kind, actual.path) == ("huggingface", str(new / "tokenizer" / "tokenizer.json"))


def test_the_end_and_the_begin_of_a_foreign_folder_are_those_of_its_files(foreign, transformers, tmp_path):
    """Two ends are in the vocabulary: the configurations, and not the first name that is known, say which it is."""
    _, folder = foreign(eos_token_id=2, bos_token_id=3)
    names = ["</s>", "<unk>", "<|endoftext|>", "<|start|>"]
    vocabulary = {name: i for i, name in enumerate(names)} | {chr(ord("!") + i): i for i in range(4, 90)}
    tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[])).save(str(folder / "tokenizer.json"))
    new = begin(folder, tmp_path / "runs")
    _, tokenizer, _ = load_run(new)
    assert (tokenizer.eos_id, tokenizer.bos_id) == (2, 3)
    export(new, tmp_path / "again")
    for name in ("config.json", "generation_config.json"):
        content = json.loads((tmp_path / "again" / name).read_text())
        assert (content["eos_token_id"], content["bos_token_id"]) == (2, 3)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "again")("&").input_ids == [3, vocabulary["&"]]
    main([f"from={tmp_path / 'again'}", "run=twice", f"runs={tmp_path / 'runs'}", "steps=5", "logger=none"])
    assert load_run(tmp_path / "runs" / "twice")[1].hash == tokenizer.hash


def test_the_run_is_complete_and_its_command_goes_on(make_run, tmp_path, capsys):
    export(make_run("swish"), tmp_path / "hf")
    new = begin(tmp_path / "hf", tmp_path / "imported", "optim.lr=0.01", "model.z_loss=1e-4", "model=llama_60m")
    printed = capsys.readouterr().out.splitlines()
    first, program, *arguments = shlex.split(printed[-1])
    assert (first, program) == ("deepspeed", "train.py")
    assert load(arguments) == from_yaml(new / "config.yaml")
    config = from_yaml(new / "config.yaml")
    assert (config.optim.lr, config.model.z_loss, config.model.d_model) == (0.01, 1e-4, 32)
    (line,) = (new / "metrics.jsonl").read_text().splitlines()
    expected = {"kind": "event", "step": 0, "tokens": 0, "event": "imported", "from": str(tmp_path / "hf")}
    assert json.loads(line) == expected
    assert [path.name for path in (new / "checkpoints").iterdir()] == ["step_00000000"]
    state = load_run(new)[2]
    assert (state["step"], state["optimizer_steps"], state["corpus_hash"]) == (0, 0, None)
    assert load_tokenizer(new / "tokenizer").exact


def test_a_head_that_is_stored_although_it_is_tied_may_be_the_embedding(make_run, tmp_path, capsys):
    run = make_run(tie_embeddings=True)
    export(run, tmp_path / "hf")
    _edit(tmp_path / "hf", lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert_same(run, begin(tmp_path / "hf", tmp_path / "imported"))
    assert "untied" not in capsys.readouterr().err


@pytest.mark.parametrize("arm", ["swiglu", "swish"])
def test_a_head_of_its_own_in_a_tied_folder_is_kept(transformers, make_run, arm, tokens, tmp_path, capsys):
    export(make_run(arm, tie_embeddings=True), tmp_path / "hf")
    _edit(tmp_path / "hf", lambda t: t.update({"lm_head.weight": torch.randn(384, 32)}))
    new = begin(tmp_path / "hf", tmp_path / "imported")
    assert from_yaml(new / "config.yaml").model.tie_embeddings is False
    sentence = (
        "config.json has tie_word_embeddings=true, and lm_head.weight beside it is another matrix: imported untied"
    )
    assert sentence in capsys.readouterr().err
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=True).eval()
    with torch.inference_mode():
        expected, actual = theirs(tokens).logits, load_run(new)[0](tokens)
    assert (actual - expected).abs().max() < 1e-5 * expected.abs().max()


# ---- folders that Transformers made


@pytest.fixture
def foreign(transformers, tmp_path):
    """The function that lets Transformers make a folder: (its model, the folder)."""

    def make(family: str = "Llama", shards: str = "5GB", **settings):
        sizes = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 2}
        sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 0, "eos_token_id": 0}
        config = getattr(transformers, f"{family}Config")(**(sizes | settings))
        model = getattr(transformers, f"{family}ForCausalLM")(config).eval().float()  # xielu makes its numbers in bf16
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter += 0.2 * torch.rand(parameter.shape) * ("norm" in name or "act_fn" in name)
        folder = tmp_path / "foreign"
        model.save_pretrained(folder, max_shard_size=shards)
        vocabulary = {"<|end_of_text|>": 0} | {chr(ord("!") + i): i for i in range(1, 90)}
        tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[])).save(str(folder / "tokenizer.json"))
        return model, folder

    return make


@pytest.mark.parametrize(
    ("family", "settings", "formula"),
    [
        ("Llama", {}, "silu(gate) * up"),
        ("Llama", {"tie_word_embeddings": True, "num_key_value_heads": 4}, "silu(gate) * up"),
        ("Llama", {"shards": "20KB", "rms_norm_eps": 0.1, "head_dim": 6}, "silu(gate) * up"),
        ("Llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 20.0}}, "silu(gate) * up"),
        ("Llama", {"hidden_act": "relu2"}, "relu(gate) ** 2 * up"),
        ("Llama", {"hidden_act": "quick_gelu"}, "(gate * sigmoid(1.702 * gate)) * up"),
        ("Llama", {"hidden_act": "linear"}, "gate * up"),
        ("Llama", {"hidden_act": "prelu"}, "where(gate > 0, gate, slope * gate) * up"),
        ("Arcee", {}, "relu(x) ** 2"),
        ("Arcee", {"hidden_act": "prelu"}, "where(x > 0, x, slope * x)"),
        ("Arcee", {"hidden_act": "hardswish"}, "x * clip(x + 3, 0, 6) / 6"),
        ("Arcee", {"hidden_act": "xielu"}, None),
        ("Arcee", {"hidden_act": "gelu_new"}, "gelu_tanh(x)"),
        ("Qwen3", {"head_dim": 8, "rms_norm_eps": 0.1}, "silu(gate) * up"),
        ("Qwen3", {"head_dim": 12, "tie_word_embeddings": True, "hidden_act": "gelu"}, "gelu(gate) * up"),
        ("Apertus", PLAIN, None),
        ("Apertus", PLAIN | {"hidden_act": "relu2"}, "relu(x) ** 2"),
    ],
)
def test_a_folder_of_transformers_gives_its_logits(foreign, family, settings, formula, tmp_path):
    model, folder = foreign(family, **settings)
    new = begin(folder, tmp_path / "runs")
    ours, _, _ = load_run(new)
    tokens = torch.randint(128, (2, 21))
    with torch.inference_mode():
        expected, actual = model(tokens).logits, ours(tokens)
    # fp32 sums in another order, as in test_export.py.
    assert (actual - expected).abs().max() < 1e-5 * expected.abs().max()
    if formula:
        assert from_yaml(new / "config.yaml").ffn.formula == formula


# ---- refusals


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            {"model_type": "gemma"},
            "unknown model_type in FOLDER/config.json: 'gemma': choose from apertus, arcee, formula_ffn, llama, qwen3",
        ),
        ({"model_type": "apertus", "rope_parameters": None}, "FOLDER/config.json has rope_parameters of type 'llama3'"),
        ({"model_type": "qwen3", "use_sliding_window": True}, "FOLDER/config.json has layers of sliding_attention"),
        (
            {"layer_types": ["full_attention", "sliding_attention"]},
            "has layers of sliding_attention: only full_attention",
        ),
        ({"hidden_act": "gelu_nwe"}, "unknown hidden_act in FOLDER/config.json: 'gelu_nwe': did you mean 'gelu_new'?"),
        ({"hidden_act": ["silu"]}, "unknown hidden_act"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "FOLDER/config.json has rope_parameters of type 'llama3'"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "FOLDER/config.json has rope_scaling of type 'linear'"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
        ({"rope_theta": "big"}, "FOLDER/config.json has rope_theta='big': expected a number"),
        ({"attention_bias": True}, "FOLDER/config.json has attention_bias=True: biases are not supported"),
        ({"mlp_bias": True}, "FOLDER/config.json has mlp_bias=True"),
        ({"quantization_config": {"bits": 4}}, "has a quantization_config"),
        ({"hidden_size": None}, "FOLDER/config.json has no hidden_size"),
        ({"num_hidden_layers": 2.5}, "FOLDER/config.json has num_hidden_layers=2.5: expected a whole number above 0"),
        ({"vocab_size": 90}, "has a tokenizer of 350 pieces, and vocab_size 90 in config.json"),
        ({"vocab_size": 448}, "model.embed_tokens.weight is (384, 32) where (448, 32) is expected"),
        ({"intermediate_size": 40}, "model.layers.0.mlp.gate_proj.weight is (48, 32) where (40, 32) is expected"),
        ({"num_hidden_layers": 3}, "it holds no tensor model.layers.2.input_layernorm.weight"),
        (
            {"num_hidden_layers": 1},
            "holds model.layers.1.input_layernorm.weight, which is no tensor of this decoder",
        ),
        ({"model_type": ["llama"]}, "unknown model_type in FOLDER/config.json: \"['llama']\""),
        ({"layer_types": 5}, "FOLDER/config.json has layer_types=5: expected a list of names"),
        ({"layer_types": [["x"]]}, "FOLDER/config.json has layer_types=[['x']]: expected a list of names"),
        ({"num_key_value_heads": 3}, "model.n_kv_heads=3 does not divide model.n_heads=4"),
        ({"model_type": "formula_ffn"}, "needs in ffn a list of 2 layers, each with formula, parameters and d_ff"),
        (
            {"model_type": "formula_ffn", "ffn": [{"formula": "y"}] * 2},
            "has an invalid formula in ffn[0]: unknown symbol",
        ),
        ({"model_type": "formula_ffn", "ffn": [{"formula": 3}] * 2}, "has no formula in ffn[0]"),
        (
            {"model_type": "formula_ffn", "ffn": [{"formula": "relu(x)", "d_ff": n} for n in (48, 50)]},
            "has layers of the widths 48, 50",
        ),
    ],
)
def test_a_configuration_that_ours_cannot_hold_is_refused(make_run, change, sentence, tmp_path):
    folder = tmp_path / "hf"
    export(make_run(), folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError) as caught:
        begin(folder, tmp_path / "imported")
    assert sentence.replace("FOLDER", str(folder)) in str(caught.value)
    assert not (tmp_path / "imported").exists()


def _without(folder, *names: str) -> None:
    for name in names:
        (folder / name).unlink()


def _edit(folder, edit) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


DAMAGES = {
    "no weights": (lambda f: _without(f, "model.safetensors"), "holds no model.safetensors and no"),
    "a pickle": (
        lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
        "(pickles such as pytorch_model.bin are not supported)",
    ),
    "a missing shard": (
        lambda f: (
            (f / "model.safetensors").rename(f / "model-2.safetensors")
            and (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-1.safetensors"}}')
        ),
        "its index names model-1.safetensors, which is missing",
    ),
    "half a file": (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-9]),
        "is not a valid safetensors file",
    ),
    "no configuration": (lambda f: _without(f, "config.json"), "config.json: No such file or directory"),
    "no JSON": (lambda f: (f / "config.json").write_text("{"), "config.json is not valid JSON"),
    "no object": (lambda f: (f / "config.json").write_text("[]"), "config.json does not hold a JSON object"),
    "no tokenizer": (
        lambda f: _without(f, "tokenizer.json", "tokenizer.model"),
        "holds no tokenizer: neither tokenizer.json nor tokenizer.model",
    ),
    "a missing tensor": (
        lambda f: _edit(f, lambda t: t.pop("model.layers.1.self_attn.v_proj.weight")),
        "is incomplete: it holds no tensor model.layers.1.self_attn.v_proj.weight",
    ),
    "a bias": (
        lambda f: _edit(f, lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(32)})),
        "holds model.layers.0.self_attn.q_proj.bias, which is no tensor",
    ),
    "another shape": (
        lambda f: _edit(f, lambda t: t.update({"model.norm.weight": torch.ones(31)})),
        "model.norm.weight is (31,) where (32,) is expected",
    ),
    "a NaN": (
        lambda f: _edit(f, lambda t: t["model.norm.weight"].__setitem__(3, float("nan"))),
        "is damaged: model.norm.weight holds NaN",
    ),
    "an infinity": (
        lambda f: _edit(f, lambda t: t["lm_head.weight"][5].__setitem__(0, float("inf"))),
        "is damaged: lm_head.weight holds an infinity",
    ),
    "no folder": (shutil.rmtree, "there is no folder"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_folder_that_is_incomplete_is_refused(make_run, damage, tmp_path):
    folder = tmp_path / "hf"
    export(make_run(), folder)
    break_it, sentence = DAMAGES[damage]
    break_it(folder)
    with pytest.raises(UserError) as caught:
        begin(folder, tmp_path / "imported")
    assert sentence in str(caught.value)
    assert not list((tmp_path / "imported").glob("*"))


def test_one_file_counts_beside_the_index_of_shards_that_it_replaced(make_run, tmp_path):
    """As in Transformers, whose `save_pretrained` leaves the index behind."""
    export(make_run(), tmp_path / "hf")
    expected = arms_of(begin(tmp_path / "hf", tmp_path / "plain"))
    (tmp_path / "hf" / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-1.safetensors"}}')
    assert arms_of(begin(tmp_path / "hf", tmp_path / "beside")) == expected


@pytest.mark.parametrize("weight_map", [["a"], {"a": 3}, None])
def test_an_index_that_maps_nothing_to_files_is_refused(make_run, weight_map, tmp_path):
    export(make_run(), tmp_path / "hf")
    (tmp_path / "hf" / "model.safetensors").unlink()
    (tmp_path / "hf" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(UserError, match=r"index\.json has no weight_map from the names of tensors to those of files"):
        begin(tmp_path / "hf", tmp_path / "imported")


def test_a_run_that_exists_is_left_alone(make_run, tmp_path):
    export(make_run(), tmp_path / "hf")
    new = begin(tmp_path / "hf", tmp_path / "imported")
    before = (new / "metrics.jsonl").read_text()
    with pytest.raises(UserError, match="exists: choose another name for this run"):
        begin(tmp_path / "hf", tmp_path / "imported")
    assert (new / "metrics.jsonl").read_text() == before


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["run=x"], "missing from=FOLDER, the folder of the model"),
        (["from=hf"], "give the new run a name: run=NAME"),
        (["from=hf", "run=x", "ffn=relu2"], "ffn is determined by hf: leave it out"),
        (["from=hf", "run=x", "model.d_ff=64"], "model.d_ff is determined by hf: leave it out"),
        (["from=hf", "run=x", "tokenizer.vocab_size=64"], "tokenizer.vocab_size is determined by hf"),
        (["from=hf", "run=x", "optim.lrr=1"], "unknown key 'optim.lrr'"),
        (["from=hf", "run=x/y"], "run='x/y' cannot name a folder"),
    ],
)
def test_bad_input_is_refused_in_a_sentence(make_run, arguments, sentence, tmp_path, monkeypatch):
    export(make_run(), tmp_path / "hf")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        main(arguments)
    assert sentence in str(caught.value)


def test_help_lists_the_arguments():
    printed = sys.modules["model.import_hf"].__doc__ or ""
    assert all(word in printed for word in ("from=FOLDER", "run=NAME", "runs=FOLDER"))


def test_the_old_name_of_the_command_is_an_alias_that_prints_a_deprecation(in_process):
    result = in_process(lambda _: runpy.run_module("model.load", run_name="__main__"), "run=x")
    warning, error = result.err.splitlines()
    assert warning == "warning: `python -m model.load` is now called `python -m model.import_hf`"
    assert (result.status, error) == (2, "error: missing from=FOLDER, the folder of the model")
