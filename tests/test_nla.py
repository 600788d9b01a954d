"""NLA pairs: read like transformers runs them, and a lens exported as one."""

from __future__ import annotations

import dataclasses
import json
import shutil
import types

import jax
import numpy as np
import pytest
import safetensors.numpy
import yaml
from pipeline import quick_compilation
from tiny_lens import tiny_original, tiny_spec
from tiny_models import write_tiny_folder
from tiny_user import LAYER, TEXT, TEXTS, tiny_user_lens

from conlens_jax.models.hf_io import save_model
from conlens_jax.nla.export import PARTS, export_pair
from conlens_jax.nla.pairs import NlaPair, _explanation
from conlens_jax.nla.sidecar import SIDECAR, VALUE_HEAD, read_sidecar

torch = pytest.importorskip("torch")

TEMPLATE = (
    "{% for m in messages %}the {{ m.content }}{% endfor %}{{ ' and' if add_generation_prompt }}"
)
N_NEW, SCALE, WIDTH = 5, 30.0, 32
META = {
    "kind": "nla_model",
    "d_model": WIDTH,
    "extraction_layer_index": LAYER,
    "tokens": {"injection_char": "owl"},
    "extraction": {"injection_scale": SCALE, "mse_scale": WIDTH**0.5},
}


@pytest.fixture(scope="module")
def lens(tmp_path_factory):
    with quick_compilation(tmp_path_factory):
        yield tiny_user_lens(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def folders(lens, tmp_path_factory):
    """A released pair as its repository describes one; the AV in one dialect, the AR in the
    other, and the AR without norm and head in its files."""
    root, tokenizer = tmp_path_factory.mktemp("pair"), lens.model.tokenizer
    shape = tiny_spec().model
    (root / "av").mkdir()
    save_model(root / "av", shape, tiny_original(tiny_spec(), seed=7))
    tokenizer.save(root / "av")
    (root / "av" / "chat_template.jinja").write_text(TEMPLATE)
    (owl,) = tokenizer.encode("owl")
    av = {**META, "role": "actor", "prompt_templates": {"actor": "cat {injection_char} saw"}}
    av["tokens"] = {**META["tokens"], "injection_token_id": owl}
    (root / "av" / SIDECAR).write_text(yaml.safe_dump(av))
    whole = tiny_original(tiny_spec(), seed=6)
    layers = jax.tree.map(lambda leaf: leaf[: LAYER + 1], whole["layers"])
    short = dataclasses.replace(shape, n_layers=LAYER + 1)
    (root / "ar").mkdir()
    save_model(root / "ar", short, {**whole, "layers": layers})
    tokenizer.save(root / "ar")
    file = root / "ar" / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    kept = {n: t for n, t in tensors.items() if n not in ("lm_head.weight", "model.norm.weight")}
    assert len(kept) == len(tensors) - 2
    safetensors.numpy.save_file(kept, file)
    head = np.random.default_rng(0).standard_normal((WIDTH, WIDTH)).astype(np.float32)
    safetensors.numpy.save_file({"weight": head}, root / "ar" / VALUE_HEAD)
    ar = {**META, "role": "ar", "prompt_templates": {"ar": "two {explanation} and the"}}
    (root / "ar" / SIDECAR).write_text(yaml.safe_dump(ar))
    return root / "av", root / "ar"


@pytest.fixture(scope="module")
def pair(folders):
    return NlaPair.load(*folders, max_new_tokens=N_NEW, unroll=1)


def transformers_model(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def greedy(model, embeddings, count):
    """Token ids by full passes over ``inputs_embeds``."""
    written, table = [], model.get_input_embeddings()
    embeddings = torch.tensor(np.asarray(embeddings))[None]
    with torch.no_grad():
        for _ in range(count):
            token = model(inputs_embeds=embeddings).logits[0, -1].argmax()
            written.append(int(token))
            embeddings = torch.cat([embeddings, table(token)[None, None]], dim=1)
    return written


def last_state(model, embeddings):
    """The output of the last block at the last position."""
    found = []
    hook = model.model.layers[-1].register_forward_hook(
        lambda module, inputs, output: found.append(
            output[0] if isinstance(output, tuple) else output
        )
    )
    with torch.no_grad():
        model(inputs_embeds=torch.tensor(np.asarray(embeddings))[None])
    hook.remove()
    return found[0].reshape(-1, found[0].shape[-1])[-1].numpy()


def embedded(model, ids):
    with torch.no_grad():
        return model.get_input_embeddings()(torch.tensor(ids, dtype=torch.long)).numpy()


# --- reading ------------------------------------------------------------------------------------


def test_the_verbaliser_writes_what_transformers_writes(lens, folders, pair):
    model = transformers_model(folders[0])
    ids = lens.model.tokenizer.encode("the cat owl saw and")
    activations = np.stack([lens.capture(TEXT, position) for position in (2, 5, 7)])
    texts = []
    for vector in activations:
        embeddings = embedded(model, ids)
        embeddings[2] = SCALE * vector / np.linalg.norm(vector)
        written = greedy(model, embeddings, N_NEW)
        eos = lens.model.tokenizer.eos_id
        written = written[: written.index(eos)] if eos in written else written
        texts.append(lens.model.tokenizer.decode(written))
    assert pair.verbalise(activations) == texts and len(set(texts)) > 1


def test_the_reconstructor_is_transformers_without_norm_and_head(lens, folders, pair, tmp_path):
    # transformers wants a norm and a head in the files; they play no part.
    whole = shutil.copytree(folders[1], tmp_path / "ar")
    tensors = safetensors.numpy.load_file(whole / "model.safetensors")
    tensors["model.norm.weight"] = np.ones(WIDTH, np.float32)
    tensors["lm_head.weight"] = np.ones((48, WIDTH), np.float32)
    safetensors.numpy.save_file(tensors, whole / "model.safetensors", metadata={"format": "pt"})
    model = transformers_model(whole)
    head = safetensors.numpy.load_file(folders[1] / VALUE_HEAD)["weight"]
    texts = ["fox saw", "one red fox saw two blue owl"]
    for text, found in zip(texts, pair.reconstruct(texts), strict=True):
        ids = lens.model.tokenizer.encode(f"two {text} and the")
        expected = head @ last_state(model, embedded(model, ids))
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)


def test_a_pair_is_scored_by_what_the_model_then_predicts(lens, pair):
    found = pair.explain(lens.model, TEXTS[:2], [-2, -1])
    assert [row.document for row in found] == [0, 0, 1, 1]
    for row in found:
        text, position = TEXTS[row.document], row.position
        activation = lens.capture(text, position)
        assert row.explanation == pair.verbalise(activation[None])[0]
        vector = pair.reconstruct([row.explanation])[0]
        vector = vector * np.linalg.norm(activation) / np.linalg.norm(vector)
        again = lens.swap(text, position, vector)
        assert row.best.kl == pytest.approx(again.best.kl, rel=1e-3, abs=1e-5)
        assert row.best.cos == pytest.approx(again.best.cos, abs=1e-4)
        assert row.token == again.token
        assert [p.token for p in row.before] == [p.token for p in again.before]


def test_positions_asked_for_twice_and_activations_that_are_none(lens, pair):
    found = pair.explain(lens.model, TEXT, [3, -1, 3])
    assert [row.position for row in found] == [3, found[1].position, 3] and found[0] == found[2]
    with pytest.raises(ValueError, match="positions must be whole numbers"):
        pair.explain(lens.model, TEXT, [3.0])
    vectors = np.ones((2, WIDTH), np.float32)
    vectors[1, 4] = np.nan
    with pytest.raises(ValueError, match="activations contains NaN or infinity in row 1"):
        pair.verbalise(vectors)
    with pytest.raises(ValueError, match=r"activations must be \[N, 32\], not \(32,\)"):
        pair.verbalise(vectors[0])


def wrapped(folder, copy, prefix):
    """The folder of a text model as the text part of a multimodal one, with a tower beside it."""
    shutil.copytree(folder, copy)
    text = json.loads((folder / "config.json").read_text())
    vision = {"model_type": "siglip_vision_model", "hidden_size": 16}
    config = {"model_type": "gemma3", "text_config": text, "vision_config": vision}
    (copy / "config.json").write_text(json.dumps(config))
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    nested = {prefix + name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    nested["vision_tower.vision_model.head"] = np.ones(3, np.float32)
    safetensors.numpy.save_file(nested, copy / "model.safetensors")
    return copy


def test_a_pair_of_multimodal_gemma3_is_read_for_its_text_part(tmp_path):
    """Each half under one of the names that such folders have; the oracle has the text models.
    Gemma scales the embeddings of tokens, and not the vector in their midst."""
    n_new, layer = 3, 1
    av, ar = tmp_path / "av", tmp_path / "ar"
    for folder, seed, shape in ((av, 0, {}), (ar, 1, {"num_hidden_layers": layer + 1})):
        folder.mkdir()
        write_tiny_folder(folder, seed=seed, model_type="gemma3_text", **shape)
    (av / "chat_template.jinja").write_text(TEMPLATE.replace("the ", "word4 "))
    tokens = {"injection_char": "word9", "injection_token_id": 9}
    template = {"av": "word5 {injection_char} word6"}
    sidecar = {**META, "role": "av", "tokens": tokens, "prompt_templates": template}
    (av / SIDECAR).write_text(yaml.safe_dump(sidecar))
    sidecar = {**META, "role": "critic", "prompt_templates": {"critic": "word7 {explanation}"}}
    (ar / SIDECAR).write_text(yaml.safe_dump(sidecar))
    random = np.random.default_rng(2)
    head = random.standard_normal((WIDTH, WIDTH)).astype(np.float32)
    safetensors.numpy.save_file({"weight": head}, ar / VALUE_HEAD)
    pair = NlaPair.load(
        wrapped(av, tmp_path / "av-wrapped", "language_model.model."),
        wrapped(ar, tmp_path / "ar-wrapped", "model.language_model."),
        max_new_tokens=n_new,
        unroll=1,
    )
    vector = random.standard_normal(WIDTH).astype(np.float32)
    theirs = transformers_model(av)
    ids = pair.av.tokenizer.encode("word4 word5 word9 word6 and")
    embeddings = embedded(theirs, ids)
    embeddings[2] = SCALE * vector / np.linalg.norm(vector)
    written = greedy(theirs, embeddings, n_new)
    eos = pair.av.tokenizer.eos_id
    written = written[: written.index(eos)] if eos in written else written
    assert pair.verbalise(vector[None]) == [pair.av.tokenizer.decode(written)] != [""]
    theirs = transformers_model(ar)
    ids = pair.av.tokenizer.encode("word7 word11 word12")
    expected = head @ last_state(theirs, embedded(theirs, ids))
    (found,) = pair.reconstruct(["word11 word12"])
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())


def test_every_end_of_the_verbaliser_ends_its_text(pair):
    eos = pair.av.tokenizer.eos_id
    config = dataclasses.replace(pair.av.config, eos_token_ids=(7, 9))
    ending = dataclasses.replace(pair, av=dataclasses.replace(pair.av, config=config))
    for end in (7, 9, eos):
        assert ending._ended(np.array([5, 6, end, 9, eos])).tolist() == [5, 6]
    assert ending._ended(np.array([5, 6])).tolist() == [5, 6]


def test_what_stands_between_the_tags():
    assert _explanation("so: <explanation>\n a fox \n</explanation> x") == "a fox"
    assert _explanation("<explanation> cut off") == "cut off"
    assert _explanation(" no tags ") == "no tags"


def test_sidecars_that_do_not_fit(folders, tmp_path):
    av, ar = folders
    with pytest.raises(ValueError, match="role is 'actor', not ar or critic"):
        read_sidecar(av, "ar")
    with pytest.raises(ValueError, match="no nla_meta.yaml"):
        read_sidecar(tmp_path, "av")
    (tmp_path / SIDECAR).write_text("role: av\n")
    with pytest.raises(ValueError, match="prompt_templates.av.*layer_index.*injection_scale"):
        read_sidecar(tmp_path, "av")
    copy = shutil.copytree(ar, tmp_path / "ar")
    meta = yaml.safe_load((ar / SIDECAR).read_text())
    (copy / SIDECAR).write_text(yaml.safe_dump({**meta, "extraction_layer_index": 0}))
    with pytest.raises(ValueError, match="not a pair"):
        NlaPair.load(av, copy)


# --- writing ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(lens, tmp_path_factory):
    return export_pair(lens, tmp_path_factory.mktemp("exported"))


def test_an_exported_decoder_writes_the_same_in_transformers(lens, exported):
    av, _ = exported
    model, parts = transformers_model(av), safetensors.numpy.load_file(av / PARTS)
    for position in (2, 6):
        activation = lens.capture(TEXT, position)
        normal = (activation - parts["mean"]) / parts["scale"]
        slot = normal @ parts["slot_kernel"] + parts["slot_bias"]
        prompt = np.concatenate([parts["prompt_left"], slot[None], parts["prompt_right"]])
        written = greedy(model, prompt, lens.spec.text_len)
        assert lens.model.tokenizer.decode(written) == lens.decode(activation)


def test_an_exported_encoder_reads_the_same_in_transformers(lens, exported):
    _, ar = exported
    model, parts = transformers_model(ar), safetensors.numpy.load_file(ar / PARTS)
    weight = safetensors.numpy.load_file(ar / VALUE_HEAD)["weight"]
    assert model.config.num_hidden_layers == LAYER + 1
    text = embedded(model, lens.model.tokenizer.encode("one red fox saw"))
    state = last_state(model, np.concatenate([parts["prompt_left"], text, parts["prompt_right"]]))
    found = lens.encode("one red fox saw")
    np.testing.assert_allclose(weight @ state + parts["bias"], found, rtol=1e-3, atol=1e-3)
    meta = yaml.safe_load((ar / SIDECAR).read_text())
    assert (meta["role"], meta["extraction_layer_index"], meta["d_model"]) == ("ar", LAYER, WIDTH)
    assert meta["prompt_templates"] == {"ar": "two {explanation} and"}


def test_the_first_layers_of_gemma4_are_no_gemma4(tmp_path):
    lens = types.SimpleNamespace(spec=tiny_spec(family="gemma4_text"))
    with pytest.raises(ValueError, match="of a gemma4_text model are no such model; use Lens"):
        export_pair(lens, tmp_path)
    assert not any(tmp_path.iterdir())


def test_adapters_cannot_be_exported(lens, tmp_path):
    trainable = {**lens.trainable, "encoder": {**lens.trainable["encoder"], "lora": {}}}
    with pytest.raises(ValueError, match=r"encoder\.lora; use Lens\.save"):
        export_pair(dataclasses.replace(lens, trainable=trainable), tmp_path)
