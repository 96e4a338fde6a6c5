"""The classifier as a Hugging Face model: loaded, saved, trained, compiled, and what padding must not change."""

import copy
import json
import warnings

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    Trainer,
    TrainingArguments,
)

import mhex_text
from mhex_core import joint_logits
from mhex_text import MHEXForSequenceClassification, MHEXTextConfig, MHEXTextOutput

from .encoders import BOTH, CASES, LENGTHS, attentions, make_batch, make_config, make_encoder

FRESH = {f"blocks.{index}.{name}.weight" for index in range(3) for name in ("gate", "head")}


def make_model(case="bert", *, attention=None, changes=None, **settings):
    encoder = make_encoder(case, attention=attention, **(changes or {}))
    model = MHEXForSequenceClassification.from_encoder(encoder, 3, **settings)
    torch.manual_seed(7)
    with torch.no_grad():
        for weight in model.blocks.parameters():
            weight.normal_(std=0.3)
    return model


def everything(model, inputs, **more):
    return model(**inputs, output_heads=True, output_activations=True, **more)


def same_weights(ours, theirs):
    ours, theirs = ours.state_dict(), theirs.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(value, theirs[name]) for name, value in ours.items())


# ----------------------------------------------------------------------------------------------------- what it computes


@pytest.mark.parametrize(("case", "attention"), BOTH)
def test_padding_batch_and_order_change_nothing(case, attention):
    model, batch = make_model(case, attention=attention), make_batch(case)
    order = [2, 0, 3, 1]
    with torch.no_grad():
        together = everything(model, batch)
        shuffled = model(**{name: value[order] for name, value in batch.items()})
        for index, length in enumerate(LENGTHS):
            alone = everything(model, {"input_ids": batch["input_ids"][index : index + 1, :length]})
            assert_close(together.logits[index], alone.logits[0], rtol=1e-5, atol=1e-5)
            for layer in range(3):
                ours, theirs = together.activations[layer][index, :length], alone.activations[layer][0]
                assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
                assert_close(together.head_logits[layer][index], alone.head_logits[layer][0], rtol=1e-5, atol=1e-5)
    assert_close(shuffled.logits, together.logits[order], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", [case for case in CASES if len(attentions(case)) == 2])
def test_both_attentions_agree(case):
    batch = make_batch(case)
    models = [make_model(case, attention=attention) for attention in ("eager", "sdpa")]
    assert [model.config._attn_implementation for model in models] == ["eager", "sdpa"]
    with torch.no_grad():
        outputs = [everything(model, batch) for model in models]
    assert_close(outputs[0].logits, outputs[1].logits, rtol=1e-5, atol=1e-5)
    real = batch["attention_mask"].bool()
    for ours, theirs in zip(outputs[0].activations, outputs[1].activations, strict=True):
        assert_close(ours[real], theirs[real], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_without_gates_activations_lead_to_the_encoders_own_states(case):
    encoder, batch = make_encoder(case), make_batch(case)
    model = MHEXForSequenceClassification.from_encoder(encoder, 3, gate=False)
    with torch.no_grad():
        output = everything(model, batch)
        # Activations of the first two layers: the third one's state has passed ModernBERT's final normalisation.
        states = encoder(**batch, output_hidden_states=True).hidden_states[1:3]
    adapter, real = mhex_text.adapters.adapter_for(encoder.config), batch["attention_mask"].bool()
    for index, (activation, expected) in enumerate(zip(output.activations, states, strict=False)):
        ours = activation
        if isinstance(adapter, mhex_text.PostNormAdapter):
            ours = adapter.tail(encoder, index)[1](activation)
        if "convolution" not in case or index:
            assert_close(ours[real], expected[real], rtol=1e-6, atol=1e-6)


def test_only_what_is_asked_for_comes_back():
    model, batch = make_model(), make_batch()
    plain = model(**batch)
    assert isinstance(plain, MHEXTextOutput)
    assert list(plain.keys()) == ["logits"]
    labelled = model(**batch, labels=torch.tensor([0, 1, 2, 0]))
    assert list(labelled.keys()) == ["loss", "logits"]
    full = everything(model, batch)
    assert [value.shape for value in full.head_logits] == [(4, 3)] * 3
    assert [value.shape for value in full.gate_logits] == [(4, 32)] * 3
    assert [value.shape for value in full.activations] == [(4, 12, 32)] * 3
    as_tuple = model(**batch, return_dict=False)
    assert isinstance(as_tuple, tuple)
    assert torch.equal(as_tuple[0], plain.logits)


def test_heads_are_the_equivalent_matrices_times_the_pooled_activations():
    model, batch = make_model(), make_batch()
    output, mask = everything(model, batch), batch["attention_mask"][..., None]
    for matrix, activation, logits in zip(
        model.equivalent_matrices(), output.activations, output.head_logits, strict=True
    ):
        pooled = torch.relu((activation * mask).sum(dim=1) / mask.sum(dim=1))
        assert_close(pooled @ matrix.T, logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("objective", ["layerwise", "joint"])
def test_loss_and_prediction_belong_to_the_objective(objective):
    model, batch = make_model(objective=objective), make_batch()
    labels = torch.tensor([0, 1, 2, 0])
    output = everything(model, batch, labels=labels)
    if objective == "joint":
        assert_close(output.logits, joint_logits(output.head_logits, decay=0.8))
        assert_close(output.loss, F.cross_entropy(output.logits, labels))
    else:
        assert torch.equal(output.logits, output.head_logits[-1])
        assert_close(output.loss, sum(F.cross_entropy(logits, labels) for logits in output.head_logits))
    output.loss.backward()
    assert all(weight.grad is not None for weight in model.blocks.parameters())
    assert model.encoder.embeddings.word_embeddings.weight.grad.abs().sum() > 0


def test_independent_classes_are_trained_by_binary_cross_entropy():
    model, batch = make_model(multi_label=True), make_batch()
    labels = torch.tensor([[1.0, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0]])
    output = everything(model, batch, labels=labels)
    expected = sum(F.binary_cross_entropy_with_logits(logits, labels) for logits in output.head_logits)
    assert_close(output.loss, expected)
    assert model.config.problem_type == "multi_label_classification"


def test_chosen_layers_carry_blocks_and_the_last_of_them_predicts():
    batch = make_batch()
    model = make_model(layers=(1, 0))
    assert model.config.layers == (0, 1)
    assert len(model.blocks) == 2
    output = everything(model, batch)
    assert torch.equal(output.logits, output.head_logits[-1])
    last = model.encoder.encoder.layer[2]
    with torch.no_grad():
        for weight in last.parameters():
            weight.fill_(float("nan"))
    assert torch.equal(model(**batch).logits, output.logits)  # nothing reads the layer after the last block
    only = make_model(layers=(2,), gate=False)
    every = make_model(gate=False)
    only.blocks[0].load_state_dict(every.blocks[2].state_dict())
    assert torch.equal(only(**batch).logits, every(**batch).logits)


# --------------------------------------------------------------------------------------------------- loading and saving


@pytest.mark.parametrize("kind", [BertModel, BertForMaskedLM, BertForSequenceClassification])
def test_from_a_folder_only_the_blocks_are_fresh(tmp_path, kind, caplog):
    source = kind(make_config("bert"))
    with torch.no_grad():
        for weight in source.parameters():
            weight.normal_()
    source.save_pretrained(tmp_path)
    model = MHEXForSequenceClassification.from_encoder(str(tmp_path), 3)
    theirs = source.base_model.state_dict()
    loaded = {name: value for name, value in model.state_dict().items() if name not in FRESH}
    assert set(model.state_dict()) - set(loaded) == FRESH
    assert set(loaded) == {f"encoder.{name}" for name in theirs if not name.startswith("pooler")}
    for name, value in loaded.items():
        assert torch.equal(value, theirs[name.removeprefix("encoder.")]), name
    assert "newly initialized" not in caplog.text.lower()
    assert "missing" not in caplog.text.lower()
    for name in FRESH:
        assert 0.015 < model.get_parameter(name).std() < 0.025  # initializer_range is 0.02


@pytest.mark.parametrize("case", CASES)
def test_from_a_model_it_is_copied_and_only_the_blocks_are_fresh(case):
    source = make_encoder(case)
    # A part that the user put there has none of the library's marks of initialisation.
    replaced = torch.nn.Embedding(60, source.get_input_embeddings().embedding_dim)
    source.set_input_embeddings(replaced)
    before = copy.deepcopy(source.state_dict())
    model = MHEXForSequenceClassification.from_encoder(source, 3)
    assert not model.training
    for name, value in model.encoder.state_dict().items():
        assert torch.equal(value, before[name]), name
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
    assert all(torch.equal(value, before[name]) for name, value in source.state_dict().items())


def test_of_a_model_with_a_head_the_encoder_is_taken():
    source = AutoModelForMaskedLM.from_config(make_config("distilbert"))
    model = MHEXForSequenceClassification.from_encoder(source, 3)
    assert type(model.encoder).__name__ == "DistilBertModel"
    assert same_weights(model.encoder, source.distilbert)


@pytest.mark.parametrize("case", CASES)
def test_saving_and_loading_changes_no_bit(case, tmp_path):
    model, batch = make_model(case, objective="joint", labels=("good", "bad", "neither")), make_batch(case)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    loaded = MHEXForSequenceClassification.from_pretrained(tmp_path)
    assert same_weights(loaded, model)
    assert not loaded.training
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    assert loaded.config.id2label == {0: "good", 1: "bad", 2: "neither"}
    assert loaded.config.label2id == {"good": 0, "bad": 1, "neither": 2}
    assert loaded.config.objective == "joint"
    config = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(config, MHEXTextConfig)
    auto = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert isinstance(auto, MHEXForSequenceClassification)
    assert same_weights(auto, model)


def test_the_auto_classes_know_it_after_a_bare_import(tmp_path, python):
    make_model().save_pretrained(tmp_path)
    script = (
        "import sys, mhex_text\n"
        "assert not {'torchvision', 'mhex_vision', 'matplotlib', 'datasets'} & set(sys.modules)\n"
        "from transformers import AutoModelForSequenceClassification as Auto\n"
        f"print(type(Auto.from_pretrained({str(tmp_path)!r})).__name__)\n"
    )
    done = python.run("-c", script)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "MHEXForSequenceClassification"


def test_loading_honours_attention_and_dtype(tmp_path):
    make_model().save_pretrained(tmp_path)
    for attention in ("eager", "sdpa"):
        loaded = MHEXForSequenceClassification.from_pretrained(tmp_path, attn_implementation=attention)
        assert loaded.encoder.config._attn_implementation == attention
    half = MHEXForSequenceClassification.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {weight.dtype for weight in half.parameters()} == {torch.bfloat16}
    assert half(**make_batch()).logits.dtype == torch.bfloat16
    half.save_pretrained(tmp_path / "half")
    again = MHEXForSequenceClassification.from_pretrained(tmp_path / "half", dtype="auto")
    assert same_weights(again, half)


def test_blocks_have_the_encoders_dtype():
    model = MHEXForSequenceClassification.from_encoder(make_encoder().to(torch.float64), 3)
    assert {weight.dtype for weight in model.parameters()} == {torch.float64}


def test_the_vocabulary_may_grow(tmp_path):
    model, batch = make_model(), make_batch()
    expected = model(**batch).logits
    model.resize_token_embeddings(64, mean_resizing=False)
    assert torch.equal(model(**batch).logits, expected)
    model.save_pretrained(tmp_path)
    loaded = MHEXForSequenceClassification.from_pretrained(tmp_path)
    assert loaded.config.vocab_size == loaded.config.encoder.vocab_size == 64
    assert torch.equal(loaded(**batch).logits, expected)


# ------------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("gate", [True, False])
def test_a_frozen_encoder_stays_as_it_is(tmp_path, gate):
    model, batch = make_model(freeze_backbone=True, gate=gate), make_batch()
    model.save_pretrained(tmp_path)
    for candidate in (model, MHEXForSequenceClassification.from_pretrained(tmp_path)):
        candidate.train()
        assert candidate.blocks.training
        assert not candidate.encoder.training
        before = copy.deepcopy(candidate.encoder.state_dict())
        trained = {name for name, weight in candidate.named_parameters() if weight.requires_grad}
        assert trained == FRESH
        candidate(**batch, labels=torch.tensor([0, 1, 2, 0])).loss.backward()
        torch.optim.SGD(candidate.parameters(), lr=1.0).step()
        assert all(torch.equal(value, before[name]) for name, value in candidate.encoder.state_dict().items())


def enable_checkpoints(model, **options):
    # transformers 5 gives it another name, and warns of the old one.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(options)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_checkpoints_change_neither_loss_nor_gradients(case, frozen, reentrant):
    batch, labels = make_batch(case), torch.tensor([0, 1, 2, 0])
    gradients = []
    for checkpoints in (False, True):
        model = make_model(case, freeze_backbone=frozen)
        if checkpoints:
            enable_checkpoints(model, use_reentrant=reentrant)
            assert model.gradient_checkpointing
        model.train()
        torch.manual_seed(11)
        loss = model(**batch, labels=labels).loss
        loss.backward()
        gradients.append({"loss": loss, **{name: weight.grad for name, weight in model.named_parameters()}})
    assert gradients[0].keys() == gradients[1].keys()
    for name, value in gradients[0].items():
        other = gradients[1][name]
        if value is None:  # of the normalisation after the last head; older checkpoints say zero
            assert other is None or not other.any(), name
        else:
            assert_close(other, value, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("case", ["bert", "modernbert", "deberta-v2"])
def test_autocast_stays_close_to_full_precision(case):
    model, batch = make_model(case), make_batch(case)
    with torch.no_grad():
        expected = model(**batch).logits
        with torch.autocast("cpu", dtype=torch.bfloat16):
            half = model(**batch).logits
    assert_close(half.float(), expected, rtol=0.1, atol=0.1 * float(expected.abs().max()))


@pytest.mark.parametrize("case", ["bert", "distilbert", "modernbert"])
def test_it_compiles_as_one_graph(case):
    model, batch = make_model(case), make_batch(case)
    labels = torch.tensor([0, 1, 2, 0])
    expected = everything(model, batch, labels=labels)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    output = compiled(**batch, labels=labels, output_heads=True, output_activations=True)
    assert_close(output.loss, expected.loss)
    assert_close(output.logits, expected.logits)
    for ours, theirs in zip(output.activations, expected.activations, strict=True):
        assert_close(ours, theirs)


def test_the_trainer_trains_and_predicts(tmp_path):
    pytest.importorskip("accelerate")
    model, batch = make_model(), make_batch(lengths=(6,) * 12)
    labels = (batch["input_ids"][:, 0] % 3).long()
    rows = [
        {"input_ids": ids, "attention_mask": mask, "labels": label}
        for ids, mask, label in zip(batch["input_ids"], batch["attention_mask"], labels, strict=True)
    ]
    settings = {"per_device_train_batch_size": 4, "max_steps": 6, "learning_rate": 5e-3, "report_to": []}
    arguments = TrainingArguments(
        output_dir=tmp_path, save_strategy="no", use_cpu=True, disable_tqdm=True, logging_strategy="no", **settings
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    before = model(**batch, labels=labels).loss.item()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pinned memory without an accelerator
        trainer.train()
        prediction = trainer.predict(rows)
    assert trainer.evaluate(rows)["eval_loss"] < before
    assert prediction.predictions.shape == (12, 3)
    assert_close(torch.from_numpy(prediction.predictions), model.eval()(**batch).logits.detach(), rtol=1e-4, atol=1e-4)


# -------------------------------------------------------------------------------------------------- settings and errors


def test_settings_survive_their_dictionary():
    config = MHEXTextConfig(
        make_config("modernbert"), gate=False, layers=[2, 0], objective="joint", decay=0.5, num_labels=5
    )
    again = MHEXTextConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert again.layers == (0, 2)
    assert again.block_layers == (0, 2)
    assert (again.gate, again.objective, again.decay, again.num_labels) == (False, "joint", 0.5, 5)
    assert type(again.encoder) is type(config.encoder)
    assert again.encoder.local_attention == 4
    assert again != MHEXTextConfig(make_config("modernbert"), num_labels=5)
    assert MHEXTextConfig().encoder.model_type == "bert"
    assert isinstance(MHEXTextConfig().encoder, BertConfig)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"encoder": "bert"}, TypeError, "encoder must be a configuration or a dictionary, got str"),
        ({"encoder": {"hidden_size": 3}}, ValueError, "encoder must hold a model_type, got the keys hidden_size"),
        ({"encoder": {"model_type": "gpt2"}}, ValueError, "encoder must be one of .*bert.*got 'gpt2'"),
        ({"gate": 1}, TypeError, "gate must be a bool, got int"),
        ({"freeze_backbone": None}, TypeError, "freeze_backbone must be a bool, got NoneType"),
        ({"objective": 1}, TypeError, "objective must be a string, got int"),
        ({"objective": "both"}, ValueError, "objective must be one of 'layerwise', 'joint', got 'both'"),
        ({"decay": "0.8"}, TypeError, "decay must be a number, got str"),
        ({"decay": 1.5}, ValueError, r"decay must be in \[0, 1\], got 1.5"),
        ({"decay": float("nan")}, ValueError, r"decay must be in \[0, 1\], got nan"),
        ({"layers": "some"}, ValueError, "layers must be 'all' or a sequence of indices, got 'some'"),
        ({"layers": 1}, TypeError, "layers must be 'all' or a sequence of indices, got int"),
        ({"layers": (0, 1.0)}, TypeError, r"layers\[1\] must be an int, got float"),
        ({"layers": (True,)}, TypeError, r"layers\[0\] must be an int, got bool"),
        ({"layers": (-1,)}, ValueError, r"layers\[0\] must lie in \[0, 11\], got -1"),
        ({"layers": (0, 12)}, ValueError, r"layers\[1\] must lie in \[0, 11\], got 12"),
        ({"layers": ()}, ValueError, "layers must hold at least one index"),
        ({"layers": (1, 1)}, ValueError, r"none twice, got \(1, 1\)"),
        ({"num_labels": "3"}, TypeError, "num_labels must be an int, got str"),
        ({"num_labels": 1}, ValueError, "num_labels must be at least 2"),
        ({"num_labels": 2, "id2label": {0: "a"}}, ValueError, "id2label must hold num_labels = 2 names, got 1"),
        ({"problem_type": "regression"}, ValueError, "problem_type must be that of a classification"),
    ],
)
def test_bad_settings_are_named(settings, error, message):
    with pytest.raises(error, match=message):
        MHEXTextConfig(**settings)


@pytest.mark.parametrize(
    ("arguments", "settings", "error", "message"),
    [
        ((3, 3), {}, TypeError, "name_or_path_or_model must be a name, a path or a PreTrainedModel, got int"),
        ((None, 3), {"labels": "abc"}, TypeError, "labels must be a sequence of texts"),
        ((None, 3), {"labels": ("a", "b")}, ValueError, "labels must hold 3 different names"),
        ((None, 3), {"labels": ("a", "b", "a")}, ValueError, "labels must hold 3 different names"),
        ((None, 3), {"multi_label": 1}, TypeError, "multi_label must be a bool, got int"),
        ((None, 3), {"layers": (3,)}, ValueError, r"layers\[0\] must lie in \[0, 2\], got 3"),
    ],
)
def test_bad_arguments_are_named(arguments, settings, error, message):
    given, num_labels = arguments
    with pytest.raises(error, match=message):
        MHEXForSequenceClassification.from_encoder(make_encoder() if given is None else given, num_labels, **settings)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "exactly one of input_ids and inputs_embeds"),
        ({"input_ids": (2, 3), "inputs_embeds": (2, 3, 32)}, "exactly one of input_ids and inputs_embeds"),
        ({"input_ids": (3,)}, r"input_ids must have shape \(B, T\), got \(3,\)"),
        ({"inputs_embeds": (2, 3)}, r"inputs_embeds must have shape \(B, T, E\), got \(2, 3\)"),
        ({"input_ids": (2, 3), "attention_mask": (2, 4)}, r"attention_mask must have shape \(2, 3\), got \(2, 4\)"),
        ({"input_ids": (2, 3), "attention_mask": (2, 1, 1, 3)}, "attention_mask must have shape"),
    ],
)
def test_inputs_that_do_not_fit_are_named(inputs, message):
    tensors = {name: torch.ones(shape, dtype=torch.long) for name, shape in inputs.items()}
    with pytest.raises(ValueError, match=message):
        make_model()(**tensors)


def test_every_public_name_exists_and_is_documented():
    assert len(set(mhex_text.__all__)) == len(mhex_text.__all__)
    for name in mhex_text.__all__:
        assert getattr(mhex_text, name).__doc__
        assert name in dir(mhex_text)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = mhex_text.nothing
