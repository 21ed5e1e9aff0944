"""Programs for torch.export and ONNX Runtime, run from their files; and what every exporter does about errors."""

import dataclasses
import errno
import functools
import io
import json
import logging
import os
import pickle
import warnings
import zipfile

import jax
import numpy as np
import pytest
import torch
import transformers

from lfm_jax.interop import export_folder, torch_export
from lfm_jax.interop.exported_file import (
    Conversation,
    ExportedFile,
    Reference,
    check_installed,
    compare,
    judge,
    measure_speed,
    quiet_libraries,
    reference_logits,
    whole_file,
)
from lfm_jax.interop.torch_export import export_onnx, export_pt2, open_onnx, open_pt2
from lfm_jax.interop.torch_model import initial_state, load_torch_model, state_names
from lfm_jax.models import Decoder, ModelConfig, MoEConfig, RopeConfig, functional

MOE = ModelConfig(
    vocab_size=80, embed_dim=32, layer_types=("conv", "full_attention"), num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=48,
    moe=MoEConfig(num_experts=4, experts_per_token=2, mlp_dim=24, num_dense_layers=1), tokenizer_vocab_size=70,
)  # fmt: skip
LFM3 = dataclasses.replace(
    MOE, layer_types=("conv", "sliding_attention"), moe=None, conv_width=7, conv_bias=True, sliding_window=4,
    sandwich_norms=True, attention_gate=True, sliding_rope=RopeConfig(theta=100.0), tie_embeddings=False,
)  # fmt: skip
CONVOLUTIONS = dataclasses.replace(MOE, layer_types=("conv",), moe=None)
CAPACITY = 32
TEXT = [int(token) for token in np.random.default_rng(1).integers(0, 70, 20)]


@dataclasses.dataclass
class Exported:
    """A model, its file, and the model's parameters as they were before."""

    folder: object
    model: torch.nn.Module
    before: dict
    reference: Reference
    found: ExportedFile
    conversation: Conversation


def _exported(config, export, opened, place):
    functions = functional(lambda rngs: Decoder(config, rngs=rngs))
    generator = np.random.default_rng(0)
    draw = lambda leaf: generator.normal(size=leaf.shape).astype(np.float32) * 2 * max(leaf.shape) ** -0.5
    params, buffers = (jax.tree.map(draw, tree) for tree in (functions.abstract_params, functions.abstract_buffers))
    folder = export_folder(config, params, buffers, place / "hf")
    model = load_torch_model(folder)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    reference = reference_logits(config, params, buffers, TEXT)
    found = export(model, place / "out" / "model", reference, capacity=CAPACITY)
    return Exported(folder, model, before, reference, found, opened(found.file))


@pytest.fixture(scope="module")
def onnx_file(tmp_path_factory):
    return _exported(LFM3, export_onnx, open_onnx, tmp_path_factory.mktemp("onnx"))


@pytest.fixture(scope="module")
def pt2_file(tmp_path_factory):
    return _exported(MOE, export_pt2, open_pt2, tmp_path_factory.mktemp("pt2"))


@pytest.fixture(params=["onnx", "pt2"])
def exported(request):
    return request.getfixturevalue(f"{request.param}_file")


def test_a_file_is_what_it_says(exported):
    found = exported.found
    assert found.bytes == found.file.stat().st_size
    assert found.max_logit_difference < 1e-4
    assert found.greedy_agreement == 1
    assert [file.name for file in found.file.parent.iterdir()] == ["model"]


def test_export_does_not_mutate_source(exported):
    after = exported.model.state_dict()
    assert after.keys() == exported.before.keys()
    assert all(torch.equal(tensor, exported.before[name]) for name, tensor in after.items())


@pytest.mark.parametrize("lengths", [[20], [1] * 20, [3, 9, 1, 7]], ids=["whole", "one_by_one", "pieces"])
def test_any_lengths_in_a_row_are_the_whole(lengths, exported):
    """One program, whatever the length; and each beginning is a new one."""
    whole, _ = exported.model(torch.tensor([TEXT]), initial_state(exported.model.config, 1, 20))
    exported.conversation.begin()
    start = 0
    for length in lengths:
        found = exported.conversation.feed(TEXT[start : start + length])
        start += length
        np.testing.assert_allclose(found, whole[0, start - 1, :70], atol=1e-5)


def test_a_sequence_fills_the_capacity(exported):
    tokens = (TEXT + TEXT)[:CAPACITY]
    whole, _ = exported.model(torch.tensor([tokens]), initial_state(exported.model.config, 1, CAPACITY))
    exported.conversation.begin()
    for token in tokens:
        found = exported.conversation.feed([token])
    np.testing.assert_allclose(found, whole[0, -1, :70], atol=1e-5)


def test_padded_vocab_is_never_sampled(exported):
    """The file has no logits for it."""
    exported.conversation.begin()
    assert exported.conversation.feed(TEXT).shape == (70,)


def test_greedy_tokens_are_those_of_transformers(exported):
    theirs = transformers.AutoModelForCausalLM.from_pretrained(exported.folder).eval()
    prompt = torch.tensor([TEXT[:4]])
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": [-1], "pad_token_id": 0}
    expected = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), **options)[0, 4:].tolist()
    exported.conversation.begin()
    tokens, given = [], TEXT[:4]
    for _ in expected:
        tokens.append(int(np.argmax(exported.conversation.feed(given))))
        given = tokens[-1:]
    assert tokens == expected


def test_a_full_conversation_is_refused(exported):
    exported.conversation.begin()
    exported.conversation.feed(TEXT)
    with pytest.raises(ValueError, match=r"20 \+ 13 tokens are more than the capacity of this file, 32"):
        exported.conversation.feed(TEXT[:13])
    exported.conversation.feed(TEXT[:12])


def test_a_batch_is_its_rows(pt2_file, onnx_file):
    """The files take any batch, by the names that they give."""
    import onnxruntime

    tokens = np.random.default_rng(2).integers(0, 70, (3, 6))
    expected, _ = onnx_file.model(torch.from_numpy(tokens), initial_state(LFM3, 3, CAPACITY))
    names = state_names(LFM3)
    given = {name: tensor.numpy() for name, tensor in zip(names, initial_state(LFM3, 3, CAPACITY), strict=True)}
    session = onnxruntime.InferenceSession(onnx_file.found.file)
    logits, length = session.run(["logits", "next_length"], given | {"tokens": tokens})
    np.testing.assert_allclose(logits, expected[:, -1, :70], atol=1e-5)
    assert length.tolist() == [6]
    assert [entry.name for entry in session.get_outputs()] == ["logits", *(f"next_{name}" for name in names)]
    program = torch.export.load(str(pt2_file.found.file)).module()
    logits, _ = program(torch.from_numpy(tokens), initial_state(MOE, 3, CAPACITY))
    expected, _ = pt2_file.model(torch.from_numpy(tokens), initial_state(MOE, 3, CAPACITY))
    np.testing.assert_allclose(logits, expected[:, -1, :70], atol=1e-5)


def test_weights_too_many_for_one_file_lie_beside_it(tmp_path, monkeypatch):
    monkeypatch.setattr(torch_export, "_MOST_PROTOBUF_BYTES", 1000)
    found = _exported(CONVOLUTIONS, export_onnx, open_onnx, tmp_path).found
    assert sorted(file.name for file in found.file.parent.iterdir()) == ["model", "model.data"]
    assert found.bytes == sum(file.stat().st_size for file in found.file.parent.iterdir())


def test_speed_is_measured_in_a_process_of_its_own(onnx_file):
    speed = measure_speed(open_onnx, onnx_file.found.file, prompt_tokens=20, new_tokens=4)
    assert min(speed) > 0


@pytest.mark.parametrize(("capacity", "text"), [(1, TEXT), (200_000, TEXT)])
def test_a_capacity_that_is_none_is_refused(capacity, text, pt2_file, tmp_path):
    with pytest.raises(ValueError, match=f"capacity must be from 2 to the model's context_length 128000, got {capacity}"):
        export_pt2(pt2_file.model, tmp_path / "model", pt2_file.reference, capacity=capacity)


@pytest.mark.parametrize("tokens", [1, 20])
def test_a_text_that_does_not_fit_is_refused(tokens, pt2_file, tmp_path):
    reference = pt2_file.reference._replace(tokens=pt2_file.reference.tokens[:tokens])
    with pytest.raises(ValueError, match=f"the text to compare on has {tokens} tokens; give 2 to the capacity 16"):
        export_pt2(pt2_file.model, tmp_path / "model", reference, capacity=16)


def test_a_package_that_is_missing_is_named():
    with pytest.raises(ModuleNotFoundError, match=r"not installed: no_such_package; run: pip install .*\[export\]"):
        check_installed("torch", "no_such_package")


class Telling:
    """Unpickled as any object may be, it makes a folder."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize("place", ["inputs", "weights", "object"])
def test_an_archive_that_would_run_code_is_refused(place, pt2_file, tmp_path):
    """In each of the places where PyTorch unpickles without asking what; and it asks so again afterwards."""
    run = torch.export.load(str(pt2_file.found.file))  # trusted: the setting is of `open_pt2` alone
    assert run.example_inputs
    content = io.BytesIO()
    torch.save(Telling(tmp_path / "ran"), content)
    weights = {"config": {"w": {"path_name": "weight_0", "is_param": True, "use_pickle": True, "tensor_meta": None}}}
    path = tmp_path / "model.pt2"
    with zipfile.ZipFile(pt2_file.found.file) as source, zipfile.ZipFile(path, "w") as target:
        for entry in source.namelist():
            data = source.read(entry)
            if place == "inputs" and "sample_inputs" in entry or place == "weights" and entry.endswith("/weight_0"):
                data = content.getvalue()
            if place == "weights" and entry.endswith("weights_config.json"):
                given = json.loads(data)["config"]
                first = next(name for name, value in given.items() if value["path_name"] == "weight_0")
                data = json.dumps({"config": given | {first: {**given[first], **weights["config"]["w"]}}}).encode()
            target.writestr(entry, data)
        if place == "object":
            target.writestr(entry.partition("/")[0] + "/data/constants/opaque_obj_0", pickle.dumps(Telling(tmp_path / "ran")))
    with pytest.raises(ValueError, match="holds an object that is no tensor" if place == "object" else "eights.only"):
        open_pt2(path)
    assert not (tmp_path / "ran").exists() and "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


def test_what_is_no_archive_is_refused(tmp_path):
    (tmp_path / "model.pt2").write_bytes(b"PK of another kind")
    with pytest.raises(ValueError, match=r"model.pt2 is no program of PyTorch's"):
        open_pt2(tmp_path / "model.pt2")


def test_a_failed_export_leaves_what_was_there(pt2_file, tmp_path, monkeypatch):
    """A wrong file and a full disk."""
    (tmp_path / "model").write_text("before")
    wrong = pt2_file.reference._replace(logits=-pt2_file.reference.logits)
    export = functools.partial(export_pt2, pt2_file.model, tmp_path / "model", capacity=CAPACITY)
    monkeypatch.setattr(torch_export, "step_program", lambda *_: torch.export.load(str(pt2_file.found.file)))
    with pytest.raises(ValueError, match="the file's logits differ by .* from ours"):
        export(wrong)

    def full(program, opened, **_):
        opened.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch.export, "save", full)
    with pytest.raises(OSError, match="model was not written, and nothing is left of it: No space left on device") as caught:
        export(pt2_file.reference)
    assert caught.value.errno == errno.ENOSPC
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("model", "before")]


def test_a_file_takes_its_place_when_it_is_whole(tmp_path):
    with whole_file(tmp_path / "new" / "model") as file:
        file.write_text("whole")
        assert not (tmp_path / "new" / "model").exists()
    assert (tmp_path / "new" / "model").read_text() == "whole"
    assert len(list((tmp_path / "new").iterdir())) == 1


def _fake(logits_of, chunk=8):
    """A runtime whose state is the text so far."""
    step = lambda tokens, text: (np.asarray(logits_of(text + tokens[0].tolist()), np.float32)[None], text + tokens[0].tolist())
    return Conversation(step, [], 64, chunk)


def test_a_long_prompt_goes_in_several_steps():
    calls = []

    def logits_of(text):
        calls.append(len(text))
        return [len(text), 0]

    conversation = _fake(logits_of)
    assert conversation.feed(range(20)).tolist() == [20, 0]
    assert calls == [8, 16, 20]


def test_differences_and_agreement_are_counted():
    """By hand: five positions of three ids, the reference has a fourth that the file has not."""
    expected = np.array([[1, 0, 0, 9], [0, 1, 0, 9], [0, 0, 1, 9], [1, 0, 0, 9]], np.float32)
    found = np.array([[1, 0, 0], [0, 1, 0.5], [0, 2, 1], [1.25, 0, 0]], np.float32)
    assert compare(found, expected, exact=False) == (2.0, 0.75)
    with pytest.raises(ValueError, match="the file's logits differ by 2 from ours, the largest of which is 1"):
        compare(found, expected)
    found[0, 0] = np.nan
    with pytest.raises(ValueError, match="the file's logits differ by nan"):
        compare(found, expected, exact=False)


def test_a_file_that_remembers_another_sequence_is_refused():
    calls = []

    def logits_of(text):
        calls.append(text)
        return [len(calls), 0]

    reference = Reference(np.arange(4), np.array([[9, 9], [1, 0], [2, 0], [3, 0]], np.float32))
    with pytest.raises(ValueError, match="a second sequence gets other logits than the first"):
        judge(_fake(logits_of), reference)
    assert judge(_fake(lambda text: [len(text) - 1, 0]), reference) == (0, 1)


def test_quiet_libraries_are_quiet_only_inside(caplog):
    with quiet_libraries():
        warnings.warn("theirs", DeprecationWarning, stacklevel=1)
        logging.getLogger("theirs").warning("theirs")
    assert not caplog.records
    with pytest.warns(DeprecationWarning, match="ours"):
        warnings.warn("ours", DeprecationWarning, stacklevel=1)
    logging.getLogger("ours").warning("ours")
    assert [record.message for record in caplog.records] == ["ours"]
