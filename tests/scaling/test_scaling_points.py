"""Points of one's own: what is read, how FLOPs are counted, and what is refused."""

import json
import re

import numpy as np
import pytest

from lfm_jax.scaling import points, read_held_out, read_points


def test_jsonl_and_csv_give_the_same_points(tmp_path):
    (tmp_path / "runs.jsonl").write_text(
        '{"params": 1e6, "tokens": 2e7, "loss": 3.5, "name": "a"}\n\n{"loss": 3.0, "params": 2000000, "tokens": 4e7}\n'
    )
    (tmp_path / "runs.csv").write_text("name,loss,params,tokens\na,3.5,1e6,2e7\nb,3.0,2000000,4e7\n")
    for name in ("runs.jsonl", "runs.csv"):
        found = read_points(tmp_path / name)
        assert len(found) == 2 and found.samples is None and found.params.dtype == np.float64
        np.testing.assert_array_equal(found.params, [1e6, 2e6])
        np.testing.assert_array_equal(found.tokens, [2e7, 4e7])
        np.testing.assert_array_equal(found.loss, [3.5, 3.0])


def test_other_variables_are_read_where_the_file_has_them(tmp_path):
    header = "loss,params,tokens,unique_tokens,samples,teacher_loss,weight_bits"
    (tmp_path / "runs.csv").write_text(f"{header}\n3,1e6,2e7,1e7,4,2.5,6\n")
    found = read_points(tmp_path / "runs.csv")
    assert [float(value[0]) for value in (found.unique_tokens, found.samples, found.teacher_loss, found.weight_bits)] == [
        1e7, 4.0, 2.5, 6.0,
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["runs.jsonl", "runs.csv"])
def test_what_a_line_says_of_fits_and_of_repetition_is_heeded(tmp_path, name):
    """The first line repeats nothing and says nothing of it; one is a seed more, one was held out."""
    rows = [
        {"params": 1e6, "tokens": 1e7, "loss": 4.0},
        {"params": 1e6, "tokens": 2e7, "loss": 3.5, "unique_tokens": 1e7, "fitted": True, "held_out": False},
        {"params": 1e6, "tokens": 2e7, "loss": 3.6, "fitted": False},
        {"params": 2e6, "tokens": 4e7, "loss": 3.0, "unique_tokens": 3e7, "fitted": False, "held_out": True},
    ]
    columns = list(rows[1])
    text = {
        "runs.jsonl": "\n".join(map(json.dumps, rows)),
        "runs.csv": "\n".join([",".join(columns), *(",".join(str(row.get(each, "")) for each in columns) for row in rows)]),
    }
    (tmp_path / name).write_text(text[name])
    fitted, held_out = read_points(tmp_path / name), read_held_out(tmp_path / name)
    assert (fitted.loss.tolist(), fitted.unique_tokens.tolist()) == ([4.0, 3.5], [1e7, 1e7])
    assert (held_out.loss.tolist(), held_out.unique_tokens.tolist()) == ([3.0], [3e7])
    (tmp_path / name).write_text("\n".join(text[name].splitlines()[: 2 if name == "runs.csv" else 1]))
    assert read_held_out(tmp_path / name) is None


def test_flops_are_six_for_each_parameter_and_token():
    """Chinchilla itself, 70B on 1.4T tokens: 5.88e23."""
    assert points(70e9, 1.4e12, 1.9).flops[0] == pytest.approx(5.88e23)


def test_points_are_taken_with_all_that_they_have():
    found = points([1.0, 2.0, 3.0], 10.0, [4.0, 5.0, 6.0], samples=[1, 2, 3]).take(np.array([2, 0]))
    assert found.params.tolist() == [3.0, 1.0] and found.samples.tolist() == [3.0, 1.0] and found.unique_tokens is None
    assert found.tokens.tolist() == [10.0, 10.0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1e6, 1e7, [3.0, float("nan")]), "loss must be finite and above zero, got nan at point 1"),
        (([1e6, 0.0], 1e7, 3.0), "params must be finite and above zero, got 0.0 at point 1"),
    ],
)
def test_values_that_are_no_measurements_are_refused(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        points(*arguments)


def test_there_are_no_more_unique_tokens_than_tokens():
    with pytest.raises(ValueError, match="unique_tokens are among tokens, and point 1 has more of them than tokens"):
        points(1e6, [2e7, 1e7], 3.0, unique_tokens=2e7)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("runs.txt", "", "must be .jsonl (an object a line) or .csv (with a header)"),
        ("runs.csv", "params,tokens,loss\n", "runs.csv has no points"),
        ("runs.csv", "params,tokens,loss,fitted\n1,2,3,False\n", "runs.csv has no points that laws are fitted to"),
        ("runs.jsonl", '{"params": 1}\n{"params": 1', "runs.jsonl:2 is no JSON"),
        ("runs.jsonl", "[1, 2, 3]", "runs.jsonl:1: expected an object with params, tokens and loss, got [1, 2, 3]"),
        ("runs.csv", "params,tokens\n1,2\n", "runs.csv:2 has no loss; a point needs params, tokens, loss"),
        ("runs.jsonl", '{"params": 1, "tokens": 2, "loss": 3, "samples": 1}\n{"params": 1, "tokens": 2, "loss": 3}',
         "runs.jsonl:2 has no samples"),
        ("runs.csv", "params,tokens,loss\n1,2,3\n1,2,diverged\n", "runs.csv:3: loss must be a number above zero, got 'diverged'"),
        ("runs.jsonl", '{"params": 1, "tokens": 2, "loss": -3}', "loss must be a number above zero, got -3"),
    ],
)  # fmt: skip
def test_a_file_that_is_not_understood_is_refused(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)):
        read_points(tmp_path / name)
