"""Text to token shards, on all cores of this machine or, through Apache Beam, on many machines.

    python run.py --config=configs/tokenize_data.py --workdir=workdirs/tokens --config.data.source=FOLDER

leaves `tokenizer/`, `tokens/train/` and `tokens/held_out/` in the workdir, the same bytes on any number of cores; after a kill,
the same command goes on where it was. A tokenizer is trained on the text unless `tokenizer_from` names one:

    python run.py --config=configs/tokenize_data.py --workdir=gs://BUCKET/tokens --config.data.source=gs://BUCKET/text \
        --config.tokenizer_from=gs://BUCKET/tokenizer --config.runner=beam \
        --config.beam_options=--runner=DataflowRunner,--project=PROJECT,--region=REGION,--temp_location=gs://BUCKET/temporary

needs the extra `beam`; without beam_options, Beam runs on this machine. As the config stands, the text is Python's own standard
library: half a minute on two cores, most of it for the tokenizer. Expect 3 to 4 bytes a token from the 4,096 ids.
"""

from ml_collections import ConfigDict


def get_config(argument: str = "") -> ConfigDict:
    """There is one; it takes no argument."""
    if argument:
        raise ValueError(f"{argument!r}: this config takes no argument")
    return ConfigDict({"experiment": "tokenize_data", "data": {"source": "stdlib"}})
