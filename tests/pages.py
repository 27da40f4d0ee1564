"""Generated parts of the pages: `python -m tests.pages` writes them, and a policy test compares.

A part stands between `<!-- made by: NAME -->` and `<!-- end -->`. NAME is one of MAKERS, or a command of the package
such as `python -m ds_moe_ep check-config ep16`, which then stands in a fence with its output.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import io
import re
import shlex
import subprocess
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ds_moe_ep
from ds_moe_ep.cli.main import main as command
from ds_moe_ep.cli.tables import figure_table, knob_table
from ds_moe_ep.config.knobs import Layout, ModelConfig, MoEConfig
from ds_moe_ep.specification.claims import stated_and_derived
from tests.published import published_table

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "ds_moe_ep" / "docs"
PAGES = (ROOT / "README.md", *sorted(DOCS.glob("*.md")))
COMMAND = "python -m ds_moe_ep "
PART = re.compile(r"(<!-- made by: (.+?) -->\n).*?(<!-- end -->)", re.DOTALL)
MANY = 8  # parameters, from which on a signature is a table of knobs
LINE = 100  # characters of a signature


def page(text: str) -> str:
    """The page with each generated part made anew."""
    return PART.sub(lambda part: f"{part[1]}{made(part[2])}\n{part[3]}", text)


def made(name: str) -> str:
    """Text of the part called `name`."""
    if name.startswith(COMMAND):
        words, _, rest = name.removeprefix(COMMAND).partition(" | ")
        return f"```console\n$ {name}\n{filtered(output_of(shlex.split(words)), rest)}\n```"
    return MAKERS[name]()


def output_of(words: list[str]) -> str:
    """Output of the package's command line, 80 columns wide."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        status = command(words)
    assert status == 0, f"{shlex.join(words)} ended with {status}"
    return "\n".join(line.rstrip() for line in printed.getvalue().strip().splitlines())


def filtered(text: str, command_line: str) -> str:
    """The text behind a pipe, where there is one."""
    if not command_line:
        return text
    done = subprocess.run(["bash", "-c", command_line], input=text, capture_output=True, text=True, check=True)
    return done.stdout.rstrip()


def api() -> str:
    """Every public name with its signature and its docstring."""
    return "\n\n".join(section for name in ds_moe_ep.__all__ for section in sections_of(name))


def sections_of(name: str) -> Iterator[str]:
    """The section of a public name, and of each public method and property of a class."""
    value = getattr(ds_moe_ep, name)
    if not callable(value):
        words = [repr(key) for key in value] if isinstance(value, dict) else [repr(value)]
        yield f"### {name}\n\n" + ", ".join(f"`{word}`" for word in words)
        return
    yield f"### {name}\n\n{described(name, value)}"
    for member, found in vars(value).items() if inspect.isclass(value) else ():
        is_one = inspect.isfunction(plain(found)) or isinstance(found, property)
        if is_one and not member.startswith("_") and plain(found).__doc__:
            yield f"#### {name}.{member}\n\n{described(member, found)}"


def plain(member: Any) -> Any:
    """The function of a class's or static method; others as they are."""
    return member.__func__ if isinstance(member, classmethod | staticmethod) else member


def described(name: str, value: Any) -> str:
    """A signature in a fence, where there is one to tell, and the docstring."""
    value = plain(value)
    words = textwrap.dedent(inspect.getdoc(value) or "")
    if isinstance(value, property) or (inspect.isclass(value) and issubclass(value, Exception)):
        return words
    parameters = [one for one in inspect.signature(value).parameters.values() if one.name not in ("self", "cls")]
    if dataclasses.is_dataclass(value) and len(parameters) > MANY:
        return f"{words}\n\nIts fields are the [knobs](knobs.md)."
    return f"```python\n{signature(name, parameters, inspect.signature(value).return_annotation)}\n```\n\n{words}"


def signature(name: str, parameters: list[inspect.Parameter], result: Any) -> str:
    """A signature as source has it: on one line, or with a line per parameter."""
    words = [text_of(parameter) for parameter in parameters]
    kinds = [parameter.kind for parameter in parameters]
    if inspect.Parameter.KEYWORD_ONLY in kinds and inspect.Parameter.VAR_POSITIONAL not in kinds:
        words.insert(kinds.index(inspect.Parameter.KEYWORD_ONLY), "*")
    end = "" if result in (inspect.Signature.empty, "None", None) else f" -> {annotation(result)}"
    line = f"{name}({', '.join(words)}){end}"
    return line if len(line) <= LINE else "\n".join([f"{name}(", *(f"    {word}," for word in words), f"){end}"])


def text_of(parameter: inspect.Parameter) -> str:
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
    kind = "" if parameter.annotation is parameter.empty else f": {annotation(parameter.annotation)}"
    words = getattr(parameter.default, "__name__", repr(parameter.default))
    default = "" if parameter.default is parameter.empty else f" = {words}"
    return f"{stars}{parameter.name}{kind}{default}"


def annotation(value: Any) -> str:
    """An annotation as source has it; annotations are texts where a file imports them from __future__."""
    value = getattr(value, "__forward_arg__", value)
    return value if isinstance(value, str) else inspect.formatannotation(value)


MAKERS: dict[str, Callable[[], str]] = {
    "published runs": published_table,
    "knobs of moe_ep": lambda: knob_table(MoEConfig),
    "knobs of the model": lambda: knob_table(ModelConfig),
    "knobs of the layout": lambda: knob_table(Layout),
    "figures": lambda: figure_table(stated_and_derived()),
    "public names": api,
}


def main() -> None:
    """Writes the generated parts of all pages, and prints the pages that changed."""
    for path in PAGES:
        text = path.read_text(encoding="utf-8")
        if (new := page(text)) != text:
            path.write_text(new, encoding="utf-8")
            print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
