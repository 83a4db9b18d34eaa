"""The campaign `manifests`: damaged manifests of checkpoints and plans, and other files that say what a folder is."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from ablation.manifest import hashes_of
from ablation.manifest import read_manifest as read_plan_manifest
from bench.fuzz.campaign import Campaign
from bench.fuzz.indexes import CHECKPOINT, resume
from bench.fuzz.metrics import begin, readings_of_plan
from bench.fuzz.mutations import (
    VALUES,
    Damaged,
    copied,
    damaged_bytes,
    damaged_json,
    damaged_text,
    json_bytes,
    read_all,
)
from bench.fuzz.sound import run_config, write_plan, write_run
from conf.load import from_yaml, values_of
from conf.validate import validate
from kernels.common.errors import UserError
from kernels.common.json_files import digest
from launch.endings import read_ending
from model.health import damage
from model.manifest import run_of

_YAML = ("&a [*a, *a]", "!!python/object/apply:os.system [x]", "!!python/name:os.system", "!!binary aa", "${oc.env:HOME}",
         "? [a]", "<<: {a: 1}", "[" * 500, "{a: " * 500, "- " * 500, "9" * 5000, "1e999", "1:30:00", "2026-01-01", "\t", "%",
         "!!int x", "!!set {a}", "~", "|", ">-", "'", '"', "@", "`", "---", "...", "\x85", "\ufeff", "*a", "=")  # fmt: skip


def campaign(_: str, folder: Path) -> Campaign:
    """Return the campaign; its sound files are written to an empty folder."""
    config = run_config()
    run = write_run(config, folder / "runs")
    plan = write_plan(folder / "plans")[1]
    names = ("manifest.json", "state.json")
    stored = {name: json.loads((run / CHECKPOINT / name).read_text(encoding="utf-8")) for name in names}
    planned = json.loads((plan / "manifest.json").read_text(encoding="utf-8"))

    def make(draw: random.Random) -> Damaged:
        kind = draw.random()
        if kind < 0.25:
            return _manifest_of_checkpoint(draw, stored["manifest.json"])
        if kind < 0.4:
            return Damaged(
                "run, fitting", {f"{CHECKPOINT}/state.json": json_bytes(draw, damaged_json(draw, stored["state.json"]))}
            )
        if kind < 0.6:
            return _manifest_of_plan(draw, planned)
        if kind < 0.9:
            return Damaged("configuration", {"config.yaml": _damaged_yaml(draw, (run / "config.yaml").read_bytes())})
        ending = json_bytes(
            draw, damaged_json(draw, json.loads((run / "ending.json").read_text(encoding="utf-8"))), 0.4
        )
        return Damaged("ending", {"ending.json": ending})

    def read(damaged: Damaged) -> None:
        kind, _, how = damaged.how.partition(", ")
        with copied(plan if kind == "plan" else run, damaged.files) as copy:
            checkpoint = copy / CHECKPOINT
            readers: dict[str, list[Any]] = {
                "run": [
                    lambda: resume(copy, config, how == "fitting"),
                    lambda: damage(checkpoint),
                    lambda: run_of(checkpoint),
                ],
                "plan": [lambda: read_plan_manifest(copy), *readings_of_plan(copy)],
                "configuration": [
                    lambda: validate(from_yaml(copy / "config.yaml"), 1),
                    lambda: values_of(copy / "config.yaml"),
                ],
                "ending": [lambda: read_ending(copy)],
            }
            read_all(readers[kind], (UserError,))

    read(Damaged("plan", {}))  # loads what the dashboard needs
    return Campaign(make, read, (UserError,), begin)


def _manifest_of_checkpoint(draw: random.Random, sound: dict[str, Any]) -> Damaged:
    content = damaged_json(draw, sound)
    if fits := isinstance(content, dict) and draw.random() < 0.7:
        content.pop("digest", None)
        content["digest"] = digest(content, 16)
    return Damaged(
        f"run, {'signed' if fits else 'as it is'}", {f"{CHECKPOINT}/manifest.json": json_bytes(draw, content)}
    )


def _manifest_of_plan(draw: random.Random, sound: dict[str, Any]) -> Damaged:
    """Damage what a plan's manifest says, most often with hashes that fit."""
    content = damaged_json(draw, sound)
    if fits := draw.random() < 0.8:
        try:
            content["hash"], content["hashes"] = hashes_of({part: content[part] for part in ("plan", "shared", "arms")})
        except (LookupError, TypeError, AttributeError):
            fits = False
    return Damaged(f"plan, {'signed' if fits else 'as it is'}", {"manifest.json": json_bytes(draw, content)})


def _damaged_yaml(draw: random.Random, raw: bytes) -> bytes:
    """Return a configuration with lines that have other values, tags, anchors or indentation, or are gone."""
    lines = raw.decode().splitlines()
    for _ in range(draw.choice((1, 1, 2, 5))):
        at, kind = draw.randrange(len(lines)), draw.random()
        name = lines[at].partition(":")[0]
        if kind < 0.4:
            lines[at] = f"{name}: {draw.choice(_YAML)}"
        elif kind < 0.65:
            lines[at] = f"{name}: {json.dumps(draw.choice(VALUES))}"
        elif kind < 0.72:
            lines[at] = draw.choice(_YAML)
        elif kind < 0.8:
            lines[at] = f"{draw.choice(('  ', ' ', chr(9)))}{lines[at]}"
        elif kind < 0.9:
            lines.insert(at, draw.choice(lines))
        elif len(lines) > 1:
            del lines[at]
    if draw.random() < 0.02:  # a bomb
        lines = [f"a{i}: &a{i} [{f'*a{i - 1}, ' * 9 if i else 'x'}]" for i in range(30)]
    text = "\n".join(lines).encode("utf-8", "surrogatepass") + b"\n"
    return draw.choice((damaged_text, damaged_bytes))(draw, text) if draw.random() < 0.1 else text
