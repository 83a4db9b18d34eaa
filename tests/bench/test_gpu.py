"""bench.gpu without a GPU: arithmetic, the page, what it imports, and a dry run in the interpreter."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import gpu, gpu_page, gpu_resume, gpu_step, gpu_timing

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
ROW = {
    "formula": "swiglu",
    "dtype": "bfloat16",
    "shape": [8, 2, 16],
    "h": 2e-3,
    "h_eager": 2e-3,
    "dpre": 2e-3,
    "dpre_eager": 2e-3,
    "learned": 0.0,
    "not_finite": 0,
    "kernels_differ": 0.0,
    "repeats": True,
    "telemetry": {"h": 0.0, "statistics": 1e-4},
}
TIMES = {
    "formula": "swiglu",
    "rows": 8,
    "d_ff": 16,
    "forward_bytes": 600,
    "backward_bytes": 1000,
    "copy_bytes": 600,
    "forward": {"copy": [1e-6, 1e-6, 2e-6], "triton": [2e-6, 1e-6, 3e-6]},
    "backward": {"copy": [1e-6, 1e-6, 2e-6], "triton": [2e-6, 1e-6, 3e-6]},
    "saved_bytes": {"triton": 3 * 2**20},
}
RECORD = {
    "device": "a GPU",
    "torch": "1",
    "triton": "2",
    "checks": [ROW],
    "times": [TIMES],
    "left_out": ["tea"],
    "steps": [
        {
            "model": "llama_1b",
            "parameters": 1_100_048_384,
            "tokens": 16384,
            "seconds": [0.2, 0.1, 0.3],
            "tokens_per_second": 81920.0,
            "mfu": 0.45,
            "peak": "a data sheet",
            "losses": [10.0, 9.0],
            "activations_gib": 17.5,
            "estimate_gib": 18.0,
            "parts": {"GEMM": 0.15, "idle": 0.05},
        }
    ],
    "attention": [{"model": "llama_1b", "method": "sdpa", "seconds": [2e-3, 1e-3, 3e-3], "flops_per_second": 4e14}],
    "loss": [{"model": "llama_1b", "method": "chunks of 8192", "failed": "out of memory"}],
    "products": [
        {
            "model": "llama_1b",
            "method": "fp8 rowwise",
            "seconds": [2e-3, 1e-3, 3e-3],
            "flops_per_second": 9e14,
            "error": 2e-3,
        }
    ],
    "resume": [{"model": "nano", "method": "stop and resume", "stopped_after": 11, "equal": True, "seconds": 30.0}],
    "extremes": [{"formula": "swiglu", "dtype": "bfloat16", "nan_kept": True, "finite_lost": 0}],
    "large": [{"formula": "swiglu", "elements": 2**31, "error": 2e-3}],
    "fused": [
        {"operation": "norm 8x16", "dtype": "bfloat16", "forward": (2, 1, 3), "backward": (2, 1, 3), "error": 1.0}
    ],
    "tiles": [{"formula": "swiglu", "seconds": {"forward 512": [1e-6, 1e-6, 1e-6]}}],
}


def test_bandwidth_is_relative_to_the_copy():
    text = gpu_page.page(RECORD)
    # 600 bytes in 2 µs where the copy moves 600 in 1; backward moves 1000.
    assert "| swiglu | 8 x 16 | forward | triton | 2 (1 to 3) | 50% | 3 |" in text
    assert "| swiglu | 8 x 16 | backward | triton | 2 (1 to 3) | 83% | 3 |" in text
    assert "| swiglu | 8 x 16 | forward | copy | 1 (1 to 2) | 100% |  |" in text
    assert text.endswith("## Left out\n\ntea\n")


def test_the_page_begins_with_training_steps():
    text = gpu_page.page(RECORD)
    step = "| llama_1b | 1,100,048,384 | 16,384 | 200.0 (100.0 to 300.0) | 81,920 | 45.0% | 17.50 | 18.00 |"
    assert text.index(step) < text.index("## Errors")
    assert "llama_1b: GEMM 75%, idle 25%." in text
    assert "| llama_1b | sdpa | 2.00 (1.00 to 3.00) | 400 |  |" in text
    assert "| llama_1b | chunks of 8192 | out of memory | | |" in text
    assert "| llama_1b | fp8 rowwise | 2.00 (1.00 to 3.00) | 900 |  |" in text
    assert "stopped after step 11 ends with weights: the same to the last bit." in text


@pytest.mark.parametrize(
    ("section", "change", "expected"),
    [
        ("steps", {"failed": "no kernel image"}, "training llama_1b: no kernel image"),
        ("steps", {"losses": [10.0, float("nan")]}, "training llama_1b: the loss went from 10.000 to nan"),
        ("products", {"error": 0.1}, "llama_1b, products in fp8 rowwise: error 0.1"),
        ("products", {"error": float("nan")}, "error nan"),
        ("resume", {"equal": False}, "its weights differ"),
        ("resume", {"failed": "out of memory", "equal": False}, "nano, stop and resume: out of memory"),
        ("checks", {"h": 5e-3}, "the error of h is 0.005, plain torch's 0.002"),
        ("checks", {"dpre": float("nan")}, "the error of dpre is nan"),
        ("checks", {"not_finite": 3}, "3 numbers are not finite"),
        ("checks", {"repeats": False}, "sums repeat: False"),
        ("checks", {"learned": 0.9}, "the error of the gradient of the learned parameters is 0.9"),
        ("checks", {"learned": float("nan")}, "the error of the gradient of the learned parameters is nan"),
        ("checks", {"dtype": "float32", "h": 0.0, "dpre": 0.0, "learned": 1e-5}, "the learned parameters is 1e-05"),
        ("checks", {"kernels_differ": 0.9}, "the forward kernel and the two of backward differ by 0.9"),
        ("checks", {"kernels_differ": float("nan")}, "the two of backward differ by nan"),
        ("checks", {"failed": "no kernel image"}, "checks of swiglu, bfloat16, 8 x 2 x 16: no kernel image"),
        ("extremes", {"failed": "no kernel image"}, "extremes of swiglu, bfloat16: no kernel image"),
        ("large", {"failed": "out of memory"}, "large of swiglu: out of memory"),
        ("fused", {"failed": "no kernel image"}, "fused of norm 8x16, bfloat16: no kernel image"),
        ("times", {"failed": "out of memory"}, "times of swiglu, 8 x 16: out of memory"),
        ("tiles", {"failed": "out of resource"}, "tiles of swiglu: out of resource"),
        ("attention", {"failed": "CUDA out of memory", "crashed": True}, "llama_1b, sdpa: CUDA out of memory"),
        ("checks", {"telemetry": {"h": 0.1, "statistics": 0.0}}, "the forward kernel with telemetry is off"),
        ("checks", {"telemetry": {"h": 0.0, "statistics": float("nan")}}, "the forward kernel with telemetry is off"),
        ("fused", {"error": 1.2}, "norm 8x16 in bfloat16: 1.20 times the error of plain PyTorch"),
        ("extremes", {"nan_kept": False}, "NaN does not propagate"),
        ("extremes", {"finite_lost": 2}, "2 results overflow that are finite in float64"),
        ("large", {"error": float("nan")}, "beyond 2**31 elements: error nan"),
    ],
)
def test_a_failed_check_has_a_sentence(section, change, expected):
    assert gpu_page.failures(RECORD) == []
    (sentence,) = gpu_page.failures({**RECORD, section: [RECORD[section][0] | change]})
    assert expected in sentence


def test_the_gradient_of_a_learned_parameter_is_judged_as_a_sum_in_fp32():
    row = RECORD["checks"][0] | {"dtype": "float32", "h": 0.0, "dpre": 0.0}
    assert gpu_page.failures({**RECORD, "checks": [row | {"learned": 5e-6}]}) == []  # 8 roundings x sqrt(8 x 2 x 16)


class OutOfSharedMemory(Exception):
    """Like Triton's OutOfResources, whose base is Exception."""


@pytest.mark.parametrize("error", [OutOfSharedMemory("out of resource: shared memory\nsee above"), RuntimeError("")])
def test_a_part_that_fails_is_a_row_and_the_next_one_runs(monkeypatch, tmp_path, capsys, error):
    """Every part fails, the making of its tensors included."""

    def fail(*_, **__):
        raise error

    parts = (
        (gpu, "make"),
        (gpu_step, "train"),
        (gpu_step, "attention_choices"),
        (gpu_step, "loss_chunks"),
        (gpu, "fp8_products"),
    )
    for module, name in (*parts, (gpu.fused, "operations"), (gpu, "check_extremes")):
        monkeypatch.setattr(module, name, fail)
    monkeypatch.setattr(gpu.runtime, "interpreted", lambda: True)
    assert gpu.main(["--tiny", "--no-compile", "--formulas", "relu", "silu", "--results", str(tmp_path)]) == 1
    record = json.loads((tmp_path / "the-interpreter-elementwise.json").read_text(encoding="utf-8"))
    reason = str(error).partition("\n")[0] or "RuntimeError"
    failed = {section: [row["failed"] for row in record[section]] for section in
              ("steps", "attention", "loss", "products", "checks", "extremes", "fused", "times")}  # fmt: skip
    one, of_each = [reason], [reason] * 2
    assert failed == {"steps": one, "attention": one, "loss": one, "products": one, "checks": of_each * 3,
                      "extremes": of_each, "fused": one, "times": of_each}  # fmt: skip
    printed = capsys.readouterr().out
    sentences = [f"training tiny: {reason}", f"tiny, attention: {reason}", f"checks of relu, float32, 2 x 48: {reason}",
                 f"fused of all: {reason}", f"times of silu, 2 x 48: {reason}"]  # fmt: skip
    page = (tmp_path / "the-interpreter-elementwise.md").read_text(encoding="utf-8")
    for sentence in sentences:
        assert f"\n{sentence}\n" in printed
        assert f"\n- {sentence}\n" in page


def test_a_way_that_does_not_run_here_is_told_from_a_crash():
    def fails(error: Exception):
        def method() -> torch.Tensor:
            raise error

        return method

    methods = {"none": fails(RuntimeError("No available kernel")), "broken": fails(OutOfSharedMemory("shared memory"))}
    methods["works"] = lambda: torch.ones(2, requires_grad=True)
    none, broken, works = gpu_step.tried(gpu_step.TINY, methods, CPU, 1)
    assert (none["failed"], "crashed" in none) == ("No available kernel", False)
    assert (broken["failed"], broken["crashed"]) == ("shared memory", True)
    assert len(works["seconds"]) == 3


@pytest.mark.parametrize(("launching", "slept"), [(0.001, 0.001), (30.0, 0.1)])
def test_a_gpu_sleeps_until_all_calls_of_a_timing_are_launched(monkeypatch, launching, slept):
    order = []

    class RecordedEvent:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            order.append("event")

        def synchronize(self) -> None:
            order.append("wait")

        def elapsed_time(self, _: RecordedEvent) -> float:
            return 6.0  # milliseconds

    clock = iter([0.0, launching])
    # `monkeypatch` refuses names that this torch does not have.
    monkeypatch.setattr(torch.cuda, "Event", RecordedEvent)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: order.append(cycles))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: order.append("idle"))
    monkeypatch.setattr(gpu_timing.time, "perf_counter", lambda: next(clock))
    assert gpu_timing.seconds_of(lambda: order.append("call"), 3, torch.device("cuda")) == pytest.approx(0.002)
    calls = ["call"] * 3
    assert order == ["idle", *calls, int(6e9 * slept), "event", *calls, "event", "wait"]


def test_attention_within_documents_is_credited_with_its_own_pairs():
    rows = {row["method"]: row for row in gpu_step.attention_choices(gpu_step.TINY, CPU, torch.float32, 1)}
    flops = {name: row["flops_per_second"] * row["seconds"][0] for name, row in rows.items()}
    whole = 7 * 2 * 16**2 * 32  # 7 products over half of the square, 2 FLOPs each; 2 sequences
    assert (flops["sdpa"], flops["blocks"]) == (pytest.approx(whole), pytest.approx(whole))
    assert flops["sdpa, documents"] == pytest.approx(whole / 8)  # eight documents of 2 tokens
    uneven = dataclasses.replace(gpu_step.TINY, length=17)
    rows = {row["method"]: row for row in gpu_step.attention_choices(uneven, CPU, torch.float32, 1)}
    documents = rows["sdpa, documents"]
    assert documents["flops_per_second"] * documents["seconds"][0] == pytest.approx(7 * 2 * (8 * 2**2 + 1) * 32)


def test_a_tensor_that_is_saved_twice_is_counted_once():
    x = torch.ones(1000, requires_grad=True)
    _, saved = gpu.saved_bytes(lambda: x * x)
    assert saved == 4000


def test_nothing_new_starts_after_the_time_budget():
    options = gpu.arguments(["--tiny", "--no-compile", "--formulas", "relu"])
    minutes = gpu.Minutes(-1.0)
    assert list(gpu.collect(options, CPU, minutes)) == []
    assert "check of relu, width 1" in minutes.left_out
    assert "times of relu, 2 x 48" in minutes.left_out


def test_it_imports_nothing_but_torch_and_what_the_kernels_need():
    """`bench/gpu.sh` runs where neither Hydra nor DeepSpeed nor any other library of training is installed."""
    blocked = ("hydra", "omegaconf", "deepspeed", "transformers", "psutil", "rich", "filelock", "scipy", "wandb")
    code = f"import sys; sys.modules.update(dict.fromkeys({blocked!r})); import bench.gpu"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr


def test_without_a_gpu_it_refuses():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    with pytest.raises(SystemExit, match="torch finds no GPU"):
        gpu.main([])


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_a_dry_run_in_the_interpreter(tmp_path):
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHON": sys.executable}
    command = ["bash", str(ROOT / "bench" / "gpu.sh"), "--tiny", "--no-compile", "--formulas", "swiglu", "xielu"]
    results = tmp_path / "a" / "b"  # which nobody has made
    done = subprocess.run(
        [*command, "--results", str(results)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "all checks passed" in done.stdout
    record = json.loads((results / "the-interpreter-elementwise.json").read_text(encoding="utf-8"))
    assert {row["formula"] for row in record["times"]} == {"swiglu", "xielu"}
    (step,) = record["steps"]
    assert step["losses"][-1] < step["losses"][0]
    assert {"GEMM", "attention", "loss"} <= set(step["parts"])
    assert not [row for row in (*record["attention"], *record["loss"]) if "failed" in row]
    assert [row["saved_bytes"]["triton"] for row in record["times"]] == [2 * 2 * 48 * 4, 2 * 48 * 4 + 2 * 4]
    assert (results / "the-interpreter-elementwise.md").read_text(encoding="utf-8") == gpu_page.page(record)


@pytest.mark.slow
def test_a_run_that_is_stopped_ends_as_one_that_is_not():
    tiny = ("model.d_model=64", "model.n_heads=2", "model.d_ff_gated=96", "sequence_length=64", "++global_batch_size=2")
    row = gpu_resume.resumed(*tiny)
    assert row["equal"], row
    assert 0 < row["stopped_after"] < 60
