"""Published sizes, counted from abstract shapes."""

import math

import jax
import pytest

from lfm_jax.models import PRESETS, Decoder, functional, preset
from lfm_jax.models.accounting import active_parameter_count, parameter_count

# Model cards; the 24B's is "about".
PUBLISHED = {
    "lfm2_5_230m": 229_693_184,
    "lfm2_350m": 354_483_968,
    "lfm2_700m": 742_489_344,
    "lfm2_1_2b": 1_170_340_608,
    "lfm2_2_6b": 2_569_272_320,
    "lfm2_8b_a1b": 8_339_929_856,
    "lfm2_5_8b_a1b": 8_467_856_128,
    "lfm3_1_7b": 1_728_801_536,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_preset_has_the_published_parameter_count(name):
    assert parameter_count(preset(name)) == PUBLISHED[name]


def test_the_24b_is_within_a_thousandth_of_its_card():
    assert math.isclose(parameter_count(preset("lfm2_24b_a2b")), 23.84e9, rel_tol=1e-3)


def test_expert_bias_is_counted_apart_from_the_parameters():
    model = functional(lambda rngs: Decoder(preset("lfm2_8b_a1b"), rngs=rngs))
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(model.abstract_buffers)) == 704


@pytest.mark.parametrize(("name", "active"), [("lfm2_8b_a1b", 1.5e9), ("lfm2_24b_a2b", 2.3e9)])
def test_active_parameters_match_the_cards_to_their_digits(name, active):
    assert math.isclose(active_parameter_count(preset(name)), active, rel_tol=0.05)


def test_lfm3_layout_is_the_published_one():
    layers = PRESETS["lfm3_1_7b"].layer_types
    assert [index for index, kind in enumerate(layers) if kind == "full_attention"] == [2, 6, 10, 14, 18, 22]
    assert [index for index, kind in enumerate(layers) if kind == "sliding_attention"] == [4, 8, 12, 16, 20]


def test_unknown_preset_names_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'lfm2_350m'"):
        preset("lfm2_350M")
