"""The decoders of the model's tests: what is counted from a configuration is held against them."""

from tests.model.conftest import arm, build, one_thread, seeded, tiny_config, tokens

__all__ = ["arm", "build", "one_thread", "seeded", "tiny_config", "tokens"]
