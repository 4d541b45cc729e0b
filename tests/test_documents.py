"""The documents: short, plain, and with links that lead somewhere."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import pytest

from tests.support.repository import ROOT

FOLDERS = ("din_dist", "docker", "k8s", "launch", "tests")
DOCUMENTS = {
    path.relative_to(ROOT).as_posix(): path
    for path in sorted([*ROOT.glob("*.md"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.md"))])
}
MODULES = {path.relative_to(ROOT / "din_dist").as_posix(): path for path in (ROOT / "din_dist").rglob("*.py")}
ROOMS = sorted({name.split("/")[0] for name in MODULES})
VERB = re.compile(r"[A-Z][a-z]+s\b")


def paragraphs(text: str) -> Iterator[str]:
    """Yields each paragraph, list item and row of a table, without code blocks, headings and where links lead."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"^(#|!\[|\[[^\]]+\]: ).*$", "", text, flags=re.MULTILINE)
    text = re.sub(r"\[([^\]]+)\](\([^)]*\)|\[[^\]]*\])?", r"\1", text)
    for block in re.split(r"\n\s*\n|\n(?=\s*(?:[-*|]|\d+\.) )|\n(?=\|)", text):
        if block.strip():
            yield re.sub(r"^\s*(?:[-*]|\d+\.) ", "", " ".join(block.split()))


def sentences(text: str) -> Iterator[str]:
    """Yields the sentences of all paragraphs; tables have none."""
    for paragraph in paragraphs(text):
        if not paragraph.startswith("|"):
            yield from (part for part in re.split(r"(?<=[.!?])\s+", paragraph) if part)


def links(text: str) -> Iterator[str]:
    """Yields where the links lead, be it beside them or at the end of the document."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"`[^`\n]*`", "", text)
    yield from re.findall(r"\]\(([^)\s]+)\)", text)
    yield from re.findall(r"^\[[^\]]+\]: (\S+)$", text, flags=re.MULTILINE)


def anchors(text: str) -> set[str]:
    """Returns the names by which a document's headings are reached."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_front_page_is_short_and_plain() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 150
    found = list(sentences(text))
    assert sum(len(sentence.split()) for sentence in found) / len(found) <= 18
    crowded = [paragraph for paragraph in paragraphs(text) if paragraph.count(";") > 1]
    assert not crowded, "more than one semicolon"


def test_sentences_are_counted() -> None:
    text = (
        "# Heading\n\nOne two. Three\nfour [five](six)!\n\n- Seven; eight.\n\n| a. b | c |\n\n```\ncode. code.\n```\n"
    )
    assert list(sentences(text)) == ["One two.", "Three four five!", "Seven; eight."]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_no_line_is_long(name: str) -> None:
    lines = DOCUMENTS[name].read_text().splitlines()
    assert not [f"{name}:{number}" for number, line in enumerate(lines, 1) if len(line) > 120]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_link_leads_somewhere(name: str) -> None:
    path = DOCUMENTS[name]
    for link in links(path.read_text()):
        if re.match(r"[a-z]+:", link):
            continue
        file, _, anchor = link.partition("#")
        target = path.parent / file if file else path
        assert target.exists(), f"{name}: {link}"
        if anchor:
            assert anchor in anchors(target.read_text()), f"{name}: {link}"


def test_the_map_has_every_room() -> None:
    text = (ROOT / "din_dist" / "README.md").read_text()
    assert not [room for room in ROOMS if not room.endswith(".py") and not re.search(rf"\| [`\[]{room}[/`]", text)]


@pytest.mark.parametrize("room", ROOMS)
def test_docstrings_begin_with_their_subject_or_verb(room: str) -> None:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = [
        f"{name}:{getattr(node, 'lineno', 1)}: {docstring.splitlines()[0]}"
        for name, path in MODULES.items()
        if name.split("/")[0] == room
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, kinds) and (docstring := ast.get_docstring(node))
        if docstring.split()[0].strip(",;:") in ("Of", "As", "What", "Whether")
    ]
    assert not found


@pytest.mark.parametrize("room", ROOMS)
def test_docstrings_of_functions_begin_with_a_verb(room: str) -> None:
    """The verb stands in the third person. The docstring of a property is a noun phrase, or says when it is true."""
    wrong = []
    for name, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text())) if name.split("/")[0] == room else ():
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and (docstring := ast.get_docstring(node)):
                is_property = any("property" in ast.unparse(decorator) for decorator in node.decorator_list)
                if is_property if docstring.startswith("Returns") else not (is_property or VERB.match(docstring)):
                    wrong.append(f"{name}:{node.lineno}: {docstring.splitlines()[0]}")
    assert not wrong
