"""The checkpoint format: how weights are written, read and verified.

A checkpoint is a folder `step_00000100/`:

    rank_00000.safetensors   one rank's pieces of parameters and of their optimizer state, in fp32
    index.json               the place of each piece in the full tensor of its name
    state.json               the counters of the run
    manifest.json            the size and BLAKE2 hash of each of these files, and what they are of (`manifest.py`)

The format does not depend on the topology. A piece is a range of consecutive elements of a flattened tensor-parallel shard, and
the index holds the `parallel.ShardSpec` that unshards them. A rank of any other topology finds what it needs, and one of the
same topology finds it in one piece. So ranks gather nothing to save, all of them write at once, and speed needs no second,
native format. Gate and up of a gated arm are an axis of their own, which is never sharded, so they cannot be mixed.

Reading executes nothing that a file contains; `health.py` finds what a checkpoint is worth. Which pieces a rank holds, and the
optimizer state, live in `training/checkpoint.py`.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor, nn

from conf.optimizers.optimizer import ADAMW_RULE
from kernels.common.errors import UserError
from kernels.common.files import atomic_folder, naming
from kernels.common.json_files import digest, read_object
from model.manifest import file_hash, file_of, write_manifest
from model.parallel import ShardSpec, full_shape, shard_spec

FORMAT = 2
_FILE_BYTES = 2 << 30  # `save_weights` starts a new file at this size
_INDEX_BYTES = 1 << 31  # of the longest index.json that is read
# The states of AdamW. Checkpoints whose index lists no states, of before there were other optimizers, hold these or none.
MOMENTS = ADAMW_RULE.states


class Piece(NamedTuple):
    """A range of elements of a flattened shard of a parameter."""

    tensor: int  # tensor rank of the shard
    start: int
    size: int
    rank: int  # whose file holds it


def stored_name(name: str, key: str = "") -> str:
    """Return the name of a parameter's piece in a rank's file, or of the state `key` that the optimizer keeps of it."""
    return f"{name}.{key}" if key else name


def index_entry(
    parameter: nn.Parameter, tensor: int, states: Iterable[str], row_states: Iterable[str] = ()
) -> dict[str, Any]:
    """Return the index entry, still without pieces, of a parameter of a model on `tensor` tensor ranks.

    Args:
        states: that the optimizer keeps of it, and that every piece has beside it.
        row_states: with one number per row of the full tensor; the file of rank 0 holds them whole.
    """
    spec = shard_spec(parameter)
    return {
        "shape": list(full_shape(parameter, tensor)),
        "tensor": tensor if spec else 1,
        "cut": {"dim": spec.dim, "sections": list(spec.sections)} if spec else None,
        "states": list(states),
        "row_states": list(row_states),
        "pieces": [],
    }


def header_of(state: dict[str, Any], rank: int, pieces: Iterable[tuple[str, Piece]]) -> dict[str, str]:
    """Return what the header of a rank's file says about it: the checkpoint that it belongs to, and its place there.

    Args:
        state: what state.json holds.
        pieces: (parameter's name, piece) of each piece in the file.
    """
    step, run = str(state["step"]), str(state.get("run_id"))
    return {"step": step, "rank": str(rank), "run": run, "pieces": digest([(name, [*piece]) for name, piece in pieces])}


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> dict[str, Any]:
    """Write fp32 tensors in host memory as a safetensors file, sync it, and return its manifest entry.

    The hash is computed while the bytes are written: a file of many GB is neither read again nor copied in memory.

    Args:
        metadata: of the header, from `header_of`.
    """
    header: dict[str, Any] = {"__metadata__": metadata}
    offset = 0
    for name, tensor in tensors.items():
        end = offset + 4 * tensor.numel()
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest, size = hashlib.blake2b(digest_size=16), 0
    with naming(path), open(path, "wb", buffering=0) as file:
        flat = (tensor.detach().contiguous().view(-1).numpy().data for tensor in tensors.values())
        for part in (len(text).to_bytes(8, "little"), text, *flat):
            rest = memoryview(part).cast("B")
            digest.update(rest)
            size += len(rest)
            while rest:
                rest = rest[file.write(rest) :]
        os.fsync(file.fileno())
    return {"bytes": size, "blake2b": digest.hexdigest()}


def write_rest(folder: Path, index: dict[str, Any], state: dict[str, Any], files: dict[str, dict[str, Any]]) -> None:
    """Write index.json, state.json and manifest.json beside the ranks' files.

    Args:
        files: the manifest entries of the ranks' files, by name.
    """
    files = dict(files)
    for name, content in (("index.json", index), ("state.json", {**state, "format": FORMAT})):
        with naming(folder / name):
            (folder / name).write_text(
                json.dumps(content, indent=2 if name == "state.json" else None) + "\n", encoding="utf-8"
            )
        files[name] = {"bytes": (folder / name).stat().st_size, "blake2b": file_hash(folder / name)}
    write_manifest(folder, state, files)


class OptimizerState(NamedTuple):
    """What an optimizer keeps of parameters, for `save_weights`."""

    steps: int = 0  # that it has taken
    of: Callable[[str], Mapping[str, Tensor]] = lambda _: {}  # a parameter's name -> its states, of its full shape
    by_rows: Mapping[str, Mapping[str, Tensor]] = {}  # {parameter: {state: one number per row}}


NO_STATE = OptimizerState()


def save_weights(
    path: Path,
    tensors: Iterable[tuple[str, Tensor]],
    state: dict[str, Any],
    optimizer: OptimizerState = NO_STATE,
) -> None:
    """Write full tensors, by the names of `Decoder.named_parameters`, as a checkpoint; without `optimizer`, of weights alone.

    Args:
        path: the checkpoint's folder, `step_N` for N = state["step"]. It must not exist.
        tensors: consumed one at a time. They are written to several files, as if by several ranks, to bound the memory used.
    """
    index: dict[str, Any] = {}
    files: dict[str, Any] = {}
    buffered: dict[str, Tensor] = {
        stored_name(name, key): values for name, states in optimizer.by_rows.items() for key, values in states.items()
    }
    with atomic_folder(path) as folder:

        def write() -> None:
            name, pieces = file_of(len(files)), [(n, index[n]["pieces"][0]) for n in buffered if n in index]
            files[name] = write_tensors(folder / name, buffered, header_of(state, len(files), pieces))
            buffered.clear()

        for name, tensor in tensors:
            buffered[name] = tensor.detach().to("cpu", torch.float32)
            pieces = [Piece(0, 0, tensor.numel(), len(files))]
            states = {key: values.to("cpu", torch.float32) for key, values in optimizer.of(name).items()}
            buffered |= {stored_name(name, key): values for key, values in states.items()}
            index[name] = {"shape": list(tensor.shape), "tensor": 1, "cut": None, "states": [*states], "pieces": pieces}
            index[name] |= {"row_states": [*rows]} if (rows := optimizer.by_rows.get(name)) else {}
            if sum(4 * each.numel() for each in buffered.values()) >= _FILE_BYTES:
                write()
        write()
        write_rest(folder, index, {**state, "optimizer_steps": optimizer.steps}, files)


class CheckpointReader:
    """Reads tensors of a checkpoint by name, in full or in part, from whichever files hold their pieces.

    Raises:
        UserError: the checkpoint has another format.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.state: dict[str, Any] = read_object(folder / "state.json")
        if self.state.get("format") != FORMAT:
            raise UserError(
                f"{folder} has checkpoint format {self.state.get('format')}, and this version reads {FORMAT}: "
                "continue with the version that wrote it, or start a run of another name (run=NAME)"
            )
        self._index: dict[str, Any] = read_object(folder / "index.json", _INDEX_BYTES)
        self._files: dict[int, Any] = {}

    def states(self, name: str) -> tuple[str, ...]:
        """Return the names of the states that the checkpoint holds of a parameter; without any a run starts from zeros."""
        entry = self._entry(name)
        if "states" in entry:
            return tuple(entry["states"])
        names = self._file(entry["pieces"][0][3]).keys()  # of version 0.2
        return MOMENTS if stored_name(name, MOMENTS[0]) in names else ()

    def row_states(self, name: str) -> dict[str, Tensor]:
        """Return the states of a parameter with one number per row of its full tensor, flat."""
        keys = self._entry(name).get("row_states", [])
        return {key: self._file(0).get_tensor(stored_name(name, key)).flatten() for key in keys}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the full shape of every parameter by name, without reading any."""
        return {name: tuple(entry["shape"]) for name, entry in self._index.items()}

    def spec(self, name: str) -> ShardSpec | None:
        """Return how a parameter is divided among tensor ranks in the checkpoint; None: it is whole."""
        cut = self._entry(name)["cut"]
        return ShardSpec(cut["dim"], tuple(cut["sections"])) if cut else None

    def tensor(self, name: str, key: str = "") -> Tensor:
        """Return a full parameter, or its optimizer state `key`, in fp32.

        Raises:
            UserError: the checkpoint does not hold it, or holds it incompletely.
        """
        entry = self._entry(name)
        spec, tensor = self.spec(name), entry["tensor"]
        shape = list(entry["shape"])
        if spec:
            shape[spec.dim] //= tensor
        shards = [self._stored_range(name, key, rank, 0, math.prod(shape)).view(shape) for rank in range(tensor)]
        return spec.unshard(shards) if spec else shards[0]

    def shard_range(
        self, name: str, key: str, spec: ShardSpec | None, rank: int, size: int, start: int, stop: int
    ) -> Tensor:
        """Return elements [start, stop) of the flattened shard of a parameter that belongs to tensor rank `rank` of `size`.

        If the checkpoint was saved with the same shards, only the pieces that overlap the range are read.
        """
        entry = self._entry(name)
        if spec is None and entry["tensor"] == 1:
            return self._stored_range(name, key, 0, start, stop)
        if spec is not None and entry["tensor"] == size and entry["cut"]:
            return self._stored_range(name, key, rank, start, stop)
        full = self.tensor(name, key)
        shard = full if spec is None else spec.shard(full, rank, size)
        return shard.flatten()[start:stop]

    def _stored_range(self, name: str, key: str, tensor: int, start: int, stop: int) -> Tensor:
        """Return elements [start, stop) of the flattened shard that tensor rank `tensor` saved."""
        values, filled = torch.empty(stop - start), 0
        for piece in (Piece(*numbers) for numbers in self._entry(name)["pieces"]):
            low, high = max(start, piece.start), min(stop, piece.start + piece.size)
            if piece.tensor == tensor and low < high:
                stored = self._file(piece.rank).get_slice(stored_name(name, key))
                inside = slice(low - piece.start, high - piece.start)
                is_flat = len(stored.get_shape()) == 1
                values[low - start : high - start] = stored[inside] if is_flat else stored[:].flatten()[inside]
                filled += high - low
        if filled != stop - start:
            raise UserError(f"{self.folder} holds {filled} of {stop - start} elements of {stored_name(name, key)}")
        return values

    def _entry(self, name: str) -> dict[str, Any]:
        if name not in self._index:
            raise UserError(f"{self.folder} is a checkpoint of another model: it holds no {name}")
        return self._index[name]

    def _file(self, rank: int) -> Any:
        if rank not in self._files:
            self._files[rank] = safe_open(self.folder / file_of(rank), framework="pt")
        return self._files[rank]


def step_of(checkpoint: Path) -> int:
    """Return the step of a checkpoint's folder, `step_N`."""
    return int(checkpoint.name.removeprefix("step_"))


def checkpoints(folder: Path) -> Iterator[Path]:
    """Yield the complete checkpoints in `folder`, newest first: folders `step_N`. An unfinished one has another name."""
    steps = {path: path.name.removeprefix("step_") for path in folder.glob("step_*") if path.is_dir()}
    yield from sorted(
        (path for path in steps if steps[path].isdecimal()), key=lambda path: int(steps[path]), reverse=True
    )


def check_shapes(model: nn.Module, stored: CheckpointReader) -> None:
    """Check that a checkpoint holds exactly the parameters of an unsharded `model` (which may be on the meta device).

    Raises:
        UserError: the checkpoint is of another model.
    """
    expected, actual = {name: tuple(p.shape) for name, p in model.named_parameters()}, stored.shapes()
    specs = {name: shard_spec(parameter) for name, parameter in model.named_parameters()}
    for name, shape in expected.items():
        if name not in actual:
            raise UserError(f"{stored.folder} is a checkpoint of another model: it holds no {name}")
        if actual[name] != shape:
            raise UserError(
                f"{stored.folder} is a checkpoint of another shape: {name} is {actual[name]} there and {shape} here"
            )
        spec, stored_spec = specs[name], stored.spec(name)
        if stored_spec is not None and stored_spec != spec:
            raise UserError(f"{stored.folder} is a checkpoint of another model: {name} is sharded in another way there")
    unexpected = sorted(actual.keys() - expected.keys())
    if unexpected:
        raise UserError(
            f"{stored.folder} is a checkpoint of another model: it holds {unexpected[0]}, which this one does not have"
        )


def load_weights(model: nn.Module, folder: Path) -> dict[str, Any]:
    """Fill the parameters of an unsharded `model` from a checkpoint, and return the checkpoint's state.

    Raises:
        UserError: the checkpoint is of another model.
    """
    reader = CheckpointReader(folder)
    check_shapes(model, reader)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(reader.tensor(name))
    return reader.state
