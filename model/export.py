"""Write a run's model for Hugging Face Transformers: `python -m model.export run=NAME to=FOLDER`.

run=NAME          a run by name or by path            step=N       a checkpoint other than the newest
to=FOLDER         new or empty                        dtype=fp32   of the weights: fp32 | bf16
runs=FOLDER       where the runs are

The folder holds safetensors, config.json, generation_config.json and the tokenizer, and loads without this project:
AutoModelForCausalLM.from_pretrained(FOLDER). An arm that Transformers knows becomes a LlamaForCausalLM or an ArceeForCausalLM.
Every other becomes a FormulaForCausalLM, whose code lies in the folder: from_pretrained(FOLDER, trust_remote_code=True).
The way back is `python -m model.import_hf`.
"""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from conf.load import find_run, from_yaml
from conf.schema import Config
from data.tokenizer import Tokenizer
from kernels.common.commands import run_command
from kernels.common.errors import UserError, unknown
from kernels.common.files import atomic_folder, say_why
from kernels.common.options import read_options
from kernels.formula import Formula
from launch.estimate.counts import Shape
from model.decoder import Decoder
from model.generate import load_run
from model.huggingface.layout import CLASSES, FORMULA, TransformersLayout, tensor_names, transformers_layout
from model.huggingface.tokenizer import write_tokenizer

_DEFAULTS = {"run": "", "to": "", "runs": "runs", "step": -1, "dtype": "fp32"}
_REQUIRED = {"run": "run=NAME, the run to export", "to": "to=FOLDER, the folder for the model"}
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_SHARD_BYTES = 4 << 30
_CODE = "modeling_formula.py"


def export(run: Path, to: Path, step: int = -1, dtype: str = "fp32") -> str:
    """Write the model of a run into the folder `to`, and return the name of the class that it became.

    Args:
        to: does not exist, or is an empty folder. Half a folder is never seen under this name.
        step: of the checkpoint; -1: the newest.
        dtype: of the weights, fp32 or bf16.

    Raises:
        UserError: `to` is not empty, there is no such checkpoint, the tokenizer cannot be converted, or the disk is full.
    """
    if dtype not in _DTYPES:
        raise unknown("dtype", dtype, _DTYPES)
    if to.exists() and not (to.is_dir() and not any(to.iterdir())):
        raise UserError(f"{to} exists and is not an empty folder: name another one (to=FOLDER)")
    config = from_yaml(run / "config.yaml")
    model, tokenizer, _ = load_run(run, step)
    layout = transformers_layout(model.shape)
    with say_why("write", to):
        if to.exists():
            to.rmdir()
        with atomic_folder(to) as folder:
            pad = write_tokenizer(tokenizer, folder, config.sequence_length)
            _write_json(folder / "config.json", _model_config(config, model.shape, layout, tokenizer, pad, dtype))
            _write_json(folder / "generation_config.json", _generation_config(model.shape, tokenizer, pad))
            if layout.model_type == FORMULA:
                shutil.copyfile(Path(__file__).with_name("huggingface") / "modeling.py", folder / _CODE)
            _write_weights(model, layout, folder, _DTYPES[dtype])
    return CLASSES[layout.model_type]


def _model_config(
    config: Config, shape: Shape, layout: TransformersLayout, tokenizer: Tokenizer, pad: int, dtype: str
) -> dict[str, Any]:
    std = config.model.init_std
    found = {
        "architectures": [CLASSES[layout.model_type]],
        "model_type": layout.model_type,
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.d_model,
        "num_hidden_layers": shape.n_layers,
        "num_attention_heads": shape.n_heads,
        "num_key_value_heads": shape.n_kv_heads,
        "head_dim": shape.head_dim,
        "max_position_embeddings": config.sequence_length,
        "rms_norm_eps": config.model.norm_eps,
        "rope_theta": config.model.rope_theta,
        "tie_word_embeddings": shape.tied,
        "initializer_range": shape.d_model**-0.5 if std is None else std,
        # A document begins after the end of another one: the end-of-text token is also what a text begins with.
        **{"bos_token_id": tokenizer.eos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": pad},
        "torch_dtype": str(_DTYPES[dtype]).removeprefix("torch."),
    }
    if layout.model_type != FORMULA:
        return found | {
            "hidden_act": layout.hidden_act,
            "intermediate_size": shape.ffn[0].d_ff,
            **{"attention_bias": False, "mlp_bias": False},
        }
    module = _CODE.removesuffix(".py")
    layers = [
        {"formula": ffn.arm.formula, "parameters": _plain(ffn.formula, list(ffn.arm.parameters)), "d_ff": ffn.d_ff}
        for ffn in shape.ffn
    ]
    return found | {
        "auto_map": {
            "AutoConfig": f"{module}.FormulaConfig",
            "AutoModelForCausalLM": f"{module}.{CLASSES[FORMULA]}",
        },
        "qk_norm": shape.qk_norm,
        "ffn": layers,
    }


def _plain(formula: Formula, parameters: list[str]) -> dict[str, Any]:
    """Return a formula's parameters with nothing left to a default."""
    learned = {name: {"init": given.init, "share": given.share} for name, given in formula.learned.items()}
    return {name: learned.get(name, formula.fixed.get(name)) for name in parameters}


def _generation_config(shape: Shape, tokenizer: Tokenizer, pad: int) -> dict[str, Any]:
    found: dict[str, Any] = {"bos_token_id": tokenizer.eos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": pad}
    if shape.vocab_size > tokenizer.vocab_size:  # rows that only round the vocabulary up stand for nothing
        found["suppress_tokens"] = list(range(tokenizer.vocab_size, shape.vocab_size))
    return found


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _tensors(model: Decoder, layout: TransformersLayout) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors by their name there, each a view of one of ours."""
    for name, parameter in model.named_parameters():
        rows = parameter.detach()
        rows = rows.flatten(0, 1) if rows.ndim == 3 else rows  # gate, then up
        parts = tensor_names(name, model.shape, layout)
        for (theirs, _), part in zip(parts, rows.split([size[0] for _, size in parts]), strict=True):
            yield theirs, part


def _write_weights(model: Decoder, layout: TransformersLayout, folder: Path, dtype: torch.dtype) -> None:
    """Write model.safetensors, or shards of it and their index."""
    shards: list[dict[str, Tensor]] = [{}]
    total = size = 0
    for name, tensor in _tensors(model, layout):
        tensor_bytes = tensor.numel() * dtype.itemsize
        if shards[-1] and size + tensor_bytes > _SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        total, size = total + tensor_bytes, size + tensor_bytes
    files = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    files = files if len(shards) > 1 else ["model.safetensors"]
    for file, shard in zip(files, shards, strict=True):  # only one shard is held twice
        try:
            save_file(
                {name: tensor.to(dtype).contiguous() for name, tensor in shard.items()}, folder / file, {"format": "pt"}
            )
        except Exception as error:  # the library wraps the operating system's error in its own
            if "No space left" in str(error):
                raise OSError(errno.ENOSPC, str(error)) from error
            raise
    if len(shards) > 1:
        where = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
        _write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": where})


def main(argv: list[str]) -> None:
    options = read_options(argv, _DEFAULTS, required=_REQUIRED)
    run, to = find_run(options["run"], options["runs"]), Path(options["to"])
    became = export(run, to, options["step"], options["dtype"])
    trusted = ", trust_remote_code=True" if became == CLASSES[FORMULA] else ""
    print(f"wrote {to}: a {became}")
    print(f"AutoModelForCausalLM.from_pretrained({str(to)!r}{trusted})")


if __name__ == "__main__":
    run_command(main, __doc__, needs_arguments=True)
