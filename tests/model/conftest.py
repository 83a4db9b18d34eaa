"""Small decoders, and checkpoints of them, for the tests of this room."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from conf.load import FOLDER
from conf.schema import Config, FFNConfig
from model.accounting import shape_of
from model.decoder import Decoder
from model.initialise import initialise
from model.weights import save_weights

ARMS = {
    path.stem: {"parameters": {}, **yaml.safe_load(path.read_text(encoding="utf-8"))}
    for path in sorted((FOLDER / "ffn").glob("*.yaml"))
    if path.stem != "custom"
}
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
    shape = shape_of(config)
    decoder = Decoder(shape, config.model, backend, document_start)
    initialise(decoder, shape, seed, config.model.init_std)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            if name.endswith("norm.weight"):
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return decoder.to(dtype)


def write_checkpoint_of(decoder: Decoder, folder: Path, step: int) -> Path:
    """Write a checkpoint without optimizer state."""
    path = folder / f"step_{step:08d}"
    save_weights(path, decoder.named_parameters(), {"step": step})
    return path


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
