"""Mathematics is compared by math-verify where it is installed, and an answer that ends the child costs nobody else a verdict."""

import importlib.util

import pytest

from data_pipelines.tasks.mathematics import equal_mathematics

# Stands in for the package: texts are equal if they are, and one of them ends the process.
FAKE = """
import os

def parse(text, parsing_timeout):
    return text

def verify(reference, answer, timeout_seconds):
    if "hostile" in answer:
        os.abort()
    if "strange" in answer:
        raise ZeroDivisionError
    return reference == answer
"""


def test_one_answer_that_ends_the_child_is_the_only_one_without_a_verdict(tmp_path, monkeypatch):
    (tmp_path / "math_verify.py").write_text(FAKE)
    monkeypatch.syspath_prepend(tmp_path)
    pairs = [("1", "1"), ("hostile", "1"), ("strange", "strange"), ("2", "3"), ("x" * 1001, "x" * 1001), ("4", "4")]
    assert equal_mathematics(pairs) == [True, False, False, False, False, True]
    assert equal_mathematics([]) == []


def test_without_the_package_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"takes math-verify, which is not here: pip install 'lfm_jax\[eval\]'"):
        equal_mathematics([("1", "1")])


def test_the_package_itself():
    pytest.importorskip("math_verify")
    equal = [
        ("\\frac{1}{2}", "0.5"), ("x^2+2x+1", "(x+1)^2"), ("\\sqrt{8}", "2\\sqrt{2}"), ("\\{1,2\\}", "\\{2,1\\}"), ("x=5", "5"),
        ("1,234", "1234"), ("10^{-3}", "0.001"),
    ]  # fmt: skip
    different = [
        ("3", "4"), ("", "4"), ("[0,1)", "[0,1]"), ("\\pi", "3.14159"), ("9^{9^{9^{9}}}", "3"), ("(" * 900, "3"), ("\ud800", "3"),
        ("\\frac{" * 150, "3"), ("9" * 999, "3"), ("}", "3"), ("3} or \\boxed{4", "4"),
    ]  # fmt: skip
    assert equal_mathematics(equal + different) == [True] * len(equal) + [False] * len(different)
