"""Weights on disk: their names and layout in a checkpoint, and how they are read and verified.

A checkpoint is a folder `step_00000100/` of safetensors files, `state.json`, and `manifest.json` with the size and BLAKE2
hash of each file. Tensors are whole (no rank's slice) and fp32. In memory gate and up are one parameter (2, d_ff, d_model); on
disk they are two, so that nobody has to guess which half is which. Reading executes nothing that a file contains.
Writing weights alone is here too; with the optimizer's state it is `training/checkpoint.py`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from conf.errors import UserError
from conf.files import atomic_folder

FORMAT = 1
_FILE_BYTES = 2 << 30  # tensors are collected until a file has this size
_PACKED = "ffn.up"  # the parameter that is two tensors on disk when the arm is gated


def to_disk(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """Return the tensors, by their name on disk, that a parameter (or its optimizer state) is stored as."""
    if name.endswith(_PACKED) and tensor.ndim == 3:
        return {name.removesuffix("up") + "gate": tensor[0], name: tensor[1]}
    return {name: tensor}


def from_disk(name: str, shape: torch.Size | tuple[int, ...], stored: CheckpointReader, suffix: str = "") -> Tensor:
    """Return a parameter of the given shape; the inverse of `to_disk`. `suffix` names its optimizer state.

    Raises:
        UserError: a tensor is missing or has another shape.
    """
    names = [name]
    if name.endswith(_PACKED) and len(shape) == 3:
        names = [name.removesuffix("up") + "gate", name]
    parts = [stored.tensor(each + suffix) for each in names]
    tensor = torch.stack(parts) if len(parts) == 2 else parts[0]
    if tuple(tensor.shape) != tuple(shape):
        raise UserError(
            f"{stored.folder} is a checkpoint of another shape: {name} is {tuple(tensor.shape)} there and {tuple(shape)} here"
        )
    return tensor


class CheckpointReader:
    """Reads the tensors of one checkpoint by name, from whichever file holds them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.state: dict[str, Any] = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        self._files = {}
        for path in sorted(folder.glob("*.safetensors")):
            file = safe_open(path, framework="pt")
            self._files.update(dict.fromkeys(file.keys(), file))

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def tensor(self, name: str) -> Tensor:
        """Return the tensor of that name.

        Raises:
            UserError: there is none.
        """
        if name not in self._files:
            raise UserError(f"{self.folder} is a checkpoint of another model: it holds no {name}")
        return self._files[name].get_tensor(name)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every tensor by name, without reading one."""
        return {name: tuple(file.get_slice(name).get_shape()) for name, file in self._files.items()}


def checkpoints(folder: Path) -> Iterator[Path]:
    """Yield the complete checkpoints in `folder`, newest first: folders `step_N`. One of another name was never finished."""
    steps = {path: path.name.removeprefix("step_") for path in folder.glob("step_*") if path.is_dir()}
    yield from sorted(
        (path for path in steps if steps[path].isdecimal()), key=lambda path: int(steps[path]), reverse=True
    )


def file_hash(path: Path) -> str:
    """Return the BLAKE2b hash of a file, in hexadecimal."""
    with open(path, "rb") as file:
        digest = hashlib.blake2b(digest_size=16)
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def damage(folder: Path) -> str:
    """Return what is wrong with a checkpoint's files, or "" if each has the size and hash of the manifest."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        files = [(name, entry["bytes"], entry["blake2b"]) for name, entry in manifest["files"].items()]
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return "manifest.json is missing or unreadable"
    for name, size, digest in files:
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes, not {size}"
        if file_hash(path) != digest:
            return f"{name} does not have the contents that were saved"
    return ""


def newest_intact(folder: Path) -> tuple[Path | None, list[str]]:
    """Return the newest checkpoint whose files are as they were saved, and a sentence for each damaged one passed over."""
    passed_over = []
    for path in checkpoints(folder):
        wrong = damage(path)
        if not wrong:
            return path, passed_over
        passed_over.append(f"checkpoint {path} is damaged and was passed over: {wrong}")
    return None, passed_over


def check_shapes(model: nn.Module, stored: CheckpointReader) -> None:
    """Compare the parameters of `model` (which may be on the meta device) with a checkpoint's, in both directions.

    Raises:
        UserError: the checkpoint is of another model.
    """
    parts = [part for name, parameter in model.named_parameters() for part in to_disk(name, parameter).items()]
    expected, found = {name: tuple(part.shape) for name, part in parts}, stored.shapes()
    for name, shape in expected.items():
        if name not in found:
            raise UserError(f"{stored.folder} is a checkpoint of another model: it holds no {name}")
        if found[name] != shape:
            raise UserError(
                f"{stored.folder} is a checkpoint of another shape: {name} is {found[name]} there and {shape} here"
            )
    # Optimizer state is stored under a parameter's name and one word more.
    foreign = sorted(name for name in found if name not in expected and name.rpartition(".")[0] not in expected)
    if foreign:
        raise UserError(
            f"{stored.folder} is a checkpoint of another model: it holds {foreign[0]}, which this one has not"
        )


def load_weights(model: nn.Module, folder: Path) -> dict[str, Any]:
    """Fill `model`'s parameters from a checkpoint, and return the checkpoint's state.

    Raises:
        UserError: the checkpoint is of another model.
    """
    reader = CheckpointReader(folder)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(from_disk(name, parameter.shape, reader))
    return reader.state


def save_weights(path: Path, tensors: Iterable[tuple[str, Tensor]], state: dict[str, Any]) -> None:
    """Write a checkpoint of weights alone, from which training starts with fresh moments.

    Args:
        path: the checkpoint's folder, `step_N`; it must not exist.
        tensors: whole parameters under their names in memory, taken one at a time.
        state: what else must be known to go on, as JSON; `optimizer_steps` is 0.

    Raises:
        OSError: it cannot be written; nothing is left behind.
    """
    held: dict[str, Tensor] = {}
    with atomic_folder(path) as folder:
        for name, tensor in tensors:
            for stored, part in to_disk(name, tensor).items():
                held[stored] = part.detach().to("cpu", torch.float32).contiguous()
            if sum(4 * part.numel() for part in held.values()) >= _FILE_BYTES:
                _write(folder, held)
        _write(folder, held)
        (folder / "state.json").write_text(json.dumps({**state, "format": FORMAT}, indent=2) + "\n", encoding="utf-8")
        files = sorted(folder.iterdir())
        listed = {file.name: {"bytes": file.stat().st_size, "blake2b": file_hash(file)} for file in files}
        text = json.dumps({"format": FORMAT, "files": listed}, indent=2) + "\n"
        (folder / "manifest.json").write_text(text, encoding="utf-8")


def _write(folder: Path, held: dict[str, Tensor]) -> None:
    if held:
        path = folder / f"tensors-{len(list(folder.glob('tensors-*'))) + 1:05d}.safetensors"
        try:
            save_file(held, path)
        except Exception as error:  # the library wraps the operating system's error in its own
            raise OSError(f"cannot write {path}: {error}") from error
        held.clear()
