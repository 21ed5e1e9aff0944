"""Documents as ids on disk: all of them, the same whoever wrote them, and nothing damaged is taken for whole."""

import concurrent.futures
import inspect
import io
import json
import math
import pickle
import shutil
import textwrap

import numpy as np
import pytest
from array_record.python import array_record_module
from etils import epath

from data_pipelines import Document, TokenizerConfig, read_token_shards, train_tokenizer, write_token_shards
from data_pipelines.tokenization import shard_writer, token_shards

TEXTS = [part for module in (inspect, io, json, textwrap) for part in inspect.getsource(module).split("\n\n") if part]
DOCUMENTS = [Document(text, str(index)) for index, text in enumerate(TEXTS)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_tokenizer(TokenizerConfig(vocab_size=600), DOCUMENTS, tmp_path_factory.mktemp("workdir") / "tokenizer")


@pytest.fixture(scope="module")
def written(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("written") / "train"
    write_token_shards(iter(DOCUMENTS), tokenizer, folder, shard_tokens=10_000)
    return folder


@pytest.fixture
def copy(written, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(written, tmp_path / "copy")


def test_every_document_is_there(written, tokenizer):
    shards = read_token_shards(written, tokenizer, check_contents=True)
    expected = [tokenizer.encode(text) for text in TEXTS]
    assert len(shards) == shards.documents == len(TEXTS)
    assert [shards[index].tolist() for index in range(len(shards))] == expected
    assert [tokenizer.decode(shards[index]) for index in range(len(shards))] == TEXTS
    assert shards[3].dtype == np.uint16
    assert shards.lengths.tolist() == [len(ids) for ids in expected]
    assert shards.tokens == sum(map(len, expected))
    assert shards.text_bytes == len("".join(TEXTS).encode())
    assert shards.vocab_size == tokenizer.vocab_size
    with pytest.raises(IndexError, match=f"document {len(TEXTS)} of {len(TEXTS)}"):
        shards[len(TEXTS)]


def test_shards_are_closed_when_they_are_full(written):
    shards = read_token_shards(written)
    assert len(shards.shards) > 3
    assert all(10_000 <= shard.tokens for shard in shards.shards[:-1])
    assert all(shard.tokens < 10_000 + shards.lengths.max() for shard in shards.shards)
    assert sum(shard.documents for shard in shards.shards) == len(TEXTS)
    names = {f"{kind}-00000-{number:03}" for number in range(len(shards.shards)) for kind in ("tokens", "lengths")}
    assert {path.stem for path in written.iterdir()} == names | {"index"}
    index = json.loads((written / "index.json").read_text())
    assert index["records"] == {"seen": len(TEXTS), "bad": {}} and shards.bad_records == 0


def test_a_file_is_read_by_itself(written):
    """Against the whole: the n-th document of a file is known from the numbers of those before."""
    shards = read_token_shards(written)
    first = 0
    for number, shard in enumerate(shards.shards):
        ids = [shards[first + document] for document in range(shard.documents)]
        lengths = shards.lengths_of(number)
        assert lengths.dtype == np.int64 and lengths.tolist() == list(map(len, ids)) and lengths.sum() == shard.tokens
        some = np.random.default_rng(number).permutation(shard.documents)[:20]
        for document, found in zip([*some, some[0]], shards.read_many(number, [*some, some[0]]), strict=True):
            np.testing.assert_array_equal(found, ids[document])
            np.testing.assert_array_equal(shards.read(number, document), ids[document])
        first += shard.documents
    assert shards.read_many(0, []) == []
    with pytest.raises(IndexError, match=rf"document {shards.shards[1].documents} of \d+ in tokens-00000-001.array_record"):
        shards.read(1, shards.shards[1].documents)
    with pytest.raises(ValueError, match="read-only"):
        shards.lengths_of(0)[0] = 1


def test_difficulties_are_averaged_file_by_file(tokenizer, tmp_path):
    difficulties = [0.1 * index if index % 3 else None for index in range(40)] + [None] * 200
    documents = [document._replace(difficulty=number) for document, number in zip(DOCUMENTS, difficulties, strict=False)]
    shards = write_token_shards(documents, tokenizer, tmp_path / "train", shard_tokens=2000)
    first, seen = 0, set()
    for shard in shards.shards:
        known = [number for number in difficulties[first : first + shard.documents] if number is not None]
        assert shard.difficulty == (pytest.approx(math.fsum(known) / len(known)) if known else None)
        seen.add(shard.difficulty is None)
        first += shard.documents
    assert seen == {True, False}


@pytest.mark.parametrize("threads", [1, 3])
def test_bytes_do_not_depend_on_threads_or_batches(threads, written, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(shard_writer, "_BATCH_CHARACTERS", 1 << (8 + threads))
    write_token_shards(DOCUMENTS, tokenizer, tmp_path / "again", shard_tokens=10_000, threads=threads)
    for path in written.iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.parametrize(("vocab_size", "dtype"), [(1 << 16, np.uint16), ((1 << 16) + 1, np.uint32)])
def test_more_ids_take_more_bytes(vocab_size, dtype, tokenizer, tmp_path):
    class Shifted:
        """Gives the highest ids there are."""

        fingerprint = "other"

        def encode_batch(self, texts, threads):
            return [[index + vocab_size - 600 for index in ids] for ids in tokenizer.encode_batch(texts)]

    Shifted.vocab_size = vocab_size
    shards = write_token_shards(DOCUMENTS[:3], Shifted(), tmp_path / "wide")
    assert shards[0].dtype == dtype
    assert (shards[0].astype(np.int64) - (vocab_size - 600)).tolist() == tokenizer.encode(TEXTS[0])


def test_a_copy_in_another_process_reads_the_same(written):
    shards = read_token_shards(written)
    first = shards[5]  # opens a file
    again = pickle.loads(pickle.dumps(shards))
    np.testing.assert_array_equal(again[5], first)
    assert again.fingerprint == shards.fingerprint and again.shards == shards.shards


def test_few_files_are_open_at_a_time_and_threads_may_read_them(written, tokenizer, monkeypatch):
    monkeypatch.setattr(token_shards, "_OPEN_FILES", 2)
    opened = []
    reader = token_shards.array_record_module.ArrayRecordReader
    spy = lambda path, **options: opened.append(path) or reader(path, **options)
    monkeypatch.setattr(token_shards.array_record_module, "ArrayRecordReader", spy)
    shards = read_token_shards(written, tokenizer)
    order = np.random.default_rng(0).permutation(len(shards))[:300]
    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda index: tokenizer.decode(shards[index]), order))
    assert found == [TEXTS[index] for index in order]
    assert shards._reader.cache_info().currsize == shards._lengths.cache_info().currsize == 2
    assert len(opened) > len(shards.shards)  # closed and opened again


def test_opening_costs_the_same_whatever_the_size(written, tmp_path):
    """The index of two thousand files, none of which is there, opens like that of twenty; what is used is looked at."""
    entry = json.loads((written / "index.json").read_text())["shards"][0]
    for count in (20, 2000):
        folder = tmp_path / str(count)
        folder.mkdir()
        entries = [entry | {"file": f"tokens-{number:05}-000.array_record"} for number in range(count)]
        index = json.loads((written / "index.json").read_text()) | {"shards": entries}
        index |= {"documents": count * entry["documents"], "tokens": count * entry["tokens"]}
        (folder / "index.json").write_text(json.dumps(index))
        for kind, suffix in (("tokens", "array_record"), ("lengths", "npy")):
            shutil.copy(written / f"{kind}-00000-000.{suffix}", folder / f"{kind}-{count - 1:05}-000.{suffix}")
        shards = read_token_shards(folder)
        assert len(shards) == count * entry["documents"] and len(shards.shards) == count
        last = read_token_shards(written).read(0, entry["documents"] - 1)
        np.testing.assert_array_equal(shards[len(shards) - 1], last)
        with pytest.raises(FileNotFoundError, match="00007-000.npy is missing"):
            shards.lengths_of(7)


def test_the_fingerprint_is_that_of_all_ids(written, copy, tokenizer, tmp_path):
    shards = read_token_shards(written)
    assert read_token_shards(copy).fingerprint == shards.fingerprint
    changed = [DOCUMENTS[0]._replace(text=TEXTS[0][::-1]), *DOCUMENTS[1:]]
    other = write_token_shards(changed, tokenizer, tmp_path / "other", shard_tokens=10_000)
    assert other.fingerprint != shards.fingerprint


def test_files_elsewhere_are_written_by_way_of_local_ones(written, tokenizer, tmp_path, monkeypatch):
    """A bucket cannot be written by array_record itself."""
    opened = []
    writer = shard_writer.array_record_module.ArrayRecordWriter
    spy = lambda path, options: opened.append(path) or writer(path, options)
    monkeypatch.setattr(shard_writer.array_record_module, "ArrayRecordWriter", spy)
    monkeypatch.setattr(shard_writer, "is_remote", lambda path: True)
    write_token_shards(DOCUMENTS, tokenizer, tmp_path / "bucket", shard_tokens=10_000)
    assert opened and not any(path.startswith(str(tmp_path)) for path in opened)
    for path in written.iterdir():
        assert (tmp_path / "bucket" / path.name).read_bytes() == path.read_bytes(), path.name
    assert [path.name for path in tmp_path.iterdir()] == ["bucket"]


def test_where_folders_cannot_be_renamed_the_index_comes_last(written, copy, tmp_path, monkeypatch):
    monkeypatch.setattr(shard_writer, "is_remote", lambda path: True)
    copied = []
    copy_file = type(epath.Path(copy)).copy
    spy = lambda path, *arguments, **options: copied.append(path.name) or copy_file(path, *arguments, **options)
    monkeypatch.setattr(type(epath.Path(copy)), "copy", spy)
    shard_writer.publish(epath.Path(copy), epath.Path(tmp_path / "bucket"))
    assert copied[-1] == "index.json" and sorted(copied) == sorted(path.name for path in written.iterdir())
    assert not copy.exists() and len(read_token_shards(tmp_path / "bucket", check_contents=True)) == len(TEXTS)


def test_only_a_finished_folder_appears(tokenizer, tmp_path):
    def interrupted():
        yield from DOCUMENTS[:100]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_token_shards(interrupted(), tokenizer, tmp_path / "train")
    assert [path.name for path in tmp_path.iterdir()] == [".train.part"]
    assert not (tmp_path / ".train.part" / "index.json").exists()
    write_token_shards(DOCUMENTS[:5], tokenizer, tmp_path / "train")
    assert [path.name for path in tmp_path.iterdir()] == ["train"]
    with pytest.raises(FileExistsError, match="train exists; read it with read_token_shards, or delete it"):
        write_token_shards(DOCUMENTS, tokenizer, tmp_path / "train")


def test_writing_nothing_is_refused(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="there is no document to tokenize"):
        write_token_shards([], tokenizer, tmp_path / "train")
    with pytest.raises(ValueError, match="shard_tokens must be positive, got 0"):
        write_token_shards(DOCUMENTS, tokenizer, tmp_path / "train", shard_tokens=0)
    assert not list(tmp_path.iterdir())


def test_tokenizer_hash_mismatch_refused(written, tokenizer, tmp_path):
    other = train_tokenizer(TokenizerConfig(vocab_size=601), DOCUMENTS, tmp_path / "other")
    message = (
        rf"another tokenizer \(600 ids, fingerprint {tokenizer.fingerprint[:12]}\) than the given one \(601 ids, fingerprint"
    )
    with pytest.raises(ValueError, match=message):
        read_token_shards(written, other)
    assert len(read_token_shards(written, tokenizer)) == len(TEXTS)


def _edit_index(folder, change):
    index = json.loads((folder / "index.json").read_text())
    change(index)
    (folder / "index.json").write_text(json.dumps(index))


def test_another_format_is_refused(copy):
    _edit_index(copy, lambda index: index.update(format=1))
    with pytest.raises(ValueError, match="index.json is of format 1, this version reads 2; delete the folder and tokenize again"):
        read_token_shards(copy)


def test_a_damaged_index_is_refused(copy):
    _edit_index(copy, lambda index: index["shards"].pop())
    with pytest.raises(ValueError, match=r"index.json is damaged: it gives \d+ documents, its files have \d+; delete the folder"):
        read_token_shards(copy)
    content = (copy / "index.json").read_text()
    (copy / "index.json").write_text(content[: len(content) // 2])
    with pytest.raises(ValueError, match="index.json is damaged .*; delete the folder and tokenize again"):
        read_token_shards(copy)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda index: index.update(documents=-1), "documents"),
        (lambda index: index.update(tokens=1.0), "tokens"),
        (lambda index: index.pop("text_bytes"), "text_bytes"),
        (lambda index: index.update(dtype="O"), "dtype"),
        (lambda index: index.update(dtype=["<u2"]), "dtype"),
        (lambda index: index.update(tokenizer=[]), "tokenizer.vocab_size"),
        (lambda index: index["tokenizer"].update(fingerprint=7), "tokenizer.fingerprint"),
        (lambda index: index["records"].update(bad={"empty": "7"}), "records.bad"),
        (lambda index: index.update(shards={}), "shards"),
        (lambda index: index["shards"].append(None), r"shards\[\d\].documents"),
        (lambda index: index["shards"][1].update(file="../tokens-00000-001.array_record"), r"shards\[1\].file"),
        (lambda index: index["shards"][1].update(file="tokens-00000-000.array_record"), "shards: a file that is there twice"),
        (lambda index: index["shards"][0].update(difficulty=float("nan")), r"shards\[0\].difficulty"),
        (lambda index: index["shards"][0].update(sha256="0"), r"shards\[0\].sha256"),
        (lambda index: index["shards"][0].update(bytes=1 << 63), r"shards\[0\].bytes"),
    ],
)
def test_a_field_that_is_no_sound_value_is_named(change, field, copy):
    _edit_index(copy, change)
    with pytest.raises(ValueError, match=f"index.json is damaged: {field} is missing or no sound value; delete the folder"):
        read_token_shards(copy)


@pytest.mark.parametrize(
    ("text", "message"),
    [("[" * 100_000, "index.json is damaged .maximum recursion"), ("[]", "is damaged: expected a JSON object, got list")],
)
def test_an_index_that_is_none_is_refused(text, message, copy):
    (copy / "index.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_token_shards(copy)


def test_an_index_too_long_to_be_one_is_not_parsed(copy, monkeypatch):
    monkeypatch.setattr(token_shards, "_MOST_INDEX_BYTES", 100)
    with pytest.raises(ValueError, match=r"index.json has \d+ bytes, more than 100: it is damaged"):
        read_token_shards(copy)


def _npy(array):
    content = io.BytesIO()
    np.save(content, array)
    return content.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no lengths .No data left in file"),
        (_npy(np.zeros(3, "<u4"))[:-4], "holds no lengths"),
        (_npy(np.zeros(3, "<u4")).replace(b"(3,)", b"(1000000000000,)"), "holds no lengths"),
        (_npy(np.zeros(3, "<u4")), r"has uint32 of shape \(3,\), not uint32 of \d+"),
        (_npy(np.zeros(3, "<f4")), r"has float32 of shape \(3,\), not uint32 of \d+"),
    ],
)
def test_lengths_that_were_written_wrong_are_refused(content, message, copy):
    """With a digest that agrees: whoever made the folder made it so."""
    (copy / "lengths-00000-000.npy").write_bytes(content)
    sha256 = token_shards.sha256_of(epath.Path(copy / "lengths-00000-000.npy"))
    _edit_index(copy, lambda index: index["shards"][0].update(lengths_sha256=sha256))
    with pytest.raises(ValueError, match=f"lengths-00000-000.npy {message}"):
        read_token_shards(copy)[0]


def _refused(folder, error, message, shard):
    """When the shard is first used, and at once if all is to be checked; other shards can be read."""
    with pytest.raises(error, match=message):
        read_token_shards(folder, check_contents=True)
    shards = read_token_shards(folder)
    other = 1 - min(shard, 1)
    assert len(shards.read(other, 0)) == shards.lengths_of(other)[0]
    with pytest.raises(error, match=message):
        shards.read(shard, 0)


def test_a_missing_index_is_named(copy):
    (copy / "index.json").unlink()
    with pytest.raises(FileNotFoundError, match="index.json does not exist.*; delete the folder and tokenize again"):
        read_token_shards(copy)


@pytest.mark.parametrize("name", ["lengths-00000-001.npy", "tokens-00000-001.array_record"])
def test_a_missing_file_is_named(name, copy):
    (copy / name).unlink()
    _refused(copy, FileNotFoundError, f"{name} is missing; delete the folder and tokenize again", 1)


def test_a_truncated_shard_is_named(copy):
    shard = copy / "tokens-00000-001.array_record"
    content = shard.read_bytes()
    for end in (len(content) // 2, 0):
        shard.write_bytes(content[:end])
        _refused(copy, ValueError, f"tokens-00000-001.array_record has {end} bytes, {len(content)} by index.json", 1)


@pytest.mark.parametrize("records", [0, 3])
def test_a_shard_with_fewer_records_is_named(records, copy):
    """A whole file, of a size that the index agrees with."""
    shard = copy / "tokens-00000-000.array_record"
    writer = array_record_module.ArrayRecordWriter(str(shard), "group_size:1,uncompressed")
    for _ in range(records):
        writer.write(b"some")
    writer.close()
    _edit_index(copy, lambda index: index["shards"][0].update(bytes=shard.stat().st_size))
    _refused(copy, ValueError, rf"tokens-00000-000.array_record has {records} records, \d+ by index.json; delete", 0)


def test_a_shard_that_is_no_array_record_is_named(copy):
    shard = copy / "tokens-00000-002.array_record"
    shard.write_bytes(bytes(reversed(shard.read_bytes())))
    _refused(copy, ValueError, "tokens-00000-002.array_record is damaged", 2)


def test_a_flipped_bit_is_noticed(copy):
    """When the record is read, alone or with others, and before, by the hash of the file."""
    shard = copy / "tokens-00000-000.array_record"
    content = bytearray(shard.read_bytes())
    content[10_000] ^= 4
    shard.write_bytes(content)
    with pytest.raises(ValueError, match=r"tokens-00000-000.array_record has changed since it was written \(SHA-256\)"):
        read_token_shards(copy, check_contents=True)
    shards = read_token_shards(copy)
    message = r"tokens-00000-000.array_record: document \d+ cannot be read .*; delete the folder and tokenize again"
    with pytest.raises(ValueError, match=message) as alone:
        for index in range(shards.shards[0].documents):
            shards[index]
    with pytest.raises(ValueError, match=message) as together:
        shards.read_many(0, range(shards.shards[0].documents))
    assert str(alone.value).partition("(")[0] == str(together.value).partition("(")[0]


def test_lengths_that_changed_are_refused(copy):
    lengths = np.load(copy / "lengths-00000-001.npy")
    np.save(copy / "lengths-00000-001.npy", lengths + 1)
    _refused(copy, ValueError, r"lengths-00000-001.npy has changed since it was written \(SHA-256\)", 1)


def test_a_record_of_another_length_is_refused(copy):
    lengths = np.load(copy / "lengths-00000-000.npy")
    lengths[7] += 1
    np.save(copy / "lengths-00000-000.npy", lengths)
    sha256 = token_shards.sha256_of(epath.Path(copy / "lengths-00000-000.npy"))
    _edit_index(copy, lambda index: index["shards"][0].update(lengths_sha256=sha256))
    shards = read_token_shards(copy)
    with pytest.raises(ValueError, match=rf"document 7 has \d+ ids, {lengths[7]} by lengths-00000-000.npy"):
        shards[7]
