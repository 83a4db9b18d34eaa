"""What a model writes: the same for a seed, whatever the cache; where it stops; and the command's answers to bad input."""

from __future__ import annotations

import re
from collections import Counter

import pytest
import torch
from torch import Tensor

from conf.load import to_yaml
from kernels.common.errors import UserError
from model import generate as command
from model.generate import generate, load_run, main

EOS = 1


class Letters:
    """A tokenizer whose pieces are the characters from "a" on, after two tokens without text."""

    eos_id, start_id, vocab_size = EOS, EOS, 40

    def encode(self, text: str) -> list[int]:
        return [ord(character) - ord("a") + 2 for character in text]

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(i - 2 + ord("a")) for i in ids)


def write(logits_of, **settings: object) -> str:
    defaults: dict[str, object] = {"prompt": "ab", "tokens": 12, "temperature": 1.0, "top_k": 0, "seed": 0}
    with torch.inference_mode():
        return generate(logits_of, Letters(), 2, **(defaults | settings))


@pytest.fixture
def model(build):
    """Logits of a decoder that never ends a document."""
    decoder = build(dtype=torch.float32).eval()

    def logits_of(tokens: Tensor, cache) -> Tensor:
        logits = decoder(tokens, None, cache)
        logits[..., EOS] = -torch.inf
        return logits

    logits_of.decoder = decoder
    return logits_of


def always(logits: dict[int, float], size: int = 40):
    """A model whose logits are these for every token, and -20 else."""
    row = torch.full((size,), -20.0)
    for token, value in logits.items():
        row[token] = value
    return lambda tokens, _: row.expand(1, tokens.shape[1], size).clone()


def test_the_prompt_comes_first_and_as_many_tokens_follow(model):
    assert re.fullmatch("ab.{12}", write(model), re.DOTALL)
    assert len(write(model, prompt="", tokens=5)) == 5
    assert write(model, tokens=0) == "ab"


def test_a_seed_gives_one_text_and_another_seed_another(model):
    assert write(model, seed=1) == write(model, seed=1)
    assert len({write(model, seed=seed) for seed in range(5)}) == 5
    torch.manual_seed(0)
    first = write(model)
    torch.manual_seed(1)
    assert write(model) == first


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_cache_changes_nothing(model, temperature):
    inputs: list[Tensor] = []

    def without_cache(tokens: Tensor, _) -> Tensor:
        inputs.append(tokens)
        logits = model.decoder(torch.cat(inputs, 1))
        logits[..., EOS] = -torch.inf
        return logits

    assert write(without_cache, temperature=temperature) == write(model, temperature=temperature)
    assert [tokens.shape[1] for tokens in inputs] == [3] + [1] * 11  # the end of a document, "ab", then one by one
    assert inputs[0].tolist() == [[EOS, 2, 3]]


def test_temperature_0_takes_the_likeliest_and_ignores_the_seed():
    model = always({5: 1.0, 6: 1.01, 7: 0.99})
    assert {write(model, temperature=0.0, seed=seed) for seed in range(5)} == {"ab" + "e" * 12}


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-45])
def test_a_low_temperature_is_close_to_the_likeliest(temperature):
    model = always({5: 1.0, 6: 2.0})
    assert write(model, temperature=temperature) == "ab" + "e" * 12


def test_top_k_chooses_among_the_k_likeliest():
    model = always({5: 1.0, 6: 1.2, 7: 1.1, 8: 0.9})
    letters = {top_k: set(write(model, prompt="", tokens=200, top_k=top_k)) for top_k in (0, 1, 2, 3, 99)}
    assert (letters[1], letters[2], letters[3]) == (set("e"), set("ef"), set("def"))
    assert letters[0] >= set("defg")
    assert letters[99] == letters[0]


def test_tokens_are_chosen_with_their_probability():
    """Probabilities 0.5, 0.3, 0.2 at temperature 1; their squares, normalised, at temperature 1/2."""
    model = always({token: float(torch.tensor(p).log()) + 20 for token, p in ((5, 0.5), (6, 0.3), (7, 0.2))})
    for temperature, expected in ((1.0, (0.5, 0.3, 0.2)), (0.5, (25 / 38, 9 / 38, 4 / 38))):
        counts = Counter(write(model, prompt="", tokens=2000, temperature=temperature))
        for letter, p in zip("def", expected, strict=True):
            assert abs(counts[letter] / 2000 - p) < 4 * (p * (1 - p) / 2000) ** 0.5  # four standard errors


def test_the_end_of_the_document_ends_the_text():
    calls = []

    def model(tokens: Tensor, _) -> Tensor:
        calls.append(tokens)
        return always({EOS if len(calls) == 4 else 5: 9.0})(tokens, _)

    assert write(model, temperature=0.0) == "abddd"
    assert len(calls) == 4


def test_rows_beyond_the_tokenizer_are_never_chosen():
    model = always({39: 1.0, 40: 50.0, 63: 60.0}, size=64)
    assert write(model, temperature=0.0, tokens=3) == "ab" + chr(39 - 2 + ord("a")) * 3
    assert write(model, top_k=1, tokens=3) == "ab" + chr(39 - 2 + ord("a")) * 3


# ---- the command


@pytest.fixture
def run(tiny_config, build, write_checkpoint, tmp_path, monkeypatch):
    """A run folder with two checkpoints, whose tokenizer is `Letters`."""
    folder = tmp_path / "runs" / "tiny"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(to_yaml(tiny_config()))
    for step in (10, 20):
        write_checkpoint(build(dtype=torch.float32, seed=step), folder / "checkpoints", step)
    monkeypatch.setattr(command, "load_tokenizer", lambda _: Letters())
    return folder


def test_a_run_is_loaded_as_it_was_saved(run, build):
    for step, expected in ((-1, 20), (20, 20), (10, 10)):
        model, _, state = load_run(run, step)
        assert state["step"] == expected
        assert not model.training
        saved = build(dtype=torch.float32, seed=expected)
        assert all(torch.equal(*pair) for pair in zip(model.parameters(), saved.parameters(), strict=True))


def test_the_command_continues_a_prompt(run, capsys):
    arguments = [f"runs={run.parent}", "run=tiny", "prompt=abc", "tokens=6", "seed=3"]
    main(arguments)
    first = capsys.readouterr().out
    assert first.startswith("abc")
    main(arguments)
    assert capsys.readouterr().out == first
    main([*arguments, "step=10"])
    assert capsys.readouterr().out != first
    main([f"runs={run.parent}", "run=tiny", r'prompt=print("a\n")', "tokens=0"])
    assert capsys.readouterr().out == 'print("a\\n")\n'  # as it is typed


def test_a_run_that_cannot_be_loaded_is_refused(run):
    with pytest.raises(UserError, match="has no checkpoint of step 15: there are 10, 20"):
        load_run(run, 15)
    (run / "checkpoints" / "step_00000020" / "state.json").write_text("{}")
    with pytest.raises(UserError, match=r"step_00000020 is damaged: state.json has 2 bytes"):
        load_run(run)
    assert load_run(run, 10)[2]["step"] == 10
    (run / "checkpoints").rename(run / "moved")
    with pytest.raises(UserError, match="has no checkpoint yet"):
        load_run(run)


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("temprature=1", "unknown option 'temprature': did you mean 'temperature'?"),
        ("run", "run needs a value: run=VALUE"),
        ("tokens=many", "tokens=many: expected a whole number"),
        ("tokens=1.5", "tokens=1.5: expected a whole number"),
        ("temperature=hot", "temperature=hot: expected a number"),
        ("temperature=nan", "temperature=nan: expected a number of at least 0"),
        ("temperature=inf", "temperature=inf: expected a number of at least 0"),
        ("temperature=-1", "temperature=-1: expected a number of at least 0"),
        ("top_k=-1", "top_k=-1: expected a whole number of at least 0"),
        ("tokens=-1", "tokens=-1: expected a whole number of at least 0"),
        ("prompt=a", "missing run=NAME, the run to sample from"),
        ("run=missing", "there is no run 'missing'"),
        ("run=missing seed=18446744073709551616", "seed=18446744073709551616 is not below 2^64"),
        ("run=missing prompt=\udcff", "prompt= is not UTF-8: write texts in it"),
    ],
)
def test_bad_input_is_refused_in_a_sentence(word, sentence, tmp_path):
    with pytest.raises(UserError) as caught:
        main([*word.split(), f"runs={tmp_path}"])
    assert sentence in str(caught.value)


def test_help_names_every_option():
    printed = command.__doc__
    assert [name for name in command._DEFAULTS if f"{name}=" not in printed] == []
