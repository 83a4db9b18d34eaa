"""Export a run's model to Hugging Face Transformers: `python -m model.export run=NAME to=FOLDER`.

    run=NAME     a run by name or by path
    to=FOLDER    new or empty
    dtype=fp32   of the weights: fp32 | bf16
    step=N       a checkpoint; default: the newest
    runs=FOLDER  where run folders are; default: runs

The folder holds safetensors, config.json, generation_config.json and the tokenizer, and loads without this project:
AutoModelForCausalLM.from_pretrained(FOLDER). An arm that Transformers knows becomes a LlamaForCausalLM or an ArceeForCausalLM,
with QK-norm a Qwen3ForCausalLM or an ApertusForCausalLM. Any other becomes a FormulaForCausalLM, whose code is in the folder:
from_pretrained(FOLDER, trust_remote_code=True). What else loads the folder is printed. `python -m model.import_hf` reads it.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import Tensor

from conf.load import find_run, from_yaml
from conf.schema import Config
from conf.shape import Shape
from data.tokenizer import Tokenizer
from kernels.common.commands import run_command
from kernels.common.errors import UserError, unknown
from kernels.common.files import atomic_folder, explain_os_errors
from kernels.common.options import read_options
from kernels.formula import Formula
from kernels.formula.settled import settled
from model.decoder import Decoder, Layer
from model.generate import load_run
from model.huggingface.layout import APERTUS, CLASSES, FORMULA, TransformersLayout, tensor_names, transformers_layout
from model.huggingface.loaders import loaders, notes
from model.huggingface.tokenizer import ORIGINAL, write_tokenizer

_DEFAULTS = {"run": "", "to": "", "runs": "runs", "step": -1, "dtype": "fp32"}
_REQUIRED = {"run": "run=NAME, the run to export", "to": "to=FOLDER, the folder for the model"}
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_SHARD_BYTES = 4 << 30
_CODE = "modeling_formula.py"


def export(run: Path, to: Path, step: int = -1, dtype: str = "fp32") -> str:
    """Export the model of a run, and return the name of its class in Transformers.

    Args:
        to: does not exist, or is an empty folder. It appears under this name only when it is complete.
        step: of the checkpoint; -1: the newest.
        dtype: of the weights, fp32 or bf16.

    Raises:
        UserError: `to` is not empty, there is no such checkpoint, the tokenizer cannot be converted, or the disk is full.
    """
    return CLASSES[_export(run, to, step, dtype).model_type]


def _export(run: Path, to: Path, step: int, dtype: str) -> TransformersLayout:
    if dtype not in _DTYPES:
        raise unknown("dtype", dtype, _DTYPES)
    if to.exists() and not (to.is_dir() and not any(to.iterdir())):
        raise UserError(f"{to} exists and is not an empty folder: choose another one (to=FOLDER)")
    to = to.resolve()  # a link to an empty folder stays one
    if to == Path.cwd():
        raise UserError(f"{to} is the folder that you are in, and it would be replaced: choose another one (to=FOLDER)")
    config = from_yaml(run / "config.yaml")
    model, tokenizer, _ = load_run(run, step)
    shape = _settled_shape(model)
    layout = transformers_layout(shape)
    with explain_os_errors("write", to):
        if to.exists():
            to.rmdir()
        with atomic_folder(to) as folder:
            pad = write_tokenizer(tokenizer, folder, config.sequence_length)
            _write_json(folder / "config.json", _model_config(config, shape, layout, tokenizer, pad, dtype))
            _write_json(folder / "generation_config.json", _generation_config(shape, tokenizer, pad))
            if layout.model_type == FORMULA:
                shutil.copyfile(Path(__file__).with_name("huggingface") / "modeling.py", folder / _CODE)
            _write_weights(model, shape, layout, folder, _DTYPES[dtype])
    return layout


def _settled_shape(model: Decoder) -> Shape:
    """Return a model's shape with formulas in which scheduled parameters are numbers: their values at the checkpoint's step."""
    layers = []
    for ffn, layer in zip(model.shape.ffn, model.layers, strict=True):
        if ffn.formula.scheduled:
            formula = settled(ffn.formula, cast("Layer", layer).ffn.scheduled)
            parameters = formula.fixed | {name: given.settings() for name, given in formula.learned.items()}
            arm = dataclasses.replace(ffn.arm, name="custom", formula=formula.text, parameters=parameters)
            ffn = dataclasses.replace(ffn, arm=arm, formula=formula)
        layers.append(ffn)
    return dataclasses.replace(model.shape, ffn=tuple(layers))


def _model_config(
    config: Config, shape: Shape, layout: TransformersLayout, tokenizer: Tokenizer, pad: int, dtype: str
) -> dict[str, Any]:
    """Return the content of config.json."""
    std = config.model.init_std
    content: dict[str, Any] = {
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
        # In training a document starts after the end of another, so a text starts with the end-of-text token by default.
        "bos_token_id": tokenizer.start_id,
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": pad,
        "torch_dtype": str(_DTYPES[dtype]).removeprefix("torch."),
    }
    if layout.model_type != FORMULA:
        return content | {
            "hidden_act": layout.hidden_act,
            "intermediate_size": shape.ffn[0].d_ff,
            "attention_bias": False,
            "mlp_bias": False,
            **(_plain_rotary(config.model.rope_theta) if layout.model_type == APERTUS else {}),
        }
    module = _CODE.removesuffix(".py")
    layers = [
        {"formula": ffn.arm.formula, "parameters": _plain(ffn.formula, list(ffn.arm.parameters)), "d_ff": ffn.d_ff}
        for ffn in shape.ffn
    ]
    return content | {
        "auto_map": {
            "AutoConfig": f"{module}.FormulaConfig",
            "AutoModelForCausalLM": f"{module}.{CLASSES[FORMULA]}",
        },
        "qk_norm": shape.qk_norm,
        "final_logit_softcapping": shape.logit_softcap or None,
        "ffn": layers,
    }


def _plain_rotary(theta: float) -> dict[str, Any]:
    """Return the keys that keep Transformers, before 5 and since, from the scaled positions that it takes by default."""
    return {"rope_parameters": {"rope_type": "default", "rope_theta": theta}, "rope_scaling": None}


def _plain(formula: Formula, parameters: list[str]) -> dict[str, Any]:
    """Return a formula's parameters, with every default written out."""
    learned = {name: given.settings() for name, given in formula.learned.items()}
    return {name: learned.get(name, formula.fixed.get(name)) for name in parameters}


def _generation_config(shape: Shape, tokenizer: Tokenizer, pad: int) -> dict[str, Any]:
    """Return the content of generation_config.json."""
    content: dict[str, Any] = {
        "bos_token_id": tokenizer.start_id,
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": pad,
    }
    if shape.vocab_size > tokenizer.vocab_size:  # further rows are padding of the vocabulary
        content["suppress_tokens"] = list(range(tokenizer.vocab_size, shape.vocab_size))
    return content


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _tensors(model: Decoder, shape: Shape, layout: TransformersLayout) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors by their names in Transformers: views of our parameters, and constants of the activation."""
    for name, parameter in model.named_parameters():
        layer, _, symbol = name.partition(".ffn.learned.")
        if symbol and symbol not in shape.ffn[int(layer.rpartition(".")[2])].formula.learned:
            continue  # of a term that a schedule has faded out
        rows = parameter.detach()
        rows = rows.flatten(0, 1) if rows.ndim == 3 else rows  # gate, then up
        names = tensor_names(name, shape, layout)
        for (theirs, _), block in zip(names, rows.split([size[0] for _, size in names]), strict=True):
            yield theirs, block
    for index in range(shape.n_layers):
        for buffer, value in layout.buffers.items():
            yield f"model.layers.{index}.mlp.act_fn.{buffer}", torch.tensor(value)


def _write_weights(model: Decoder, shape: Shape, layout: TransformersLayout, folder: Path, dtype: torch.dtype) -> None:
    """Write model.safetensors, or its shards and their index."""
    shards: list[dict[str, Tensor]] = [{}]
    total = size = 0
    for name, tensor in _tensors(model, shape, layout):
        tensor_bytes = tensor.numel() * dtype.itemsize
        if shards[-1] and size + tensor_bytes > _SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        total, size = total + tensor_bytes, size + tensor_bytes
    files = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    files = files if len(shards) > 1 else ["model.safetensors"]
    for file, shard in zip(files, shards, strict=True):  # shards are converted one at a time, to save memory
        try:
            save_file(
                {name: tensor.to(dtype).contiguous() for name, tensor in shard.items()}, folder / file, {"format": "pt"}
            )
        except Exception as error:  # the library wraps the operating system's error in its own
            if "No space left" in str(error):
                raise OSError(errno.ENOSPC, str(error)) from error
            raise
    if len(shards) > 1:
        weight_map = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_json(folder / "model.safetensors.index.json", index)


def main(argv: list[str]) -> None:
    options = read_options(argv, _DEFAULTS, required=_REQUIRED)
    run, to = find_run(options["run"], options["runs"]), Path(options["to"])
    layout = _export(run, to, options["step"], options["dtype"])
    class_name = CLASSES[layout.model_type]
    trust = ", trust_remote_code=True" if class_name == CLASSES[FORMULA] else ""
    print(f"wrote {to}: {'an' if class_name[0] in 'AEIOU' else 'a'} {class_name}")
    print(f"opens with AutoModelForCausalLM.from_pretrained({str(to)!r}{trust})")
    if trust:
        print("(its tokenizer with AutoTokenizer and the same arguments)")
    print(f"loads in {', '.join(loaders(layout))}")
    for note in notes(layout, (to / ORIGINAL["tokenizer.model"]).is_file()):
        print(note)


if __name__ == "__main__":
    run_command(main, __doc__, needs_arguments=True)
