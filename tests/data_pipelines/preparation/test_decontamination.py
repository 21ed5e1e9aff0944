"""Contamination against sets of word runs, and its report by hand."""

import collections
import json

import numpy as np
import pytest
from etils import epath

from data_pipelines import DocumentsConfig, read_documents
from data_pipelines.preparation.decontamination import (
    DecontaminationConfig,
    EvaluationNgrams,
    EvaluationSetConfig,
    find_contamination,
)
from data_pipelines.preparation.word_hashes import WordHashes, plain_words
from lfm_jax.configuration import ConfigError


def write(path, texts, field="text"):
    path.write_text("".join(json.dumps({field: text}) + "\n" for text in texts))
    return EvaluationSetConfig(name=path.stem, source=str(path), text_field=field)


def hits_of(texts, ngrams):
    hashes = WordHashes()
    found = [[index, ngram] for index, text in enumerate(texts) for ngram in ngrams.find(hashes(plain_words(text)))]
    return np.array(found, np.int64).reshape(-1, 2)


def runs(text, length):
    words = plain_words(text)
    return {tuple(words[at : at + length]) for at in range(len(words) - length + 1)}


def test_the_overlap_is_that_of_sets(tmp_path):
    """Random texts of few words, so that there is much of it: every figure against Python's sets."""
    generator = np.random.default_rng(0)

    def random_texts(count):
        return [" ".join(generator.choice(list("abcdefgh"), generator.integers(1, 30))) for _ in range(count)]

    evaluation = {"one": random_texts(20), "two": random_texts(30)}
    texts = random_texts(300)
    sets = tuple(write(tmp_path / f"{name}.jsonl", own) for name, own in evaluation.items())
    config = DecontaminationConfig(evaluation=sets, ngram_words=4, max_documents=3, reported_ngrams=5)
    ngrams = EvaluationNgrams.collect(config)
    ngrams.save(epath.Path(tmp_path) / "ngrams.npz")
    ngrams = EvaluationNgrams.load(epath.Path(tmp_path) / "ngrams.npz")
    found = find_contamination(hits_of(texts, ngrams), ngrams, config)

    everything = set().union(*(runs(text, 4) for own in evaluation.values() for text in own))
    counts = collections.Counter(run for text in texts for run in runs(text, 4) & everything)
    counted = {run for run, count in counts.items() if count <= 3}
    shared = {index: runs(text, 4) & counted for index, text in enumerate(texts) if runs(text, 4) & counted}
    assert len(ngrams.hashes) == len(everything)
    assert 20 < len(shared) < 300 and len(counted) < len(counts)
    assert dict(zip(found.documents.tolist(), found.ngrams.tolist(), strict=True)) == {at: len(own) for at, own in shared.items()}
    for which, (name, own) in enumerate(evaluation.items()):
        of_set = set().union(*(runs(text, 4) for text in own))
        bits = {document for document, bit in zip(found.documents.tolist(), found.sets.tolist(), strict=True) if bit >> which & 1}
        assert bits == {document for document, grams in shared.items() if grams & of_set}
        report = found.report[which]
        commonest = report.pop("commonest_ngrams")
        ignored = report.pop("commonest_ignored_ngrams")
        assert report == {
            "name": name, "evaluation_documents": len(own), "too_short_to_check": sum(not runs(text, 4) for text in own),
            "evaluation_documents_touched": sum(bool(runs(text, 4) & counted) for text in own), "documents": len(bits),
            "ngrams": len(counted & of_set), "ignored_ngrams": len((counts.keys() - counted) & of_set),
        }  # fmt: skip
        for entries, whole in ((commonest, counted & of_set), (ignored, (counts.keys() - counted) & of_set)):
            assert [entry["documents"] for entry in entries] == sorted((counts[run] for run in whole), reverse=True)[:5]
            assert all(counts[tuple(entry["text"].split())] == entry["documents"] for entry in entries)


def test_thirteen_words_without_case_and_punctuation(tmp_path):
    words = [f"word{number}" for number in range(14)]
    config = DecontaminationConfig(evaluation=(write(tmp_path / "set.jsonl", [" ".join(words)], "question"),))
    ngrams = EvaluationNgrams.collect(config)
    texts = ["x " + ", ".join(words[:13]).upper() + "! y", " ".join(words[:12]), " ".join([*words[:6], "no", *words[6:]]), "!"]
    found = find_contamination(hits_of(texts, ngrams), ngrams, config)
    assert found.documents.tolist() == [0] and found.ngrams.tolist() == [1]
    assert found.report[0]["commonest_ngrams"] == [{"text": " ".join(words[:13]), "documents": 1}]


def test_a_run_in_very_many_documents_is_ignored_unless_none_shall_be(tmp_path):
    phrase = "in the name of the people of the united states of america we the judges"
    entry = write(tmp_path / "set.jsonl", [phrase])
    texts = [phrase] * 11
    for most, contaminated in ((10, 0), (11, 11), (None, 11)):
        config = DecontaminationConfig(evaluation=(entry,), max_documents=most)
        ngrams = EvaluationNgrams.collect(config)
        assert len(find_contamination(hits_of(texts, ngrams), ngrams, config).documents) == contaminated


def test_nothing_in_common_and_nothing_long_enough(tmp_path):
    config = DecontaminationConfig(evaluation=(write(tmp_path / "set.jsonl", ["too short"]),))
    ngrams = EvaluationNgrams.collect(config)
    found = find_contamination(hits_of([" ".join(map(str, range(50)))], ngrams), ngrams, config)
    assert not len(found.documents) and found.report[0]["too_short_to_check"] == 1


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"ngram_words": 0}, "ngram_words must be positive, got 0"),
        ({"max_documents": 0}, "max_documents must be positive or None, got 0"),
        ({"reported_ngrams": -1}, "reported_ngrams must not be negative, got -1"),
        ({"evaluation": (EvaluationSetConfig(name="a", source="b"),) * 2}, "each of another name; got 2, twice: .'a'"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        DecontaminationConfig(**settings)


def test_a_set_that_cannot_be_read_is_named(tmp_path):
    config = DecontaminationConfig(evaluation=(EvaluationSetConfig(name="mmlu", source=str(tmp_path / "none")),))
    with pytest.raises(ConfigError, match="evaluation set 'mmlu': source .* does not exist"):
        EvaluationNgrams.collect(config)


def test_planted_questions_are_found_in_real_text(published_data):
    """Each fiftieth question of GSM8K in a stretch of a book: those documents are found, and none of the others."""
    source = published_data / "gsm8k" / "train.jsonl"
    entry = EvaluationSetConfig(name="gsm8k", source=str(source), text_field="question")
    questions = DocumentsConfig(source=str(source), text_field="question", held_out_share=1.0)
    texts = [document.text for document in read_documents(questions, "held_out")][::50]
    books = DocumentsConfig(source=str(published_data / "books" / "validation.jsonl.zst"), held_out_share=1.0)
    book = next(read_documents(books, "held_out")).text
    stretches = [book[at : at + 1000] for at in range(0, 2000 * len(texts), 1000)][: 2 * len(texts)]
    mixed = [f"{stretch}\n{texts[at // 2].upper() if at % 2 else ''}" for at, stretch in enumerate(stretches)]
    config = DecontaminationConfig(evaluation=(entry,))
    ngrams = EvaluationNgrams.collect(config)
    found = find_contamination(hits_of(mixed, ngrams), ngrams, config)
    long_enough = [at for at in range(1, len(mixed), 2) if len(plain_words(texts[at // 2])) >= 13]
    assert len(long_enough) > 100 and found.documents.tolist() == long_enough
