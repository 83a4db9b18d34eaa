"""Start a run from a Hugging Face folder: `python -m model.load from=FOLDER run=NAME [key=value ...]`.

from=FOLDER       with config.json, safetensors and a tokenizer    run=NAME     of the new run
key=value         as train.py takes them: data, steps, optim ...   runs=FOLDER  where the runs are

The folder is one of `python -m model.export`, or any LlamaForCausalLM or ArceeForCausalLM. Sizes, formula and tokenizer are
the folder's; everything else is composed from the overrides. The run holds its weights as a checkpoint of step 0, and the
command that is printed trains on from there.
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from conf.load import load, to_yaml
from conf.schema import Config
from conf.validate import validate
from data.tokenizer import Tokenizer, load_tokenizer
from kernels.common.commands import run_command
from kernels.common.errors import UserError
from kernels.common.files import atomic_folder, say_why
from launch.estimate.counts import Shape, shape_of
from model.decoder import Decoder
from model.huggingface.config import Described, choice_of, key_of, read_config
from model.huggingface.layout import tensor_names
from model.huggingface.tokenizer import ORIGINAL
from model.weights import save_weights

_OURS = ("model.activation_checkpointing", "model.attention", "model.mask_documents", "model.z_loss", "model.init_std")
_OURS += ("model.name", "ffn.backend", "ffn.save")  # of these groups, what no folder says


class Folder:
    """The tensors of a Hugging Face folder, by name, from whichever file holds them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        index, single = path / "model.safetensors.index.json", path / "model.safetensors"
        if index.is_file():
            files = sorted(set(read_json(index).get("weight_map", {}).values()))
        elif single.is_file():
            files = [single.name]
        else:
            pickled = " (a pickle such as pytorch_model.bin is not read)" if any(path.glob("*.bin")) else ""
            raise UserError(f"{path} holds no model.safetensors and no model.safetensors.index.json{pickled}")
        self._files: dict[str, Any] = {}
        for name in files:
            if not (path / name).is_file():
                raise UserError(f"{path} is incomplete: {name}, which its index names, is missing")
            try:
                file = safe_open(path / name, framework="pt")
            except (SafetensorError, OSError) as error:
                raise UserError(f"{path / name} is no sound safetensors file: {error}") from error
            self._files.update(dict.fromkeys(file.keys(), file))

    def names(self) -> set[str]:
        """Return the names of all tensors."""
        return set(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor, without reading it."""
        return tuple(self._files[name].get_slice(name).get_shape())

    def tensor(self, name: str) -> Tensor:
        """Return a tensor in fp32."""
        return self._files[name].get_tensor(name).float()


def read_json(path: Path) -> dict[str, Any]:
    """Return the object that a JSON file holds.

    Raises:
        UserError: the file is missing, or is no JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path} is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object")
    return content


def import_folder(source: Path, overrides: list[str]) -> tuple[Config, list[str]]:
    """Write the run folder that continues from `source`; return its configuration, and the words of the command for train.py.

    Args:
        overrides: as train.py takes them, run=NAME among them.

    Raises:
        UserError: the folder holds what ours cannot (the key and its value are named), a tensor is missing or has another
            shape, the run exists, or an override contradicts the folder.
    """
    typed = dict(word.partition("=")[::2] for word in overrides)
    if not typed.get("run"):
        raise UserError("say what the new run is called: run=NAME")
    run = Path(typed.get("runs", "runs"), typed["run"])
    for key in sorted(typed):
        if key.partition(".")[0] in ("model", "ffn", "tokenizer") and key not in _OURS and key != "model":
            raise UserError(f"{key} is what {source} says: leave it out")
    if not source.is_dir():
        raise UserError(f"there is no folder {source}")
    stored = Folder(source)
    described = read_config(read_json(source / "config.json"), source, stored)
    tokenizer = _tokenizer(source)
    if tokenizer.vocab_size > described.vocab_size:
        raise UserError(
            f"{source} has a tokenizer of {tokenizer.vocab_size} pieces, and vocab_size {described.vocab_size} in config.json"
        )
    if run.exists():
        raise UserError(f"{run} exists: give this run another name (run=NAME)")
    words = [*overrides, *_words(described), *_tokenizer_words(tokenizer, run)]
    config = load(words, "model.load")
    validate(config, 1)
    if Path(config.runs, str(config.run)) != run:
        raise UserError(f"run={typed['run']}: write the name of the run without quotes")
    shape = shape_of(config, tokenizer.vocab_size)
    for ffn, arm, width in zip(shape.ffn, described.arms, described.widths, strict=True):
        assert (key_of(ffn.arm.formula, ffn.arm.parameters), ffn.d_ff) == (key_of(*arm), width), arm
    tensors = _tensors(stored, config, shape, described)
    state = {
        **{"step": 0, "samples": 0, "tokens": 0, "batches_hash": 0, "optimizer_steps": 0},
        **{"corpus_hash": None, "tokenizer_hash": tokenizer.hash},
        **{"eval_loss": None, "evaluation_missed": False, "wall_seconds": 0.0},
    }
    event = {"kind": "event", "step": 0, "tokens": 0, "event": "imported", "from": os.path.abspath(source)}
    with say_why("write the run", run), atomic_folder(run) as folder:
        (folder / "tokenizer").mkdir()
        tokenizer.save(folder / "tokenizer")
        (folder / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
        (folder / "metrics.jsonl").write_text(json.dumps(event) + "\n", encoding="utf-8")
        (folder / "checkpoints").mkdir()
        save_weights(folder / "checkpoints" / "step_00000000", tensors, state)
    return config, words


def _tokenizer(source: Path) -> Tokenizer:
    """Return the folder's tokenizer: our own file if it is there, so that it is the same to the last byte."""
    ours, original = (source / ORIGINAL[name] for name in ("tokenizer.model", "tokenizer.json"))
    foreign = source / "tokenizer.json"
    if ours.is_file() and ((found := load_tokenizer(ours)).exact or not foreign.is_file()):
        return found
    if not original.is_file() and not foreign.is_file():
        raise UserError(f"{source} holds no tokenizer: neither tokenizer.json nor tokenizer.model")
    return load_tokenizer(original if original.is_file() else foreign)


def _words(described: Described) -> list[str]:
    """Return the overrides that ask for the model that the folder describes."""
    base, *others = described.arms
    words = [f"model.{key}={_shown(value)}" for key, value in described.model.items()]
    choice = choice_of(base)
    words += [f"ffn={choice}"] if choice else ["ffn=custom", *_arm_words("ffn", *base)]
    for index, arm in enumerate(others, start=1):
        if arm != base:
            key, choice = f"ffn.per_layer.{index}", choice_of(arm)
            words += [f"{key}={choice}"] if choice else _arm_words(key, *arm)
    return words


def _arm_words(key: str, formula: str, parameters: dict[str, Any]) -> Iterator[str]:
    yield f"{key}.formula=" + (formula if key == "ffn" else f"'{formula}'")
    for name, value in parameters.items():
        each = f"{key}.parameters.{name}"
        if isinstance(value, dict):
            yield from (f"{each}.{inner}={_shown(setting)}" for inner, setting in value.items())
        else:
            yield f"{each}={_shown(value)}"


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else "null" if value is None else str(value)


def _tokenizer_words(tokenizer: Tokenizer, run: Path) -> list[str]:
    kind = "huggingface" if tokenizer.file_name == "tokenizer.json" else "sentencepiece"
    return [f"tokenizer={kind}", f"tokenizer.path={run / 'tokenizer' / tokenizer.file_name}"]


def _tensors(stored: Folder, config: Config, shape: Shape, described: Described) -> list[tuple[str, Tensor]]:
    """Check that the folder's tensors are those of this decoder, and return an iterator over them in our names."""
    with torch.device("meta"):
        ours = {name: tuple(p.shape) for name, p in Decoder(shape, config.model, "sdpa").named_parameters()}
    layout = described.layout
    parts = {name: tensor_names(name, shape, layout) for name in ours}
    expected = {theirs: size for each in parts.values() for theirs, size in each}
    found = stored.names()
    for theirs, size in expected.items():
        if theirs not in found:
            raise UserError(f"{stored.path} is incomplete: it holds no tensor {theirs}")
        if stored.shape(theirs) != size:
            raise UserError(
                f"{stored.path} contradicts its config.json: {theirs} is {stored.shape(theirs)} where {size} is expected"
            )
    ignored = {f"model.layers.{i}.mlp.act_fn.{name}" for i in range(shape.n_layers) for name in layout.buffers}
    ignored |= {"lm_head.weight"} if shape.tied else set()
    foreign = sorted(n for n in found - expected.keys() - ignored if not n.endswith("rotary_emb.inv_freq"))
    if foreign:
        raise UserError(f"{stored.path} holds {foreign[0]}, for which a decoder of ours has no place")
    return (  # type: ignore[return-value]
        (name, torch.cat([stored.tensor(theirs) for theirs, _ in parts[name]]).view(size))
        for name, size in ours.items()
    )


def main(argv: list[str]) -> None:
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__)
        return
    sources = [word.partition("=")[2] for word in argv if word.startswith("from=")]
    if not sources or not sources[-1]:
        raise UserError("say which folder holds the model: from=FOLDER")
    config, words = import_folder(Path(sources[-1]), [word for word in argv if not word.startswith("from=")])
    print(f"wrote {Path(config.runs) / str(config.run)}: {config.model.n_layers} layers, ffn {config.ffn.formula}")
    print("train on with")
    print("deepspeed train.py " + " ".join(map(shlex.quote, words)))


if __name__ == "__main__":
    run_command(main)
