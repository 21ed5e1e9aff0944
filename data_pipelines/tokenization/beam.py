"""A corpus tokenized on many machines, with Apache Beam: the same units as on one machine, and the same bytes."""

import functools
from collections.abc import Sequence

from etils import epath

from data_pipelines.sources.documents import DocumentsConfig, Split
from data_pipelines.tokenization.assembly import Assembly
from data_pipelines.tokenization.token_shards import TokenShards, read_token_shards
from data_pipelines.tokenization.tokenizer import Tokenizer, load_tokenizer
from data_pipelines.tokenization.units import Advance, TokenizationConfig, Unit, Work, tokenize_unit

_NAMESPACE = "tokenization"


def tokenize_corpus_with_beam(
    data: DocumentsConfig,
    split: Split,
    tokenizer: epath.PathLike,
    folder: epath.PathLike,
    config: TokenizationConfig,
    options: Sequence[str] = (),
) -> TokenShards:
    """As `tokenize_corpus`, the units dealt out by Beam; also what one of the two has begun, the other finishes.

    Every worker needs this package, and must reach the source, the tokenizer and the folder by the names given here: gs://, or
    absolute ones on a file system that all share. Workers say what they did in the counters `tokens` and `source_bytes`.

    Args:
      tokenizer: file or folder, as for `load_tokenizer`: each worker reads it by itself.
      options: of Beam, as on a command line: `--runner=DataflowRunner`, `--region=...`. None: Beam's own runner on this machine.
    Raises:
      ImportError: Apache Beam is not installed.
      FileExistsError, FileNotFoundError, ValueError: as `tokenize_corpus`; runners wrap what workers raised in their own.
    """
    beam = _import_beam()
    loaded = load_tokenizer(tokenizer)
    assembly = Assembly(data, split, loaded, folder, config)
    if assembly.missing:
        run = functools.partial(_run_unit, assembly.work, str(tokenizer), loaded.fingerprint)
        pipeline_options = beam.options.pipeline_options.PipelineOptions(list(options))
        with beam.Pipeline(options=pipeline_options) as pipeline:
            # Without the shuffle, a runner may give all units to one worker, for they come from one place.
            units = pipeline | "units" >> beam.Create(assembly.missing) | "deal out" >> beam.Reshuffle()
            _ = units | "tokenize" >> beam.Map(run)
    assembly.finish()
    return read_token_shards(folder, loaded)


def _import_beam():
    try:
        import apache_beam
    except ImportError as error:
        raise ImportError("tokenizing with Beam needs Apache Beam: pip install -c constraints.txt -e '.[beam]'") from error
    return apache_beam


@functools.cache  # of a process, which does many units
def _tokenizer(path: str, fingerprint: str) -> Tokenizer:
    tokenizer = load_tokenizer(path)
    if tokenizer.fingerprint != fingerprint:
        raise ValueError(
            f"{path} is another tokenizer here (fingerprint {tokenizer.fingerprint[:12]}) than where the pipeline was started "
            f"({fingerprint[:12]}); put the same file where every worker reads it"
        )
    return tokenizer


def _run_unit(work: Work, tokenizer: str, fingerprint: str, unit: Unit) -> None:
    from apache_beam.metrics import Metrics

    counters = {name: Metrics.counter(_NAMESPACE, name) for name in Advance._fields}

    def report(advance: Advance) -> None:
        for name, counter in counters.items():
            counter.inc(getattr(advance, name))

    # Runners start a process for each core.
    tokenize_unit(work, Unit(*unit), _tokenizer(tokenizer, fingerprint), 1, report)
