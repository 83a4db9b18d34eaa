"""Small decoders, and checkpoints of them, for the tests of this room."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from conf.keys import FOLDER
from conf.load import to_yaml
from conf.schema import Config, FFNConfig
from conf.shape import Shape, shape_of
from data.tokenizer import Tokenizer
from data.train_tokenizer import train_sentencepiece
from model.decoder import Decoder
from model.initialise import initialise
from model.weights import save_weights

ARMS = {
    path.stem: {"parameters": {}, **yaml.safe_load(path.read_text(encoding="utf-8"))}
    for path in sorted((FOLDER / "ffn").glob("*.yaml"))
    if path.stem != "custom"
}
# Of each kind one: without and with a gate, two pieces, parameters of a layer and of a channel, a bound.
UNLIKE = ("relu", "swiglu", "maxout", "xielu", "prelu", "swiglu_clamped", "tanh_relu2")
TINY = {
    "d_model": 32,
    "n_layers": 2,
    "n_heads": 4,
    "n_kv_heads": 2,
    "d_ff_gated": 48,
    "vocab_size": 64,
    "init_std": 0.2,
}


def config_of(arm: str = "swiglu", **model: Any) -> Config:
    """Return the configuration of a tiny decoder with an arm of conf/ffn; `model` are other values of its group."""
    config = Config(run="tiny", steps=1)
    config.ffn = FFNConfig(**ARMS[arm])
    for name, value in (TINY | model).items():
        assert hasattr(config.model, name), name
        setattr(config.model, name, value)
    return config


def build_decoder(
    arm: str = "swiglu",
    dtype: torch.dtype = torch.float64,
    backend: str = "sdpa",
    document_start: int | None = None,
    seed: int = 0,
    **model: Any,
) -> Decoder:
    """Return an initialised decoder, the norms moved off 1 so that a forgotten one shows."""
    config = config_of(arm, **model)
    return build_decoder_of(config, shape_of(config), backend, document_start, seed).to(dtype)


def build_decoder_of(
    config: Config, shape: Shape, backend: str = "sdpa", document_start: int | None = None, seed: int = 0
) -> Decoder:
    """Return the decoder of a configuration in fp32, initialised, the norms moved off 1."""
    decoder = Decoder(shape, config.model, backend, document_start)
    initialise(decoder, shape, seed, config.model.init_std)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            if name.endswith("norm.weight"):
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return decoder


def write_checkpoint_of(decoder: Decoder, folder: Path, step: int) -> Path:
    """Write a checkpoint without optimizer state."""
    path = folder / f"step_{step:08d}"
    save_weights(path, decoder.named_parameters(), {"step": step})
    return path


def write_run_of(decoder: Decoder, config: Config, tokenizer: Tokenizer, run: Path, step: int = 7) -> Path:
    """Write a run that has one checkpoint; what formulas learn is moved off its start, so that a lost one shows."""
    chance = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            if ".learned." in name:
                parameter += 0.1 + 0.3 * torch.rand(parameter.shape, generator=chance)
    (run / "tokenizer").mkdir(parents=True)
    (run / "config.yaml").write_text(to_yaml(config))
    tokenizer.save(run / "tokenizer")
    write_checkpoint_of(decoder, run / "checkpoints", step)
    return run


@pytest.fixture(scope="session")
def sentencepiece() -> Tokenizer:
    """A tokenizer of 350 pieces: with 384 rows in an embedding some stand for nothing."""
    chance = random.Random(1)
    words = ["def", "return", "self", "value", "index", "for", "in", "range", "print", "class", "import", "yield"]
    lines = ["    " * chance.randrange(4) + " ".join(chance.choices(words, k=6)) + "\n" for _ in range(900)]
    return train_sentencepiece(["".join(lines[i : i + 9]) for i in range(0, len(lines), 9)], 350)


@pytest.fixture
def make_run(tmp_path, sentencepiece) -> Callable[..., Path]:
    """The function that writes the run of an arm of conf/ffn; `model` are values of its group, `ffn` replaces the arm's."""

    def make(arm: str = "swiglu", name: str = "run", ffn: dict[str, Any] | None = None, **model: Any) -> Path:
        config = config_of(arm, **({"vocab_size": 384} | model))
        config.ffn = FFNConfig(**(ARMS[arm] | {"from_output": ""} | ffn)) if ffn else config.ffn
        shape = shape_of(config)
        decoder = build_decoder_of(config, shape)
        return write_run_of(decoder, config, sentencepiece, tmp_path / "runs" / name)

    return make


@pytest.fixture(scope="session")
def transformers(tmp_path_factory) -> Iterator[Any]:
    """The library; what it copies of exported code goes into a folder of the tests."""
    library = pytest.importorskip("transformers")
    from transformers import dynamic_module_utils

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        patch.setattr("sys.path", sys.path.copy())
        yield library


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Small products are done before a second thread has begun, most of all where the tests share the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def build() -> Callable[..., Decoder]:
    return build_decoder


@pytest.fixture(scope="session")
def tiny_config() -> Callable[..., Config]:
    return config_of


@pytest.fixture(scope="session")
def write_checkpoint() -> Callable[..., Path]:
    return write_checkpoint_of


@pytest.fixture(scope="session", params=list(ARMS))
def arm(request: pytest.FixtureRequest) -> str:
    """Every arm of conf/ffn."""
    return request.param


@pytest.fixture
def tokens() -> torch.Tensor:
    """(2, 23) tokens of a vocabulary of 64."""
    return torch.randint(64, (2, 23), generator=torch.Generator().manual_seed(2))
