"""Statistics of the router by hand."""

import jax.numpy as jnp
import pytest

from lfm_jax.training.step import router_metrics


@pytest.mark.parametrize(
    "counts, imbalance, idle_share, effective_experts",
    [
        ([[3, 3, 3, 3]], 1, 0, 4),
        ([[0, 8, 0, 0]], 4, 3 / 4, 1),
        ([[6, 6, 0, 0]], 2, 1 / 2, 2),
        ([[1, 3, 0, 4]], 2, 1 / 4, 8 / (3 ** (3 / 8) * 4 ** (1 / 2))),
        ([[6, 6, 0, 0], [5, 5, 5, 5]], 3 / 2, 1 / 4, 3),
        ([[0, 0, 0, 0]], 1, 0, 4),
        ([[7]], 1, 0, 1),
    ],
)
def test_router_metrics_by_hand(counts, imbalance, idle_share, effective_experts):
    found = router_metrics(jnp.asarray(counts, jnp.float32))
    assert {name: float(value) for name, value in found.items()} == pytest.approx(
        {
            "router_imbalance": imbalance,
            "router_idle_share": idle_share,
            "router_effective_experts": effective_experts,
        }
    )
