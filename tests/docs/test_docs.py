"""What README, CONTRIBUTING and docs/ show is true: links lead somewhere, and commands and Python blocks work."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import yaml

from tests.docs import pages
from tests.docs.composing import compose, file_of, parse
from tests.docs.pages import PAGES, ROOT, TESTED, Shown, anchors, code_spans, links, shown, tokens
from tests.training.tiny import command

README_LINES = 150
SECONDS = {
    "run": 600,
    "slow": 3600,
}  # until a command is taken for hung; one of `run` takes a few seconds on a quiet machine
_ROOMS = [path.parent.name for path in ROOT.glob("[a-z]*/__init__.py")] + ["docs", "examples", "tests"]


def every(*kinds: str) -> list:
    """Return what the pages show of these kinds, as parameters; the slow ones marked."""
    return [
        pytest.param(s, id=s.id, marks=pytest.mark.slow if s.kind == "slow" else ())
        for page in TESTED
        for s in shown(page)
        if s.kind in kinds
    ]


def of_page(page: Path) -> str:
    return str(page.relative_to(ROOT))


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= README_LINES


@pytest.mark.parametrize("page", PAGES, ids=of_page)
def test_every_link_leads_somewhere(page):
    for target in links(page):
        url = urlsplit(target)
        if url.scheme:
            assert url.scheme == "https", target
            assert "." in url.netloc, target
            continue
        path = (page.parent / unquote(url.path)).resolve() if url.path else page
        assert path.exists(), f"{target}: there is no {path}"
        assert path.is_relative_to(ROOT), f"{target} leads out of the repository"
        if url.fragment:
            assert url.fragment in anchors(path), f"{target}: {path.name} has the anchors {sorted(anchors(path))}"


@pytest.mark.parametrize("page", TESTED, ids=of_page)
def test_every_page_of_docs_is_in_the_index(page):
    if page.parent.name == "docs" and page.name != "README.md":
        assert page.name in links(ROOT / "docs" / "README.md")


@pytest.mark.parametrize("page", TESTED, ids=of_page)
def test_every_path_and_command_in_the_prose_exists(page):
    for span in code_spans(page):
        if match := re.match(r"python -m ([\w.]+)", span):
            assert file_of(match[1]), f"`{span}`: there is no such module"
        elif re.fullmatch(r"make [a-z-]+", span):
            compose(span)
        elif (
            re.fullmatch(r"[\w.-]+(/[\w.*<>-]*)+", span)
            and span.split("/")[0] in _ROOMS
            and not re.search("<|NAME", span)
        ):
            assert list(ROOT.glob(span.rstrip("/"))), f"`{span}`: there is no such file"


@pytest.mark.parametrize("page", TESTED, ids=of_page)
def test_every_yaml_block_is_yaml(page):
    for token in tokens(page):
        if token.type == "fence" and token.info.strip() == "yaml":
            assert yaml.safe_load(token.content) is not None


@pytest.mark.parametrize("shell", every("compose"))
def test_what_cannot_run_here_composes(shell: Shown, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    compose(shell.text)


@pytest.mark.parametrize("shell", every("parse"))
def test_what_needs_a_network_parses(shell: Shown):
    parse(shell.text)


@pytest.mark.parametrize("example", every("run", "slow"))
def test_what_is_shown_runs(example: Shown, sandbox, fresh):
    words = shlex.split(example.text, comments=True) if example.language != "python" else []
    if example.language == "python":
        (sandbox / "example.py").write_text(example.text, encoding="utf-8")
        arguments = [sys.executable, sandbox / "example.py"]
    elif words[0] == "python" and not set(example.text.partition(" #")[0]) & set("|&;<>$`*"):
        arguments = [sys.executable, *words[1:]]  # without a shell, by a process that has torch imported already
    else:
        arguments = ["bash", "-euo", "pipefail", "-c", example.text]
    # What `make` does takes the names that the shared checkout has already given away.
    folder = fresh() if example.text.startswith("make ") else sandbox
    result = command(*arguments, cwd=folder, timeout=SECONDS[example.kind])
    assert result.status == 0, f"{result.out[-3000:]}\n{result.err[-3000:]}"
    if example.language != "python":
        assert result.out.strip(), "it printed nothing"


@pytest.mark.parametrize(
    ("block", "complaint"),
    [
        ("```bash\nls\n```", "in no category"),
        ("```python\nprint()\n```", "in no category"),
        ("```bash test=maybe\nls\n```", "unknown categories"),
        ("```bash test=run,slow\nls\n```", "1 commands, but 2 categories"),
        ("```python test=compose\nprint()\n```", "is run, or slow"),
        ("```ruby\nputs 1\n```", "language 'ruby'"),
        ("text\n\n    ls\n", "indented block"),
    ],
)
def test_a_block_in_no_category_is_refused(block, complaint, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(block)
    with pytest.raises(pages.PageError, match=re.escape(complaint)):
        shown(page)


def test_continued_lines_are_one_command_and_comments_are_none():
    assert pages.commands("# first\npython -m a \\\n    b=1  # and so on\n\nmake x\n") == [
        "python -m a b=1  # and so on",
        "make x",
    ]


@pytest.mark.parametrize(
    "wrong",
    [
        "python train.py ffn=swigloo",
        "deepspeed --num_gpus 3 train.py ffn=swiglu",  # 8 sequences over 3 ranks
        "python -m model.exprot run=x to=y",
        "python -m model.export run=x into=y",
        "make trian",
        "python -m ablation.run ablation=glu_variant",
    ],
)
def test_a_command_with_a_mistake_does_not_compose(wrong, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Exception, match=r".") as caught:
        compose(wrong)
    assert not isinstance(caught.value, KeyboardInterrupt)


def test_a_command_that_could_run_is_not_only_parsed():
    with pytest.raises(AssertionError, match="can be run or composed"):
        parse("python -m launch.doctor")
