"""Control characters and secrets in text from elsewhere."""

from __future__ import annotations

import pytest

from kernels.common.text import assigned_secret, command_text, is_secret, printable, redact, secrets_of


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain é 🙂\t\n", "plain é 🙂\t\n"),
        ("\x1b[2Jgone", "\\x1b[2Jgone"),
        ("a\rb\x07\x08", "a\\rb\\x07\\x08"),
        ("\u202egnp.exe\u2066", "\\u202egnp.exe\\u2066"),
        ("\x9b31m\x7f\u2028", "\\x9b31m\\x7f\\u2028"),
        ("half \ud800", "half \\ud800"),
    ],
)
def test_control_characters_are_written_out(text, shown):
    assert printable(text) == shown


@pytest.mark.parametrize(
    "name", ["WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "dbPassword", "MYTOKEN", "api-keys", "GITHUB_PAT"]
)
def test_secrets_are_known_by_their_names(name):
    assert is_secret(name)
    assert redact(f"cluster.environment.{name}=a,b c") == f"cluster.environment.{name}=***"
    assert redact(f"{{{name}: a b, other: 1}}", {}) == f"{{{name}: ***, other: 1}}"
    assert redact("see a-very-long-value there", {name: "a-very-long-value"}) == "see *** there"


@pytest.mark.parametrize("text", ["tokens=1e9", "sample_tokens=64", "tokenizer.eos=</s>", "eval_tokens: 5", "ffn=relu"])
def test_what_is_no_secret_stays(text):
    assert redact(text, {}) == text
    assert assigned_secret(text) is None


def test_a_secret_that_the_shell_reads_elsewhere_is_not_written_out():
    assert assigned_secret("export HF_TOKEN=$(cat ~/token)") is None
    assert assigned_secret('export A=1 HF_TOKEN="abc"') == "HF_TOKEN"
    assert redact("export HF_TOKEN=$TOKEN", {}) == "export HF_TOKEN=$TOKEN"


def test_words_and_paths_are_no_secret_values():
    assert secrets_of({"A_KEY": "short", "SSH_KEY": "/home/me/.ssh/id", "B_TOKEN": "0123456789abc"}) == {
        "B_TOKEN": "0123456789abc"
    }


def test_a_command_is_one_line_without_secrets():
    assert command_text(["train.py", "A_TOKEN=x", "run=a b", "\x1b"]) == "train.py 'A_TOKEN=***' 'run=a b' '\\x1b'"
