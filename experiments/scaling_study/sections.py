"""The sections of the study's report: tables, and what to know when reading them."""

from typing import Any

from experiments.markdown import markdown_table
from experiments.scaling_study import budgets, own_sweep, risks, tables
from experiments.scaling_study.laws import RECORDED
from experiments.scaling_study.tables import amount, beyond, number, of, percent, prose, text

_Figures = dict[str, Any]


def fits(figures: _Figures) -> list[str]:
    """The laws, and where they put the compute-optimal budgets."""
    return [
        "## The fits", "",
        *prose("""The first four are fitted here, with resamples; the others are constants as printed (docs/scaling_laws.md
            has how ours compare with those). Chinchilla's, Besiroglu's and Hoffmann's are of the same runs. N counts
            embeddings once."""),
        "", *tables.fits(figures["fits"]), "", "### Compute-optimal", "",
        *prose("""The tokens with which each size makes the best use of 6 N D FLOPs. Those of Chinchilla's and Muennighoff's
            runs lie within the runs. Gadre et al.'s law is fitted to M of 20 and more, and puts the optimum below that;
            their appendix F says that this contradicts their figure 9. Take it as a statement about that law, not about
            training."""),
        "", *tables.optima(figures["optima"]),
    ]  # fmt: skip


def losses(figures: _Figures) -> list[str]:
    """The loss by tokens, and the error over tasks."""
    lines = ["## The loss from 1T to 28T tokens", ""]
    for name in budgets.MODELS:
        rows = [row for row in figures["losses"] if row["model"] == name]
        lines += [f"### {name}", "", *tables.losses(rows), ""]
    errors = {"constants of": text("corpus"), **{key: number(key, ".4f") for key in ("1T", "10T", "28T")}}
    return [
        *lines,
        *prose(f"""The mean error over Gadre et al.'s 17 tasks that goes with it for {budgets.SMALLEST}, by their printed
            constants, 123 times beyond their M. On larger models than were fitted that law is off by up to 10 %
            (docs/scaling_laws.md), more than all of these steps."""),
        "", *markdown_table(errors, figures["errors"]),
    ]  # fmt: skip


def next_trillion(figures: _Figures) -> list[str]:
    """Marginal tokens."""
    return [
        "## The next trillion tokens", "",
        *prose("""Nats a token that one more trillion brings. In these laws size and tokens are apart, so that it is the
            same for every size; as far beyond the runs as the losses above."""),
        "", *tables.next_trillion(figures["next_trillion"]), "",
        "By how much N would have to grow to bring as much, at the same tokens:", "",
        *tables.same_gain(figures["next_trillion"], budgets.MODELS), "",
        *prose("""A law in which they are not apart (Busbridge et al. 2025, supervised, N without embeddings, 73 runs), as a
            measure of what the form decides:"""),
        "", *tables.next_trillion_coupled(figures["next_trillion_coupled"]),
    ]  # fmt: skip


def cost(figures: _Figures, config: Any) -> list[str]:
    """Training and inference, whoever pays."""
    costs = config.costs
    return [
        "## What it costs in all", "", "### Whoever trains", "",
        *prose(f"""28T tokens on {budgets.PLANNED_CHIPS} chips of {budgets.PLANNED_CHIP}, by the pod planner's estimate
            (docs/benchmarks/pod_plan.md); nothing ran."""),
        "", *tables.trainers(figures["trainers"]), "", "### The users' devices", "",
        *prose(f"""A token of one sequence reads all weights ({costs.weight_bits:g} bits each) and a cache of
            {costs.context:,} tokens in bfloat16, at {costs.device_bytes_per_second / 1e9:g} GB/s and
            {costs.device_joules_per_byte * 1e9:g} nJ a byte, from a battery of {costs.battery_joules / 1e3:g} kJ. The speed
            is that at which LFM2.5-350M was measured on phones. The energy is an estimate by others (MobileLLM, arXiv
            2402.14905), no measurement, and a study that measured (arXiv 2603.26603) found that fewer bits save little: it
            may be off by a factor of several, and all that is counted in energy with it."""),
        "", *tables.devices(figures["devices"]), "", "### The small model against the optimal one of the same loss", "",
        *prose(f"""{budgets.SMALLEST} on 28T tokens, and the compute-optimal model that a law gives the same loss (by Gadre
            et al.'s, at an M below their runs). "Pays from": the tokens of demand from which the small one has cost less in
            all. "Right at": those at which no other way to this loss is cheaper (Sardana et al. 2024). Served: 6 N D, and
            {costs.served.inference:g} N FLOPs a token. On devices: {costs.joules_per_flop:g} J a training FLOP (a DGX H100's
            10.2 kW at 40 % of its peak) and the energy of the weights above, without the cache. On
            {tables.power(costs.devices)} devices 1e13 tokens are {1e13 / costs.devices:,.0f} each."""),
        "", *tables.equals(figures["equals"]), "", "### Training and inference together", "",
        "By the law of Chinchilla's points. FLOPs where whoever trains also serves, by the tokens served:", "",
        *tables.totals(figures["totals"], "flops"), "",
        "MWh where devices run it, by the tokens that they decode; the first column is what whoever trains pays:", "",
        *tables.totals(figures["totals"], "mwh"), "", "### For which training a demand asks", "",
        *prose(f"""Tokens a parameter with which {budgets.SMALLEST} is the cheapest model of its loss, by demand. Every figure is
            beyond the runs of the fits, which end at M of 303 to 640. Sardana et al. trained up to 10,000, and found that laws
            fitted to 100 and less promise too much there. Served:"""),
        "", *tables.demanded(figures["demanded"]), "", "On devices, in energy:", "",
        *tables.demanded(figures["demanded_on_devices"]),
    ]  # fmt: skip


def several_answers(figures: _Figures, config: Any) -> list[str]:
    """The view at test time."""
    answers = {
        "compared with": text("compared_with"), "params": of("params", amount), "tokens": of("tokens", amount),
        "loss": number("loss", ".3f"), "k, by FLOPs": number("samples", ".1f"),
        "k, drawn together on a device": number("samples_on_device", ".1f"),
    }  # fmt: skip
    chances = figures["answers_accuracy"]
    accuracy = {"a + b": text("spread"), **{key: number(key, ".2f") for key in chances[0] if key != "spread"}}
    published = {
        "task": text("task"), "over-trained": of("params", amount), "its M": number("multiplier", ",.0f"),
        "k": number("samples", ".1f"), "pass@k, %": number("pass_percent", "g"), "compute-optimal": of("optimal_params", amount),
        "its k": number("optimal_samples", ".1f"), "its pass@k, %": number("optimal_pass_percent", "g"),
    }  # fmt: skip
    return [
        "## Several answers in place of size", "",
        *prose(f"""How many answers of {budgets.SMALLEST} cost as much as one of a compute-optimal model, by Chinchilla's
            points: in FLOPs (2 N k, Roberts et al. 2026, arXiv 2604.01411), and on a device, where answers that are drawn
            together share the reading of the weights and each reads its own cache of {config.costs.context:,} tokens."""),
        "", *markdown_table(answers, figures["answers_for_one"]), "",
        *prose("""What k answers are worth depends on how much the questions differ. Roberts et al. take their chances to be
            Beta-distributed, and print no constants; so this is an illustration with a mean of 0.3 and three spreads,
            fitted to nothing (a small a + b: questions are easy or hopeless)."""),
        "", *markdown_table(accuracy, chances), "",
        "What they measured with 2.56e19 FLOPs of training and 2e9 for a token of all answers (their table 1):", "",
        *markdown_table(published, figures["answers_published"]), "",
        *prose("""pass@k takes a perfect judge of answers, which a program can be for sums and code, and nothing is for most
            of what users ask. 2 N k leaves out the prompt, the cache and memory's traffic. That a model of equal loss has
            equal chances in one answer is itself an assumption."""),
    ]  # fmt: skip


def hidden_risks(figures: _Figures) -> list[str]:
    """Fine-tuning, rounding, repeated text, a teacher."""
    rounding = {"model": text("model"), "N without embeddings": of("body_params", amount), "tokens": of("tokens", amount)}
    rounding |= {f"{bits} bits": number(f"{bits}_bits", ".4f") for bits in risks.BITS}
    rounding |= {"N beyond": beyond("params"), "tokens beyond": beyond("tokens"), "M beyond": beyond("multiplier")}
    repeated = {"different tokens": of("unique_tokens", amount), "epochs": number("epochs", ".1f")}
    repeated |= {"worth": of("worth_tokens", amount), **{name: number(name, ".4f") for name in budgets.MODELS}}
    teachers = {
        "model": text("model"), "tokens": of("tokens", amount), "alone": number("loss_alone", ".4f"),
        "best teacher": number("best_teacher_loss", ".3f"), "taught": number("loss_taught", ".4f"),
        "gain": number("gain", "+.4f"), "tokens beyond": of("beyond_tokens", tables.times),
    }  # fmt: skip
    tuning = {
        "model": text("model"), "M at 28T": number("multiplier", ",.0f"), "times the onset": number("times_onset", ".1f"),
        "the onset's M, in tokens": of("onset_tokens", amount),
    }  # fmt: skip
    low, high = risks.FINE_TUNING_MULTIPLIERS
    return [
        "## Risks that the loss does not show", "",
        *prose(f"""**Fine-tuning.** Springer et al. 2025 (arXiv 2503.19206): OLMo-1B, instruction-tuned, gets worse from M
            of {low:,} to {high:,} on, OLMo-7B does not up to {risks.FINE_TUNING_UNHARMED_MULTIPLIER}; models of 15M to 90M
            show the same under noise in their weights, later with smaller rates. There is no law of it, so what 28T costs
            here is not known, only how far behind the onset lies."""),
        "", *markdown_table(tuning, figures["fine_tuning"]), "",
        *prose("""**Rounding.** Nats that rounding after training adds, by Kumar et al. 2024 (GPTQ), whose authors call
            their constants unlikely to be useful elsewhere. That it grows with the tokens and falls with the size is the
            finding; the numbers at 28T are no forecast. Training with the rounding in it is the way out
            (docs/benchmarks/quantization_aware.md)."""),
        "", *markdown_table(rounding, figures["rounding"]), "",
        *prose("""**Repeated text.** Nats that fewer different tokens cost, of 28T seen, by Muennighoff et al. 2023 (at most
            178B different tokens there). It is little because little of the loss is left to tokens. When repetition harms,
            as it did in their longest runs, that law cannot say."""),
        "", *markdown_table(repeated, figures["repetition"]), "",
        *prose("""**A teacher.** The loss alone and with the best teacher, by Busbridge et al. 2025, N without embeddings,
            for distillation alone with all of the teacher's logits. What is gained early is gone by 28T."""),
        "", *markdown_table(teachers, figures["teachers"]),
    ]  # fmt: skip


def limits(figures: _Figures) -> list[str]:
    """What no law here can say."""
    reach = max(row["most_multiplier"] for row in figures["fits"])
    points = (
        f"""**Whether they hold at M = {figures["multiplier"]:,.0f}.** The runs end at {reach:.0f}. From there on it is
        assumed that the loss falls by the same power of D; if it does not, everything here changes, and no interval shows
        it.""",
        """**Anything of the data.** The fits are of one mixture each, seen once. Filtering, curricula, synthetic text,
        another mixture late in training, and whether 28T different good tokens exist, are outside them.""",
        """**The schedule.** Chinchilla's runs had a cosine each, as long as the run. A long constant rate with a decay at
        the end is another curve.""",
        """**This architecture and tokenizer.** All fits are of attention alone with other vocabularies. Constants do not
        carry over; that ratios between budgets do is a hope.""",
        """**What users see.** Loss is not accuracy, one answer is not k, and a model that is fine-tuned, reinforced and
        rounded is another one than that whose loss was predicted.""",
        """**Money.** FLOPs, chip-hours and joules are counted, no prices. Decoding on servers is bound by memory, so that a
        served token costs more than its 2 N FLOPs: `--config.costs.inference_mfu_share` makes it dearer.""",
    )
    return ["## What the laws cannot say", "", *(line for point in points for line in prose(f"- {point}"))]


def own(figures: _Figures, config: Any) -> list[str]:
    """The sweep of one's own, if there is one."""
    lines = ["## Our own sweep", ""]
    if figures["own_runs"]:
        about = f"""{figures["own_runs"]} runs, {figures["own_held_out"]} of them held out before any fit (N without embeddings,
            {config.own_resamples} resamples). They say whether laws foresee runs far beyond those that they were fitted to, and
            nothing of the loss of 350M parameters on text."""
        lines += [*prose(about), "", *_own_laws(figures["own_laws"])]
    else:
        lines += [f"No runs are recorded yet (`{RECORDED.name}/{own_sweep.POINTS}`): nothing here is from runs of our own."]
    if not figures["own_probes"]:
        return [*lines, "", f"No probes of trained models are recorded yet (`{RECORDED.name}/{own_sweep.PROBES}`)."]
    probes = {
        "probe": text("probe"), "models": text("runs"), "harmed": text("harmed"),
        "exponent of the tokens": number("token_exponent", "+.2f"), "of the parameters": number("param_exponent", "+.2f"),
    }  # fmt: skip
    about = """What was done to trained models, and how the loss that it adds goes with tokens and parameters, D^g_D / N^g_N
        (Kumar et al. have 0.51 and 0.34 for rounding)."""
    return [*lines, "", *prose(about), "", *markdown_table(probes, figures["own_probe_exponents"])]


def _own_laws(rows: list[_Figures]) -> list[str]:
    def constants(row: _Figures) -> str:
        ends = {key: "{:.3g} to {:.3g}".format(*row["intervals_95"][key]) for key in row["constants"]}
        return ", ".join(f"{key} {value:.4g} ({ends[key]})" for key, value in row["constants"].items())

    cannot = [
        f"- Not fitted: {row['architecture']}, {row['law'] or 'any law'}: {row['not_fitted']}."
        for row in rows
        if "not_fitted" in row
    ]

    def held_out(row: _Figures) -> str:
        if "held_out" not in row:
            return ""
        return f"{percent(row['held_out_error_share'], '.2f')}, worst {percent(row['held_out_worst_share'], '+.2f')}"

    columns = {
        "architecture": text("architecture"), "law": text("law"), "runs": text("points"), "constants, 95 %": constants,
        "error in the fit": lambda row: percent(row["fitted_error_share"], ".2f"), "on runs held out": held_out,
    }  # fmt: skip
    fitted = markdown_table(columns, [row for row in rows if "not_fitted" not in row])
    return [*fitted, "", *cannot] if cannot else fitted
