"""Which of the answers to a prompt is chosen, and which is rejected."""

import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from experiments.judges import normalized

Rule = Literal["loop_first", "score"]
Outcome = Literal["pair", "unscored", "all_loop", "unfinished", "not_acceptable", "equal", "small_margin", "disagreement"]


class Candidate(NamedTuple):
    """An answer that is to be judged.

    text: what a model would learn to say, or not to. ended: the model came to its end. loops: it ends in a doom loop.
    right: as the verifier has it; None where there is none. acceptable: how good it is on a scale that holds for all prompts,
    [0, 1]; None: nobody knows.
    """

    text: str
    ended: bool
    loops: bool
    right: bool | None
    acceptable: float | None


class Choice(NamedTuple):
    """chosen, rejected: numbers of answers; None where it is no pair. outcome: "pair", or why there is none."""

    chosen: int | None
    rejected: int | None
    outcome: Outcome


def combined(scores: Mapping[str, Sequence[float | None]]) -> list[float | None]:
    """The jury's score of each answer, [0, 1]: the mean of the normalised scores of the judges that have one for it."""
    by_judge = [normalized(each) for each in scores.values()]
    every = [[score for score in of_answer if score is not None] for of_answer in zip(*by_judge, strict=True)]
    return [math.fsum(known) / len(known) if known else None for known in every]


def choose_pair(
    candidates: Sequence[Candidate],
    scores: Mapping[str, Sequence[float | None]],
    rule: Rule,
    *,
    acceptable: float,
    min_margin: float,
    min_agreement: float,
) -> Choice:
    """The pair of a prompt, if its answers make one.

    The highest is chosen and the lowest rejected. By "loop_first" an answer that loops is never chosen, and where there is one it
    is rejected (of several the lowest), whatever its score: neither margin nor agreement is asked for then. By "score" loops are
    answers like others. Among equals the earliest is chosen and the latest rejected: no length is preferred, and the greedy
    answer, which comes last and is what users see, is rather told what it does worse.

    Outcomes, the first that fits: "unscored": fewer than two answers can be compared. "all_loop": loop_first, and all do.
    "unfinished": the best was cut off by the limit; a model that learns it learns to end there. "not_acceptable": the best is
    neither right nor acceptable; the least bad is not what is to be learnt, such as the shortest of the wrong. "equal": both say
    the same. "small_margin", "disagreement": see below. "pair".

    Args:
      candidates: sampled ones first, the greedy one last. scores: by judge, of each candidate, as the judge gave them.
      acceptable: from where on an answer that is not known to be right is good enough. min_margin: between the combined scores of
        the two. min_agreement: the share of the judges with an opinion on both that must hold the chosen for strictly better.
    """
    totals = combined(scores) if scores else [None] * len(candidates)
    loops = {number for number, candidate in enumerate(candidates) if candidate.loops and rule == "loop_first"}
    scored = [number for number, total in enumerate(totals) if total is not None]
    eligible = [number for number in scored if number not in loops]
    if not eligible or len({*scored, *loops}) < 2:
        return Choice(None, None, "all_loop" if loops and len(loops) == len(candidates) else "unscored")
    chosen = max(eligible, key=lambda number: (totals[number], -number))
    # Of a loop that nobody could score, nothing is known but that it is one.
    rejected = min(loops or scored, key=lambda number: (-1.0 if totals[number] is None else totals[number], -number))
    best = candidates[chosen]
    if not best.ended:
        return Choice(None, None, "unfinished")
    if not best.right and (best.acceptable or 0.0) < acceptable:
        return Choice(None, None, "not_acceptable")
    if best.text == candidates[rejected].text:
        return Choice(None, None, "equal")
    if not loops:
        if totals[chosen] - totals[rejected] < min_margin:
            return Choice(None, None, "small_margin")
        both = [(each[chosen], each[rejected]) for each in scores.values() if None not in (each[chosen], each[rejected])]
        if sum(better > worse for better, worse in both) < min_agreement * len(both):
            return Choice(None, None, "disagreement")
    return Choice(chosen, rejected, "pair")
