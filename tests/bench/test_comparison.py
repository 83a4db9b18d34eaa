"""bench.train and bench.telemetry: arithmetic, contenders, refused options, and (slow) one round on a tiny model."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from bench import contenders, telemetry, train
from bench.train import OTHERS, BusyElsewhere, main, ratios
from conf.load import load
from conf.shape import shape_of
from kernels.common.errors import UserError
from launch.estimate.counts import flops_per_token, parameters, score_flops_per_token

ROOT = Path(__file__).parents[2]
TINY_MODEL = ["tokenizer.vocab_size=320", "model.d_model=32", "model.n_layers=1", "model.n_heads=2", "model.d_ff=64"]
TINY_MODEL += ["model.head_dim=16", "sequence_length=32", "global_batch_size=2"]


def test_ratios_are_taken_round_by_round() -> None:
    runs = {"ours": [100.0, 300.0, 200.0], "transformers": [50.0, 100.0, 200.0], "torchtune": [100.0, 100.0, 100.0]}
    figures = ratios(runs, "ours")
    assert list(figures) == ["transformers", "torchtune"]
    assert figures["transformers"] == {"median": 2.0, "range": [1.0, 3.0], "rounds": [2.0, 3.0, 1.0]}
    assert figures["torchtune"] == {"median": 2.0, "range": [1.0, 3.0], "rounds": [1.0, 3.0, 2.0]}


def test_the_speed_of_a_run_is_the_median_of_its_steps_after_a_quarter(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(name: str, *_: Any) -> dict[str, Any]:
        seconds = [90.0, 9.0] + [1.0] * 3 + [5.0, 8.0, 2.0]
        of_library = {"seconds": seconds, "cpu_seconds": [2 * second for second in seconds]}
        return {"left_out": "no such package"} if name == "torchtune" else of_library

    monkeypatch.setattr(train, "seconds_of_steps", lambda *_: run("ours")["seconds"])
    monkeypatch.setattr(train, "_other", run)
    main(["rounds=2", "steps=8", f"out={tmp_path / 'figures.json'}", *TINY_MODEL])
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["tokens_per_second"] == {name: [64 / 1.5] * 2 for name in ("ours", *OTHERS) if name != "torchtune"}
    assert figures["tokens_per_cpu_second"]["engine alone"] == [64 / 3.0] * 2
    assert (
        figures["ratios"]["litgpt compiled"]["median"]
        == figures["ratios_by_cpu_time"]["litgpt compiled"]["median"]
        == 1.0
    )
    assert figures["contenders"]["torchtune"] == {"left_out": "no such package"}
    assert capsys.readouterr().out.count("torchtune is left out: no such package") == 1


def test_every_library_of_the_report_has_a_builder() -> None:
    assert (*contenders.CONTENDERS, "engine alone", "matrix products alone") == OTHERS


@pytest.mark.parametrize("overrides", [[], ["model.n_kv_heads=1", "model.n_layers=3"]])
def test_the_matrix_products_are_those_of_a_step(overrides: list[str]) -> None:
    config = load([*TINY_MODEL, *overrides])
    shape, tokens = shape_of(config), config.global_batch_size * config.sequence_length
    step = contenders.products_step(config, shape, torch.device("cpu"), torch.float32)
    with FlopCounterMode(display=False) as counter:
        step(torch.empty(0))
    per_token = sum(flops_per_token(shape, config.sequence_length).values())
    assert counter.get_total_flops() == tokens * (per_token - score_flops_per_token(shape, config.sequence_length))


@pytest.mark.parametrize(
    "overrides", [[], ["model.qk_norm=false", "model.n_kv_heads=1"], ["model.tie_embeddings=true"]]
)
@pytest.mark.parametrize("name", ["transformers", "litgpt compiled", "torchtune"])
def test_a_contender_is_a_causal_model_of_our_shape_with_the_loss_of_the_targets(
    name: str, overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(contenders.CONTENDERS[name].package, exc_type=ImportError)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda _: None)  # the same model, without a minute of compiling
    torch.manual_seed(0)
    shape = shape_of(load([*TINY_MODEL, *overrides]))
    model, loss = contenders.CONTENDERS[name].build(shape, 32)
    assert sum(parameter.numel() for parameter in model.parameters()) == sum(parameters(shape).values())
    inputs, targets = torch.randint(shape.vocab_size, (2, 2, 32))

    def logits(tokens: torch.Tensor) -> torch.Tensor:  # (2, 32, V)
        out = model(tokens)
        return torch.cat(out, 1) if isinstance(out, list) else getattr(out, "logits", out)

    expected = F.cross_entropy(logits(inputs).flatten(0, 1), targets.flatten())
    torch.testing.assert_close(loss(inputs, targets), expected)
    changed = torch.cat((inputs[:, :-1], (inputs[:, -1:] + 1) % shape.vocab_size), 1)
    torch.testing.assert_close(logits(changed)[:, :-1], logits(inputs)[:, :-1])  # causal
    assert not torch.allclose(logits(changed)[:, -1], logits(inputs)[:, -1])


def test_a_library_that_cannot_be_imported_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "litgpt", None)
    with pytest.raises(ImportError):
        contenders.litgpt_compiled(shape_of(load(TINY_MODEL)), 32)


def test_cores_busy_elsewhere_are_those_of_neither_this_process_nor_its_children(
    monkeypatch: pytest.MonkeyPatch, set_time: Callable[..., None]
) -> None:
    Times = namedtuple("Times", "user system idle iowait steal guest")
    Usage = namedtuple("Usage", "ru_utime ru_stime")
    # In 10 seconds of a machine of 2 cores: 4 of this process, 6 of its children, 5 of others (2 of them in a guest), 1 stolen.
    times = iter([Times(100, 20, 50, 7, 1, 30), Times(113, 22, 53, 8, 2, 32)])
    usages = iter([Usage(1, 1), Usage(2, 0), Usage(4, 2), Usage(7, 1)])
    clock = iter([1000.0, 1010.0])
    monkeypatch.setattr(train.psutil, "cpu_times", lambda: next(times))
    monkeypatch.setattr(train.resource, "getrusage", lambda _: next(usages))
    set_time(train, perf_counter=lambda: next(clock))
    assert BusyElsewhere().cores() == pytest.approx((13 + 2 + 1 - 4 - 6) / 10)


@pytest.mark.parametrize("arguments", [["steps=4"], ["rounds=x"], ["ffn=swigluu"]])
@pytest.mark.parametrize("command", [main, telemetry.main])
def test_bad_input_is_refused(command: Callable[[list[str]], None], arguments: list[str]) -> None:
    with pytest.raises(UserError):
        command(arguments)


def test_the_cost_of_a_sample_is_that_of_its_step_and_the_next_beyond_two_others() -> None:
    # Steps 1 to 4 warm up; step 8, 12, 16 are sampled, and 9, 13 and 17 write the line.
    seconds = [9.0] * 4 + [1.25, 1.0, 1.0, 1.5] * 4
    assert telemetry.sample_cost(seconds) == 0.75


def test_other_arms_are_not_compared_with_llamas() -> None:
    with pytest.raises(UserError, match="ffn=swiglu"):
        main(["ffn=relu"])


@pytest.mark.slow
def test_a_round_on_a_tiny_model(tmp_path: Path) -> None:
    corpus = tmp_path / "text"
    corpus.mkdir()
    for number in range(40):
        (corpus / f"{number}.txt").write_text(f"document {number}: " + "the quick brown fox jumps over the dog. " * 60)
    out = tmp_path / "figures.json"
    arguments = ["rounds=1", "steps=8", f"out={out}", "data=text", f"data.path={corpus}", f"data.prepared={tmp_path}"]
    arguments += [*TINY_MODEL, "tokens=1000"]
    subprocess.run([sys.executable, "-m", "bench.train", *arguments], cwd=ROOT, check=True, timeout=1200)
    figures = json.loads(out.read_text())
    left_out = {name for name, facts in figures["contenders"].items() if "left_out" in facts}
    assert left_out <= {"litgpt compiled", "torchtune"}, "Transformers is installed with the tests"
    assert set(figures["tokens_per_second"]) | left_out == {"ours", *OTHERS}
    assert all(len(speeds) == 1 and speeds[0] > 0 for speeds in figures["tokens_per_second"].values())
