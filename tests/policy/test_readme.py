"""README agrees with the code: knobs, figures, files and commands."""

from __future__ import annotations

import re
from typing import Any

import pytest

from ds_moe_ep.config import Layout, ModelConfig, MoEConfig
from ds_moe_ep.figures import stated_and_derived
from ds_moe_ep.tables import figure_table, knob_table
from tests.policy.sources import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("config", [MoEConfig, ModelConfig, Layout])
def test_the_table_of_knobs_is_the_one_that_the_code_prints(config: Any) -> None:
    assert knob_table(config) in README, "run `python -m ds_moe_ep knobs` and paste its tables"


def test_the_table_of_figures_is_the_one_that_the_code_prints() -> None:
    assert figure_table(stated_and_derived()) in README, "run `python -m ds_moe_ep figures` and paste its table"


@pytest.mark.parametrize("command", ["bash examples/quickstart.sh", "bash tests/run.sh"])
def test_readme_names_the_two_commands_and_their_files_exist(command: str) -> None:
    assert command in README
    assert (ROOT / command.split()[1]).is_file()


def test_every_file_that_readme_names_exists() -> None:
    named = set(re.findall(r"\b(?:examples|ds_configs|tests|ds_moe_ep)/[\w./-]*\w\.(?:py|sh|json|md)\b", README))
    assert named
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


def test_every_link_inside_the_repository_leads_somewhere() -> None:
    targets = re.findall(r"\]\((?!https?:|#)([^)#]+)", README)
    assert [target for target in targets if not (ROOT / target).exists()] == []
