"""The campaign `indexes`: damaged indexes of a prepared corpus, opened, and of a checkpoint, resumed from."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from bench.faults.corruptions import fit_manifest
from bench.fuzz.campaign import Campaign
from bench.fuzz.mutations import Damaged, copied, damaged_bytes, damaged_json, json_bytes, read_all
from bench.fuzz.sound import (
    DATASET,
    VOCABULARY,
    remember_configurations,
    run_config,
    write_blend,
    write_prepared,
    write_run,
)
from conf.schema import Config
from conf.shape import shape_of
from data.batches import BatchStream, held_out_windows, open_dataset, refuse_repetition
from data.shards import finished_group, token_dtype
from data.verify import verify
from kernels.common.errors import UserError
from kernels.common.json_files import digest
from kernels.common.units import duration
from model.decoder import Decoder
from model.health import contents_problem
from model.weights import CheckpointReader, load_weights
from training.resume import choose_checkpoint, why_unfit
from training.spikes import SpikeDetector
from training.verify import verify as verify_run

LENGTH = 16
CHECKPOINT = "checkpoints/step_00000008"


def campaign(_: str, folder: Path) -> Campaign:
    """Return the campaign; its sound files are written to an empty folder."""
    small = write_prepared(folder / "prepared")
    blend = write_blend(folder / "prepared", small)
    config = run_config()
    run = write_run(config, folder / "runs")
    indexes = {path: json.loads((path / "index.json").read_text()) for path in (small, blend)}
    group, stored = (
        json.loads((small / "group-00000.json").read_text()),
        json.loads((run / CHECKPOINT / "index.json").read_text()),
    )
    lists = {path.name: path.read_bytes() for path in small.glob("*.idx")}

    def make(draw: random.Random) -> Damaged:
        kind = draw.random()
        if kind < 0.35:
            return _index_of_corpus(draw, small.name, indexes[small])
        if kind < 0.5:
            return _index_of_corpus(draw, blend.name, indexes[blend])
        if kind < 0.55:
            content = json_bytes(draw, damaged_json(draw, group))
            return Damaged("record of shards", {f"{small.name}/group-00000.json": content})
        if kind < 0.6:
            name = draw.choice(sorted(lists))
            return Damaged("ends of documents", {f"{small.name}/{name}": damaged_bytes(draw, lists[name])})
        fits = "" if draw.random() < 0.1 else ", fitting"
        return Damaged(
            f"checkpoint{fits}", {f"{CHECKPOINT}/index.json": json_bytes(draw, damaged_json(draw, stored), 0.1)}
        )

    def read(damaged: Damaged) -> None:
        if damaged.how.startswith("checkpoint"):
            with copied(run, damaged.files) as copy:
                resume(copy, config, damaged.how.endswith("fitting"))
        else:
            with copied(small.parent, damaged.files) as copy:
                names = [blend.name] if f"{blend.name}/index.json" in damaged.files else [small.name, blend.name]
                read_all([step for name in names for step in _openings(copy / name, group)], (UserError,))

    return Campaign(make, read, (UserError,), remember_configurations)


def _index_of_corpus(draw: random.Random, name: str, sound: dict[str, Any]) -> Damaged:
    """Damage the index of a corpus; with a digest that fits, without one as version 0.1 left it, or with the old one."""
    index = damaged_json(draw, sound)
    how = draw.choice(("fitting", "fitting", "no digest", "old digest"))
    if isinstance(index, dict) and how != "old digest":
        index.pop("digest", None)
        if how == "fitting":
            index["digest"] = digest(index, 16)
    return Damaged(f"index, {how}", {f"{name}/index.json": json_bytes(draw, index)})


def _openings(folder: Path, group: dict[str, Any]) -> list[Any]:
    """Return what training, `data.prepare` and `data.verify` do with a prepared corpus."""

    def train() -> None:
        dataset = open_dataset(folder)
        stream = BatchStream(dataset, LENGTH, seed=0)
        stream.samples(0, 4)
        list(held_out_windows(dataset, LENGTH))
        refuse_repetition(dataset, LENGTH, 100, 1e6)
        f"{dataset.bytes_per_token:.2f} {dataset.why_no_bits} {dataset.xz_bits_per_byte or 0.0:.3f}"

    def prepare_again() -> None:
        finished_group(folder, 0, group["text_hash"], group["tokenizer_hash"], token_dtype(VOCABULARY))

    return [train, prepare_again, lambda: verify(folder)]


def resume(run: Path, config: Config, fits: bool) -> None:
    """Do with the folder of a run what `training.verify` and a resumed run do.

    Args:
        fits: rewrite the hashes of the checkpoint's manifest for the files that are there.

    Raises:
        UserError: no checkpoint can be used.
    """
    if fits:
        fit_manifest(run / CHECKPOINT)
    list(verify_run(run))
    shape = shape_of(config, VOCABULARY)
    path, _ = choose_checkpoint(
        run / "checkpoints", None, contents_problem, lambda path: why_unfit(path, DATASET, shape, config)
    )
    if path is None:
        raise UserError("there is no checkpoint")
    reader = CheckpointReader(path)
    SpikeDetector(4, 6.0).load(reader.state.get("spikes"))
    duration(reader.state["wall_seconds"])
    for name in reader.shapes():
        reader.tensor(name)
    if any(map(reader.states, reader.shapes())):
        raise AssertionError("it has no state of an optimizer")
    load_weights(Decoder(shape, config.model, "sdpa"), path)
