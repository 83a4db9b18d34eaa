"""Create a run from a Hugging Face model: `python -m model.import_hf from=FOLDER run=NAME [KEY=VALUE ...]`.

    from=FOLDER  with config.json, safetensors and a tokenizer
    run=NAME     name of the new run
    KEY=VALUE    overrides for train.py: data, steps, optim, ...
    runs=FOLDER  where run folders are; default: runs

The folder is one that `python -m model.export` wrote, or any LlamaForCausalLM, Qwen3ForCausalLM, ArceeForCausalLM or
ApertusForCausalLM with plain rotary positions. Sizes, formula and tokenizer come from the folder, everything else from the
overrides. The run starts with the imported weights as a checkpoint of step 0, and the printed command trains on from there.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from conf.load import load
from conf.overrides import check_overrides
from conf.schema import Config
from conf.shape import Shape, shape_of
from conf.validate import validate
from data.tokenizer import Tokenizer, load_tokenizer, named_by_config
from kernels.common.commands import run_command
from kernels.common.errors import UserError
from kernels.common.options import split_options
from model.decoder import Decoder
from model.huggingface.config import ImportedConfig, choice_of, key_of, read_config
from model.huggingface.layout import tensor_names
from model.huggingface.tokenizer import ORIGINAL
from model.new_run import write_new_run

_ALLOWED = (  # keys of `model`, `ffn` and `tokenizer` that a Hugging Face folder does not determine
    "ffn.backend",
    "ffn.save",
    "model",
    "model.activation_checkpointing",
    "model.attention",
    "model.init_std",
    "model.mask_documents",
    "model.name",
    "model.z_loss",
)


class StoredTensors:
    """The tensors of a Hugging Face folder by name, from whichever file holds them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        index, single = path / "model.safetensors.index.json", path / "model.safetensors"
        if single.is_file():  # first, as in Transformers: `save_pretrained` leaves the index of shards that it replaces
            files = [single.name]
        elif index.is_file():
            files = _shards(index)
        else:
            pickled = " (pickles such as pytorch_model.bin are not supported)" if any(path.glob("*.bin")) else ""
            raise UserError(f"{path} holds no model.safetensors and no model.safetensors.index.json{pickled}")
        self._files: dict[str, Any] = {}
        for name in files:
            if not (path / name).is_file():
                raise UserError(f"{path} is incomplete: its index names {name}, which is missing")
            try:
                file = safe_open(path / name, framework="pt")
            except (SafetensorError, OSError) as error:
                raise UserError(f"{path / name} is not a valid safetensors file: {error}") from error
            self._files.update(dict.fromkeys(file.keys(), file))

    def names(self) -> set[str]:
        """Return the names of all tensors."""
        return set(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor, without reading it."""
        return tuple(self._files[name].get_slice(name).get_shape())

    def tensor(self, name: str) -> Tensor:
        """Return a tensor in fp32.

        Raises:
            UserError: it holds a NaN or an infinity.
        """
        tensor = self._files[name].get_tensor(name).float()
        if not tensor.isfinite().all():
            raise UserError(f"{self.path} is damaged: {name} holds {'NaN' if tensor.isnan().any() else 'an infinity'}")
        return tensor


def _shards(index: Path) -> list[str]:
    """Return the names of the files that an index names."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise UserError(f"{index} has no weight_map from the names of tensors to those of files")
    return sorted(set(weight_map.values()))


def read_json(path: Path) -> dict[str, Any]:
    """Return the object that a JSON file holds.

    Raises:
        UserError: the file is missing, or does not hold a JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} does not hold a JSON object")
    return content


def import_folder(source: Path, overrides: list[str]) -> tuple[Config, list[str]]:
    """Write a run folder that continues from the model in `source`.

    Args:
        overrides: as train.py takes them; run=NAME is required.

    Returns:
        The run's configuration, and the arguments with which train.py continues it.

    Raises:
        UserError: the model is not supported (the key and its value are named), a tensor is missing or has another shape, the
            run exists, or an override contradicts the folder.
    """
    run = _new_run(source, overrides)
    stored = StoredTensors(source)
    imported = read_config(read_json(source / "config.json"), source, stored)
    if imported.warning:
        print(f"warning: {imported.warning}", file=sys.stderr)
    tokenizer = _tokenizer(source)
    if tokenizer.vocab_size > imported.vocab_size:
        raise UserError(
            f"{source} has a tokenizer of {tokenizer.vocab_size} pieces, and vocab_size {imported.vocab_size} in config.json"
        )
    if run.exists():
        raise UserError(f"{run} exists: choose another name for this run (run=NAME)")
    arguments = [*overrides, *_model_overrides(imported), *_tokenizer_overrides(tokenizer, run)]
    config = load(arguments, "model.import_hf")
    validate(config, 1)
    if Path(config.runs, str(config.run)) != run:
        raise UserError(f"run={run.name}: write the name of the run without quotes")
    shape = shape_of(config, tokenizer.vocab_size)
    for ffn, arm, width in zip(shape.ffn, imported.arms, imported.widths, strict=True):
        assert (key_of(ffn.arm.formula, ffn.arm.parameters), ffn.d_ff) == (key_of(*arm), width), arm
    event = {"event": "imported", "from": os.path.abspath(source)}
    write_new_run(run, config, tokenizer, _tensors(stored, config, shape, imported), event)
    return config, arguments


def _new_run(source: Path, overrides: list[str]) -> Path:
    """Return the path of the run to create, after checking the overrides and that `source` is a folder."""
    given = {key.lstrip("+"): value for key, _, value in (override.partition("=") for override in overrides)}
    if not given.get("run"):
        raise UserError("give the new run a name: run=NAME")
    for key in sorted(given):
        if key.partition(".")[0] in ("model", "ffn", "tokenizer") and key not in _ALLOWED:
            raise UserError(f"{key} is determined by {source}: leave it out")
    if not source.is_dir():
        raise UserError(f"there is no folder {source}")
    return Path(given.get("runs", "runs"), given["run"])


def _tokenizer(source: Path) -> Tokenizer:
    """Return the folder's tokenizer, read if possible from the original file that `model.export` copied."""
    tokenizer = load_tokenizer(_tokenizer_file(source))
    return load_tokenizer(tokenizer.name, bos=named_by_config(tokenizer, source, "bos"))


def _tokenizer_file(source: Path) -> Path:
    sentencepiece, original = source / ORIGINAL["tokenizer.model"], source / ORIGINAL["tokenizer.json"]
    converted = source / "tokenizer.json"
    if sentencepiece.is_file() and (load_tokenizer(sentencepiece).exact or not converted.is_file()):
        return sentencepiece
    if not original.is_file() and not converted.is_file():
        raise UserError(f"{source} holds no tokenizer: neither tokenizer.json nor tokenizer.model")
    return original if original.is_file() else converted


def _model_overrides(imported: ImportedConfig) -> list[str]:
    """Return the overrides that select the imported model."""
    base, *others = imported.arms
    overrides = [f"model.{key}={_yaml_value(value)}" for key, value in imported.model.items()]
    name = choice_of(base)
    overrides += [f"ffn={name}"] if name else ["ffn=custom", *_arm_overrides("ffn", *base)]
    for index, arm in enumerate(others, start=1):
        if arm != base:
            key, name = f"ffn.per_layer.{index}", choice_of(arm)
            overrides += [f"{key}={name}"] if name else _arm_overrides(key, *arm)
    return overrides


def _arm_overrides(key: str, formula: str, parameters: dict[str, Any]) -> Iterator[str]:
    yield f"{key}.formula=" + (formula if key == "ffn" else f"'{formula}'")
    for name, value in parameters.items():
        parameter = f"{key}.parameters.{name}"
        if isinstance(value, dict):
            yield from (f"{parameter}.{setting}={_yaml_value(inner)}" for setting, inner in value.items())
        else:
            yield f"{parameter}={_yaml_value(value)}"


def _yaml_value(value: Any) -> str:
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _tokenizer_overrides(tokenizer: Tokenizer, run: Path) -> list[str]:
    kind = "huggingface" if tokenizer.file_name == "tokenizer.json" else "sentencepiece"
    return [f"tokenizer={kind}", f"tokenizer.path={run / 'tokenizer' / tokenizer.file_name}"]


def _tensors(
    stored: StoredTensors, config: Config, shape: Shape, imported: ImportedConfig
) -> Iterator[tuple[str, Tensor]]:
    """Check that the folder holds exactly this decoder's tensors, and return an iterator over them by our names."""
    with torch.device("meta"):
        ours = {name: tuple(p.shape) for name, p in Decoder(shape, config.model, "sdpa").named_parameters()}
    layout = imported.layout
    parts = {name: tensor_names(name, shape, layout) for name in ours}
    expected = {theirs: size for each in parts.values() for theirs, size in each}
    actual = stored.names()
    for theirs, size in expected.items():
        if theirs not in actual:
            raise UserError(f"{stored.path} is incomplete: it holds no tensor {theirs}")
        if stored.shape(theirs) != size:
            raise UserError(
                f"{stored.path} contradicts its config.json: {theirs} is {stored.shape(theirs)} where {size} is expected"
            )
    ignored = {f"model.layers.{i}.mlp.act_fn.{name}" for i in range(shape.n_layers) for name in layout.buffers}
    ignored |= {"lm_head.weight"} if shape.tied else set()
    unexpected = sorted(n for n in actual - expected.keys() - ignored if not n.endswith("rotary_emb.inv_freq"))
    if unexpected:
        raise UserError(f"{stored.path} holds {unexpected[0]}, which is no tensor of this decoder")
    return (
        (name, torch.cat([stored.tensor(theirs) for theirs, _ in parts[name]]).view(size))
        for name, size in ours.items()
    )


def main(argv: list[str]) -> None:
    options, overrides = split_options(argv, {"from": ""}, required={"from": "from=FOLDER, the folder of the model"})
    check_overrides(overrides, options)
    config, arguments = import_folder(Path(options["from"]), overrides)
    print(f"wrote {Path(config.runs) / str(config.run)}: {config.model.n_layers} layers, ffn {config.ffn.formula}")
    print("continue training with")
    print(f"deepspeed train.py {shlex.join(arguments)}")


if __name__ == "__main__":
    run_command(main, __doc__, needs_arguments=True)
