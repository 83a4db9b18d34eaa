"""The text of `--help`, fitted to the terminal.

Texts are written for the width of the source. What is wider than the terminal is laid out anew, block by block: sentences flow,
and the meanings of options keep to a column of their own. Indented lines without a second column, such as commands, stay.
"""

from __future__ import annotations

import re
import shutil
import textwrap

_LEAST = 40  # columns, however narrow the terminal says it is
_ENTRY = re.compile(r"( *)(\S+(?: \S+)*) {2,}(\S.*)")  # an option, and what it means in a second column
_CODE = re.compile(r"`[^`]+`\S*")
_NO_BREAK = "\N{NO-BREAK SPACE}"


def fit(text: str, width: int | None = None) -> str:
    """Return a usage text in which no line but an indented command is wider than the terminal.

    Args:
        width: in columns. None: that of the terminal, or `COLUMNS`; 80 where there is neither.
    """
    width = max(width or shutil.get_terminal_size().columns, _LEAST)
    return "\n\n".join(_fit_block(block, width) for block in text.strip("\n").split("\n\n"))


def _fit_block(block: str, width: int) -> str:
    lines = block.split("\n")
    if max(map(len, lines)) <= width:
        return block
    # (indentation, option, meaning); a sentence has no option, and an indented line without a second column no meaning.
    items: list[tuple[str, str, str]] = []
    column = 0  # of the meanings, as written
    for line in lines:
        indent = len(line) - len(line.lstrip())
        if entry := _ENTRY.fullmatch(line):
            items.append((entry[1], entry[2], entry[3]))
            column = entry.start(3)
        elif indent and indent == column and items and items[-1][1]:  # goes on with the meaning above
            above, option, meaning = items[-1]
            items[-1] = (above, option, f"{meaning} {line.strip()}")
        elif indent:
            items.append((line[:indent], line.strip(), ""))
        elif items and not items[-1][1]:  # goes on with the sentence above
            items[-1] = ("", "", f"{items[-1][2]} {line}")
        else:
            items.append(("", "", line))
    # Long options have their meaning on the next line, where a column behind them would leave too little room for it.
    options = [len(indent + option) for indent, option, meaning in items if option and meaning]
    column = min(max(options, default=0) + 2, width * 2 // 5)
    fitted = []
    for indent, option, meaning in items:
        if not option:
            fitted += _wrap(meaning, width)
        elif not meaning:
            fitted.append(indent + option)
        elif len(indent + option) + 2 <= column:
            first, *others = _wrap(meaning, width - column)
            fitted += [f"{indent + option:<{column}}{first}", *(" " * column + line for line in others)]
        else:
            fitted += [indent + option, *(" " * column + line for line in _wrap(meaning, width - column))]
    return "\n".join(fitted)


def _wrap(text: str, width: int) -> list[str]:
    """Return the lines of a text; a command in backquotes stays on one line where it can."""
    whole = _CODE.sub(lambda code: code[0].replace(" ", _NO_BREAK) if len(code[0]) <= width else code[0], text)
    lines = textwrap.wrap(whole, width, break_long_words=False, break_on_hyphens=False)
    return [line.replace(_NO_BREAK, " ") for line in lines]
