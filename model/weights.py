"""Weights on disk: the format of a checkpoint, and how it is written, read and verified.

A checkpoint is a folder `step_00000100/`:

    rank_00000.safetensors   what one rank held: pieces of parameters, and of their optimizer state, in fp32
    index.json               where each piece belongs in the whole tensor of its name
    state.json               the counters of the run
    manifest.json            the size and BLAKE2 hash of each of these files

Nothing in it depends on how many ranks there were. A piece is a run of consecutive elements of a tensor rank's part, and the
index says how parts make the whole (`parallel.Cut`): any rank of any other topology finds what it needs, and one of the same
topology finds it in one piece. So no rank gathers anything when it saves, all write at once, and no second, native format is
needed for speed. In gated arms the axis of gate and up is one of the shape, which no cut touches: they cannot be mixed.

Reading executes nothing that a file contains. What a rank holds, and the optimizer's part, is `training/checkpoint.py`.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor, nn

from kernels.common.errors import UserError
from kernels.common.files import atomic_folder
from model.parallel import Cut, cut_of, whole_shape

FORMAT = 2
_FILE_BYTES = 2 << 30  # where whole tensors are written, a file is closed from this size on
MOMENTS = ("exp_avg", "exp_avg_sq")


class Piece(NamedTuple):
    """A run of elements of a flattened part of a parameter: `size` from `start` on, of `tensor` rank, in `rank`'s file."""

    tensor: int
    start: int
    size: int
    rank: int


def file_of(rank: int) -> str:
    """Return the name of the file that a rank writes."""
    return f"rank_{rank:05d}.safetensors"


def stored_name(name: str, key: str = "") -> str:
    """Return the name under which a rank's file has its piece of a parameter, or of its optimizer state `key`."""
    return f"{name}.{key}" if key else name


def index_entry(parameter: nn.Parameter, tensor: int) -> dict[str, Any]:
    """Return what the index says of a parameter that is cut over `tensor` ranks, without its pieces."""
    cut = cut_of(parameter)
    return {
        "shape": list(whole_shape(parameter, tensor)),
        "tensor": tensor if cut else 1,
        "cut": {"dim": cut.dim, "sections": list(cut.sections)} if cut else None,
        "pieces": [],
    }


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Write fp32 tensors in host memory as a safetensors file, synced, and return its entry of the manifest.

    The hash is taken of what is written, while it is written: a file of many GB is not read again, nor copied in memory.
    """
    header, offset = {}, 0
    for name, tensor in tensors.items():
        end = offset + 4 * tensor.numel()
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest, size = hashlib.blake2b(digest_size=16), 0
    with open(path, "wb", buffering=0) as file:
        parts = (tensor.detach().contiguous().view(-1).numpy() for tensor in tensors.values())
        for part in (len(text).to_bytes(8, "little"), text, *parts):
            rest = memoryview(part).cast("B")
            digest.update(rest)
            size += len(rest)
            while rest:
                rest = rest[file.write(rest) :]
        os.fsync(file.fileno())
    return {"bytes": size, "blake2b": digest.hexdigest()}


def write_rest(folder: Path, index: dict[str, Any], state: dict[str, Any], files: dict[str, dict[str, Any]]) -> None:
    """Write what stands beside the ranks' files, whose entries of the manifest are `files`."""
    files = dict(files)
    for name, content in (("index.json", index), ("state.json", {**state, "format": FORMAT})):
        (folder / name).write_text(
            json.dumps(content, indent=2 if name == "state.json" else None) + "\n", encoding="utf-8"
        )
        files[name] = {"bytes": (folder / name).stat().st_size, "blake2b": file_hash(folder / name)}
    text = json.dumps({"files": files}, indent=2) + "\n"
    (folder / "manifest.json").write_text(text, encoding="utf-8")


def save_weights(path: Path, tensors: Iterable[tuple[str, Tensor]], state: dict[str, Any]) -> None:
    """Write whole tensors, by the names of `Decoder.named_parameters`, as a checkpoint without optimizer state.

    Args:
        path: the checkpoint's folder, `step_N` for N = state["step"]; there must be none.
        tensors: taken one at a time; as many files are written as hold them a few at a time, as if ranks had.
    """
    index: dict[str, Any] = {}
    files: dict[str, Any] = {}
    held: dict[str, Tensor] = {}
    with atomic_folder(path) as folder:

        def write() -> None:
            name = file_of(len(files))
            files[name] = write_tensors(folder / name, held)
            held.clear()

        for name, tensor in tensors:
            held[name] = tensor.detach().to("cpu", torch.float32)
            pieces = [Piece(0, 0, tensor.numel(), len(files))]
            index[name] = {"shape": list(tensor.shape), "tensor": 1, "cut": None, "pieces": pieces}
            if sum(4 * part.numel() for part in held.values()) >= _FILE_BYTES:
                write()
        write()
        write_rest(folder, index, {**state, "optimizer_steps": 0}, files)


class CheckpointReader:
    """Reads the tensors of one checkpoint by name, whole or in part, from whichever files hold their pieces.

    Raises:
        UserError: it is of another format.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.state: dict[str, Any] = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        if self.state.get("format") != FORMAT:
            raise UserError(
                f"{folder} has checkpoint format {self.state.get('format')}, and this version reads {FORMAT}: "
                "go on with the version that wrote it, or begin a run of another name (run=NAME)"
            )
        self._index: dict[str, Any] = json.loads((folder / "index.json").read_text(encoding="utf-8"))
        self._files: dict[int, Any] = {}

    @property
    def has_optimizer_state(self) -> bool:
        """Whether the moments of every parameter are there too; without them a run begins with zeros."""
        name, entry = next(iter(self._index.items()))
        return stored_name(name, MOMENTS[0]) in self._file(entry["pieces"][0][3]).keys()  # noqa: SIM118 (no mapping)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the whole shape of every parameter by name, without reading one."""
        return {name: tuple(entry["shape"]) for name, entry in self._index.items()}

    def tensor(self, name: str, key: str = "") -> Tensor:
        """Return a whole parameter, or its optimizer state `key`, in fp32.

        Raises:
            UserError: there is none, or a part of it is missing.
        """
        entry = self._entry(name)
        cut, tensor = entry["cut"], entry["tensor"]
        shape = list(entry["shape"])
        if cut:
            shape[cut["dim"]] //= tensor
        parts = [self._run(name, key, rank, 0, math.prod(shape)).view(shape) for rank in range(tensor)]
        return Cut(cut["dim"], tuple(cut["sections"])).whole(parts) if cut else parts[0]

    def run(self, name: str, key: str, cut: Cut | None, rank: int, size: int, start: int, stop: int) -> Tensor:
        """Return elements [start, stop) of the flattened part that tensor rank `rank` of `size` has of a parameter.

        Where it was saved in the same parts, only the pieces that overlap are read.
        """
        entry = self._entry(name)
        if cut is None and entry["tensor"] == 1:
            return self._run(name, key, 0, start, stop)
        if cut is not None and entry["tensor"] == size and entry["cut"]:
            return self._run(name, key, rank, start, stop)
        whole = self.tensor(name, key)
        part = whole if cut is None else cut.part(whole, rank, size)
        return part.flatten()[start:stop]

    def _run(self, name: str, key: str, tensor: int, start: int, stop: int) -> Tensor:
        found, filled = torch.empty(stop - start), 0
        for piece in (Piece(*numbers) for numbers in self._entry(name)["pieces"]):
            low, high = max(start, piece.start), min(stop, piece.start + piece.size)
            if piece.tensor == tensor and low < high:
                stored = self._file(piece.rank).get_slice(stored_name(name, key))
                inside = slice(low - piece.start, high - piece.start)
                is_flat = len(stored.get_shape()) == 1
                found[low - start : high - start] = stored[inside] if is_flat else stored[:].flatten()[inside]
                filled += high - low
        if filled != stop - start:
            raise UserError(f"{self.folder} holds {filled} of {stop - start} elements of {stored_name(name, key)}")
        return found

    def _entry(self, name: str) -> dict[str, Any]:
        if name not in self._index:
            raise UserError(f"{self.folder} is a checkpoint of another model: it holds no {name}")
        return self._index[name]

    def _file(self, rank: int) -> Any:
        if rank not in self._files:
            self._files[rank] = safe_open(self.folder / file_of(rank), framework="pt")
        return self._files[rank]


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
    """Compare the parameters of a whole `model` (which may be on the meta device) with a checkpoint's, in both directions.

    Raises:
        UserError: the checkpoint is of another model.
    """
    expected, found = {name: tuple(p.shape) for name, p in model.named_parameters()}, stored.shapes()
    for name, shape in expected.items():
        if name not in found:
            raise UserError(f"{stored.folder} is a checkpoint of another model: it holds no {name}")
        if found[name] != shape:
            raise UserError(
                f"{stored.folder} is a checkpoint of another shape: {name} is {found[name]} there and {shape} here"
            )
    foreign = sorted(found.keys() - expected.keys())
    if foreign:
        raise UserError(
            f"{stored.folder} is a checkpoint of another model: it holds {foreign[0]}, which this one has not"
        )


def load_weights(model: nn.Module, folder: Path) -> dict[str, Any]:
    """Fill a whole `model`'s parameters from a checkpoint, and return the checkpoint's state.

    Raises:
        UserError: the checkpoint is of another model.
    """
    reader = CheckpointReader(folder)
    check_shapes(model, reader)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(reader.tensor(name))
    return reader.state
