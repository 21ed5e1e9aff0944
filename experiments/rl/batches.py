"""The batches of reinforcement learning: answers of the policy as it is, or as it was one batch before, row by row."""

import concurrent.futures
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from experiments.results import write_json
from experiments.rl.curriculum import Curriculum
from experiments.rl.figures import batch_figures, summary
from experiments.rl.making import Maker, probe_figures
from experiments.rl.records import Files, arrays, longest, with_log_probs
from experiments.rl.rewards import advantages_of, counts, token_advantages
from experiments.rl.sampler import Sampler, everywhere
from experiments.rl.settings import AdvantagesConfig, CurriculumConfig, RewardsConfig, RolloutsConfig
from lfm_jax.models import ModelConfig
from lfm_jax.models.functional import Tree
from lfm_jax.sharding import shard_count
from lfm_jax.sharding.context import CHUNKS
from lfm_jax.training import as_fed, host_part, place_batch

COLD = "cold.json"
LogProbsStep = Callable[[Tree, Tree, dict[str, jax.Array]], jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trainer:
    """What batches need of the trainer.

    log_probs: see `make_policy_log_probs_step`. needs_old: whether the loss weighs by the trainer's own log-probabilities.
    reference: (params, buffers) not to be left; None: there is no such term. model: its configuration.
    replay_routing: whether the trainer's own log-probabilities, and not the reference's, are those of the sampler's experts.
    environments: whose figures are told apart.
    """

    mesh: Mesh
    log_probs: LogProbsStep
    needs_old: bool
    reference: tuple[Tree, Tree] | None
    model: ModelConfig
    replay_routing: bool
    environments: tuple[str, ...]


class _Made(NamedTuple):
    """A batch: this host's records, and figures of all."""

    records: list[dict[str, Any]]
    figures: dict[str, float]


def beside_training() -> bool:
    """Whether a second thread may answer while the first one trains: where one process has one device, or a CPU's.

    Elsewhere the two could hand programs to two devices in different orders, which would then wait for each other without end.
    """
    return jax.process_count() == 1 and (jax.device_count() == 1 or jax.default_backend() == "cpu")


class RolloutBatches:
    """This host's rows of the global batches, without end; see `ObservingBatchIterator`.

    A batch of rollouts makes `RolloutsConfig.updates` batches of rows. Of every `mini_batches` prompts in a row each update of an
    epoch has one, so that it has the same prompts on any number of hosts. With lag 1 the next rollouts are made by the parameters
    that the present ones were first learnt from by: in a thread of its own while that goes on, where that may be
    (`beside_training`), and else when they are wanted, behind the last update.

    The state names the batches on disk that the next rows come from, so that a run goes on with the same rows to the bit.

    Args:
      total: batches of rollouts in the run; none is made ahead beyond them. kept_states: so many of the last states may be gone
        back to, and what they need is kept.
    """

    def __init__(
        self, workdir: epath.Path, maker: Maker, sampler: Sampler, curriculum: Curriculum, trainer: Trainer, *, total: int,
        kept_states: int, seed: int, rollouts: RolloutsConfig, rewards: RewardsConfig, advantages: AdvantagesConfig,
        watching: CurriculumConfig,
    ):  # fmt: skip
        self._workdir, self._maker, self._sampler, self._curriculum = workdir, maker, sampler, curriculum
        self._trainer, self._total, self._kept_states, self._seed = trainer, total, kept_states, seed
        self._rollouts, self._rewards, self._advantages, self._watching = rollouts, rewards, advantages, watching
        index, count = self._part = host_part(trainer.mesh)
        mine = rollouts.prompts // count
        self._slots = range(index * mine, (index + 1) * mine)
        self._files = Files(workdir, self._part)
        self._pool = concurrent.futures.ThreadPoolExecutor(1, "rollouts") if rollouts.lag and beside_training() else None
        self._batch, self._position, self._made = 0, rollouts.updates, 0
        self._now, self._ahead = _Made([], {}), None
        self._held: list[list[int]] = []
        self._observed: tuple[Tree, Tree, int] | None = None

    def observe(self, params: Tree, buffers: Tree, step: int) -> None:
        """See `ObservingBatchIterator`."""
        self._observed = params, buffers, step

    def __next__(self) -> dict[str, np.ndarray]:
        if self._position == self._rollouts.updates:
            self._begin(self._batch + 1)
        self._observed = None  # the next step takes the arrays over
        batch = self._arrays(self._picked(*divmod(self._position, self._rollouts.mini_batches)))
        self._position += 1
        return batch

    def figures(self) -> dict[str, float]:
        """Of the rollouts that the last rows are from."""
        return self._now.figures

    def settle(self) -> None:
        """Waits for what is made ahead: then the engine is free."""
        if self._ahead is not None:
            self._ahead.result()

    def close(self) -> None:
        """Ends the thread, after the batch that it makes."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def get_state(self) -> dict[str, Any]:
        """Plain values of JSON."""
        self.settle()
        ahead = self._ahead is not None
        needed = [self._batch] * (0 < self._position < self._rollouts.updates) + [self._made] * ahead
        self._held = [*self._held, needed][-self._kept_states :]
        return {
            "batch": self._batch, "position": self._position, "made": self._made, "held": self._held, "parts": self._part[1],
            "figures": self._now.figures, "figures_ahead": self._ahead.result().figures if ahead else None,
            "curriculum": self._curriculum.get_state(),
        }  # fmt: skip

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Goes on from there.

        Raises:
          ValueError: rollouts that were being learnt from are gone.
        """
        self.settle()
        self._batch, self._position, self._made = state["batch"], state["position"], state["made"]
        self._held = [list(each) for each in state["held"]]
        self._curriculum.set_state(state["curriculum"])
        parts = state.get("parts", self._part[1])  # of a checkpoint from before it was told
        read = lambda batch, figures: _Made(self._files.read(batch, self._slots, parts), figures)
        unfinished = 0 < self._position < self._rollouts.updates
        self._now = read(self._batch, state["figures"]) if unfinished else _Made([], state["figures"])
        self._ahead = None
        if self._made > self._batch:
            self._ahead = _Later(lambda: read(self._made, state["figures_ahead"]))
            self.settle()
        self._tell_cold()

    def _begin(self, number: int) -> None:
        """The rollouts of a batch, and with lag 1 the next ones on their way."""
        params, buffers, step = self._observed
        loaded = self._ahead is None
        if loaded:
            self._sampler.load(params, buffers)
            self._ahead = _Later(lambda: self._make(number, step))
        self._now, self._ahead = self._ahead.result(), None
        self._batch, self._position = number, 0
        self._add_log_probs(params, buffers)
        if self._rollouts.lag and number < self._total:
            if not loaded:
                self._sampler.load(params, buffers)
            make = lambda: self._make(number + 1, step)
            self._ahead = _Later(make) if self._pool is None else self._pool.submit(make)

    def _make(self, number: int, step: int) -> _Made:
        standings = self._curriculum.standings
        records = self._maker.records(number, self._slots, {name: each.difficulty for name, each in standings.items()})
        for answer in (answer for record in records for answer in record["answers"]):
            dense = token_advantages(self._rewards, answer)
            answer |= {"counts": counts(self._advantages, answer)} | ({} if dense is None else {"token_advantages": dense})
        found = everywhere([[summary(record) for record in records], longest(records)], self._trainer.mesh)
        summaries, seq = [each for part, _ in found for each in part], self._seq(max(length for _, length in found))
        rewards = [[answer["reward"] for answer in each["answers"]] for each in summaries]
        advantages = advantages_of(self._advantages, rewards)[self._slots.start : self._slots.stop]
        for record, of_record in zip(records, advantages, strict=True):
            record |= {"policy_step": step, "seq": seq}
            for answer, advantage in zip(record["answers"], of_record, strict=True):
                answer["advantage"] = advantage
        self._files.write(number, records)
        figures = batch_figures(summaries, self._rollouts.each_temperature) | self._watched(number, step, summaries)
        self._made = number
        self._forget()
        return _Made(records, figures)

    def _watched(self, number: int, step: int, summaries: list[dict[str, Any]]) -> dict[str, float]:
        """Moves the curriculum, and looks closer at who has gone cold; figures of both."""
        figures = {
            f"difficulty_of_{name}": float(standing.difficulty) for name, standing in self._curriculum.standings.items()
        }  # of this batch
        correct: dict[str, list[float]] = {name: [] for name in self._curriculum.standings}
        for each in summaries:
            values = [answer["parts"]["correct"] for answer in each["answers"]]
            correct[each["environment"]] += [value for value in values if value is not None]
        index, count = self._part
        difficulties = {name: each.difficulty for name, each in self._curriculum.standings.items()}
        gone_cold = self._curriculum.take(correct)
        for name in gone_cold:
            numbers = range(index, self._watching.probe_prompts, count)
            mine = self._maker.probe(self._watching, name, difficulties[name], numbers)
            found = [each for part in everywhere(mine, self._trainer.mesh) for each in part]
            standing = self._curriculum.standings[name]
            standing.cold = {
                "difficulty": difficulties[name], "batch": number, "policy_step": step, **probe_figures(found), "prompts": found,
            }  # fmt: skip
            if jax.process_index() == 0:
                print(
                    f"{name} is cold at difficulty {difficulties[name]}: no answer of {standing.failures} batches was right; "
                    f"of {self._watching.probe_samples} answers each to {self._watching.probe_prompts} problems a right one is "
                    f"{standing.cold['verdict']}; see {COLD} and configs/cold_start.py"
                )
        self._tell_cold()
        cold = {f"cold_of_{name}": float(each.cold is not None) for name, each in self._curriculum.standings.items()}
        return figures | cold

    def _tell_cold(self) -> None:
        cold = {name: each.cold for name, each in self._curriculum.standings.items() if each.cold is not None}
        path = self._workdir / COLD
        if jax.process_index() == 0 and (cold or path.exists()):
            write_json(path, {"environments": cold})

    def _forget(self) -> None:
        if self._rollouts.keep is not None:
            last = range(self._made - self._rollouts.keep + 1, self._made + 1)
            self._files.keep({*last, self._batch, self._made, *(batch for needed in self._held for batch in needed)})

    def _seq(self, length: int) -> int:
        """The shortest of the few lengths of rows that has room for so many positions."""
        unit = CHUNKS * shard_count("seq", self._trainer.mesh)
        lengths = [-(-(self._rollouts.seq_len >> power) // unit) * unit for power in range(self._rollouts.buckets)]
        return min(each for each in lengths if each >= length)

    def _arrays(self, records: list[dict[str, Any]]) -> dict[str, np.ndarray]:
        model = self._trainer.model
        words = -(-model.vocab_size // 32) if self._rollouts.filtered else None
        seq, environments = records[0]["seq"], self._trainer.environments
        return arrays(
            records, seq, words, greedy_as=self._rollouts.greedy_as, routing=model.routing_shape, environments=environments
        )

    def _picked(self, epoch: int, mini_batch: int) -> list[dict[str, Any]]:
        """This host's records of an update."""
        size = self._rollouts.mini_batches
        place = lambda slot: np.random.default_rng([self._seed, self._batch, epoch, slot // size]).permutation(size)[slot % size]
        return [record for record in self._now.records if place(record["slot"]) == mini_batch]

    def _add_log_probs(self, params: Tree, buffers: Tree) -> None:
        """What a trainer must compute of the whole batch before the first update."""
        wanted = {"old_log_probs": (params, buffers)} if self._trainer.needs_old else {}
        if self._trainer.reference is not None:
            wanted["reference_log_probs"] = self._trainer.reference
        if not wanted:
            return
        for name, model in wanted.items():
            for mini_batch in range(self._rollouts.mini_batches):  # of the shapes of an update
                some = self._picked(0, mini_batch)
                batch = self._arrays(some)
                if model is self._trainer.reference or not self._trainer.replay_routing:
                    batch.pop("routing", None)
                found = self._trainer.log_probs(*model, place_batch(batch, self._trainer.mesh))
                rows = as_fed(np.asarray(found), self._trainer.mesh)
                mine = len(rows) // self._part[1]
                with_log_probs(some, name, rows[self._part[0] * mine :][:mine])
        self._files.write(self._batch, self._now.records)


class _Later:
    """As a future, without a thread: made when it is first asked for."""

    def __init__(self, make: Callable[[], _Made]):
        self._make, self._result = make, None

    def result(self) -> _Made:
        if self._result is None:
            self._result = self._make()
        return self._result
