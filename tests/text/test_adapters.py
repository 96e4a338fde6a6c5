"""Adapters against the encoders they run: layer by layer and all at once, padded and alone."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers import AutoConfig, AutoModel, BertConfig, PreTrainedModel

import mhex_text.adapters
from mhex_core import MHEXBlock
from mhex_text import (
    Adapter,
    MHEXForSequenceClassification,
    MHEXTextConfig,
    PostNormAdapter,
    PreNormAdapter,
    key_mask,
    register_adapter,
    supported_encoders,
)
from mhex_text.adapters import adapter_for

from .encoders import BOTH, CASES, make_batch, make_config, make_encoder


@pytest.fixture
def registry(monkeypatch):
    """What a test registers is forgotten afterwards."""
    monkeypatch.setattr(mhex_text.adapters, "_adapters", dict(mhex_text.adapters._adapters))


def run(encoder, inputs, blocks=None):
    adapter = adapter_for(encoder.config)
    rest = dict.fromkeys(("inputs_embeds", "attention_mask", "token_type_ids", "position_ids", "input_ids"))
    hidden, context = adapter.embed(encoder, **{**rest, **inputs})
    states, outputs = [hidden], []
    for index in range(adapter.depth(encoder.config)):
        block = None if blocks is None else blocks[index]
        hidden, output = adapter.run_layer(encoder, index, hidden, context, block, inputs.get("attention_mask"))
        states.append(hidden)
        outputs.append(output)
    return states, outputs


def last_of(encoder, states):
    return encoder.final_norm(states[-1]) if hasattr(encoder, "final_norm") else states[-1]


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize(("case", "attention"), BOTH)
def test_without_blocks_it_computes_what_the_encoder_computes(case, attention, masked):
    encoder = make_encoder(case, attention=attention)
    inputs = make_batch(case)
    real = inputs["attention_mask"].bool()
    if not masked:
        inputs = {"input_ids": make_batch(case, lengths=(7, 7))["input_ids"]}
        real = torch.ones(2, 7, dtype=torch.bool)
    with torch.no_grad():
        expected = encoder(**inputs, output_hidden_states=True)
        states, _ = run(encoder, inputs)
    assert_close(last_of(encoder, states)[real], expected.last_hidden_state[real], rtol=1e-6, atol=1e-6)
    for ours, theirs in zip(states[:-1], expected.hidden_states[:-1], strict=True):
        assert_close(ours[real], theirs[real], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_a_block_that_only_watches_changes_nothing_to_the_bit(case):
    encoder, inputs = make_encoder(case), make_batch(case)
    blocks = [MHEXBlock(32, 3, gate=False) for _ in range(3)]
    with torch.no_grad():
        plain, _ = run(encoder, inputs)
        watched, outputs = run(encoder, inputs, blocks)
    for ours, theirs in zip(watched, plain, strict=True):
        assert torch.equal(ours, theirs)
    assert all(output.activation.shape == (4, 12, 32) for output in outputs)


@pytest.mark.parametrize("case", CASES)
def test_a_gate_multiplies_what_the_method_says(case):
    encoder, inputs = make_encoder(case), make_batch(case)
    torch.manual_seed(3)
    block = MHEXBlock(32, 3)
    adapter = adapter_for(encoder.config)
    rest = dict.fromkeys(("inputs_embeds", "token_type_ids", "position_ids"))
    mask = inputs["attention_mask"]
    with torch.no_grad():
        hidden, context = adapter.embed(encoder, **{**rest, **inputs})
        hidden, _ = adapter.run_layer(encoder, 0, hidden, context, None, None)
        x, r = adapter.attend(encoder, 1, hidden, context)
        result, output = adapter.run_layer(encoder, 1, hidden, context, block, mask)
        pooled = torch.stack([total[real.bool()].mean(dim=0) for total, real in zip(x + r, mask, strict=True)])
        h = torch.relu(pooled) @ block.gate.weight.T
        gate = torch.sigmoid(h)[:, None]
        if isinstance(adapter, PostNormAdapter):
            read, expected = x + r, adapter.tail(encoder, 1)[1](gate * (x + r))
        else:
            read, expected = r + gate * x, r + gate * x
    assert_close(output.hidden, h)
    assert_close(output.logits, h @ block.head.weight.T)
    assert_close(output.activation, read)
    assert_close(result, expected)


@pytest.mark.parametrize("case", CASES)
def test_dropout_in_training_is_the_encoders_own(case):
    encoder, inputs = make_encoder(case), {"input_ids": make_batch(case, lengths=(6, 6))["input_ids"]}
    encoder.train()
    torch.manual_seed(5)
    expected = encoder(**inputs).last_hidden_state
    torch.manual_seed(5)
    ours = last_of(encoder, run(encoder, inputs)[0])
    assert_close(ours, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_embeddings_positions_and_segments_are_handed_on(case):
    encoder = make_encoder(case)
    ids = make_batch(case, lengths=(6, 6))["input_ids"]
    embedded = {"inputs_embeds": encoder.get_input_embeddings()(ids).detach()}
    with torch.no_grad():
        plain = run(encoder, {"input_ids": ids})[0][-1]
        assert_close(run(encoder, embedded)[0][-1], encoder_states(encoder, embedded), rtol=1e-6, atol=1e-6)
        if case.startswith("deberta"):
            return  # its positions are relative
        moved = {"input_ids": ids, "position_ids": torch.arange(8, 2, -1)[None].expand(2, 6)}
        assert not torch.allclose(run(encoder, moved)[0][-1], plain)
        if getattr(encoder.config, "type_vocab_size", 0) > 1:
            segments = {"input_ids": ids, "token_type_ids": torch.tensor([[0, 0, 0, 1, 1, 1]] * 2)}
            assert_close(run(encoder, segments)[0][-1], encoder_states(encoder, segments), rtol=1e-6, atol=1e-6)
            assert not torch.allclose(run(encoder, segments)[0][-1], plain)


def encoder_states(encoder, inputs):
    """The last layer's output before any final normalisation: run against the encoder by undoing nothing."""
    if not hasattr(encoder, "final_norm"):
        return encoder(**inputs).last_hidden_state
    kept, encoder.final_norm = encoder.final_norm, nn.Identity()
    try:
        return encoder(**inputs).last_hidden_state
    finally:
        encoder.final_norm = kept


@pytest.mark.parametrize(("case", "attention"), BOTH)
def test_a_text_without_a_real_token_is_finite_and_disturbs_no_other(case, attention):
    encoder, inputs = make_encoder(case, attention=attention), make_batch(case)
    inputs["attention_mask"][1] = 0
    blocks = [MHEXBlock(32, 3) for _ in range(3)]
    with torch.no_grad():
        states, outputs = run(encoder, inputs, blocks)
        _, expected = run(encoder, {name: value[[0, 2, 3]] for name, value in inputs.items()}, blocks)
    assert torch.isfinite(states[-1]).all()
    for ours, theirs in zip(outputs, expected, strict=True):
        assert (ours.hidden[1] == 0).all()
        assert_close(ours.logits[[0, 2, 3]], theirs.logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", ["flash_attention_2", "flex_attention"])
@pytest.mark.parametrize("case", ["bert", "distilbert", "modernbert"])
def test_another_attention_is_refused(case, form):
    encoder = make_encoder(case)
    encoder.config._attn_implementation_internal = form
    with pytest.raises(ValueError, match=r"attn_implementation must be one of 'eager', 'sdpa'.*" + form):
        run(encoder, make_batch(case))
    with pytest.raises(ValueError, match="attn_implementation"):
        run(encoder, {"input_ids": make_batch(case)["input_ids"]}) if case == "modernbert" else key_mask(
            encoder, torch.zeros(1, 1, 32), None
        )


def test_the_supported_architectures_are_listed_sorted():
    listed = supported_encoders()
    assert isinstance(listed, tuple)
    assert list(listed) == sorted(listed)
    assert {"bert", "roberta", "electra", "distilbert", "deberta-v2", "modernbert"} <= set(listed)


@pytest.mark.parametrize("config", [AutoConfig.for_model("gpt2"), object()], ids=["gpt2", "nothing"])
def test_an_unsupported_architecture_is_told_what_is_and_how_to_add_it(config):
    with pytest.raises(ValueError, match=r"bert.*modernbert.*register_adapter"):
        adapter_for(config)


def test_what_would_be_computed_differently_is_refused():
    with pytest.raises(ValueError, match="is_decoder=True"):
        MHEXTextConfig(make_config("bert", is_decoder=True))
    config = make_config("bert")
    config.position_embedding_type = "relative_key"
    with pytest.raises(ValueError, match="position_embedding_type must be 'absolute', got 'relative_key'"):
        MHEXTextConfig(config)


def test_the_documented_example_runs_as_it_stands(registry):
    text = mhex_text.adapters.__doc__
    example = text[text.index("    from mhex_text") : text.index("An encoder that normalises before")]
    assert len(example.strip().splitlines()) < 30
    exec("\n".join(line[4:] for line in example.splitlines()), {})
    assert "bert-generation" in supported_encoders()
    settings = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = AutoConfig.for_model("bert-generation", intermediate_size=40, max_position_embeddings=40, **settings)
    encoder = AutoModel.from_config(config).eval()
    inputs = make_batch()
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        states, _ = run(encoder, inputs)
        assert_close(states[-1][real], encoder(**inputs).last_hidden_state[real], rtol=1e-6, atol=1e-6)
        output = MHEXForSequenceClassification.from_encoder(encoder, 3)(**inputs, output_activations=True)
    assert output.logits.shape == (4, 3)
    assert len(output.activations) == 2


class OwnConfig(BertConfig):
    model_type = "own-pre-norm"


class OwnEncoder(PreTrainedModel):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.words = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(nn.Linear(config.hidden_size, config.hidden_size) for _ in range(2))
        self.post_init()

    def get_input_embeddings(self):
        return self.words

    def forward(self, input_ids):
        hidden = self.words(input_ids)
        for layer in self.layers:
            hidden = hidden + layer(hidden)
        return hidden


class OwnAdapter(PreNormAdapter):
    def depth(self, config):
        return 2

    def embed(self, encoder, *, input_ids, **rest):
        return encoder.words(input_ids), ()

    def attend(self, encoder, index, hidden, context):
        return hidden, encoder.layers[index](hidden)


def test_an_architecture_of_ones_own_takes_an_adapter_and_the_auto_classes(registry, tmp_path):
    AutoConfig.register("own-pre-norm", OwnConfig, exist_ok=True)
    AutoModel.register(OwnConfig, OwnEncoder, exist_ok=True)
    register_adapter("own-pre-norm", OwnAdapter())
    encoder = OwnEncoder(OwnConfig(vocab_size=60, hidden_size=32)).eval()
    inputs = make_batch()
    assert_close(run(encoder, inputs)[0][-1], encoder(inputs["input_ids"]))
    model = MHEXForSequenceClassification.from_encoder(encoder, 3)
    model.save_pretrained(tmp_path)
    loaded = MHEXForSequenceClassification.from_pretrained(tmp_path)
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)


def test_registering_is_checked(registry):
    adapter = OwnAdapter()
    with pytest.raises(TypeError, match="model_type must be a string, got int"):
        register_adapter(3, adapter)
    with pytest.raises(TypeError, match="adapter must be an object of a class derived from Adapter"):
        register_adapter("own", OwnAdapter)
    with pytest.raises(TypeError, match="replace must be a bool, got int"):
        register_adapter("own", adapter, replace=1)
    with pytest.raises(ValueError, match="model_type must be new, got 'bert'"):
        register_adapter("bert", adapter)
    register_adapter("bert", adapter, replace=True)
    assert adapter_for(make_config("bert")) is adapter
    with pytest.raises(TypeError, match="abstract"):
        Adapter()
