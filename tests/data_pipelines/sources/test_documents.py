"""Documents: which there are, and on which side of the split."""

import json

import pytest

from data_pipelines import DocumentsConfig, list_source_files, read_documents, read_source_file


@pytest.fixture
def records(tmp_path):
    """A folder of one file with 400 records, another with one."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "many.jsonl").write_text("".join(json.dumps({"text": f"record {number}"}) + "\n" for number in range(400)))
    (folder / "one.jsonl").write_text('{"text": "alone"}\n')
    return folder


def _names(config, split):
    return [document.name for document in read_documents(config, split)]


def test_the_two_splits_are_everything_once(records):
    config = DocumentsConfig(source=str(records), held_out_share=0.25)
    train, held_out = (list(read_documents(config, split)) for split in ("train", "held_out"))
    assert sorted(document.text for document in train + held_out) == sorted(["alone", *(f"record {n}" for n in range(400))])
    assert len({document.name for document in train + held_out}) == 401
    assert 60 < len(held_out) < 140  # 0.25 of 401, four standard deviations around it
    assert [document.name for document in train] == _names(config, "train")


def test_a_documents_side_depends_on_its_name_alone(records, tmp_path):
    """Not on the folder's place, on other files, or on how many records follow."""
    config = DocumentsConfig(source=str(records), held_out_share=0.25)
    held_out = [name for name in _names(config, "held_out") if name.startswith("many")]
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    lines = (records / "many.jsonl").read_text().splitlines(keepends=True)
    (moved / "many.jsonl").write_text("".join(lines[:200]))
    (moved / "another.jsonl").write_text("".join(lines))
    again = [name for name in _names(DocumentsConfig(source=str(moved), held_out_share=0.25), "held_out")]
    first = [name for name in held_out if int(name.partition(":")[2]) <= 200]
    assert [name for name in again if name.startswith("many")] == first


def test_the_split_is_the_one_of_always(records):
    """Written down: another hash would move documents that a model was trained on into what it is measured on."""
    config = DocumentsConfig(source=str(records), held_out_share=0.01)
    assert _names(config, "held_out") == [f"many.jsonl:{line}" for line in (152, 288, 334, 354)]


def test_all_may_be_held_out(records):
    config = DocumentsConfig(source=str(records), held_out_share=1.0)
    assert len(_names(config, "held_out")) == 401
    with pytest.raises(ValueError, match="no document .* in the 'train' split with held_out_share 1.0; change held_out_share"):
        next(read_documents(config, "train"))


def test_text_files_are_split_whole_and_one_is_always_held_out(tmp_path):
    for number in range(4):
        (tmp_path / f"{number}.txt").write_text(f"text {number}\nof two lines")
    config = DocumentsConfig(source=str(tmp_path), held_out_share=0.0001)
    (held_out,) = read_documents(config, "held_out")
    train = list(read_documents(config, "train"))
    assert len(train) == 3
    assert held_out.text == f"text {held_out.name[0]}\nof two lines"
    assert held_out not in train


def test_another_source_may_be_held_out(records, tmp_path):
    (tmp_path / "held.txt").write_text("held out")
    config = DocumentsConfig(source=str(records), held_out_source=str(tmp_path / "held.txt"))
    assert len(_names(config, "train")) == 401
    assert [document.text for document in read_documents(config, "held_out")] == ["held out"]


def test_documents_are_read_as_they_are_asked_for(tmp_path):
    (tmp_path / "text.jsonl").write_text('{"text": "good"}\nbad\n')
    config = DocumentsConfig(source=str(tmp_path), held_out_share=1e-9)
    documents = read_documents(config, "train")
    assert next(documents).text == "good"
    with pytest.raises(ValueError, match="text.jsonl:2: no JSON"):
        next(documents)


def test_a_split_without_documents_says_what_to_change(tmp_path):
    (tmp_path / "only.txt").write_text("all there is")
    config = DocumentsConfig(source=str(tmp_path / "only.txt"), held_out_share=1e-9)
    assert len(_names(config, "train")) == 1
    with pytest.raises(ValueError, match="no document .* in the 'held_out' split .* change held_out_share, or name"):
        next(read_documents(config, "held_out"))
    (tmp_path / "empty.jsonl").write_text("\n\n")
    config = DocumentsConfig(source=str(tmp_path / "only.txt"), held_out_source=str(tmp_path / "empty.jsonl"))
    with pytest.raises(ValueError, match="empty.jsonl' holds no document"):
        next(read_documents(config, "held_out"))


@pytest.mark.parametrize("share", [0.0, 1.1, -0.1, float("nan")])
def test_a_share_outside_of_its_range_is_refused(share):
    with pytest.raises(ValueError, match="held_out_share must be above 0 and at most 1, got"):
        DocumentsConfig(source="stdlib", held_out_share=share)


def test_holding_out_what_is_trained_on_is_refused():
    with pytest.raises(ValueError, match="held_out_source is source itself, 'books'"):
        DocumentsConfig(source="books", held_out_source="books")


def test_a_limit_that_nothing_is_below_is_refused():
    with pytest.raises(ValueError, match="max_text_bytes must be positive, got 0"):
        DocumentsConfig(source="stdlib", max_text_bytes=0)


def test_an_unknown_split_is_refused(records):
    config = DocumentsConfig(source=str(records))
    file = list_source_files(config, "train")[0]
    reads = (
        lambda: list_source_files(config, "test"),
        lambda: next(read_source_file(config, file, "test")),
        lambda: next(read_documents(config, "test")),
    )
    for read in reads:
        with pytest.raises(ValueError, match="split must be 'train' or 'held_out', got 'test'"):
            read()


def test_files_are_listed_by_name_with_their_sizes_and_without_the_texts_of_the_other_side(records):
    for number in range(20):
        (records / f"{number}.txt").write_text("x" * (number + 1))
    config = DocumentsConfig(source=str(records), held_out_share=0.25)
    sides = {split: list_source_files(config, split) for split in ("train", "held_out")}
    for split, files in sides.items():
        assert [file.name for file in files] == sorted(file.name for file in files)
        assert all((records / file.name).stat().st_size == file.bytes and file.first is file.last is None for file in files)
        assert {"many.jsonl", "one.jsonl"} < {file.name for file in files}
        names = {document.name for document in read_documents(config, split)}
        assert {file.name for file in files if file.name.endswith(".txt")} == {name for name in names if name.endswith(".txt")}
    assert sorted(file.name for files in sides.values() for file in files if file.name.endswith(".txt")) == sorted(
        f"{number}.txt" for number in range(20)
    )


def test_a_difficulty_is_read_where_the_config_names_its_field(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a", "bits": 2}\n{"text": "b", "bits": 0.5}\n')
    (tmp_path / "b.txt").write_text("whole")
    config = DocumentsConfig(source=str(tmp_path), held_out_share=1.0, difficulty_field="bits")
    assert [document.difficulty for document in read_documents(config, "held_out")] == [2.0, 0.5, None]
    config = DocumentsConfig(source=str(tmp_path), held_out_share=1.0)
    assert {document.difficulty for document in read_documents(config, "held_out")} == {None}
    config = DocumentsConfig(source=str(tmp_path), held_out_share=1.0, difficulty_field="loss")
    with pytest.raises(ValueError, match="a.jsonl:1: there is no field 'loss', but 'text', 'bits'; set difficulty_field to"):
        list(read_documents(config, "held_out"))


def test_the_shared_books_are_read(published_data):
    """Through a pattern, zstandard and real text; the validation file is a source of its own."""
    books = published_data / "books"
    config = DocumentsConfig(source=str(books / "train-*.jsonl.zst"), held_out_source=str(books / "validation.jsonl.zst"))
    held_out = list(read_documents(config, "held_out"))
    assert len(held_out) == 5
    assert all(len(document.text) > 100_000 for document in held_out)
    assert next(read_documents(config, "train")).name == "train-00.jsonl.zst:1"
