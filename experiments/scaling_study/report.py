"""The study's figures, and the report made of them: its frame and what it says first; `sections` has the rest."""

from collections.abc import Sequence
from typing import Any

from experiments.scaling_study import budgets, own_sweep, risks, sections, use
from experiments.scaling_study.laws import PRINTED, StudyLaw
from experiments.scaling_study.tables import amount, estimate, percent, power, prose

COMMAND = "python run.py --config=configs/scaling_study.py --workdir=workdirs/scaling_study --config.data=FOLDER"
_FIRST = 0  # of the rows of a table: Chinchilla's points, whose law has the most runs


def figures(fitted: Sequence[StudyLaw], recorded: Any, config: Any) -> dict[str, Any]:
    """All that the report shows.

    Args:
      fitted: the laws with resamples. recorded: the folder with one's own runs. config: of the study.
    """
    laws, params = (*fitted, *PRINTED), budgets.sizes()
    small, costs = params[budgets.SMALLEST], config.costs
    equals = budgets.equals(laws, small, budgets.MOST_TOKENS, costs)
    answers = use.samples(fitted[_FIRST], params, costs)
    found = {
        "fits": budgets.fits(laws), "optima": budgets.optima(laws, params), "losses": budgets.losses(laws, params),
        "next_trillion": budgets.next_trillion(laws, params), "next_trillion_coupled": budgets.next_trillion_coupled(),
        "errors": budgets.errors(small), "equals": equals, "trainers": use.trainers(params),
        "devices": use.devices(params, equals[_FIRST]["params"].value, costs),
        "totals": use.totals(fitted[_FIRST], params, costs), "demanded": budgets.demanded(laws, small, costs.served),
        "demanded_on_devices": budgets.demanded(laws, small, costs.on_devices), "answers_for_one": answers,
        "answers_accuracy": use.sampled_accuracy([row["samples"] for row in answers]),
        "answers_published": use.published_samples(), "rounding": risks.rounding(), "repetition": risks.repetition(params),
        "teachers": risks.teachers(), "fine_tuning": risks.fine_tuning(params),
        **own_sweep.study(recorded, config.own_resamples, config.seed),
    }  # fmt: skip
    return found | {
        "resamples": len(fitted[_FIRST].draws.E), "params": small, "multiplier": budgets.MOST_TOKENS / small,
        "loss_at_28T": equals[_FIRST]["loss"].value,
        "gain_10T_to_28T": found["next_trillion"][_FIRST]["10T_to_28T"].value,
        "equal_loss_params": equals[_FIRST]["params"].value, "break_even_tokens": equals[_FIRST]["break_even_tokens"].value,
        "break_even_tokens_on_devices": equals[_FIRST]["break_even_tokens_on_devices"].value,
        "implied_demand_tokens": equals[_FIRST]["implied_demand"].value,
    }  # fmt: skip


def markdown(figures: dict[str, Any], config: Any) -> str:
    """The report."""
    parts = (
        _head(figures, config), ["## What it says", "", *says(figures, config)], sections.fits(figures), sections.losses(figures),
        sections.next_trillion(figures), sections.cost(figures, config), sections.several_answers(figures, config),
        sections.hidden_risks(figures), sections.limits(figures), sections.own(figures, config),
    )  # fmt: skip
    return "\n".join(line for part in parts for line in (*part, "")).rstrip() + "\n"


def _head(figures: dict[str, Any], config: Any) -> list[str]:
    return [
        "# Small models trained for very long: what the scaling laws say", "", f"    {COMMAND}", "",
        *prose(f"""Made by that command from the published runs and from what is recorded in
            `{config.recorded or "experiments/scaling_study/recorded"}`. Intervals are the middle 95 % of
            {figures["resamples"]} refits to resampled runs. They say how far the runs leave a law's constants open, and nothing
            of whether the law holds beyond its runs: where M = D / N is two orders of magnitude beyond any of them, an
            interval is the least of the doubt, and what separates the laws says more. Losses of different laws are of
            different texts and tokenizers: compare their differences. "Beyond" is how many times the most of a fit's runs a
            figure is."""),
        "", "![Loss, the next trillion, cost and demand](scaling_study.png)",
    ]  # fmt: skip


def _spread(rows: list[dict[str, Any]], key: str) -> tuple[float, float]:
    """Least and most over the laws."""
    values = [getattr(row[key], "value", row[key]) for row in rows]
    return min(values), max(values)


def _powers(ends: tuple[float, float]) -> str:
    return f"{power(ends[0])} to {power(ends[1])}"


def says(figures: dict[str, Any], config: Any) -> list[str]:
    """The summary."""
    equals, gains, losses = figures["equals"], figures["next_trillion"], figures["losses"]
    equal, loss = equals[_FIRST], losses[_FIRST]
    beyond = {key: [row["beyond"][key] for row in losses if row["model"] == budgets.SMALLEST] for key in loss["beyond"]}
    gain, last = _spread(gains, "10T_to_28T"), _spread(gains, "27T")
    grown = [percent(share, ".2g") for share in _spread(gains, f"27T_{budgets.SMALLEST}_share")]
    costs, trainer = config.costs, figures["trainers"][0]
    dearer = costs.on_devices.inference / (2 * costs.joules_per_flop)
    return [
        *prose(f"""- **{budgets.SMALLEST} on 28T tokens is M = {figures["multiplier"]:,.0f}.** That is
            {min(beyond["multiplier"]):.0f} to {max(beyond["multiplier"]):.0f} times beyond the runs of every fit here in M,
            and {min(beyond["tokens"]):.0f} to {max(beyond["tokens"]):.0f} times in tokens. All that follows is extrapolated
            so far."""),
        *prose(f"""- **The last tokens buy little loss.** From 10T to 28T {gain[0]:.3f} to {gain[1]:.3f} nats, by
            {len(gains)} laws; the 28th trillion {last[0]:.4f} to {last[1]:.4f}, for
            {trainer["chip_hours_of_a_trillion"]:,.0f} chip-hours of {budgets.PLANNED_CHIP}; {grown[0]} to {grown[1]} more
            parameters would bring as much. By Chinchilla's points the loss at 28T is {estimate(loss["28T"])} and with
            endless tokens {estimate(loss["limit"])}."""),
        *prose(f"""- **Where whoever trains also serves.** The same loss comes from {equal["params"].value / 1e9:.2f}B
            parameters on {amount(equal["tokens"].value)} tokens with {equal["training_ratio"].value:.0f} times less
            training, but each token then costs {equal["params_ratio"].value:.1f} times as much (Chinchilla's points). The
            small model has paid from {_powers(_spread(equals, "break_even_tokens"))} served tokens on, depending on the
            law, and 28T is the cheapest way to its loss at {_powers(_spread(equals, "implied_demand"))}."""),
        *prose(f"""- **Where the users' devices run it.** Whoever trains pays for no token, so no demand makes over-training
            pay for *them*: it is what they give for a size that a device can hold. In energy, training and devices
            together, it has paid from {_powers(_spread(equals, "break_even_tokens_on_devices"))} decoded tokens on, sooner
            than in FLOPs because reading a weight is put at {dearer:.0f} times the energy of a data centre's two FLOPs; 28T
            is right for {_powers(_spread(equals, "implied_demand_on_devices"))}, which on {power(costs.devices)} devices is
            {_each(equals, costs)} tokens each."""),
        *prose("""- **The risks lie where the loss does not look**: fine-tuning and rounding to few bits get harder with the
            tokens, and by no law here is it known how much at this M."""),
    ]  # fmt: skip


def _each(equals: list[dict[str, Any]], costs: Any) -> str:
    low, high = _spread(equals, "implied_demand_on_devices")
    return f"{amount(low / costs.devices)} to {amount(high / costs.devices)}"
