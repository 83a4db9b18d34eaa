"""W&B and TensorBoard log a run under one id, and can never stop it."""

from __future__ import annotations

import json
import sys
import threading
import types

import pytest

from conf.identity import config_hash
from conf.load import load, to_yaml
from conf.login import wandb_mode
from tests.training.tiny import overrides
from training import loggers as loggers_module
from training.loggers import Loggers, rewrite_offline

RECORD = {"kind": "train", "step": 3, "tokens": 768, "loss": 2.5, "lr": 0.01, "event": "text is not logged"}


@pytest.fixture
def config(tmp_path):
    """A run whose loggers are both on."""
    return load(
        overrides(tmp_path, run="r", logger="all", logger__tags="[a,b]", logger__group="g", logger__job_type="j")
    )


class FakeRun:
    """A W&B run that keeps what is logged."""

    url = "https://example.org/r"

    def __init__(self, **settings) -> None:
        self.settings, self.logged, self.metrics, self.summary, self.ended = settings, [], {}, {}, None

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.metrics[name] = step_metric

    def log(self, record: dict) -> None:
        self.logged.append(record)

    def finish(self, exit_code: int) -> None:
        self.ended = exit_code


@pytest.fixture
def wandb(monkeypatch):
    """A fake module `wandb`; `runs` are those that were started."""
    module = types.ModuleType("wandb")
    module.runs = []

    def init(**settings) -> FakeRun:
        module.runs.append(FakeRun(**settings))
        return module.runs[-1]

    module.init, module.Settings = init, lambda **settings: settings
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setenv("WANDB_MODE", "offline")
    return module


def only(config, which: str):
    config.logger.wandb, config.logger.tensorboard = which == "wandb", which == "tensorboard"
    return config


def test_a_resumed_run_keeps_its_id(config, wandb, tmp_path):
    for _ in range(2):
        Loggers(only(config, "wandb"), tmp_path, pytest.fail).finish({})
    first, second = wandb.runs
    assert first.settings == second.settings
    assert first.settings["id"] == (tmp_path / "wandb_id").read_text()
    assert len(first.settings["id"]) == 8
    expected = {"resume": "allow", "mode": "offline", "dir": str(tmp_path.parent), "name": "r"}
    expected |= {"project": "ffn", "group": "g", "job_type": "j"}
    assert expected.items() <= first.settings.items()
    assert first.settings["tags"] == ["a", "b"]
    assert first.settings["config"]["model"]["d_model"] == 33
    assert first.settings["config"]["config_hash"] == config_hash(config)


VARIABLES = {
    "WANDB_PROJECT": "mine",
    "WANDB_ENTITY": "us",
    "WANDB_RUN_GROUP": "sweep",
    "WANDB_JOB_TYPE": "probe",
    "WANDB_TAGS": "x,y",
    "WANDB_NAME": "a name",
    "WANDB_RUN_ID": "abcd1234",
    "WANDB_RESUME": "must",
    "WANDB_DIR": "/elsewhere",
    "WANDB_CONSOLE": "wrap",
    "WANDB_SILENT": "false",
    "WANDB_DISABLE_GIT": "false",
    "WANDB_INIT_TIMEOUT": "300",
    "WANDB__DISABLE_STATS": "false",
}


def test_a_variable_of_wandb_decides_what_was_not_typed(wandb, tmp_path, monkeypatch):
    for name, value in VARIABLES.items():
        monkeypatch.setenv(name, value)
    config = load(overrides(tmp_path, run="r", logger="wandb"))
    Loggers(config, tmp_path, pytest.fail).finish({})
    settings = wandb.runs[0].settings
    passed_on = {name for name, value in settings.items() if value is not None}
    assert passed_on == {"project", "mode", "config", "settings"}
    assert settings["project"] == "mine"
    assert settings["settings"] == {"finish_timeout": 55.0, "finish_timeout_raises": True}
    assert (tmp_path / "wandb_id").read_text() == "abcd1234"


def test_what_was_typed_wins_over_a_variable_of_wandb(config, wandb, tmp_path, monkeypatch):
    for name, value in VARIABLES.items():
        monkeypatch.setenv(name, value)
    config.logger.project, config.logger.entity = "typed", "me"
    Loggers(only(config, "wandb"), tmp_path, pytest.fail).finish({})
    typed = {"project": "typed", "entity": "me", "group": "g", "job_type": "j", "tags": ["a", "b"]}
    assert typed.items() <= wandb.runs[0].settings.items()


def test_a_run_with_files_of_wandb_of_its_own_keeps_them_there(config, wandb, tmp_path):
    (tmp_path / "wandb" / "offline-run-20260101_000000-abcd1234").mkdir(parents=True)
    Loggers(only(config, "wandb"), tmp_path, pytest.fail).finish({})
    assert wandb.runs[0].settings["dir"] == str(tmp_path)


def test_the_configuration_in_wandb_has_the_provenance(config, wandb, tmp_path):
    (tmp_path / "provenance.json").write_text(json.dumps([{"commit": "old"}, {"commit": "new", "dirty": True}]))
    Loggers(only(config, "wandb"), tmp_path, pytest.fail).finish({})
    assert wandb.runs[0].settings["config"]["provenance"] == {"commit": "new", "dirty": True}


def test_offline_a_resumed_run_logs_again_what_metrics_jsonl_kept(config, wandb, tmp_path, monkeypatch):
    kept = [RECORD | {"step": step} for step in (1, 2)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    for mode, steps in (("offline", [1, 2, 3]), ("online", [3])):
        monkeypatch.setenv("WANDB_MODE", mode)
        loggers = Loggers(only(config, "wandb"), tmp_path, pytest.fail)
        loggers.log(RECORD)
        loggers.finish({})
        assert [logged["step"] for logged in wandb.runs[-1].logged] == steps


@pytest.mark.usefixtures("wandb")
def test_offline_a_run_whose_wandb_process_was_ended_is_written_anew(config, tmp_path, monkeypatch):
    """By whoever ended the run: DeepSpeed ends the descendants of a rank on Ctrl-C, SLURM all processes of a job."""
    rewritten, warnings = [], []
    monkeypatch.setattr(loggers_module, "rewrite_offline", lambda *arguments: rewritten.append(arguments))
    for mode in ("offline", "online"):
        monkeypatch.setenv("WANDB_MODE", mode)
        loggers = Loggers(only(config, "wandb"), tmp_path, warnings.append)

        def lost(*_, **__):
            raise ConnectionResetError("Connection lost")

        monkeypatch.setattr(FakeRun, "finish", lost)
        loggers.finish({"status": "stopped"})
    assert rewritten == [(tmp_path, {"status": "stopped"})]
    assert warnings == [
        "W&B is off from here on: ConnectionResetError: Connection lost"
    ]  # online, the server has the run


def test_a_run_that_is_written_anew_is_whole(config, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SERVICE", "3-1-unix-/gone")
    run = tmp_path / "r"
    run.mkdir()
    (run / "config.yaml").write_text(to_yaml(only(config, "wandb")))
    (run / "metrics.jsonl").write_text("".join(json.dumps(RECORD | {"step": step}) + "\n" for step in (1, 2)))
    rewrite_offline(run, {"status": "stopped", "final_eval_loss": 2.0})
    [written] = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    assert b"train/loss" in written.read_bytes()
    assert b"final_eval_loss" in written.read_bytes()


def test_figures_are_logged_over_tokens_under_their_kind(config, wandb, tmp_path):
    loggers = Loggers(only(config, "wandb"), tmp_path, pytest.fail)
    loggers.log(RECORD)
    loggers.finish({"status": "finished", "final_eval_loss": 2.0})
    (run,) = wandb.runs
    (logged,) = run.logged
    assert {"train/loss": 2.5, "train/lr": 0.01, "tokens": 768, "step": 3}.items() <= logged.items()
    assert not any("event" in key for key in logged)
    assert run.metrics == {"tokens": None} | dict.fromkeys(("train/*", "eval/*", "telemetry/*", "event/*"), "tokens")
    assert run.summary["final_eval_loss"] == 2.0
    assert run.ended == 0


def test_a_figure_per_layer_has_a_curve_per_layer(config, wandb, tmp_path):
    loggers = Loggers(only(config, "wandb"), tmp_path, pytest.fail)
    loggers.log({"kind": "telemetry", "step": 3, "tokens": 768, "dead": [0.0, None, 0.5], "window_tokens": 768})
    loggers.finish({})
    (logged,) = wandb.runs[0].logged
    assert logged == {
        "telemetry/dead/layer_0": 0.0,
        "telemetry/dead/layer_2": 0.5,
        "telemetry/window_tokens": 768,
        **{name: value for name, value in logged.items() if name.rpartition("/")[2] in ("step", "tokens")},
    }


def test_a_failed_run_is_marked_as_one(config, wandb, tmp_path):
    Loggers(only(config, "wandb"), tmp_path, pytest.fail).finish({"status": "failed"})
    assert wandb.runs[0].ended == 1


def test_a_wandb_that_does_not_start_is_reported_once(config, wandb, tmp_path):
    warnings = []

    def init(**_):
        raise RuntimeError("no network")

    wandb.init = init
    loggers = Loggers(only(config, "wandb"), tmp_path, warnings.append)
    loggers.log(RECORD)
    loggers.finish({})
    assert warnings == ["W&B is off from here on: RuntimeError: no network"]
    assert loggers.notes == []


@pytest.mark.usefixtures("wandb")
@pytest.mark.parametrize("call", ["log", "finish"])
def test_a_wandb_that_breaks_later_is_reported_once(config, tmp_path, monkeypatch, call):
    warnings = []

    def fail(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr(FakeRun, call, fail)
    loggers = Loggers(only(config, "wandb"), tmp_path, warnings.append)
    loggers.log(RECORD)
    loggers.log(RECORD)
    loggers.finish({})
    assert warnings == ["W&B is off from here on: OSError: disk full"]


@pytest.fixture
def online(wandb, monkeypatch):
    """A W&B that is logged in, and whose server responds when `answer` is set."""
    wandb.answer, answered = threading.Event(), wandb.init
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setattr("training.loggers.UPLOAD_TIMEOUT_SECONDS", 30.0)

    def init(**settings) -> FakeRun:
        assert wandb.answer.wait(30)
        return answered(**settings)

    wandb.init = init
    yield wandb
    wandb.answer.set()


def test_a_run_does_not_wait_for_a_server_and_nothing_is_lost(config, online, tmp_path):
    loggers = Loggers(only(config, "wandb"), tmp_path, pytest.fail)
    for step in range(3):
        loggers.log(RECORD | {"step": step})
    assert online.runs == []  # the server has not responded yet
    online.answer.set()
    loggers.log(RECORD | {"step": 3})
    loggers.finish({"status": "finished", "final_eval_loss": 2.0})
    (run,) = online.runs
    assert [logged["step"] for logged in run.logged] == [0, 1, 2, 3]
    assert (run.summary["final_eval_loss"], run.ended) == (2.0, 0)
    assert loggers.notes == ["W&B: https://example.org/r"]


@pytest.mark.usefixtures("online")
def test_the_end_of_a_run_does_not_wait_forever(config, tmp_path, monkeypatch):
    warnings = []
    loggers = Loggers(only(config, "wandb"), tmp_path, warnings.append)
    loggers.log(RECORD)
    monkeypatch.setattr("training.loggers.UPLOAD_TIMEOUT_SECONDS", 0.0)
    loggers.finish({})
    assert [text.partition(":")[0] for text in warnings] == ["W&B is off from here on"]
    assert "wandb sync" in warnings[0]
    assert loggers.notes == []


def test_one_broken_logger_leaves_the_other(config, wandb, tmp_path):
    warnings = []
    wandb.init = lambda **_: 1 / 0
    loggers = Loggers(config, tmp_path, warnings.append)
    loggers.log(RECORD)
    loggers.finish({})
    assert len(warnings) == 1
    folder = tmp_path.parent
    assert loggers.notes == [f"TensorBoard: `tensorboard --logdir {folder}`, run {tmp_path.name}/tensorboard"]
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1


def test_tensorboard_logs_the_figures(config, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    loggers = Loggers(only(config, "tensorboard"), tmp_path, pytest.fail)
    loggers.log(RECORD)
    loggers.finish({})
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    (point,) = events.Scalars("train/loss")
    assert (point.step, point.value) == (3, 2.5)
    assert "train/event" not in events.Tags()["scalars"]


def test_the_real_wandb_writes_offline_under_one_id(config, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    run, files = tmp_path / "r", tmp_path / "wandb"
    run.mkdir()
    for _ in range(2):
        loggers = Loggers(only(config, "wandb"), run, pytest.fail)
        loggers.log(RECORD)
        loggers.finish({"status": "finished"})
    name, folders = (run / "wandb_id").read_text(), sorted(files.glob("offline-run-*"))
    assert len(folders) == len(list(files.glob(f"offline-run-*/run-{name}.wandb"))) == 2
    assert loggers.notes == [
        f"W&B: offline; `wandb sync {folders[-1]}` uploads it, `wandb leet {files}` draws the runs in the terminal"
    ]


def test_without_loggers_nothing_is_written(config, tmp_path):
    loggers = Loggers(only(config, "none"), tmp_path, pytest.fail)
    loggers.log(RECORD)
    loggers.finish({})
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def logged_out(monkeypatch, tmp_path):
    """A user who never logged in to W&B."""
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    return tmp_path / "netrc"


def test_offline_unless_logged_in(logged_out):
    assert wandb_mode() == "offline"
    logged_out.write_text("machine elsewhere.org login me password x\n")
    assert wandb_mode() == "offline"
    logged_out.write_text("machine api.wandb.ai login user password x\n")
    assert wandb_mode() == "online"
    logged_out.write_text("this is no netrc\n")
    assert wandb_mode() == "offline"


def test_a_server_of_ones_own(logged_out, monkeypatch):
    logged_out.write_text("machine wandb.example.org login user password x\n")
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org:8080/")
    assert wandb_mode() == "online"


@pytest.mark.usefixtures("logged_out")
def test_a_key_means_online_and_an_explicit_mode_wins(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "x")
    assert wandb_mode() == "online"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert wandb_mode() == "disabled"
