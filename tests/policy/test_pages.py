"""README and the pages agree with the code: generated parts, links, files, commands, lengths."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

from ds_moe_ep.cli.main import make_parser
from ds_moe_ep.config import options
from ds_moe_ep.config.command_line import Parser
from ds_moe_ep.training.options import TrainOptions
from tests import pages
from tests.policy.links import anchors, commands, hidden_commands, is_broken, links, without_fences
from tests.policy.messages import is_told, quoted
from tests.policy.sources import PACKAGE, ROOT

README = ROOT / "README.md"
LINKED = (
    *pages.PAGES,
    ROOT / "CHANGELOG.md",
    ROOT / "examples" / "README.md",
    ROOT / "examples" / "report" / "report.md",
    PACKAGE / "ARCHITECTURE.md",
)
RUN_OPTIONS = f"{options.make_parser(TrainOptions).format_help()} --deepspeed_config"  # the last one is DeepSpeed's
ORDER = (
    "adopt layouts overlap replicas reliability verify checkpoints planning measuring baseline knobs reference-job "
    "results troubleshooting"
)


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", pages.PAGES, ids=named)
def test_generated_parts_are_what_the_code_makes(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert pages.page(text) == text, "run `python -m tests.pages`, and commit what it writes"


def test_every_generated_part_stands_on_some_page() -> None:
    parts = {part[2] for path in pages.PAGES for part in pages.PART.finditer(path.read_text(encoding="utf-8"))}
    assert {*pages.MAKERS} <= parts
    assert {part for part in parts if part.startswith(pages.COMMAND)}


def test_a_part_that_was_changed_by_hand_is_made_again() -> None:
    part = "<!-- made by: knobs of the layout -->\n{}\n<!-- end -->"
    assert pages.page(part.format("| mine |")) == part.format(pages.MAKERS["knobs of the layout"]())


@pytest.mark.parametrize("path", LINKED, ids=named)
def test_every_link_leads_somewhere(path: Path) -> None:
    assert [link for link in links(path) if is_broken(path, link)] == []


def test_a_missing_file_and_a_missing_anchor_are_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    picture = '<source srcset="dark.png">\n<img src="https://elsewhere/x.png">\n'
    page.write_text(f"# One `code` [word](x.md): two\n\n```\n# no heading ](no/link)\n```\n## Same\n## Same\n{picture}")
    assert anchors(page) == {"one-code-word-two", "same", "same-1"}
    assert [is_broken(page, link) for link in ("page.md#same-1", "#same", "page.md", "x.md", "#other")] == [
        *[False] * 3,
        *[True] * 2,
    ]
    assert links(page) == ["x.md", "dark.png"]


@pytest.mark.parametrize("path", pages.PAGES, ids=named)
def test_commands_stand_in_blocks_that_a_slow_test_runs_or_that_say_why_not(path: Path) -> None:
    assert hidden_commands(path.read_text(encoding="utf-8")) == []


def test_a_command_in_another_fence_is_found() -> None:
    page = "```{}\npython -m ds_moe_ep audit\n```\n"
    assert [len(hidden_commands(page.format(kind))) for kind in ("console", "", "bash")] == [1, 1, 0]
    assert hidden_commands(f"<!-- made by: python -m ds_moe_ep audit -->\n{page.format('console')}<!-- end -->") == []


def test_messages_that_troubleshooting_quotes_are_those_of_the_code() -> None:
    messages = quoted(pages.DOCS / "troubleshooting.md")
    assert len(messages) > 25
    assert [message for message in messages if not is_told(message)] == []
    assert not is_told("moe_ep.ep_size=16 cannot be cut for the world of 6 ranks, which is odd")


def test_the_index_names_every_page_in_the_order_of_tasks() -> None:
    found = [link for link in dict.fromkeys(links(pages.DOCS / "README.md")) if "#" not in link]
    assert {*found} == {path.name for path in pages.DOCS.glob("*.md")} - {"README.md"}
    rows = re.findall(r"^\| \[([\w-]+)\.md\]", (pages.DOCS / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert rows == [*ORDER.split(), "limits", "api", "contributing"]


def test_readme_is_short_and_says_in_its_first_screen_what_has_not_run() -> None:
    lines = README.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 200
    assert "not run on a GPU" in "\n".join(lines[:30])


@pytest.mark.parametrize("path", [README, pages.DOCS / "limits.md", pages.DOCS / "README.md"], ids=named)
def test_tables_can_be_read_on_a_phone(path: Path) -> None:
    rows = re.findall(r"^\|(.*)\|$", without_fences(path.read_text(encoding="utf-8")), re.MULTILINE)
    assert rows
    assert [row for row in rows if row.count("|") > 3] == []
    words = {word for row in rows for word in re.sub(r"\]\([^)]*\)", "]", row).split()}
    assert sorted(word for word in words if len(word) > 26) == []


@pytest.mark.parametrize("command", ["bash examples/quickstart.sh", "bash tests/run.sh"])
def test_readme_names_the_two_commands_and_their_files_exist(command: str) -> None:
    assert command in README.read_text(encoding="utf-8")
    assert (ROOT / command.split()[1]).is_file()


@pytest.mark.parametrize("path", LINKED[: len(pages.PAGES)], ids=named)
def test_every_file_that_a_page_names_exists_and_none_is_inside_the_package(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    files = set(re.findall(r"(?<![\w/.])(?:examples|ds_configs|tests)/[\w./-]*\w\.(?:py|sh|json|jsonl|md|png)\b", text))
    assert [name for name in sorted(files) if not (ROOT / name).exists()] == []
    inside = re.findall(r"\b(?:ds_moe_ep/)?(?:engine|moe|comm|simulate|kernels|bench)/\w+\.py\b", text)
    assert inside == [], "name the public name or the command: files of the package move"


@pytest.mark.parametrize("path", LINKED, ids=named)
def test_commands_have_the_options_that_a_page_gives_them(path: Path) -> None:
    """Commands that no slow test can run (GPUs, hosts, hours) are at least typed right."""
    wrong = []
    for line in lines_of_commands(path):
        for program, given in re.findall(r" (-m ds_moe_ep (?!bench)[\w-]+|examples/\w+\.py)( .*)?$", line):
            options = re.findall(r" (--[\w-]+)", given)
            wrong += [(program, option) for option in options if option not in help_of(program)]
    assert wrong == []


def test_many_commands_stand_in_the_pages_and_a_misspelt_option_would_be_found() -> None:
    lines = [line for path in LINKED for line in lines_of_commands(path)]
    assert sum("examples/" in line or "-m ds_moe_ep " in line for line in lines) > 40
    assert "--deepspeed-config" not in help_of("examples/train_ep16.py")
    assert "--world_size" not in help_of("-m ds_moe_ep check-config")


def lines_of_commands(path: Path) -> list[str]:
    """The commands of a page, each on one line and without its comment."""
    text = "\n".join(block.text for block in commands(path)).replace("\\\n", " ")
    return [re.sub(r"\s#.*", "", line) for line in text.splitlines()]


@pytest.mark.parametrize("path", LINKED, ids=named)
def test_programs_of_the_package_that_a_page_names_can_be_started(path: Path) -> None:
    names = set(re.findall(r"-m (ds_moe_ep[\w.]*\w)", path.read_text(encoding="utf-8")))
    mains = {name: f"{name}.__main__" for name in names if getattr(find_spec(name), "submodule_search_locations", None)}
    assert [name for name in names if find_spec(mains.get(name, name)) is None] == []


def help_of(program: str) -> str:
    """The help of a command of the package; of an example, its source, which declares options, or imports a run's."""
    if program.startswith("examples/"):
        source = (ROOT / program).read_text(encoding="utf-8")
        return source + (RUN_OPTIONS if "ds_moe_ep.training.preparation" in source else "")
    (choices,) = (action.choices for action in make_parser()._actions if action.dest == "command")
    assert choices is not None
    parser = dict(choices)[program.split()[-1]]  # type: ignore[call-overload]
    assert isinstance(parser, Parser)
    return parser.format_help()
