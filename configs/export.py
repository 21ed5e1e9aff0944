"""Writes a trained model in the files of other systems, runs each there, and says how it compares and how fast it is.

    python run.py --config=configs/export.py --workdir=workdirs/exported --config.init_from=workdirs/quickstart

`init_from` is the workdir of any stage, or a Hugging Face folder. Into export/ in the workdir go hf/ (checked in transformers),
gguf/ (a file for each of `gguf_types`, checked in llama.cpp by the package xllamacpp), model.pt2 (PyTorch), model.pte and
model-8da4w.pte (ExecuTorch), model.onnx (onnxruntime), model.stablehlo (jax.export), and README.md, the model card with the table
that is printed: file, size, largest difference, greedy agreement, tokens a second on this machine; each folder has its
MANIFEST.sha256. Fewer formats: `--config.export.formats=hf,gguf --config.export.gguf_types=Q8_0`. Expect differences below 2e-4
for whatever is in float32, and `hf_greedy_agrees`; a file in float32 that disagrees is an error, and is not left there. Files of
an earlier export into the workdir are removed. Needs the extra `export`; minutes for small models. With llama-cpp-python also
llama.cpp's K-quants, and with a text an importance matrix:
`--config.export.gguf_types=Q4_K_M --config.export.gguf_importance=FILE`.
"""

from ml_collections import ConfigDict

FORMATS = ("hf", "gguf", "pytorch", "executorch", "onnx", "stablehlo")


def get_config(argument: str = "") -> ConfigDict:
    """There is one; it takes no argument."""
    if argument:
        raise ValueError(f"{argument!r}: this config takes no argument")
    return ConfigDict({"experiment": "export", "export": {"formats": FORMATS}})
