"""What is wrong with a node's hardware is named before a job trains on it; the programs that tell are fakes."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch import doctor, preflight
from launch.finding import GREEN, RED, YELLOW, Finding
from launch.preflight import driver_messages, gpu_errors, locked_memory, slow_nodes

HEALTHY = "0, 0, 0, 0\n1, 0, 0, 0\n"


@pytest.fixture
def program(tmp_path, monkeypatch):
    """Return a function that puts a program in front of the others, which prints a text and ends with a status."""
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")

    def put(name: str, text: str, status: int = 0) -> None:
        (tmp_path / f"{name}.txt").write_text(text)
        (tmp_path / name).write_text(f"#!/bin/sh\ncat {tmp_path / name}.txt\nexit {status}\n")
        (tmp_path / name).chmod(0o755)

    return put


@pytest.mark.parametrize(
    ("told", "status", "level", "sentence"),
    [
        (HEALTHY, 0, GREEN, "2, without memory errors"),
        ("0, [N/A], [N/A], [N/A]\n1, [N/A], [N/A], [N/A]\n", 0, GREEN, "2, without memory errors"),
        ("0, 0, 0, 0\n", 0, RED, "1 of the 2 that this job needs"),
        ("0, 0, 0, 0\n1, 3, 0, 0\n", 0, RED, "GPU 1 has 3 memory errors that ECC could not correct"),
        ("0, 0, 0, 1\n1, 0, 0, 0\n", 0, RED, "GPU 0 has broken rows of memory that it has not replaced"),
        ("0, 0, 0, 0\n1, [GPU requires reset], 0, 0\n", 0, RED, "GPU 1 reports [GPU requires reset]"),
        ("0, 0, 0, 0\n1, 0, [Unknown Error], [Unknown Error]\n", 0, RED, "GPU 1 reports [Unknown Error]"),
        ("0, 0, 0, 0\n1, [GPU is lost], [GPU is lost], [GPU is lost]\n", 0, RED, "GPU 1 reports [GPU is lost]"),
        ("0, 0, 0, 0\n1, 0, ERR!, 0\n", 0, RED, "GPU 1 reports ERR!"),
        ("0, 0, No, Yes\n1, 0, No, No\n", 0, RED, "GPU 0 has broken rows of memory that it has not replaced"),
        ("0, 0, No, No\n1, 0, No, [Not Supported]\n\n", 0, GREEN, "2, without memory errors"),
        (
            HEALTHY + "WARNING: infoROM is corrupted at gpu 0000:3B:00.0\n",
            0,
            RED,
            "nvidia-smi prints 'WARNING: infoROM is corrupted at gpu 0000:3B:00.0' in place of a GPU's errors",
        ),
        (
            "0, 0, 0, 0\nUnable to determine the device handle for GPU1: 0000:5D:00.0: Unknown Error\n",
            0,
            RED,
            "nvidia-smi prints 'Unable to determine the device handle for GPU1: 0000:5D:00.0: Unknown Error' in place of a "
            "GPU's errors",
        ),
        ("[GPU is lost], 0, 0, 0\n", 0, RED, "nvidia-smi prints '[GPU is lost], 0, 0, 0' in place of a GPU's errors"),
        ("Unable to determine the device handle\n", 15, RED, "nvidia-smi does not answer (CalledProcessError)"),
    ],
)
def test_gpus(program, told, status, level, sentence):
    program("nvidia-smi", told, status)
    finding = gpu_errors(2)
    assert (finding.level, finding.text, finding.node) == (level, sentence, level == RED)


@pytest.mark.parametrize(
    ("told", "status", "level", "sentence"),
    [
        ("usb 1-1: new device\n", 0, GREEN, "none since the last start"),
        ("[9.1] NVRM: Xid (PCI:0000:3b:00): 79, GPU\n", 0, RED, "79 since the last start: the GPU has fallen off the bus"),
        ("NVRM: Xid (PCI:0000:3b:00): 13, Graphics\n" * 2, 0, YELLOW, "13 since the last start"),
        ("dmesg: read kernel buffer failed\n", 1, GREEN, "the kernel's messages cannot be read here"),
    ],
)  # fmt: skip
def test_messages_of_the_driver(program, told, status, level, sentence):
    program("dmesg", told, status)
    finding = driver_messages()
    assert (finding.level, finding.text) == (level, sentence)


def test_locked_memory_matters_for_infiniband(monkeypatch, tmp_path):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (2**16, 2**16))
    monkeypatch.setattr(preflight, "_INFINIBAND", tmp_path)
    assert locked_memory().level == GREEN
    (tmp_path / "mlx5_0").mkdir()
    assert (locked_memory().level, locked_memory().node) == (RED, True)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY,) * 2)
    assert locked_memory().level == GREEN


def test_a_slow_node_is_named_to_all_and_at_fault_only_itself():
    hosts, seconds = ["gpu1", "gpu2", "gpu3"], [1.0, 1.1, 2.5]
    for rank in range(3):
        [found] = slow_nodes(hosts, seconds, rank, on_gpus=True)
        assert (found.level, found.node) == (RED, rank == 2)
        assert "gpu3 takes 2.3 times as long as the median for a matmul" in found.text
    [found] = slow_nodes(hosts, seconds, 2, on_gpus=False)
    assert (found.level, found.node) == (YELLOW, False)
    assert list(slow_nodes(hosts, [1.0, 1.1, 1.2], 0, on_gpus=True)) == []


@pytest.mark.parametrize(("at_fault", "named"), [(True, "gpu7\n"), (False, "")])
def test_the_gate_names_a_node_that_is_at_fault(monkeypatch, tmp_path, capsys, at_fault, named):
    monkeypatch.setattr(doctor, "findings", lambda *_, **__: iter([Finding(RED, "disk space", "full")]))
    monkeypatch.setattr(doctor, "node_findings", lambda gpus: iter([Finding(RED, "GPUs", f"{gpus}", node=at_fault)]))
    monkeypatch.setenv("SLURMD_NODENAME", "gpu7")
    names = Path(tmp_path / "lr 50%" / "failed.5")
    names.parent.mkdir()
    assert doctor.main([f"gate={names}", "gpus=8"]) == 1
    assert "GPUs: 8" in capsys.readouterr().out
    assert (names.read_text() if names.exists() else "") == named


def test_a_node_says_that_it_is_well_before_it_waits_for_the_others(monkeypatch, tmp_path, capsys):
    """The all-reduce may end this process or wait for long: nothing that a node knows of itself may depend on it."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "SLURMD_NODENAME": "gpu7"}.items():
        monkeypatch.setenv(name, value)
    found = [Finding(GREEN, "disk space", "some")]
    monkeypatch.setattr(doctor, "findings", lambda *_, **__: iter(found))
    monkeypatch.setattr(doctor, "node_findings", lambda _: iter([]))
    monkeypatch.setattr(doctor.signal, "signal", lambda *_: None)  # it ignores SIGTERM
    monkeypatch.setattr(doctor, "rendezvous", lambda _: None)
    written: list[list[str]] = []

    def collective(*_: object) -> Iterator[Finding]:
        written.append(sorted(path.name for path in tmp_path.iterdir()))
        raise RuntimeError("a watchdog caught a timeout")
        yield

    monkeypatch.setattr(doctor, "collective", collective)
    names = tmp_path / "failed.5"
    assert doctor.main([f"gate={names}"]) == 1
    assert "the nodes cannot communicate: a watchdog caught" in capsys.readouterr().out
    (tmp_path / "failed.5.ok.gpu7").unlink()
    found.append(Finding(RED, "compiler", "none"))  # on this node alone, perhaps
    assert doctor.main([f"gate={names}"]) == 1
    found.append(Finding(RED, "GPUs", "7 of 8", node=True))
    assert doctor.main([f"gate={names}"]) == 1
    assert written == [["failed.5.ok.gpu7"], [], ["failed.5"]]
    assert names.read_text() == "gpu7\n"


def test_a_node_that_cannot_meet_the_others_is_not_well(monkeypatch, tmp_path, capsys):
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(doctor, "findings", lambda *_, **__: iter([]))
    monkeypatch.setattr(doctor, "node_findings", lambda _: iter([]))
    monkeypatch.setattr(doctor.signal, "signal", lambda *_: None)  # it ignores SIGTERM
    monkeypatch.setattr(doctor, "rendezvous", lambda _: Finding(RED, "collective", "finds no address for gpu1"))
    assert doctor.main([f"gate={tmp_path / 'failed.5'}"]) == 1
    assert capsys.readouterr().out.count("finds no address for gpu1") == 1
    assert list(tmp_path.iterdir()) == []
