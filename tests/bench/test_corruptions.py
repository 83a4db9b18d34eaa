"""The campaign of corruptions, without the training: what is read of a damaged run folder, and what refuses it."""

from __future__ import annotations

import dataclasses
import hashlib
import traceback
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench.faults.corruptions import KINDS, STEPS, Case, Ending, Folders, campaign, checkpoint_of, verdict
from conf.identity import settings_of
from conf.load import load
from conf.schema import Config
from conf.shape import shape_of
from kernels.common.errors import UserError
from model.decoder import Decoder
from model.health import contents_problem
from model.weights import CheckpointReader, save_weights, step_of
from tests.training.tiny import overrides
from training.resume import choose_checkpoint, why_unfit
from training.runfolder import RunFolder

DATASET = SimpleNamespace(tokenizer=SimpleNamespace(hash="tokenizer"), corpus_hash="text", folder="prepared")
VOCABULARY = 384


def write_run(config: Config, name: str) -> Path:
    """Write the folder of a run that stopped after step 9, with random weights."""
    config = dataclasses.replace(config, run=name)
    folder = RunFolder(config)
    folder.claim(config)
    folder.run_id = hashlib.md5(name.encode()).hexdigest()
    folder.metrics.append({"kind": "event", "step": 0, "event": "started", "run_id": folder.run_id})
    generator = torch.Generator().manual_seed(len(name))
    with torch.device("meta"):
        shapes = {n: p.shape for n, p in Decoder(shape_of(config, VOCABULARY), config.model, "sdpa").named_parameters()}
    for step in reversed(STEPS):
        state = {"step": step, "steps": config.steps, "warmup_steps": 2, "batches_hash": 1, "corpus_hash": "text"}
        state |= {"tokenizer_hash": "tokenizer", "eval_loss": None, "evaluation_missed": False, "wall_seconds": 1.0}
        state |= {"run_id": folder.run_id, "settings": settings_of(config)}
        tensors = ((n, torch.randn(shape, generator=generator)) for n, shape in shapes.items())
        save_weights(checkpoint_of(folder.path, step), tensors, state)
        folder.metrics.append({"kind": "event", "step": step, "event": "saved"})
    folder.write_run_id()
    folder.append_provenance({})
    folder.write_summary({"status": "stopped", "steps": 9, "run_id": folder.run_id})
    folder.close()
    return folder.path


def fingerprint(checkpoint: Path) -> str:
    """Return a hash of all weights that are read from a checkpoint."""
    reader, digest = CheckpointReader(checkpoint), hashlib.blake2b()
    for name in sorted(reader.shapes()):
        digest.update(reader.tensor(name).numpy().tobytes())
    return digest.hexdigest()


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Config, Folders]:
    """The configuration of a run, its folder, and those of others."""
    root = tmp_path_factory.mktemp("corruptions")
    config = load(overrides(root, root, run="run"))
    arm = load(overrides(root, root, run="arm", ffn="geglu"))
    seed, length = dataclasses.replace(config, seed=1), dataclasses.replace(config, steps=24)
    others = tuple(write_run(other, n) for other, n in ((seed, "seed"), (arm, "arm"), (length, "length")))
    return config, Folders(write_run(config, "run"), others)


def resume(config: Config, run: Path) -> Ending:
    """Do what a resumed run does before it builds its engine; return the fingerprint of the weights that it would load."""
    config = dataclasses.replace(config, run=run.name)
    shape, folder, output = shape_of(config, VOCABULARY), RunFolder(config), ""
    try:
        output = "\n".join(folder.claim(config))
        path, warnings = choose_checkpoint(
            folder.checkpoints, folder.run_id, contents_problem, lambda path: why_unfit(path, DATASET, shape, config)
        )
        output = "\n".join([output, *warnings])
        if path is None:
            folder.refuse_to_start_over()
            return Ending(0, output, None, None)
        folder.rewind(step_of(path))
        folder.append_provenance({})
        return Ending(0, output, step_of(path), fingerprint(path))
    except UserError as error:
        return Ending(2, f"{output}\nerror: {error}", None, None)
    except Exception:
        return Ending(1, traceback.format_exc(), None, None)
    finally:
        folder.close()


def test_each_corruption_is_noticed_or_harmless(folders):
    config, prepared = folders
    pristine = {step: fingerprint(checkpoint_of(prepared.run, step)) for step in STEPS}
    ended = list(campaign(prepared, 48, 0, lambda run: resume(config, run), pristine.__getitem__))
    wrong = [
        f"{number}: {case.kind}: {case.what}: {problem}" for number, (case, _, problem) in enumerate(ended) if problem
    ]
    assert not wrong, "\n".join(wrong)
    assert {case.kind for case, _, _ in ended} == set(KINDS)
    steps = {ending.step for _, ending, _ in ended}
    assert steps == {None, *STEPS}  # some are refused, and some go on from each of the checkpoints


def test_a_verdict_says_what_is_wrong():
    case, expected = Case("damage", "", 6, False), {6: "right", 9: "wrong"}.__getitem__
    assert verdict(case, Ending(0, "", 6, "right"), expected) == ""
    assert verdict(case, Ending(0, "", 9, "right"), expected) == "it went on from 9, not from 6"
    assert verdict(case, Ending(0, "", 6, "wrong"), expected) == "it led to wrong, not to right"
    assert verdict(case, Ending(2, "error: no", None, None), expected) == "refused: error: no"
    assert verdict(case, Ending(2, "", None, None), expected) == "0 sentences refuse it"
    assert verdict(case, Ending(1, "Traceback ...", None, None), expected) == "status 1: ['Traceback ...']"
    assert verdict(case, Ending(None, "", None, None), expected) == "it waits"
    nothing_left = dataclasses.replace(case, step=None)
    assert verdict(nothing_left, Ending(2, "error: no", None, None), expected) == ""
    assert "should have been refused" in verdict(nothing_left, Ending(0, "", None, None), expected)
