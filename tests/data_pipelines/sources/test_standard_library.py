"""The embedded text: Python's own library."""

import inspect
import json
import sysconfig

import pytest

from data_pipelines import DocumentsConfig, Quarantine, read_documents
from data_pipelines.sources.standard_library import standard_library_files, standard_library_texts

MODULE = '''"""About the module."""

class Shelf(Base):
    """Holds books.

    Many of them.
    """

    def add(self, book, *, at: int = 0):
        """Puts a book there."""
        return "\\d"  # an escape that newer Pythons warn about

    def undocumented(self): ...

async def find(title):
    """Looks everywhere."""

class Undocumented:
    def hidden(self): ...
'''


@pytest.fixture
def library(tmp_path, monkeypatch):
    """An empty folder in the library's place."""
    folder = tmp_path / "lib"
    folder.mkdir()
    monkeypatch.setattr(sysconfig, "get_path", lambda name: {"stdlib": str(folder)}[name])
    return folder


def _write(folder, **files):
    for name, text in files.items():
        path = folder / f"{name.replace('__', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def _texts(split="train"):
    config = DocumentsConfig(source="stdlib", held_out_share=1e-9)
    return {document.name: document.text for document in read_documents(config, split)}


def _all_texts():
    return _texts("train") | _texts("held_out")


def test_a_file_gives_its_source_and_a_page_of_its_documentation(library):
    padding = "\n".join(f'def function_{n}():\n    """Documentation of number {n}."""' for n in range(9))
    _write(library, shelves=MODULE + padding, other="x = 1\n")
    texts = _all_texts()
    assert set(texts) == {"shelves.py", "shelves.py#doc", "other.py"}
    assert texts["shelves.py"] == MODULE + padding
    page = texts["shelves.py#doc"]
    assert page.startswith(
        "shelves - About the module.\n\nclass Shelf\n    Holds books.\n\n    Many of them.\n\n"
        "    add(self, book, *, at: int=0)\n        Puts a book there.\n\nfind(title)\n    Looks everywhere.\n\nfunction_0()\n"
    )
    assert "ndocumented" not in page and "hidden" not in page


def test_its_documents_are_counted_like_records(library, tmp_path):
    _write(library, shelves=MODULE * 3, other="x = 1\n", more="y = 1\n")
    config = DocumentsConfig(source="stdlib", held_out_share=0.4)
    with Quarantine(tmp_path / "bad") as quarantine:
        count = sum(1 for split in ("train", "held_out") for _ in read_documents(config, split, quarantine))
    assert quarantine.counts.seen == count > 3


def test_tests_packages_tables_and_what_was_built_are_left_out(library):
    _write(library, a="a = 1", pkg__b="b = 1", empty="\n", **{
        "test__c": "c", "pkg__tests__d": "d", "site-packages__e": "e", "encodings__cp1": "f", "_sysconfigdata_x": "g",
    })  # fmt: skip
    assert set(_all_texts()) == {"a.py", "pkg/b.py"}


def test_source_that_does_not_parse_is_text_all_the_same(library):
    _write(library, old='print "hello"\n', new="x = 1\n")
    assert _all_texts()["old.py"] == 'print "hello"\n'


def test_topics_are_documents_of_their_own_on_one_side(library):
    topics = {"if": 'The "if" statement', "while": "The loop", "empty": ""}
    _write(library, pydoc_data__topics=f"topics = {topics!r}\n", a="a = 1\n", b="b = 1\n", c="c = 1\n")
    expected = {"pydoc_data/topics.py#if": topics["if"], "pydoc_data/topics.py#while": topics["while"]}
    sides = [{name for name in _texts(split) if "#" in name} for split in ("train", "held_out")]
    assert sorted(sides, key=len) == [set(), set(expected)]
    assert {name: text for name, text in _all_texts().items() if "topics" in name} == expected


def test_a_file_and_its_page_are_on_one_side(library):
    for number in range(12):
        _write(library, **{f"m{number}": f'"""{"Long documentation. " * 20}"""\n'})
    config = DocumentsConfig(source="stdlib", held_out_share=0.4)
    train, held_out = ({document.name for document in read_documents(config, split)} for split in ("train", "held_out"))
    assert len(train) + len(held_out) == 24
    for side in (train, held_out):
        assert side
        assert {name.removesuffix("#doc") for name in side} <= side


def test_this_interpreters_library_is_read():
    """The documentation against what `inspect` finds in the imported module."""
    files = dict(standard_library_files())
    assert {"json/decoder.py", "typing.py", "importlib/__init__.py"} < set(files)
    texts = dict(standard_library_texts("json/decoder.py", files["json/decoder.py"]))
    assert texts[""] == inspect.getsource(json.decoder)
    page = texts["#doc"]
    for documented in (json.decoder, json.JSONDecoder.decode, json.JSONDecoder.raw_decode):
        for line in inspect.getdoc(documented).splitlines():
            assert line in page
