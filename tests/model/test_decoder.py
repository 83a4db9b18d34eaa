"""The decoder against the same model of transformers, and what must hold of it: causality, documents, cache, recomputation."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import ArceeConfig, ArceeForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM
from transformers.models.arcee.modeling_arcee import ArceeRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from bench.huggingface import widths
from launch.estimate.counts import CHECKPOINTING
from model.decoder import Cache, Decoder

# What transformers calls the elementwise part of each arm.
HF_ACTIVATION = {
    "swiglu": "silu",
    "geglu": "gelu",
    "reglu": "relu",
    "glu": "sigmoid",
    "bilinear": "linear",
    "silu": "silu",
    "gelu": "gelu",
    "relu": "relu",
    "relu2": "relu2",
}


def same_in_transformers(decoder: Decoder, arm: str) -> torch.nn.Module:
    """Return the model of transformers with the decoder's weights: Llama, Arcee (ungated) or Qwen3 (QK-norm), in float64."""
    shape = decoder.shape
    gated = shape.ffn[0].matrices == 3
    kind = Qwen3ForCausalLM if shape.qk_norm else LlamaForCausalLM if gated else ArceeForCausalLM
    settings = {LlamaForCausalLM: LlamaConfig, ArceeForCausalLM: ArceeConfig, Qwen3ForCausalLM: Qwen3Config}[kind](
        **widths(shape),
        hidden_act=HF_ACTIVATION[arm],
        rms_norm_eps=decoder.norm.eps,
        rope_parameters={"rope_type": "default", "rope_theta": decoder.layers[0].attention.rotary.theta},
        attn_implementation="sdpa",
    )
    model = kind(settings).double()
    state = {"model.embed_tokens.weight": decoder.embedding.weight, "model.norm.weight": decoder.norm.weight}
    state["lm_head.weight"] = decoder.head.weight
    for i, layer in enumerate(decoder.layers):
        ours, theirs = layer.attention, f"model.layers.{i}"
        heads = [count * shape.head_dim for count in (shape.n_heads, shape.n_kv_heads, shape.n_kv_heads)]
        for name, part in zip("qkv", ours.qkv.split(heads), strict=True):
            state[f"{theirs}.self_attn.{name}_proj.weight"] = part
        state[f"{theirs}.self_attn.o_proj.weight"] = ours.out
        if shape.qk_norm:
            state[f"{theirs}.self_attn.q_norm.weight"] = ours.q_norm.weight
            state[f"{theirs}.self_attn.k_norm.weight"] = ours.k_norm.weight
        state[f"{theirs}.mlp.up_proj.weight"] = layer.ffn.up[1] if gated else layer.ffn.up
        if gated:
            state[f"{theirs}.mlp.gate_proj.weight"] = layer.ffn.up[0]
        state[f"{theirs}.mlp.down_proj.weight"] = layer.ffn.down
        state[f"{theirs}.input_layernorm.weight"] = layer.attention_norm.weight
        state[f"{theirs}.post_attention_layernorm.weight"] = layer.ffn_norm.weight
    model.load_state_dict({name: tensor.detach().double() for name, tensor in state.items()}, strict=True)
    return model.eval()


@pytest.fixture
def in_float64(monkeypatch):
    """transformers computes norms and rotary tables in fp32 whatever the model's dtype: do these two in float64."""

    def norm(self: torch.nn.Module, x: Tensor) -> Tensor:
        return self.weight * x / (x.square().mean(-1, keepdim=True) + self.variance_epsilon).sqrt()

    def tables(self: torch.nn.Module, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        theta, dim = self.config.rope_parameters["rope_theta"], self.config.head_dim
        angles = position_ids[..., None].double() / theta ** (torch.arange(0, dim, 2).double() / dim)
        angles = torch.cat((angles, angles), -1)
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)

    for kind in (LlamaRMSNorm, ArceeRMSNorm, Qwen3RMSNorm):
        monkeypatch.setattr(kind, "forward", norm)
    modules = {LlamaRotaryEmbedding.__module__, ArceeRMSNorm.__module__, Qwen3RMSNorm.__module__}
    for module in modules:
        family = module.rpartition("_")[2].capitalize()
        monkeypatch.setattr(f"{module}.{family}RotaryEmbedding.forward", tables)


SHAPES = {
    "grouped": {},
    "multi-head": {"n_kv_heads": 4},
    "one key head": {"n_kv_heads": 1},
    "tied": {"tie_embeddings": True},
    "wide heads": {"head_dim": 12},
    "theta and eps": {"rope_theta": 500.0, "norm_eps": 0.01},
}


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("backend", ["sdpa", "blocks"])
@pytest.mark.parametrize("shape", SHAPES)
def test_llama_in_float64(build, tokens, shape, backend):
    check_parity(build("swiglu", backend=backend, **SHAPES[shape]), "swiglu", tokens)


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("arm", HF_ACTIVATION)
def test_every_arm_that_transformers_has_in_float64(build, tokens, arm):
    check_parity(build(arm), arm, tokens)


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("backend", ["sdpa", "blocks"])
def test_qk_norm_in_float64(build, tokens, backend):
    check_parity(build("swiglu", backend=backend, qk_norm=True), "swiglu", tokens)


def check_parity(decoder: Decoder, arm: str, tokens: Tensor) -> None:
    """Logits, loss and gradients are those of transformers."""
    theirs = same_in_transformers(decoder, arm)
    expected = theirs(tokens).logits
    assert_equal_but_for_rounding(decoder(tokens), expected)
    objective, nats, _ = decoder(tokens[:, :-1], tokens[:, 1:])
    # The loss of transformers itself is computed in fp32.
    loss = F.cross_entropy(expected[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    assert_equal_but_for_rounding(nats, loss.to(nats.dtype))
    objective.backward()
    loss.backward()
    for ours, name in (
        (decoder.embedding.weight, "embed_tokens"),
        (decoder.layers[0].ffn.down, "layers.0.mlp.down_proj"),
    ):
        assert_equal_but_for_rounding(ours.grad, theirs.model.get_parameter(f"{name}.weight").grad)


def assert_equal_but_for_rounding(actual: Tensor, expected: Tensor) -> None:
    """A thousand roundings of the largest element: what two orders of summation in a small model may differ by."""
    scale = 1000 * torch.finfo(actual.dtype).eps * expected.detach().abs().max().item()
    torch.testing.assert_close(actual, expected, rtol=0, atol=scale)


@pytest.mark.parametrize("arm", ["swiglu", "relu2"])
@pytest.mark.parametrize("backend", ["sdpa", "blocks"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_errs_as_transformers_does(build, tokens, arm, dtype, backend):
    """Over four models: the error of a single one is a matter of luck."""
    our_error = their_error = 0.0
    for seed in range(4):
        decoder = build(arm, backend=backend, seed=seed)
        with torch.no_grad():
            exact, (_, exact_loss, _) = decoder(tokens), decoder(tokens[:, :-1], tokens[:, 1:])
            theirs = same_in_transformers(decoder, arm).to(dtype)(tokens).logits
            ours, (_, loss, _) = decoder.to(dtype)(tokens), decoder(tokens[:, :-1], tokens[:, 1:])
        # The rounded weights are part of either error.
        our_error += (ours - exact).square().sum().item()
        their_error += (theirs - exact).square().sum().item()
        # The gradient of a token's loss has a 1-norm of at most 2.
        assert abs(loss - exact_loss) <= 2 * (ours - exact).abs().max()
    assert our_error <= 1.2**2 * their_error


@pytest.mark.parametrize("backend", ["sdpa", "blocks"])
def test_no_token_sees_a_later_one(build, tokens, backend):
    decoder = build(backend=backend)
    before = decoder(tokens)
    for place in (1, 11, 22):
        changed = tokens.clone()
        changed[:, place:] = (changed[:, place:] + 7) % 64
        after = decoder(changed)
        assert torch.equal(before[:, :place], after[:, :place])
        assert not torch.isclose(before[:, place:], after[:, place:]).any()


@pytest.mark.parametrize("backend", ["sdpa", "blocks"])
def test_no_token_sees_another_document(build, tokens, backend):
    start, cut = 63, 9
    tokens = tokens % 63
    tokens[:, cut] = start
    decoder = build(backend=backend, document_start=start)
    logits = decoder(tokens)
    changed = tokens.clone()
    changed[:, :cut] = (changed[:, :cut] + 7) % 63
    assert torch.equal(decoder(changed)[:, cut:], logits[:, cut:])
    assert not torch.isclose(decoder(changed)[:, :cut], logits[:, :cut]).any()
    # Alone, a document has the same logits: rotary positions are relative.
    assert_equal_but_for_rounding(decoder(tokens[:, cut:]), logits[:, cut:])
    # Without the mask it does not.
    free = build(backend=backend)
    assert not torch.isclose(free(changed)[:, cut:], free(tokens)[:, cut:]).any()


def test_every_document_of_a_batch_is_masked_by_its_own_row(build, tokens):
    decoder = build(backend="blocks", document_start=63)
    tokens = tokens % 63
    tokens[0, 5], tokens[1, 13], tokens[1, 17] = 63, 63, 63
    logits = decoder(tokens)
    for row in range(2):
        assert_equal_but_for_rounding(decoder(tokens[row : row + 1]), logits[row : row + 1])


@pytest.mark.parametrize("model", [{}, {"qk_norm": True}, {"tie_embeddings": True, "n_kv_heads": 1}], ids=str)
@pytest.mark.parametrize("pieces", [[23], [1] * 23, [5, 1, 1, 9, 7]], ids=["at once", "one by one", "in pieces"])
def test_a_cache_gives_what_a_full_computation_gives(build, tokens, model, pieces):
    decoder = build("geglu", backend="blocks", **model).eval()
    cache = Cache(2)
    with torch.no_grad():
        actual = torch.cat([decoder(piece, None, cache) for piece in tokens.split(pieces, 1)], 1)
        expected = decoder(tokens)
    assert_equal_but_for_rounding(actual, expected)
    assert [keys.shape[1] for keys, _ in cache.layers] == [23, 23]


def test_recomputing_a_layer_changes_nothing_but_the_memory(build, tokens, monkeypatch):
    calls = []
    losses, gradients = [], []
    for recompute in CHECKPOINTING:
        decoder = build("geglu", activation_checkpointing=recompute, qk_norm=True, z_loss=1e-3)
        forward = decoder.layers[0].ffn.forward
        monkeypatch.setattr(
            decoder.layers[0].ffn, "forward", lambda x, *a, f=forward: calls.append(x.shape) or f(x, *a)
        )
        loss, *_ = decoder(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        losses.append(loss)
        gradients.append([parameter.grad for parameter in decoder.parameters()])
        assert len(calls) == (2 if recompute is True else 1)
        calls.clear()
    assert all(torch.equal(losses[0], loss) for loss in losses)
    for other in gradients[1:]:
        assert all(torch.equal(one, two) for one, two in zip(gradients[0], other, strict=True))
    decoder.eval()(tokens[:, :-1], tokens[:, 1:])
    assert len(calls) == 1


def test_recomputing_keeps_one_tensor_a_layer(build, tokens):
    """The stream and what is to be added to it would be two."""
    kept = []
    for n_layers in (2, 5):
        decoder = build(activation_checkpointing=True, n_layers=n_layers)
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
            decoder(tokens[:, :-1], tokens[:, 1:])
        states = {x.data_ptr() for x in kept if x.shape == (2, 22, 32)}
        kept.clear()
        # Beside the layers' inputs: what the last norm read, and the gradient that the head has computed.
        assert len(states) == n_layers + 2


def test_every_parameter_gets_a_gradient(build, tokens, arm):
    decoder = build(arm, qk_norm=True)
    decoder(tokens[:, :-1], tokens[:, 1:])[0].backward()
    flat = [name for name, parameter in decoder.named_parameters() if not parameter.grad.abs().max() > 0]
    behind_a_step = [f"layers.{i}.{name}" for i in range(2) for name in ("ffn_norm.weight", "ffn.up")]
    assert sorted(flat) == (sorted(behind_a_step) if arm == "threshold" else [])


def test_a_soft_cap_bounds_logits_and_the_loss_follows(build, tokens):
    inputs, targets = tokens[:, :-1], tokens[:, 1:].clone()
    cap = 0.5
    expected = cap * torch.tanh(build()(inputs) / cap)
    capped = build(logit_softcap=cap)
    assert_equal_but_for_rounding(capped(inputs), expected)
    assert expected.abs().max() > 0.9 * cap  # it is reached
    nats = F.cross_entropy(expected.flatten(0, 1), targets.flatten())
    actual = capped(inputs, targets)[1]
    assert_equal_but_for_rounding(actual, nats.to(actual.dtype))


def test_the_objective_adds_z_loss_and_the_nats_do_not(build, tokens):
    inputs, targets = tokens[:, :-1], tokens[:, 1:].clone()
    targets[0, 3:9] = -100
    kept = targets.flatten() != -100
    logits = build()(inputs).flatten(0, 1)[kept]
    nats = F.cross_entropy(logits, targets.flatten()[kept])
    z = logits.logsumexp(-1).square().mean()
    for z_loss in (0.0, 0.1):
        objective, plain, _ = build(z_loss=z_loss)(inputs, targets)
        assert_equal_but_for_rounding(plain, nats.to(plain.dtype))
        assert_equal_but_for_rounding(objective, (nats + z_loss * z).to(plain.dtype))
        assert not plain.requires_grad


def test_a_tied_head_is_the_embedding(build):
    tied, untied = build(tie_embeddings=True), build()
    assert tied.head.weight is tied.embedding.weight
    assert untied.head.weight is not untied.embedding.weight
    names = {name for name, _ in untied.named_parameters()} - {name for name, _ in tied.named_parameters()}
    assert names == {"head.weight"}


def test_training_after_inference_mode(build, tokens):
    """What inference leaves behind (rotary tables) must not stop a gradient."""
    decoder = build()
    with torch.inference_mode():
        decoder(tokens)
    decoder(tokens[:, :-1], tokens[:, 1:])[0].backward()
