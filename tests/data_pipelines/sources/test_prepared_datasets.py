"""Datasets of TensorFlow Datasets: a small one of our own, prepared as ArrayRecord and read, all without TensorFlow."""

import json
import os
import pickle
import subprocess
import sys

import pytest

from data_pipelines import DocumentsConfig, Quarantine, list_source_files, read_documents, read_source_file
from data_pipelines.sources import prepared_datasets

# tensorflow-datasets 4.9 reads its own files through a method that protobuf 6 calls old.
pytestmark = pytest.mark.filterwarnings(r"ignore:label\(\) is deprecated:DeprecationWarning")

COUNTS = {"train": 500, "test": 20}
PREPARE = """
import io
import sys
import numpy as np
import tensorflow_datasets as tfds

class Shelf(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=name) for name in ("en", "one", "bad")]

    def _info(self):
        page = tfds.features.Image(shape=(2, 2, 3))
        features = {"body": tfds.features.Text(), "score": np.float32, "page": page, "n": np.int64}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        counts = {"en": COUNTS, "one": {"validation": 3}, "bad": {"train": 3}}[self.builder_config.name]
        return {split: self._generate_examples(count) for split, count in counts.items()}

    def _generate_examples(self, count):
        for n in range(count):
            text = ["good", "", b"\\xff"][n] if self.builder_config.name == "bad" else f"caf\\u00e9 {n}"
            yield n, {"body": text, "score": n / 4, "page": io.BytesIO(b"no picture: it must not be decoded"), "n": n}

for config in ("en", "one", "bad"):
    builder = Shelf(data_dir=sys.argv[1], config=config, file_format="array_record")
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(num_shards=2))
""".replace("COUNTS", repr(COUNTS))


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """The dataset in three configs, prepared by another process, so that its code is not there to be read."""
    folder = tmp_path_factory.mktemp("prepared")
    subprocess.run([sys.executable, "-c", PREPARE, folder], check=True, capture_output=True)
    return folder


def _config(data_dir, source="tfds:shelf/en#train", **settings):
    settings = {"text_field": "body", "held_out_share": 1.0, **settings}
    return DocumentsConfig(source=source, data_dir=str(data_dir), **settings)


def test_a_dataset_is_read_and_nothing_of_it_is_lost(data_dir):
    documents = list(read_documents(_config(data_dir, difficulty_field="score"), "held_out"))
    assert [document.name for document in documents] == [f"shelf/en/1.0.0/train:{number}" for number in range(1, 501)]
    read = {document.text: document.difficulty for document in documents}
    assert read == {f"caf\u00e9 {n}": n / 4 for n in range(500)}


@pytest.mark.parametrize("source", ["tfds:shelf/en:1.0.0#train", "tfds:shelf/en:1.*.*#train", "tfds:shelf:1.0.0#train"])
def test_names_are_those_of_tfds_builder(source, data_dir):
    assert len(list(read_documents(_config(data_dir, source), "held_out"))) == 500


def test_the_only_split_need_not_be_named(data_dir):
    documents = list(read_documents(_config(data_dir, "tfds:shelf/one"), "held_out"))
    assert [document.name for document in documents] == [f"shelf/one/1.0.0/validation:{number}" for number in (1, 2, 3)]


def test_ranges_are_read_by_themselves_and_make_up_the_split(data_dir, monkeypatch):
    monkeypatch.setattr(prepared_datasets, "RANGE_RECORDS", 64)
    monkeypatch.setattr(prepared_datasets, "_READ_RECORDS", 10)
    config = _config(data_dir, held_out_share=0.2)
    both = []
    for split in ("train", "held_out"):
        files = pickle.loads(pickle.dumps(list_source_files(config, split)))
        assert [(file.first, file.last) for file in files] == [(first, min(first + 63, 500)) for first in range(1, 501, 64)]
        assert files == sorted(files)
        parts = [list(read_source_file(config, file, split)) for file in files]
        whole = list(read_documents(config, split))
        assert [document for part in parts for document in part] == whole
        both += whole
    assert {document.text for document in both} == {f"caf\u00e9 {n}" for n in range(500)}
    assert len(both) == 500
    sizes = sum(file.bytes for file in files)
    information = json.loads((data_dir / "shelf" / "en" / "1.0.0" / "dataset_info.json").read_text())
    assert sizes == int({split["name"]: split for split in information["splits"]}["train"]["numBytes"])


def test_a_split_of_a_dataset_may_be_what_is_held_out(data_dir):
    config = _config(data_dir, held_out_source="tfds:shelf/en#test")
    assert len(list(read_documents(config, "train"))) == 500
    assert len(list(read_documents(config, "held_out"))) == 20


def test_bad_records_are_put_aside(data_dir, tmp_path):
    with pytest.raises(ValueError, match=r"tfds:shelf/bad/1.0.0/train:\d: (the text is empty|no UTF-8)"):
        list(read_documents(_config(data_dir, "tfds:shelf/bad"), "held_out"))
    with Quarantine(tmp_path / "bad.jsonl") as quarantine:
        (document,) = read_documents(_config(data_dir, "tfds:shelf/bad"), "held_out", quarantine)
    assert document.text == "good"
    assert quarantine.counts.bad == {"empty": 1, "no_utf8": 1} and quarantine.counts.seen == 3
    assert '"where": "shelf/bad/1.0.0/train:' in (tmp_path / "bad.jsonl").read_text()
    with pytest.raises(ValueError, match="train:1: 'n' is int, not text; set text_field"):
        list(read_documents(_config(data_dir, text_field="n"), "held_out"))


@pytest.mark.parametrize(
    ("source", "settings", "kind", "message"),
    [
        ("tfds:shelf/en", {}, ValueError, "expected one split .* got 'none'; there are tfds:shelf/en#test, tfds:shelf/en#train"),
        ("tfds:shelf/en#val", {}, ValueError, "expected one split .* got 'val'; there are tfds:shelf/en#test"),
        ("tfds:shelf/en#train[:3]", {}, ValueError, r"expected one split .* got 'train\[:3\]'; there are"),
        ("tfds:shelf/fr", {}, FileNotFoundError, "tfds:shelf/fr: Could not find .* set data_dir, or prepare it with `tfds bu"),
        ("tfds:shelf/en:2.0.0", {}, FileNotFoundError, "build shelf/en --file_format=array_record --data_dir=.*`"),
        ("tfds:shelf/en#train", {"text_field": "text"}, ValueError, "train: there is no feature 'text', but 'body'"),
        ("tfds:shelf/en#train", {"difficulty_field": "hard"}, ValueError, "no feature 'hard', but .*; set difficulty_field"),
    ],
)  # fmt: skip
def test_what_is_not_there_is_named_with_what_is(source, settings, kind, message, data_dir):
    with pytest.raises(kind, match=message):
        list(read_documents(_config(data_dir, source, **settings), "held_out"))


def _copied(data_dir, tmp_path):
    folder = tmp_path / "shelf" / "one" / "1.0.0"
    folder.mkdir(parents=True)
    for path in (data_dir / "shelf" / "one" / "1.0.0").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def test_another_format_is_refused_with_the_command_that_converts_it(data_dir, tmp_path):
    information = _copied(data_dir, tmp_path) / "dataset_info.json"
    information.write_text(information.read_text().replace('"array_record"', '"tfrecord"'))
    command = f"tfds convert_format --dataset_version_dir={information.parent} --out_file_format=array_record"
    with pytest.raises(ValueError, match=f"is tfrecord, and only array_record is read; convert it with `{command}`"):
        list_source_files(_config(tmp_path, "tfds:shelf/one"), "held_out")


def test_a_damaged_file_is_noticed(data_dir, tmp_path):
    file = _copied(data_dir, tmp_path) / "shelf-validation.array_record-00001-of-00002"
    content = bytearray(file.read_bytes())
    flipped = content.copy()
    flipped[next(n for n in range(1 << 16, len(content)) if content[n])] ^= 1
    for damaged in (content[: 1 << 16], content[:100], bytes(len(content)), flipped):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match="records 1 to 3 of 'validation' cannot be read .*damaged: prepare the"):
            list(read_documents(_config(tmp_path, "tfds:shelf/one"), "held_out"))


def test_a_dataset_that_lies_elsewhere_than_on_a_disk_is_refused(data_dir, monkeypatch):
    """array_record opens files by itself and knows disks only."""
    from tensorflow_datasets.core import read_only_builder

    found = read_only_builder.builder_from_files("shelf/one", data_dir=str(data_dir))
    found._data_dir = type(found.data_path)("gs://bucket/shelf/one/1.0.0")
    monkeypatch.setattr(read_only_builder, "builder_from_files", lambda *arguments, **settings: found)
    with pytest.raises(ValueError, match="is in gs://bucket/shelf/one/1.0.0, but ArrayRecord is read from disks; copy it to one"):
        list_source_files(_config("gs://bucket", "tfds:shelf/one"), "held_out")


def test_tensorflow_is_not_imported(data_dir):
    code = (
        "import sys\n"
        "from data_pipelines import DocumentsConfig, read_documents\n"
        "config = DocumentsConfig(source='tfds:shelf/en#train', data_dir=sys.argv[1], text_field='body', held_out_share=1.0)\n"
        "assert len(list(read_documents(config, 'held_out'))) == 500\n"
        "assert 'tensorflow_datasets' in sys.modules and 'tensorflow' not in sys.modules"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    reading = subprocess.run([sys.executable, "-c", code, data_dir], capture_output=True, text=True, env=environment)
    assert reading.returncode == 0, reading.stderr
