"""The first pass: its columns against what the parts say of each document, and going on after a kill."""

import json

import numpy as np
import pytest
from etils import epath

from data_pipelines import Document
from data_pipelines.preparation.decontamination import DecontaminationConfig, EvaluationNgrams, EvaluationSetConfig
from data_pipelines.preparation.exact_duplicates import text_digest
from data_pipelines.preparation.near_duplicates import NearDuplicatesConfig, band_keys, signatures_of
from data_pipelines.preparation.passes import fingerprint
from data_pipelines.preparation.quality import QualityConfig, judge, rules
from data_pipelines.preparation.scan import Measures, scan_documents
from data_pipelines.preparation.word_hashes import WordHashes, plain_words
from lfm_jax.configuration import ConfigError

WORDS = "the cat sat on a mat and saw that dog run to red barn by old mill in warm sun with two small birds".split()
LEAKED = (6, 44)
NEAR = NearDuplicatesConfig(permutations=16, implementation="numpy")


@pytest.fixture(scope="module")
def documents():
    generator = np.random.default_rng(0)
    return [Document(" ".join(generator.choice(WORDS, generator.integers(1, 120))), f"caf\u00e9-{at}\udcff") for at in range(47)]


@pytest.fixture(scope="module")
def measures(tmp_path_factory, documents):
    path = tmp_path_factory.mktemp("evaluation") / "set.jsonl"
    path.write_text("".join(json.dumps({"text": documents[at].text[:90]}) + "\n" for at in LEAKED))
    config = DecontaminationConfig(evaluation=(EvaluationSetConfig(name="set", source=str(path)),), ngram_words=6)
    return Measures(NEAR, QualityConfig(), EvaluationNgrams.collect(config))


def content(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_every_column_is_what_is_known_of_each_document(documents, measures, tmp_path):
    scan = scan_documents(lambda: documents, measures, epath.Path(tmp_path), part_documents=10)
    assert scan.documents == 47 and len(list(tmp_path.glob("part-*"))) == 5
    hashes, names = WordHashes(), list(rules(QualityConfig()))
    verdicts = [judge(document.text, QualityConfig(), hashes) for document in documents]
    assert scan.column("rules").tolist() == [names.index(verdict.rule) + 1 if verdict else 0 for verdict in verdicts]
    assert 0 < sum(verdict is not None for verdict in verdicts) < 47
    np.testing.assert_allclose(scan.column("values"), [verdict.value if verdict else 0 for verdict in verdicts], rtol=1e-6)
    assert scan.column("sizes").tolist() == [len(document.text.encode()) for document in documents]
    assert scan.column("fingerprints").tolist() == [fingerprint(document) for document in documents]
    digests = np.frombuffer(b"".join(text_digest(document.text) for document in documents), "<u8").reshape(-1, 2)
    assert (scan.column("digests") == digests).all()
    words = [hashes(plain_words(document.text)) for document in documents]
    signatures = signatures_of(words, digests, NEAR)
    asked = np.array([46, 0, 10, 9, 30, 0])
    assert (scan.signatures(asked) == signatures[asked]).all()
    keys = band_keys(signatures, *NEAR.bands)
    assert all((scan.band(band) == keys[band]).all() for band in range(NEAR.bands[0]))
    assert [scan.name(at) for at in range(47)] == [document.name for document in documents]
    hits = np.concatenate(list(scan.hits())).tolist()
    assert hits == [[at, ngram] for at, own in enumerate(words) for ngram in measures.evaluation.find(own).tolist()]
    assert {at for at, _ in hits} == set(LEAKED)


@pytest.mark.parametrize("stopped_at", [5, 10, 11, 46])
def test_an_interrupted_scan_goes_on_after_its_last_whole_part(stopped_at, documents, measures, tmp_path):
    asked = []

    def read(stop):
        for at, document in enumerate(documents):
            if at == stop:
                raise KeyboardInterrupt
            asked.append(at)
            yield document

    scan_documents(lambda: documents, measures, epath.Path(tmp_path / "whole"), part_documents=10)
    folder = epath.Path(tmp_path / "stopped")
    with pytest.raises(KeyboardInterrupt):
        scan_documents(lambda: read(stopped_at), measures, folder, part_documents=10)
    kept = content(tmp_path / "stopped")
    whole_parts = {name for name in kept if name.startswith("part-")}
    assert {name.partition("/")[0] for name in whole_parts} == {f"part-{at:05}" for at in range(stopped_at // 10)}
    times = {name: (tmp_path / "stopped" / name).stat().st_mtime_ns for name in whole_parts}
    scan_documents(lambda: read(None), measures, folder, part_documents=10)
    assert content(tmp_path / "stopped") == content(tmp_path / "whole")
    assert times == {name: (tmp_path / "stopped" / name).stat().st_mtime_ns for name in whole_parts}
    asked.clear()
    scan_documents(lambda: read(None), measures, folder, part_documents=10)
    assert not asked


def test_a_source_that_ends_with_a_part_is_whole(documents, measures, tmp_path):
    folder = epath.Path(tmp_path)
    scan_documents(lambda: documents[:20], measures, folder, part_documents=10)
    (folder / "scan.json").unlink()
    assert scan_documents(lambda: documents[:20], measures, folder, part_documents=10).documents == 20


def test_what_is_not_asked_is_not_measured(documents, tmp_path):
    scan = scan_documents(lambda: documents, Measures(None, None, None), epath.Path(tmp_path))
    assert not scan.column("rules").any() and not np.concatenate(list(scan.hits())).size
    assert (tmp_path / "part-00000" / "signatures").stat().st_size == 0
    assert not list(tmp_path.rglob("band_*"))


def test_no_document_is_an_error(measures, tmp_path):
    with pytest.raises(ConfigError, match="the source has no document to prepare"):
        scan_documents(list, measures, epath.Path(tmp_path))
