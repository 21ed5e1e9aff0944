"""Batches: the same at a step whoever asks, every target once in an epoch, nothing left running."""

import collections
import gc
import itertools
import json
import math
import threading

import numpy as np
import pytest

from data_pipelines import (
    Document,
    LoaderConfig,
    StageConfig,
    TokenizerConfig,
    evaluation_batches,
    train_tokenizer,
    training_batches,
    write_token_shards,
)

ONE_HOST = {"process_index": 0, "process_count": 1}
FIELDS = ("tokens", "targets", "segment_ids", "positions", "loss_mask")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    words = " ".join(f"word{number} {number * 7919}" for number in range(500))
    folder = tmp_path_factory.mktemp("tokenizer") / "tokenizer"
    return train_tokenizer(TokenizerConfig(vocab_size=290), [Document(words, "words")], folder)


@pytest.fixture(scope="module")
def shards(tokenizer, tmp_path_factory):
    """Fifty documents of 0 to 200 ids, in several files."""
    random = np.random.default_rng(0)
    documents = [Document("".join(map(chr, random.integers(97, 123, size))), "") for size in random.integers(1, 200, 50)]
    return write_token_shards(documents, tokenizer, tmp_path_factory.mktemp("tokens") / "train", shard_tokens=1000)


def _equal(first, second):
    assert set(first) == set(second) == set(FIELDS)
    for name in FIELDS:
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)


def _joined(parts):
    """The batch of all hosts."""
    return {name: np.concatenate([part[name] for part in parts]) for name in FIELDS}


def _pairs(batches):
    """How often each target that counts follows each input."""
    pairs = collections.Counter()
    for batch in batches:
        counts = batch["loss_mask"] > 0
        pairs.update(zip(batch["tokens"][counts].tolist(), batch["targets"][counts].tolist(), strict=True))
    return pairs


def _expected_pairs(shards):
    pairs = collections.Counter()
    for document in range(len(shards)):
        ids = shards[document].tolist()
        pairs.update(zip([1, *ids], [*ids, 2], strict=True))
    return pairs


def test_every_target_is_seen_once_per_epoch(shards, tokenizer):
    config = LoaderConfig(seq_len=48, batch_size=4, epochs=3)
    batches = list(training_batches([shards], config, tokenizer, **ONE_HOST))
    expected = _expected_pairs(shards)
    assert _pairs(batches) == collections.Counter({pair: 3 * count for pair, count in expected.items()})
    assert all(batch[name].shape == (4, 48) for batch in batches for name in FIELDS)
    # The last batch is filled up with rows of padding, and only it.
    rows = np.concatenate([batch["loss_mask"].sum(1) for batch in batches])
    filled = int((rows > 0).sum())
    assert filled % 4
    assert (rows[:filled] > 0).all() and len(rows) - filled < 4
    assert filled % 3 == 0
    # An epoch ends within a batch, and its rows are all there before the next one begins.
    per_epoch = filled // 3
    for epoch in range(3):
        here = slice(epoch * per_epoch, (epoch + 1) * per_epoch)
        joined = {name: array[here] for name, array in _joined(batches).items()}
        assert _pairs([joined]) == expected


def test_each_epoch_has_another_order(shards, tokenizer):
    config = LoaderConfig(seq_len=48, batch_size=1, epochs=2)
    rows = [batch["tokens"].tobytes() for batch in training_batches([shards], config, tokenizer, **ONE_HOST)]
    first, second = rows[: len(rows) // 2], rows[len(rows) // 2 :]
    assert sorted(first) == sorted(second)
    assert sum(a == b for a, b in zip(first, second, strict=True)) < len(first) // 4
    other = LoaderConfig(seq_len=48, batch_size=1, epochs=1, seed=1)
    assert [batch["tokens"].tobytes() for batch in training_batches([shards], other, tokenizer, **ONE_HOST)] != first


def test_without_epochs_there_is_no_end(shards, tokenizer):
    endless = training_batches([shards], LoaderConfig(seq_len=48, batch_size=8), tokenizer, **ONE_HOST)
    thrice = list(training_batches([shards], LoaderConfig(seq_len=48, batch_size=8, epochs=3), tokenizer, **ONE_HOST))
    for batch, expected in zip(endless, thrice[:-1], strict=False):
        _equal(batch, expected)
    assert next(endless)["loss_mask"].sum(1).all()
    state = endless.get_state() | {"step": 10**9}
    endless.set_state(state)
    far = next(endless)
    assert far["loss_mask"].sum(1).all()
    endless.close()


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_iterator_state_exact_and_host_count_change(hosts, shards, tokenizer):
    config = LoaderConfig(seq_len=48, batch_size=4)
    alone = training_batches([shards], config, tokenizer, **ONE_HOST)
    states, expected = [], []
    for _ in range(40):  # more than an epoch
        states.append(json.dumps(alone.get_state()))
        expected.append(next(alone))
    assert len(states[-1]) < 400
    several = [training_batches([shards], config, tokenizer, process_index=host, process_count=hosts) for host in range(hosts)]
    for step in (0, 17, 5, 39):  # forwards and back
        for batches in several:
            batches.set_state(json.loads(states[step]))
            assert json.dumps(batches.get_state()) == states[step]
        for following in expected[step : step + 6]:
            parts = [next(batches) for batches in several]
            assert all(len(part["tokens"]) == 4 // hosts for part in parts)
            _equal(_joined(parts), following)
    # A state is a copy: it does not move on with the iterator.
    state = alone.get_state()
    next(alone)
    assert state["step"] == 40
    for batches in (alone, *several):
        batches.close()


def test_no_record_lost_with_workers(shards, tokenizer):
    """Two processes make the same batches as none, also after going back."""
    plain = LoaderConfig(seq_len=48, batch_size=4, epochs=2)
    expected = list(training_batches([shards], plain, tokenizer, **ONE_HOST))
    config = LoaderConfig(seq_len=48, batch_size=4, epochs=2, workers=2)
    batches = training_batches([shards], config, tokenizer, **ONE_HOST)
    state = batches.get_state()
    found = list(batches)
    assert len(found) == len(expected)
    for batch, other in zip(found, expected, strict=True):
        _equal(batch, other)
    assert _pairs(found) == collections.Counter({pair: 2 * count for pair, count in _expected_pairs(shards).items()})
    batches.set_state(state | {"step": len(expected) - 2})
    _equal(next(batches), expected[-2])
    batches.close()


def test_no_thread_leak_over_evals(shards, tokenizer):
    """Neither closed nor forgotten iterators, read in part, leave threads behind."""
    evaluation = evaluation_batches(shards, tokenizer, seq_len=48, batch_size=4, **ONE_HOST)
    before = threading.active_count()
    for index in range(10):
        list(itertools.islice(evaluation, 3))
        batches = training_batches([shards], LoaderConfig(seq_len=48, batch_size=4), tokenizer, **ONE_HOST)
        next(batches)
        started = [thread for thread in threading.enumerate() if thread.name.startswith("grain")]
        assert started
        if index % 2:
            batches.close()
        del batches
        gc.collect()
        for thread in started:
            thread.join(timeout=60)
    assert threading.active_count() <= before


def test_the_end_stays_the_end(shards, tokenizer):
    batches = training_batches([shards], LoaderConfig(seq_len=48, batch_size=4, epochs=1), tokenizer, **ONE_HOST)
    count = len(list(batches))
    for _ in range(2):
        with pytest.raises(StopIteration):
            next(batches)
    assert batches.get_state()["step"] == count
    batches.set_state(batches.get_state())
    assert list(batches) == []


def test_a_state_of_other_batches_is_refused(shards, tokenizer, tmp_path):
    config = LoaderConfig(seq_len=48, batch_size=4)
    state = training_batches([shards], config, tokenizer, **ONE_HOST).get_state()
    for changes, message in (
        ({"batch_size": 8}, "batch_size was \\[4\\], is \\[8\\]; go on with the same text"),
        ({"seed": 3}, "seed was 0, is 3; go on"),
        ({"seq_len": 32}, "rows was "),
        ({"window_files": 1}, r"order was \['shuffled', None\], is \['shuffled', 1\]"),
    ):
        settings = {"seq_len": 48, "batch_size": 4} | changes
        batches = training_batches([shards], LoaderConfig(**settings), tokenizer, **ONE_HOST)
        with pytest.raises(ValueError, match=f"the state is of other batches: {message}"):
            batches.set_state(state)
    text = [Document("other text", "")]
    other = training_batches([write_token_shards(text, tokenizer, tmp_path / "other")], config, tokenizer, **ONE_HOST)
    with pytest.raises(ValueError, match="the state is of other batches: rows was "):
        other.set_state(state)
    # How long to go on, and how many processes help, may change.
    batches = training_batches([shards], LoaderConfig(seq_len=48, batch_size=4, epochs=9, workers=1), tokenizer, **ONE_HOST)
    batches.set_state(state)


@pytest.fixture(scope="module")
def sources(tokenizer, tmp_path_factory):
    """Three texts in alphabets of their own."""
    random, folder, texts = np.random.default_rng(1), tmp_path_factory.mktemp("sources"), []
    for name, (first, last), count in (("low", (97, 105), 60), ("high", (105, 123), 25), ("digits", (48, 58), 40)):
        sizes = random.integers(1, 200, count)
        documents = [Document("".join(map(chr, random.integers(first, last, size))), "") for size in sizes]
        texts.append(write_token_shards(documents, tokenizer, folder / name, shard_tokens=1000))
    return texts


def _mixed(sources, config, tokenizer, hosts=1):
    return [training_batches(sources, config, tokenizer, process_index=host, process_count=hosts) for host in range(hosts)]


def _run(iterators, steps):
    """Whole batches, of all hosts."""
    return [_joined([next(batches) for batches in iterators]) for _ in range(steps)]


def _of_source(row, sources, rows_of):
    """Which source a row is of: each row is of one only."""
    found = [at for at, rows in enumerate(rows_of) if row["tokens"].tobytes() in rows]
    assert len(found) == 1
    return found[0]


def test_every_target_of_every_source_is_seen_once_per_epoch(sources, tokenizer):
    """With weights by their rows, all sources end in the same batch."""
    batches = training_batches(sources, LoaderConfig(seq_len=48, batch_size=4, epochs=2), tokenizer, **ONE_HOST)
    expected = sum((_expected_pairs(shards) for shards in sources), collections.Counter())
    assert _pairs(batches) == collections.Counter({pair: 2 * count for pair, count in expected.items()})


def test_a_mixture_keeps_its_weights_and_each_source_its_epochs(sources, tokenizer):
    config = LoaderConfig(seq_len=48, batch_size=8, weights=(5, 2, 3), seed=3)
    counts, steps = np.zeros(3), 60
    rows_of = [
        [batch["tokens"].tobytes()
         for batch in training_batches([shards], LoaderConfig(seq_len=48, batch_size=1, epochs=1), tokenizer, **ONE_HOST)]
        for shards in sources
    ]  # fmt: skip
    seen = [[] for _ in sources]
    for batch in _run(_mixed(sources, config, tokenizer), steps):
        for row in range(8):
            source = _of_source({"tokens": batch["tokens"][row]}, sources, rows_of)
            counts[source] += 1
            seen[source].append(batch["tokens"][row].tobytes())
    assert np.abs(counts / (8 * steps) - [0.5, 0.2, 0.3]).max() < 2 / (8 * steps)
    for source, rows in zip(seen, rows_of, strict=True):  # no row comes again before all others have come
        times = [count / rows.count(row) for row, count in collections.Counter(source).items()]
        epochs = len(source) / len(rows)
        assert math.floor(epochs) <= min(times) and max(times) <= math.ceil(epochs)
        assert epochs < 1 or len(times) == len(set(rows))


@pytest.mark.parametrize("window", [None, 2])
def test_a_mixture_goes_on_with_another_number_of_hosts_and_workers(window, sources, tokenizer):
    """Weights, stages of other lengths, middles moved, windows: by others too, nothing is lost and nothing comes twice."""
    config = LoaderConfig(
        seq_len=48, batch_size=4, weights=(5, 2, 3), seed=3, fill_in_the_middle=0.5, window_files=window,
        stages=(StageConfig(from_step=9, weights=(0, 1, 1)), StageConfig(from_step=14, seq_len=96, batch_size=8)),
    )  # fmt: skip
    expected = _run(_mixed(sources, config, tokenizer), 24)
    assert [batch["tokens"].shape for batch in expected] == [(4, 48)] * 14 + [(8, 96)] * 10
    state, found, step = None, [], 0
    for hosts, steps in ((1, 3), (4, 8), (2, 5), (4, 8)):
        iterators = _mixed(sources, config, tokenizer, hosts)
        for batches in iterators:
            if state is not None:
                batches.set_state(json.loads(state))
        found += _run(iterators, steps)
        states = {json.dumps(batches.get_state()) for batches in iterators}
        (state,), step = states, step + steps
        assert len(state) < 4000
        for batches in iterators:
            batches.close()
    for batch, other in zip(found, expected, strict=True):
        _equal(batch, other)


def test_stages_that_have_not_begun_may_change(sources, tokenizer):
    settings = {"seq_len": 48, "batch_size": 4, "weights": (5, 2, 3)}
    first = LoaderConfig(**settings, stages=(StageConfig(from_step=9, weights=(0, 1, 1)),))
    later = LoaderConfig(**settings, stages=(StageConfig(from_step=7, weights=(1, 1, 1)),))
    (batches,), (others,) = _mixed(sources, first, tokenizer), _mixed(sources, later, tokenizer)
    batches.set_state(others.get_state() | {"step": 6})
    batches.set_state(others.get_state())
    _run([batches], 8)
    with pytest.raises(ValueError, match=r"from_step was \[0\], is \[0, 7\]; weights was "):
        others.set_state(batches.get_state())
    batches.close()


def test_files_come_by_difficulty(tokenizer, tmp_path):
    texts = [Document(letter * 300, letter, difficulty) for letter, difficulty in zip("abcd", (3.0, 1.0, 4.0, 2.0), strict=True)]
    shards = write_token_shards(texts, tokenizer, tmp_path / "tokens", shard_tokens=1)
    for window in ({}, {"window_files": 1}):  # the second is what the first means
        config = LoaderConfig(seq_len=64, batch_size=1, epochs=1, order="difficulty", **window)
        batches = training_batches([shards], config, tokenizer, **ONE_HOST)
        assert batches.get_state()["order"] == ["difficulty", 1]
        letters = [tokenizer.decode(batch["targets"][0].tolist())[:1] for batch in batches]
        assert list(dict.fromkeys(letters)) == ["b", "d", "a", "c"] and letters == sorted(letters, key="bdac".index)
    without = write_token_shards([Document("text", "")], tokenizer, tmp_path / "other")
    with pytest.raises(ValueError, match="order is 'difficulty', but these texts have none; prepare them with"):
        training_batches([without], config, tokenizer, **ONE_HOST)


def test_weights_must_fit_the_sources(sources, tokenizer):
    for weights, message in (((1, 2), r"weights \(1, 2\) are for 2 sources, and there are 3; give one for each"),):
        with pytest.raises(ValueError, match=message):
            training_batches(sources, LoaderConfig(seq_len=8, batch_size=4, weights=weights), tokenizer, **ONE_HOST)


@pytest.mark.parametrize("hosts", [1, 2])
def test_evaluation_sees_every_target_once(hosts, shards, tokenizer):
    by_host = [
        evaluation_batches(shards, tokenizer, seq_len=48, batch_size=4, process_index=host, process_count=hosts)
        for host in range(hosts)
    ]
    for _ in range(2):  # it can be gone through again
        parts = [list(batches) for batches in by_host]
        assert [len(part) for part in parts] == [len(by_host[0])] * hosts
        assert all(batch["tokens"].shape == (4 // hosts, 48) for part in parts for batch in part)
        assert _pairs(itertools.chain(*parts)) == _expected_pairs(shards)
    alone = list(evaluation_batches(shards, tokenizer, seq_len=48, batch_size=4, **ONE_HOST))
    for batch, *of_hosts in zip(alone, *parts, strict=True):
        _equal(batch, _joined(of_hosts))
    rows = np.concatenate([batch["segment_ids"].max(1) for batch in alone])
    padding = int((rows == 0).sum())
    assert padding < 4
    assert (rows[len(rows) - padding :] == 0).all()


def test_hosts_must_share_a_batch_evenly(shards, tokenizer):
    with pytest.raises(ValueError, match="batch_size 6 is no multiple of the 4 hosts; choose one that is"):
        training_batches([shards], LoaderConfig(seq_len=8, batch_size=6), tokenizer, process_index=0, process_count=4)
    with pytest.raises(ValueError, match="batch_size 3 is no multiple of the 2 hosts"):
        evaluation_batches(shards, tokenizer, seq_len=8, batch_size=3, process_index=1, process_count=2)


def test_without_being_told_jax_says_which_host_this_is(shards, tokenizer):
    config = LoaderConfig(seq_len=48, batch_size=4)
    batches, told = (training_batches([shards], config, tokenizer, **hosts) for hosts in ({}, ONE_HOST))
    assert len(batches) == len(told)
    _equal(next(batches), next(told))
    batches.close()
    told.close()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seq_len": 0}, "seq_len must be positive, got 0"),
        ({"batch_size": -1}, "batch_size must be positive, got -1"),
        ({"epochs": 0}, "epochs must be positive, got 0"),
        ({"workers": -1}, "workers and seed must not be negative, got -1 and 0"),
        ({"seed": -2}, "workers and seed must not be negative, got 0 and -2"),
        ({"window_files": 0}, "window_files must be positive, got 0"),
        ({"fill_in_the_middle": 1.5}, "fill_in_the_middle must be between 0 and 1, got 1.5"),
        ({"weights": (1.0, -1.0)}, r"weights must not be negative, and not all 0, got \(1.0, -1.0\)"),
        ({"stages": (StageConfig(from_step=5), StageConfig(from_step=5))}, "one after the other, got from_step 5, 5"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        LoaderConfig(**{"seq_len": 8, "batch_size": 8} | settings)
