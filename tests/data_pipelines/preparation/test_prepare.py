"""The whole preparation on planted documents, each of which has to end in its place."""

import dataclasses
import hashlib
import json

import numpy as np
import pytest
import zstandard
from etils import epath

from data_pipelines import Document, DocumentsConfig, read_documents
from data_pipelines.preparation import prepared_documents
from data_pipelines.preparation.decontamination import DecontaminationConfig, EvaluationSetConfig
from data_pipelines.preparation.difficulty import DifficultyConfig
from data_pipelines.preparation.near_duplicates import NearDuplicatesConfig
from data_pipelines.preparation.prepare import PreparationConfig, prepare_documents
from data_pipelines.preparation.prepared_documents import Kept, OutputConfig, ordered
from lfm_jax.configuration import ConfigError, from_mapping, to_mapping

VOCABULARY = [f"{first}{second}" for first in ("lorem", "ipsum", "dolor", "amet") for second in "abcdefghijklmnopqrstuvwxyz"]
QUESTION = "how many apples are left when the old farmer has sold eleven of his forty two"


def prose(seed, count=100):
    words = np.random.default_rng(seed).choice(VOCABULARY, count)
    return " ".join(["the", "of", *words])


@pytest.fixture(scope="module")
def documents():
    """60 good ones, and among them what is to go."""
    texts = {f"good-{seed:02}": prose(seed) for seed in range(60)}
    texts["good-60"] = "The answer of that is with caf\u00e9 and \u4f60\u597d. " + prose(60)
    texts["short"] = "the end of it"
    texts["short-again"] = "the end of it"
    texts["exact"] = texts["good-03"].replace(" ", "\n", 5) + "\n"
    texts["near"] = texts["good-04"].rsplit(" ", 1)[0] + " other"
    texts["near-again"] = texts["good-04"] + " more"
    texts["leaked"] = f"{prose(70)} {QUESTION.upper()}. {prose(71)}"
    texts["leaked-copy"] = texts["leaked"]
    return [Document(text, name) for name, text in texts.items()]


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory):
    path = tmp_path_factory.mktemp("evaluation") / "questions.jsonl"
    path.write_text(json.dumps({"question": QUESTION}) + "\n" + json.dumps({"question": "too short"}) + "\n")
    return EvaluationSetConfig(name="apples", source=str(path), text_field="question")


@pytest.fixture
def config(evaluation):
    return PreparationConfig(
        near_duplicates=NearDuplicatesConfig(threshold=0.7), decontamination=DecontaminationConfig(evaluation=(evaluation,)),
        difficulty=None, output=OutputConfig(shard_bytes=20_000), part_documents=25,
    )  # fmt: skip


@pytest.fixture
def rated(config):
    """With a difficulty, which takes seconds: its model is a large table whatever the text."""
    return dataclasses.replace(config, difficulty=DifficultyConfig(sample_bytes=20_000, bucket_bytes=3000))


def records(workdir):
    files = sorted((workdir / "documents").glob("*.jsonl.zst"))
    contents = [zstandard.ZstdDecompressor().decompressobj().decompress(file.read_bytes()) for file in files]
    return [json.loads(line) for content in contents for line in content.splitlines()]


def removed(workdir):
    return {entry.pop("name"): entry for entry in map(json.loads, (workdir / "removed.jsonl").read_text().splitlines())}


def run(documents, config, workdir):
    return prepare_documents(lambda: iter(documents), config, epath.Path(workdir), {"source": "planted"})


def test_every_document_ends_in_its_place(documents, rated, tmp_path):
    manifest = run(documents, rated, tmp_path)
    kept, gone = records(tmp_path), removed(tmp_path)
    assert [record["name"] for record in kept] == [f"good-{seed:02}" for seed in range(61)]
    texts = {document.name: document.text for document in documents}
    assert all(record["text"] == texts[record["name"]] for record in kept)
    assert {name: entry["step"] for name, entry in gone.items()} == {
        "short": "quality", "short-again": "quality", "exact": "exact_duplicates", "near": "near_duplicates",
        "near-again": "near_duplicates", "leaked": "decontamination", "leaked-copy": "exact_duplicates",
    }  # fmt: skip
    assert gone["short"] == {"step": "quality", "reason": "words 4, below 50", "rule": "words", "value": 4.0}
    assert gone["exact"] == {
        "step": "exact_duplicates", "reason": "the same text as good-03", "duplicate_of": "good-03", "similarity": 1.0,
    }  # fmt: skip
    near = gone["near"]
    assert near["duplicate_of"] == "good-04" and 0.7 <= near["similarity"] < 1
    assert near["reason"] == f"about {near['similarity']:.2f} similar to good-04"
    assert gone["leaked"] == {
        "step": "decontamination", "reason": "shares 4 different runs of 13 words with apples", "evaluation_sets": ["apples"],
        "ngrams": 4,
    }  # fmt: skip
    _check_manifest(manifest, documents, kept, gone, tmp_path)


def _check_manifest(manifest, documents, kept, gone, workdir):
    assert manifest["documents"] == 61 and manifest["text_bytes"] == sum(len(record["text"].encode()) for record in kept)
    for entry in manifest["files"]:
        content = (workdir / "documents" / entry["file"]).read_bytes()
        assert (entry["bytes"], entry["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())
    assert [entry["file"] for entry in manifest["files"]] == sorted(path.name for path in (workdir / "documents").glob("*.zst"))
    assert len(manifest["files"]) > 2 and all(entry["text_bytes"] < 21_000 for entry in manifest["files"])
    sizes = {document.name: len(document.text.encode()) for document in documents}
    left = sum(sizes.values())
    for row in manifest["steps"]:
        taken = [sizes[name] for name, entry in gone.items() if entry["step"] == row["step"]]
        assert (row["removed_documents"], row["removed_bytes"]) == (len(taken), sum(taken))
        assert row["came_bytes"] == left and row["kept_bytes"] == left - sum(taken)
        left -= sum(taken)
    assert left == manifest["text_bytes"]
    assert manifest["removed_by_quality_rule"] == {"words": 2}
    (report,) = manifest["contamination"]
    assert (report["documents"], report["evaluation_documents_touched"], report["too_short_to_check"]) == (1, 1, 1)
    assert report["ngrams"] == 4 and report["commonest_ngrams"][0]["documents"] == 1
    assert manifest["settings"]["source"] == {"source": "planted"}
    quantiles = list(manifest["difficulty_quantiles"].values())
    ratings = [record["difficulty"] for record in kept]
    assert quantiles == sorted(quantiles) and quantiles[0] == min(ratings) and quantiles[-1] == max(ratings)
    assert kept[-1]["difficulty"] == max(ratings)  # the one with letters that no other has


def test_what_is_written_can_be_read_as_a_source(documents, config, tmp_path):
    run(documents, config, tmp_path)
    source = DocumentsConfig(source=str(tmp_path / "documents"), held_out_share=1.0)
    again = [document.text for document in read_documents(source, "held_out")]
    assert again == [record["text"] for record in records(tmp_path)]


@pytest.mark.parametrize("bucket_bytes", [1, 700, 1 << 20])
@pytest.mark.parametrize("open_buckets", [3, 256])
def test_documents_are_ordered_by_score_and_then_by_number(bucket_bytes, open_buckets, tmp_path, monkeypatch):
    """In one bucket, in many, and in so many that the source is read several times."""
    monkeypatch.setattr(prepared_documents, "_OPEN_BUCKETS", open_buckets)
    generator = np.random.default_rng(0)
    scores = generator.integers(0, 40, 200).astype(np.float32)
    scores[generator.random(200) < 0.3] = np.nan
    sizes = generator.integers(1, 300, 200)
    stays = np.flatnonzero(~np.isnan(scores))
    kept = [Kept(int(at), b'{"text": " %d 5 b "}\n' % at, int(sizes[at])) for at in stays]
    found = list(ordered(lambda: iter(kept), scores, sizes, bucket_bytes, epath.Path(tmp_path)))
    assert found == sorted(kept, key=lambda document: (scores[document.index], document.index))
    assert not list(tmp_path.iterdir())


def test_the_hardest_documents_come_last(documents, rated, tmp_path):
    run(documents, dataclasses.replace(rated, difficulty=dataclasses.replace(rated.difficulty, order=True)), tmp_path)
    scores = np.frombuffer((tmp_path / "passes" / "difficulty" / "scores").read_bytes(), "<f4")
    kept = [document.name for document in documents[:61]]
    expected = [kept[at] for at in np.argsort(scores[:61], kind="stable")]
    assert expected != kept and np.isnan(scores[61:]).all()
    found = records(tmp_path)
    assert [record["name"] for record in found] == expected
    assert [record["difficulty"] for record in found] == sorted(record["difficulty"] for record in found)
    assert {path.suffix for path in (tmp_path / "documents").iterdir()} == {".zst", ".json"}


def test_every_step_can_be_left_out(documents, tmp_path):
    nothing = PreparationConfig(
        quality=None, exact_duplicates=False, near_duplicates=None, decontamination=None, difficulty=None
    )  # fmt: skip
    manifest = run(documents, nothing, tmp_path)
    assert [record["name"] for record in records(tmp_path)] == [document.name for document in documents]
    assert (tmp_path / "removed.jsonl").read_text() == "" and manifest["difficulty_quantiles"] == {}
    assert {record["difficulty"] for record in records(tmp_path)} == {None}
    assert not {"difficulty", "evaluation"} & {path.name for path in (tmp_path / "passes").iterdir()}


def test_a_report_of_contamination_removes_nothing(documents, config, tmp_path):
    settings = dataclasses.replace(config, decontamination=dataclasses.replace(config.decontamination, action="report"))
    manifest = run(documents, settings, tmp_path)
    assert "leaked" in {record["name"] for record in records(tmp_path)} and "leaked" not in removed(tmp_path)
    assert manifest["contamination"][0]["documents"] == 1


class _Killed(BaseException):
    """As sudden as SIGKILL to what is tested: nothing catches it."""


def _content(workdir):
    paths = [path for path in sorted(workdir.rglob("*")) if path.is_file()]
    return {path.relative_to(workdir).as_posix(): path.read_bytes() for path in paths}


def test_stopped_anywhere_it_goes_on_to_the_same_bytes(documents, rated, tmp_path):
    """Stopped after ever more documents, in whichever pass that is, again and again until it is through."""
    config = dataclasses.replace(rated, difficulty=dataclasses.replace(rated.difficulty, order=True), part_documents=10)
    run(documents, config, tmp_path / "whole")
    stops = 0
    for budget in range(7, 700, 7):
        read = 0

        def source(budget=budget):
            nonlocal read
            for document in documents:
                if read == budget:
                    raise _Killed
                read += 1
                yield document

        try:
            prepare_documents(source, config, epath.Path(tmp_path / "stopped"), {"source": "planted"})
            break
        except _Killed:
            stops += 1
            assert not (tmp_path / "stopped" / "documents").exists()
    assert stops > 8
    assert _content(tmp_path / "stopped") == _content(tmp_path / "whole")


def test_a_finished_preparation_reads_nothing_again(documents, config, tmp_path):
    run(documents, config, tmp_path)

    def source():
        raise AssertionError("read again")
        yield

    again = prepare_documents(source, config, epath.Path(tmp_path), {"source": "planted"})
    assert again["documents"] == 61


def test_the_number_of_workers_changes_nothing(documents, config, tmp_path):
    for workers in (0, 1):
        run(documents, dataclasses.replace(config, workers=workers), tmp_path / str(workers))
    assert _content(tmp_path / "0") == _content(tmp_path / "1")


def test_passes_of_other_settings_are_refused(documents, config, tmp_path):
    run(documents, config, tmp_path)
    other = dataclasses.replace(config, near_duplicates=None)
    with pytest.raises(ConfigError, match="passes is of other settings: near_duplicates.threshold was 0.7, is None; "):
        run(documents, other, tmp_path)


def test_a_source_that_changes_between_two_passes_is_refused(documents, config, tmp_path):
    run(documents, config, tmp_path)
    prepared = tmp_path / "documents"
    for path in prepared.iterdir():
        path.unlink()
    prepared.rmdir()
    changed = [documents[0]._replace(text="something else"), *documents[1:]]
    with pytest.raises(ConfigError, match="document 0 .'good-00'. is not what it was"):
        run(changed, config, tmp_path)
    assert not prepared.exists()


def test_no_document_left_is_an_error(config, tmp_path):
    with pytest.raises(ConfigError, match="no document is left of 2: quality removed 2, exact_duplicates removed 0, .*loosen"):
        run([Document("a", "a"), Document("b", "b")], config, tmp_path)


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: PreparationConfig(workers=-1), "workers must not be negative and part_documents must be positive, got -1 and"),
        (lambda: PreparationConfig(part_documents=0), "workers must not be negative and part_documents must be .*and 0"),
        (lambda: OutputConfig(shard_bytes=0), "shard_bytes must be positive, got 0"),
        (lambda: OutputConfig(compression=0), "compression must be 1 to 19, got 0"),
    ],
)
def test_wrong_settings_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_settings_survive_as_plain_values(config):
    assert from_mapping(PreparationConfig, to_mapping(config)) == config
