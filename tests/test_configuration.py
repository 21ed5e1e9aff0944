"""Configurations say what is wrong, where, and what would be right."""

import dataclasses
import json
import re
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ml_collections import ConfigDict

from lfm_jax.configuration import (
    REQUIRED,
    ConfigError,
    field_types,
    flatten,
    from_mapping,
    nearest,
    override,
    to_mapping,
    with_defaults,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope:
    theta: float = 1e6

    def __post_init__(self):
        if self.theta <= 0:
            raise ValueError(f"theta must be positive, got {self.theta}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    embed_dim: int
    layer_types: tuple[Literal["conv", "full_attention"], ...] = ("conv",)
    rope: Rope = Rope()
    sliding_rope: Rope | None = None
    ropes: tuple[Rope, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    model: Model
    learning_rate: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)
    resume: bool = False
    name: str = "run"
    limit: int | None = None
    source: str | int = "stdlib"


SMALLEST = {"model": {"embed_dim": 8}}


def build(**settings):
    return from_mapping(Config, {**SMALLEST, **settings})


def test_nested_values_arrive_with_their_types():
    config = build(
        model={
            "embed_dim": 4,
            "layer_types": ["conv", "full_attention"],
            "sliding_rope": {"theta": 10},
            "ropes": [{}, {"theta": 2}],
        },
        learning_rate=1,
        limit=3,
    )
    assert config == Config(
        model=Model(
            embed_dim=4,
            layer_types=("conv", "full_attention"),
            sliding_rope=Rope(theta=10.0),
            ropes=(Rope(), Rope(theta=2.0)),
        ),
        learning_rate=1.0,
        limit=3,
    )
    assert isinstance(config.learning_rate, float) and isinstance(config.model.sliding_rope.theta, float)


def test_a_config_dict_and_an_instance_are_taken_like_a_dict():
    model = Model(embed_dim=8)
    assert from_mapping(Config, ConfigDict({"model": {"embed_dim": 8}})) == from_mapping(Config, {"model": model}) == build()


finite = st.floats(allow_nan=False, allow_infinity=False)
ropes = st.builds(Rope, theta=st.floats(min_value=1e-9, max_value=1e9))
models = st.builds(
    Model,
    embed_dim=st.integers(),
    layer_types=st.lists(st.sampled_from(["conv", "full_attention"])).map(tuple),
    rope=ropes,
    sliding_rope=st.none() | ropes,
    ropes=st.lists(ropes, max_size=3).map(tuple),
)
configs = st.builds(
    Config,
    model=models,
    learning_rate=finite,
    betas=st.tuples(finite, finite),
    resume=st.booleans(),
    name=st.text(),
    limit=st.none() | st.integers(),
    source=st.text() | st.integers(),
)


@given(configs)
def test_a_config_survives_json(config):
    assert from_mapping(Config, json.loads(json.dumps(to_mapping(config)))) == config


@given(configs)
def test_a_config_survives_the_command_line(config):
    """Every field that a command line can name, written as Python writes it, read back over the defaults."""
    settings = {"model": {"embed_dim": 0}}
    for path, value in flatten(to_mapping(config)).items():
        if path not in ("model.sliding_rope", "model.ropes"):
            override(Config, settings, path, repr(value))
    read = from_mapping(Config, settings)
    assert read == dataclasses.replace(config, model=dataclasses.replace(config.model, ropes=()))


@given(configs)
def test_with_defaults_is_what_from_mapping_builds(config):
    """Of the whole mapping, and of what is left of it when every default is left out."""
    whole = json.loads(json.dumps(to_mapping(config)))
    assert json.loads(json.dumps(with_defaults(Config, whole))) == whole
    bare = {"model": {"embed_dim": config.model.embed_dim}}
    assert with_defaults(Config, bare) == to_mapping(from_mapping(Config, bare))


def test_what_must_be_given_is_named_by_its_whole_path():
    outer = dataclasses.make_dataclass("Outer", [("model", Model), ("seed", int)])
    assert with_defaults(outer, {})["model"]["embed_dim"] == REQUIRED
    with pytest.raises(ConfigError, match=r"^model.embed_dim, seed: there is no default, so a value must be given\.$"):
        from_mapping(outer, {})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learning_rte": 1.0}, "learning_rte: no such field. Did you mean 'learning_rate'? Valid choices: "),
        ({"model": {"embed_dim": 8, "rope": {"thta": 1.0}}}, "model.rope.thta: no such field. Did you mean 'theta'?"),
        ({"model": {}}, "model.embed_dim: there is no default, so a value must be given"),
        ({"model": {"embed_dim": 8.0}}, "model.embed_dim: expected a whole number, got 8.0 (float)"),
        ({"model": {"embed_dim": True}}, "model.embed_dim: expected a whole number, got True (bool)"),
        ({"model": 3}, "model: expected the fields of Model (embed_dim, layer_types, rope, "),
        ({"model": {"embed_dim": 8, "layer_types": "conv"}}, "model.layer_types: expected a sequence of one of 'conv', "),
        ({"model": {"embed_dim": 8, "layer_types": ["conv", "cnv"]}}, "model.layer_types[1]: 'cnv' is not a valid choice."),
        ({"model": {"embed_dim": 8, "rope": {"theta": -1}}}, "model.rope: theta must be positive, got -1.0"),
        ({"model": {"embed_dim": 8, "sliding_rope": {"theta": 0}}}, "model.sliding_rope: theta must be positive, got 0.0"),
        ({"model": {"embed_dim": 8, "ropes": [{}, {"theta": 0}]}}, "model.ropes[1]: theta must be positive"),
        ({"learning_rate": "fast"}, "learning_rate: expected a number, got 'fast' (str)"),
        ({"learning_rate": float("nan")}, "learning_rate: expected a number below 1.8e308, got nan."),
        ({"learning_rate": True}, "learning_rate: expected a number, got True (bool)"),
        ({"resume": 1}, "resume: expected true or false, got 1 (int)"),
        ({"betas": [0.9]}, "betas: expected 2 values, got 1: [0.9]"),
        ({"betas": 0.9}, "betas: expected (a number, a number), got 0.9"),
        ({"limit": "all"}, "limit: expected a whole number, got 'all' (str)"),
        ({"source": None}, "source: expected text or a whole number, got None"),
        ({"name": None}, "name: expected text, got None"),
    ],
)
def test_a_mistake_is_named_with_its_path_and_the_nearest_choice(settings, message):
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}"):
        build(**settings)


def test_one_value_where_a_sequence_is_wanted_is_one_of_one():
    settings = {}
    override(dataclasses.make_dataclass("Sizes", [("batches", tuple[int, ...])]), settings, "batches", "8")
    assert settings == {"batches": (8,)}


@pytest.mark.parametrize(
    ("path", "text", "value"),
    [
        ("learning_rate", "3e-4", 3e-4),
        ("learning_rate", "1", 1.0),
        ("resume", "true", True),
        ("resume", "False", False),
        ("name", "123", "123"),
        ("name", "a,b", "a,b"),
        ("name", "true", "true"),
        ("limit", "None", None),
        ("limit", "5", 5),
        ("source", "7", 7),
        ("source", "gs://bucket/text", "gs://bucket/text"),
        ("betas", "0.9,0.99", (0.9, 0.99)),
        ("model.layer_types", "conv,full_attention", ("conv", "full_attention")),
        ("model.layer_types", "full_attention", ("full_attention",)),
        ("model.sliding_rope.theta", "5", 5.0),
    ],
)
def test_an_override_is_read_as_its_fields_type(path, text, value):
    settings = {"model": Model(embed_dim=8)}
    override(Config, settings, path, text)
    config = from_mapping(Config, settings)
    for name in path.split("."):
        config = getattr(config, name)
    assert config == value and type(config) is type(value)


@pytest.mark.parametrize(
    ("path", "text", "message"),
    [
        ("model.rope.thta", "1", "model.rope.thta: no such field. Did you mean 'model.rope.theta'? Valid"),
        ("model.theta", "1", "model.theta: no such field. Did you mean 'model.rope.theta'?"),
        ("learning_rate.value", "1", "learning_rate.value: no such field. Did you mean 'learning_rate'? Valid choices: "),
        ("learning_rate", "fast", "learning_rate: expected a number, got 'fast'"),
        ("model.embed_dim", "1e3", "model.embed_dim: expected a whole number, got 1000.0"),
        ("model", "lfm2_350m", "model: expected the fields of Model"),
        ("model", "{1: 2}", "model.1: no such field. Valid choices: embed_dim"),
        ("model", "{[]: 1}", "model: expected the fields of Model"),
        ("learning_rate", "1e999", "learning_rate: expected a number below 1.8e308, got inf."),
        ("learning_rate", "9" * 400, "learning_rate: expected a number below 1.8e308, got 9999"),
        ("limit", "0x" + "f" * 60_000, "limit: expected a number below 1.8e308, got a value that is too long to show."),
        ("limit", "1or 2", "limit: expected a whole number, got '1or 2' (str)"),
        ("limit", "(" * 60_000, "limit: expected a whole number, got '(((("),
        ("limit", "-" * 60_000 + "1", "limit: expected a whole number, got '----"),
        ("limit", "9" * 5000, "limit: expected a whole number, got '9999"),
        ("limit", "1" * 65_537, "limit: a value of 65537 characters; at most 65536 are read."),
        ("resume", "'" + "a" * 1000 + "'", "resume: expected true or false, got '" + "a" * 499 + "... (str)"),
    ],
)
def test_a_wrong_override_is_named_with_its_path_and_the_nearest_choice(path, text, message):
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}"):
        override(Config, {"model": {"embed_dim": 8}}, path, text)


def test_an_override_leaves_its_siblings():
    settings = {"model": {"embed_dim": 8, "rope": {"theta": 2.0}}}
    override(Config, settings, "model.embed_dim", "16")
    assert settings == {"model": {"embed_dim": 16, "rope": {"theta": 2.0}}}


def test_a_field_of_a_default_leaves_the_rest_of_that_default():
    """Not that of the class: here 1e6 and ()."""

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Study:
        model: Model = Model(embed_dim=4, layer_types=("full_attention",), rope=Rope(theta=5.0), ropes=(Rope(),))

    settings = {}
    override(Study, settings, "model.embed_dim", "8")
    expected = dataclasses.replace(Study().model, embed_dim=8)
    assert from_mapping(Study, settings).model == expected
    assert with_defaults(Study, settings) == to_mapping(Study(model=expected))
    override(Study, settings, "model.sliding_rope.theta", "2.0")
    assert from_mapping(Study, settings).model == dataclasses.replace(expected, sliding_rope=Rope(theta=2.0))


def test_field_types_walks_into_dataclasses():
    assert field_types(Config)["model.sliding_rope.theta"] is float
    assert {path for path in field_types(Config) if path.startswith("model.")} == {
        "model.embed_dim",
        "model.layer_types",
        "model.rope",
        "model.rope.theta",
        "model.sliding_rope",
        "model.sliding_rope.theta",
        "model.ropes",
    }


def test_nearest_says_nothing_where_nothing_is_near():
    assert nearest("zzz", ["steps", "seed"]) == "Valid choices: steps, seed."
