"""Text cleaned before training: poor text, duplicates and evaluation sets taken out, each document rated by difficulty.

    python run.py --config=configs/prepare_data.py --workdir=workdirs/prepared --config.data.source=FOLDER

reads .txt, .jsonl(.gz, .zst) and .parquet and writes `documents/`, which `--config.data.source` of other runs can name,
`removed.jsonl` with the reason for each removed document, `quarantine.jsonl` with the records that cannot be read (more than
`bad_records_limit` of them end the run), and the counts to results.json. For source code, which breaks the rules for prose (they
are off then; as it stands, the text is Python's standard library):

    python run.py --config=configs/prepare_data.py:code --workdir=workdirs/prepared_code

Without a benchmark's questions, and from the easiest document to the hardest:

    python run.py --config=configs/prepare_data.py --workdir=workdirs/prepared --config.data.source=FOLDER \
        --config.steps.decontamination.evaluation="[{'name': 'gsm8k', 'source': 'gsm8k/', 'text_field': 'question'}]" \
        --config.steps.difficulty.order=True

The rules are those of Gopher (Rae et al. 2021, appendix A1), near duplicates are found by MinHash (Broder 1997; Lee et al. 2022),
contamination as for GPT-3 (Brown et al. 2020, appendix C). A core of a cloud machine measures 3.5 MB of text a second, which is
most of the time, and 12 MB without the rules for prose; `--config.steps.workers` says how many do. Expect of `:code` (the library
of Python 3.11) 1,130 `documents_read`, of them 3 exact and 4 near duplicates, and a `median_difficulty_bits_per_byte` of 2.75.
"""

from ml_collections import ConfigDict


def get_config(argument: str = "") -> ConfigDict:
    """For prose, or with the argument `code` for source code."""
    if argument not in ("", "code"):
        raise ValueError(f"{argument!r}: the argument is code, or none")
    config = ConfigDict({"experiment": "prepare_data", "data": {"source": "stdlib"}})
    if argument:
        config.steps = {"quality": None}
    return config
