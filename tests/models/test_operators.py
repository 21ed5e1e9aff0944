"""The table of operators."""

from typing import get_args

from lfm_jax.models import LayerType
from lfm_jax.models.operators import OPERATORS


def test_every_layer_type_has_its_operator():
    assert tuple(OPERATORS) == get_args(LayerType)
