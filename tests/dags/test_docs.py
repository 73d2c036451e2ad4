"""What the documents show is what the tested files hold."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"<!-- from (\S+): (\S+) -->\n```(?:python|yaml|ini)\n(.*?)```", re.DOTALL)
YAML = re.compile(r"<!-- from (\S+) -->\n```yaml\n(.*?)```", re.DOTALL)
ANY = re.compile(r"([^\n]*)\n```(?:python|py|yaml|yml|ini|cfg|toml|json)\n(.*?)```", re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)#]+)\)")


def blocks():
    """Return each block of code that says where it is from."""
    return [
        pytest.param(file, name, code, id=f"{document.name}-{name}")
        for document in DOCUMENTS
        for file, name, code in BLOCK.findall(document.read_text())
    ]


@pytest.mark.parametrize(("file", "name", "code"), blocks())
def test_code_in_documents_is_cut_from_tested_files(file, name, code):
    text = (ROOT / file).read_text()
    found = re.search(rf"# \[start {name}\]\n(.*?)# \[end {name}\]", text, re.DOTALL)

    assert found is not None
    assert found[1] == code


@pytest.mark.parametrize(
    ("file", "text"),
    [
        pytest.param(file, text, id=f"{document.name}-{file}")
        for document in DOCUMENTS
        for file, text in YAML.findall(document.read_text())
    ],
)
def test_yaml_in_documents_is_cut_from_files(file, text):
    assert text in (ROOT / file).read_text()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_block_of_code_says_where_it_is_from(document):
    unmarked = [
        code for before, code in ANY.findall(document.read_text()) if not before.startswith("<!--")
    ]

    assert unmarked == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document):
    for target in LINK.findall(document.read_text()):
        if "://" not in target:
            assert (document.parent / target).exists(), target
