"""How a policy does on problems that it is not trained on: before, on the way, and at the end."""

from collections.abc import Mapping, Sequence
from typing import Any

from jax.sharding import Mesh

from experiments.rl.figures import held_out_figures
from experiments.rl.making import Maker
from experiments.rl.sampler import Sampler, everywhere
from experiments.rl.settings import EvaluationConfig
from lfm_jax.models.functional import Tree
from lfm_jax.training import host_part


class HeldOutProblems:
    """The same problems of each environment at every measurement, answered with the same draws.

    Args:
      environments: the difficulty that each begins with. temperatures: see `EvaluationConfig`.
    """

    def __init__(
        self, config: EvaluationConfig, maker: Maker, sampler: Sampler, environments: Mapping[str, int],
        temperatures: Sequence[float], mesh: Mesh,
    ):  # fmt: skip
        self._config, self._maker, self._sampler, self._mesh = config, maker, sampler, mesh
        self._environments = dict(environments)
        self._temperatures = config.temperatures or tuple(sorted({0.0, *temperatures}))

    def measure(self, params: Tree, buffers: Tree) -> dict[str, float]:
        """accuracy, tail_loop, limit and answer_tokens: NAME of the lowest temperature over all problems, NAME_at_T of each, and
        NAME_of_ENVIRONMENT where there are several."""
        self._sampler.load(params, buffers)
        found = self._answers()
        figures: dict[str, float] = {}
        for temperature in self._temperatures:
            here = [answer for answer in found if answer["temperature"] == temperature]
            of_all = held_out_figures(here)
            for name in self._environments if len(self._environments) > 1 else ():
                of_name = held_out_figures([answer for answer in here if answer["environment"] == name])
                of_all |= {f"{figure}_of_{name}": value for figure, value in of_name.items()}
            figures |= {f"{name}_at_{temperature:g}": value for name, value in of_all.items()}
            if temperature == self._temperatures[0]:
                figures |= of_all
        return figures

    def _answers(self) -> list[dict[str, Any]]:
        index, count = host_part(self._mesh)
        wanted = [
            (name, number, number // len(difficulties), difficulties[number % len(difficulties)], temperature)
            for name, start in self._environments.items()
            for difficulties in [self._config.difficulties or (start,)]
            for number in range(index, self._config.problems, count)
            for temperature in self._temperatures
        ]
        mine = [
            {"environment": name, "temperature": temperature, "correct": told["parts"]["correct"], "ending": told["ending"],
             "tokens": told["tokens"]}
            for (name, *_, temperature), told in zip(wanted, self._maker.held_out(wanted), strict=True)
        ]  # fmt: skip
        return [answer for part in everywhere(mine, self._mesh) for answer in part]
