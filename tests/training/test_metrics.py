"""metrics.jsonl is the record, and TensorBoard's events say the same."""

import json
import struct

import pytest
from tensorboardX.proto.event_pb2 import Event

from lfm_jax.training.metrics import MetricsWriter, read_metrics


def write(workdir, start, steps):
    writer = MetricsWriter(workdir, start)
    for step in steps:
        writer.write(step, {"train/loss": 10.0 / step, "eval/bits_per_byte": 1.0 + step})
    writer.close()


def events(workdir):
    """(step, name) -> value of every scalar; a record is its length, a checksum, the event and a checksum."""
    found = {}
    for file in sorted((workdir / "tensorboard").iterdir()):
        content, at = file.read_bytes(), 0
        while at < len(content):
            (size,) = struct.unpack("<Q", content[at : at + 8])
            event = Event.FromString(content[at + 12 : at + 12 + size])
            found |= {(event.step, value.tag): value.simple_value for value in event.summary.value}
            at += size + 16
    return found


def test_a_record_has_its_step_its_time_and_its_values(tmp_path):
    write(tmp_path, 0, [1, 2])
    first, second = read_metrics(tmp_path)
    assert second.pop("time") >= first.pop("time") > 1.7e9
    assert (first, second) == (
        {"step": 1, "train/loss": 10.0, "eval/bits_per_byte": 2.0},
        {"step": 2, "train/loss": 5.0, "eval/bits_per_byte": 3.0},
    )


def test_tensorboard_says_the_same(tmp_path):
    write(tmp_path, 0, [1, 4])
    records = {
        (record["step"], name): value
        for record in read_metrics(tmp_path)
        for name, value in record.items()
        if "/" in name
    }  # fmt: skip
    found = events(tmp_path)
    assert {key: found[key] for key in records} == pytest.approx(records, rel=1e-6)


def test_a_writer_goes_on_after_its_step_and_drops_what_comes_again(tmp_path):
    write(tmp_path, 0, [1, 2, 3, 4])
    write(tmp_path, 2, [3, 4, 5])
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2, 3, 4, 5]


def test_half_a_line_is_no_record_and_nothing_is_glued_to_it(tmp_path):
    write(tmp_path, 0, [1, 2])
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "train/lo')
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2]
    write(tmp_path, 3, [4])
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 4]


def test_no_file_is_no_records(tmp_path):
    assert read_metrics(tmp_path) == []
