"""Models of Transformers with fused feed-forward layers: results, what is kept, what is refused, and how they compose."""

from __future__ import annotations

import copy
import functools
import io
import pickle
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

import torch
import torch.multiprocessing
import torch.nn.functional as F
from torch import Tensor, nn
from two_ranks import RANK_KINDS, expected_on_ranks, on_a_rank

from bench import tiny_models
from bench.tiny_models import MODELS, error, in_three_ways, kept_bytes, logits_and_gradients, mlps, tokens
from kernels import FormulaError
from kernels.huggingface import Patched, PatchError, patch, unpatch
from kernels.huggingface.layers import formula_of


def tiny(name: str, **settings: Any) -> nn.Module:
    if name not in MODELS:
        pytest.skip(f"this version of Transformers has no {name}")
    return tiny_models.tiny(name, **settings)


RATIO = 1.1  # of two errors that are drawn from one distribution, each a norm over thousands of elements
GATED = ["Llama", "Mistral", "Qwen2", "Qwen3", "Gemma 2", "Gemma 3", "Phi-3", "OLMo-2", "GLM-4"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_logits_and_gradients_are_within_the_models_own_rounding(name, dtype):
    exact, unpatched, patched = in_three_ways(name, dtype)
    assert exact.keys() == unpatched.keys() == patched.keys()
    mlp = [key for key in exact if ".mlp." in key and exact[key].numel() > 1]
    for names in (["logits"], mlp, [key for key in exact if key not in mlp and exact[key].numel() > 1]):
        assert error(patched, exact, names) <= RATIO * error(unpatched, exact, names), names


@pytest.mark.parametrize("name", MODELS)
def test_parameters_stay_as_they_are(name):
    model = tiny(name)
    before = {key: value.data_ptr() for key, value in model.state_dict().items()}
    parameters = [parameter for _, parameter in model.named_parameters()]
    plain = model(tokens()).logits
    done = patch(model)
    assert len(done) == len(done.layers) == 2
    assert str(done).startswith("2 feed-forward layers: ")
    assert not done.by_modules
    assert {key: value.data_ptr() for key, value in model.state_dict().items()} == before
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert all(isinstance(step, torch.autograd.function.BackwardCFunction) for step in fused_steps(model))
    assert unpatch(model) == 2
    assert torch.equal(model(tokens()).logits, plain)
    assert unpatch(model) == 0


def fused_steps(model: nn.Module) -> list[Any]:
    width = model.config.hidden_size
    results = [layer(torch.randn(3, width)).grad_fn for layer in mlps(model)]
    assert len(results) == 2
    return [step.next_functions[0][0] if step.name().startswith("View") else step for step in results]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("name", "units"), [("Llama", 2), ("Gemma 3", 2), ("Phi-3", 2), ("Arcee", 1), ("Apertus", 1)])
def test_it_keeps_the_pre_activations_and_at_most_six_tenths(name, units, dtype):
    model, x = tiny(name).to(dtype), torch.randn(512, 64, dtype=dtype, requires_grad=True)
    before = kept_bytes(mlps(model)[0], x)
    patch(model)
    after = kept_bytes(mlps(model)[0], x)
    assert after[0] == units * 512 * 160 * dtype.itemsize
    if name in GATED:
        assert all(a <= 0.6 * b for a, b in zip(after, before, strict=True))


# ------------------------------------------------------------------------------------------------------------- other formulas


def test_a_formula_of_ones_own():
    model, x = tiny("Llama"), torch.randn(5, 64)
    assert str(patch(model, "relu(gate)**2 * up")) == "2 feed-forward layers: relu(gate)**2 * up"
    layer = mlps(model)[0]
    torch.testing.assert_close(layer(x), layer.down_proj(F.relu(layer.gate_proj(x)) ** 2 * layer.up_proj(x)))
    assert str(patch(model)) == "2 feed-forward layers: silu(gate) * up"  # patched anew, with its own
    torch.testing.assert_close(layer(x), layer.down_proj(F.silu(layer.gate_proj(x)) * layer.up_proj(x)))
    with pytest.raises(PatchError, match=r"MLP: it is gated, so a formula for it is of gate and up, not 'relu\(x\)'"):
        patch(model, "relu(x)")
    with pytest.raises(PatchError, match="it is not gated, so a formula for it is of x"):
        patch(tiny("Arcee"), "silu(gate) * up")
    with pytest.raises(FormulaError):
        patch(model, "gate / up")
    torch.testing.assert_close(layer(x), layer.down_proj(F.silu(layer.gate_proj(x)) * layer.up_proj(x)))


@pytest.mark.parametrize(
    ("name", "formula"), [("Phi-3", "gate * sigmoid(b * gate) * up"), ("Arcee", "x * sigmoid(b * x)")]
)
def test_learned_parameters_of_a_given_formula(name, formula):
    model = tiny(name)
    names = list(model.state_dict())
    patch(model, formula, {"b": {"init": 1.5, "share": "channel"}})
    added = [name for name in model.state_dict() if name not in names]
    assert added == [f"model.layers.{n}.mlp.formula_parameters.b" for n in range(2)]
    logits_and_gradients(model, model, tokens())
    for layer in mlps(model):
        assert layer.formula_parameters["b"].shape == (160,)
        assert layer.formula_parameters["b"].grad.abs().min() > 0
    unpatch(model)
    assert list(model.state_dict()) == names


def test_learned_parameters_of_xielu_are_the_layers_own():
    model = tiny("Apertus")
    patch(model)
    before = model(tokens()).logits
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    logits_and_gradients(model, model, tokens())
    for layer in mlps(model):
        assert layer.act_fn.alpha_p.grad.abs() > 0
        assert layer.act_fn.alpha_n.grad.abs() > 0
    optimizer.step()
    after = model(tokens()).logits
    assert not torch.equal(before, after)
    unpatch(model)
    torch.testing.assert_close(model(tokens()).logits, after)


ACTIVATIONS = (
    "silu swish gelu gelu_new gelu_fast gelu_pytorch_tanh gelu_python gelu_10 quick_gelu relu relu2 relu6 mish laplace"
)
ACTIVATIONS += " laplace leaky_relu sigmoid tanh linear hardswish prelu"


@pytest.mark.parametrize("name", ACTIVATIONS.split())
def test_activations_that_are_known(name):
    if name not in pytest.importorskip("transformers").activations.ACT2FN:
        pytest.skip(f"this version of Transformers has no {name}")
    model = tiny("Llama", hidden_act=name)
    before = model(tokens()).logits
    patch(model)
    torch.testing.assert_close(model(tokens()).logits, before)


@pytest.mark.parametrize(
    "function", [F.silu, torch.tanh, functools.partial(F.gelu, approximate="tanh"), nn.GELU("tanh")]
)
def test_activations_that_are_functions(function):
    assert formula_of(function) is not None
    model = tiny("Arcee")
    for layer in mlps(model):
        layer.act_fn = None
        del layer.act_fn
        layer.act_fn = function
    before = model(tokens()).logits
    patch(model)
    torch.testing.assert_close(model(tokens()).logits, before)


def test_an_activation_that_is_assigned_later_counts_from_the_next_patch_on():
    model = tiny("Arcee")
    patch(model)
    before = model(tokens()).logits
    for layer in mlps(model):
        layer.act_fn = nn.Tanh()
    assert torch.equal(model(tokens()).logits, before)
    assert str(patch(model)).endswith(": tanh(x)")
    assert not torch.allclose(model(tokens()).logits, before)


# ----------------------------------------------------------------------------------------------------------------- refusals


class Clipped(nn.Module):
    """Names like a Llama layer's, and another forward."""

    def __init__(self, act: Any = None) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 8)
        self.act_fn = act or nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj((self.act_fn(self.gate_proj(x)) * self.up_proj(x)).clamp(max=1.0))


class DroppedOut(Clipped):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x)), 0.1, self.training)


class UpFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj, self.act_fn = nn.Linear(8, 32), nn.Linear(16, 8), nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        up, gate = self.gate_up_proj(x).chunk(2, -1)
        return self.down_proj(self.act_fn(gate) * up)


class Renamed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 8)


class NamedMLP(Renamed):
    pass


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj = nn.Parameter(torch.zeros(2, 8, 4)), nn.Parameter(torch.zeros(2, 4, 4))


def misnamed() -> nn.Module:
    """A class with the name of a known activation that computes another."""
    return Clipped(type("SiLU", (nn.Module,), {"forward": lambda _, x: torch.tanh(x)})())


class Llamalike(Clipped):
    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def replaced() -> nn.Module:
    layer = Llamalike()
    layer.forward = lambda x: x
    return layer


def sliced() -> nn.Module:
    layer = Llamalike()
    layer.config = type("Config", (), {"pretraining_tp": 2})()
    return layer


REFUSALS = {
    "another forward": (Clipped, r"Clipped: its forward differs from 'silu\(gate\) \* up'"),
    "dropout": (DroppedOut, "DroppedOut: its forward is not the same twice"),
    "up before gate": (UpFirst, "UpFirst: its forward differs"),
    "a name that lies": (misnamed, "Clipped: its forward differs"),
    "an unknown activation": (lambda: Clipped(nn.Softsign()), "Clipped: its activation, Softsign, is not known"),
    "unknown names": (NamedMLP, r"NamedMLP: its projections have names that are not known \(children: first, second\)"),
    "experts": (Experts, r"Experts: its experts are one tensor \(gate_up_proj, down_proj\)"),
    "a forward of another's": (replaced, "Llamalike: its forward was already replaced"),
    "sliced products": (sliced, "Llamalike: config.pretraining_tp > 1"),
}


@pytest.mark.parametrize("kind", REFUSALS)
def test_refusals_name_the_layer_and_the_reason(kind):
    make, message = REFUSALS[kind]
    model = nn.ModuleDict({"known": Llamalike(), "odd": make(), "other": make()})
    with pytest.raises(PatchError, match=f"not fused: odd and 1 more, a {message}"):
        patch(model)
    assert unpatch(model) == 0  # the model is unchanged
    done = patch(model, strict=False)
    assert list(done.layers) == ["known"]
    assert list(done.skipped) == ["odd", "other"]
    assert "; not taken: odd and 1 more, a " in str(done)


def test_a_model_without_feed_forward_layers():
    with pytest.raises(PatchError, match="Renamed has no feed-forward layer that is known: one has gate_proj"):
        patch(Renamed())


@pytest.mark.parametrize("kind", ["module", "number"])
def test_dropout_is_refused(kind):
    layer = Llamalike()
    if kind == "module":
        layer.dropout = nn.Dropout(0.1)
    else:
        layer.hidden_dropout = 0.1
    with pytest.raises(PatchError, match=r"it has dropout \((hidden_)?dropout = 0.1\)"):
        patch(layer)


def test_decoder_layers_that_hold_the_projections_themselves():
    transformers = pytest.importorskip("transformers")
    config = transformers.OPTConfig(
        hidden_size=64, ffn_dim=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=128, word_embed_proj_dim=64
    )
    with pytest.raises(PatchError, match="a OPTDecoderLayer: it has a child that a feed-forward layer does not have"):
        patch(transformers.OPTForCausalLM(config))


def test_experts_of_mixtral():
    transformers = pytest.importorskip("transformers")
    config = transformers.MixtralConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=128, num_local_experts=2,
    )  # fmt: skip
    model = transformers.MixtralForCausalLM(config)
    if any(type(module).__name__ == "MixtralExperts" for module in model.modules()):
        with pytest.raises(PatchError, match="MixtralExperts: its experts are one tensor"):
            patch(model)
    else:  # Transformers before 5, where an expert is a module
        assert len(patch(model)) == 4


# -------------------------------------------------------------------------------------------------------------- composition


def assert_equal(results: dict[str, Tensor], expected: dict[str, Tensor], ulp: float = 64.0) -> None:
    """Sums in another order, through the whole depth: some roundings of fp32 at the size of the largest element."""
    assert results.keys() == expected.keys()
    for name, value in expected.items():
        if value.numel() == 1 and ulp:
            continue  # the terms of a parameter per layer cancel, to an error that has nothing to do with its size
        bound = ulp * torch.finfo(torch.float32).eps * float(value.abs().max())
        torch.testing.assert_close(results[name], value, rtol=0, atol=bound, msg=name)


def test_copies_are_patched_and_independent():
    model = tiny("Llama")
    patch(model)
    expected = model(tokens()).logits
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)):
        assert torch.equal(twin(tokens()).logits, expected)
        mlps(twin)[0].down_proj.weight.data.zero_()
        assert not torch.equal(twin(tokens()).logits, expected)
        assert unpatch(twin) == 2
    assert torch.equal(model(tokens()).logits, expected)


def test_hooks_fire():
    model = tiny("Apertus")
    patch(model)
    expected = logits_and_gradients(model, model, tokens())
    calls: list[str] = []
    for name in ("up_proj", "down_proj", "act_fn"):
        handle = getattr(mlps(model)[0], name).register_forward_hook(lambda *_, name=name: calls.append(name))
        assert_equal(logits_and_gradients(model, model, tokens()), expected)
        assert name in calls
        handle.remove()
        calls.clear()
    logits_and_gradients(model, model, tokens())
    assert not calls


def test_adapters_train():
    peft = pytest.importorskip("peft")
    model = tiny("Llama")
    config = peft.LoraConfig(r=4, target_modules=["gate_proj", "down_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config)
    unpatched = logits_and_gradients(adapted, adapted, tokens())
    done = patch(adapted)
    assert len(done.by_modules) == 2
    assert "in 2 of them only the activation is fused" in str(done)
    assert_equal(logits_and_gradients(adapted, adapted, tokens()), unpatched)
    assert any("lora_A" in name for name in unpatched)


def test_torch_compile():
    model = tiny("Llama", num_hidden_layers=1)
    patch(model)
    expected = logits_and_gradients(model, model, tokens())
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    assert_equal(logits_and_gradients(compiled, model, tokens()), expected)
    x = torch.randn(2, 5, 64)
    whole = torch.compile(mlps(model)[0], backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(whole(x), mlps(model)[0](x))


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant):
    model = tiny("Llama")
    patch(model)
    expected = logits_and_gradients(model, model, tokens())
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_equal(logits_and_gradients(model, model, tokens()), expected, ulp=0)


def test_functional_call():
    model = tiny("Phi-3")
    patch(model)
    doubled = {name: 2 * value.detach() for name, value in model.named_parameters() if ".mlp." in name}
    logits = torch.func.functional_call(model, doubled, (tokens(),)).logits
    for name, value in model.named_parameters():
        if name in doubled:
            value.data *= 2
    assert torch.equal(model(tokens()).logits, logits)


def test_generation():
    model = tiny("Qwen3").eval()
    model.generation_config.eos_token_id = None
    expected = model.generate(tokens(2, 4), max_new_tokens=8, do_sample=False)
    patch(model)
    assert torch.equal(model.generate(tokens(2, 4), max_new_tokens=8, do_sample=False), expected)


@pytest.mark.slow
def test_two_ranks(tmp_path: Path):
    torch.multiprocessing.spawn(on_a_rank, (str(tmp_path),), nprocs=2)
    for kind in RANK_KINDS:
        assert_equal(torch.load(tmp_path / kind), expected_on_ranks())


def test_nothing_is_done_to_a_patched_text():
    assert (
        str(Patched({"a": "silu(gate) * up", "b": "relu(x)"}))
        == "2 feed-forward layers: silu(gate) * up (1), relu(x) (1)"
    )
