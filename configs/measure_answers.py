"""How often a model falls into doom loops, and how often it is right, on held-out problems at several temperatures.

    python run.py --config=configs/measure_answers.py --workdir=workdirs/measurement --config.init_from=workdirs/sft \
        --config.tasks=arithmetic,word_problems --config.temperatures=0,0.1,0.6

`init_from` is the workdir of any stage, or a Hugging Face folder. Loops are asked for at temperature 0 and just above it, where
they are: at temperature 1 there are hardly any. Of each task and temperature it gives the share of answers that end in a loop
(tail_loop), that loop anywhere (inner_loop), that reach their limit without one (limit) and that are right, each with its 95 %
interval (Wilson); the mean length of all and of the right answers, and how much they repeat. A share of loops says little
without the others: who says nothing does not loop. Writes answers.jsonl with every answer, answers.md with the table. A minute
for 256 problems of a small model on a CPU.
"""

from ml_collections import ConfigDict


def get_config(argument: str = "") -> ConfigDict:
    """There is one; it takes no argument."""
    if argument:
        raise ValueError(f"{argument!r}: this config takes no argument")
    return ConfigDict({"experiment": "measure_answers"})
