"""Read and write YAML: what a run or a plan wrote is text from elsewhere, so its size, depth, numbers and aliases are bounded.

Values are typed as in Hydra's files: 1e-5 is a number and 2026-01-01 a text. A `${...}` in a text is no interpolation.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import os
import re
from typing import Any

import yaml
from yaml.composer import Composer
from yaml.constructor import SafeConstructor
from yaml.resolver import Resolver

from kernels.common.json_files import open_regular

MOST_BYTES = 1 << 19  # of a file; a config.yaml has 3 kB
MOST_NODES = 10_000  # keys, values, lists and mappings
DEEPEST = 20  # nested lists and mappings
LONGEST_NUMBER = 400  # characters


def read_yaml(path: str | os.PathLike[str], as_text: bool = False) -> dict[str, Any]:
    """Return the keys and values of a YAML file; an empty one has none.

    Args:
        as_text: whether every value is the text that is written: 24:00:00 is a number to YAML, of seconds.

    Raises:
        OSError: there is no such file.
        ValueError: it is no regular file of at most `MOST_BYTES`, or holds no keys and values.
        yaml.YAMLError: it is no YAML, or beyond the bounds of this module.
    """
    try:
        with io.BufferedReader(open_regular(path)) as file:
            content = file.read(MOST_BYTES + 1)
    except OSError as error:
        if error.errno == errno.EINVAL:
            raise ValueError("it is not a regular file") from error
        raise
    if len(content) > MOST_BYTES:
        raise ValueError(f"it has more than {MOST_BYTES:,} bytes")
    tree = parse_yaml(content.decode(), as_text)
    if tree is not None and not isinstance(tree, dict):
        raise ValueError("it holds no keys and values")
    return {str(key): value for key, value in (tree or {}).items()}


def parse_yaml(text: str, as_text: bool = False) -> Any:
    """Return the value of a YAML text; see `read_yaml`.

    Raises:
        yaml.YAMLError: it is no YAML, or beyond the bounds of this module.
    """
    fast, full = _loaders(as_text)
    try:
        with contextlib.suppress(Exception):
            return yaml.load(text, Loader=fast)
        # It reads what libyaml refuses, such as half a surrogate pair, or says what is wrong.
        return yaml.load(text, Loader=full)
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:  # of a value and its own tag
        raise yaml.YAMLError(f"a value does not fit its tag ({error})") from error


def write_yaml(tree: dict[str, Any]) -> str:
    """Return nested dictionaries, lists, texts and numbers as YAML, in their order."""
    return yaml.dump(tree, default_flow_style=False, allow_unicode=True, sort_keys=False, Dumper=_dumper())


def without_interpolation(value: Any) -> Any:
    """Return a value in which OmegaConf reads every text, also one with `${`, as it is."""
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", lambda match: 2 * match[1] + "\\${", value)
    if isinstance(value, dict):
        return {key: without_interpolation(inner) for key, inner in value.items()}
    return [without_interpolation(inner) for inner in value] if isinstance(value, list) else value


@functools.cache
def _loaders(as_text: bool) -> tuple[Any, Any]:
    """Return a loader that parses with libyaml, five times as fast, where PyYAML has that, and one that always can."""
    from omegaconf._utils import get_yaml_loader

    typed: Any = get_yaml_loader()

    class BoundedLoader(typed):
        """Reads values as OmegaConf does, within the bounds of this module."""

        nodes = depth = 0

        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                raise yaml.YAMLError("an alias (*name) is not read: write the value out")
            self.nodes, self.depth = self.nodes + 1, self.depth + 1
            if self.nodes > MOST_NODES or self.depth > DEEPEST:
                what = f"{MOST_NODES:,} values" if self.nodes > MOST_NODES else f"{DEEPEST} nested lists or mappings"
                raise yaml.YAMLError(f"it has more than {what}")
            node = super().compose_node(parent, index)
            self.depth -= 1
            return node

        def construct_scalar(self, node: Any) -> Any:
            if node.tag.endswith((":int", ":float")) and len(node.value) > LONGEST_NUMBER:
                raise yaml.YAMLError(f"a number has {len(node.value):,} characters")
            return super().construct_scalar(node)

    # Only what YAML itself has: OmegaConf's loader would also make paths of what asks for them.
    constructors = typed.yaml_constructors.items()
    BoundedLoader.yaml_constructors = {tag: make for tag, make in constructors if "python" not in str(tag)}
    if as_text:
        BoundedLoader.yaml_implicit_resolvers = {}
    if not yaml.__with_libyaml__:
        return BoundedLoader, BoundedLoader

    parser: Any = vars(yaml.cyaml)["CParser"]

    class FastLoader(parser, BoundedLoader):
        """Takes libyaml's events, of which nodes are composed, counted and typed as by `BoundedLoader`."""

        check_node, get_node, get_single_node = Composer.check_node, Composer.get_node, Composer.get_single_node

        def __init__(self, stream: str) -> None:
            parser.__init__(self, stream)
            for part in (Composer, SafeConstructor, Resolver):
                part.__init__(self)

    return FastLoader, BoundedLoader


@functools.cache
def _dumper() -> Any:
    from omegaconf._utils import get_omega_conf_dumper

    typed: Any = get_omega_conf_dumper()

    class Dumper(typed):
        """Writes values as OmegaConf does, equal ones too."""

        def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002 (PyYAML's signature)
            return True

    return Dumper
