"""Encoders of every supported family, small enough to build in milliseconds."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoConfig, AutoModel, PreTrainedTokenizerFast
from transformers.models.auto.modeling_auto import MODEL_MAPPING

SIZES = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 40}
DISTILBERT = {"vocab_size": 60, "dim": 32, "n_layers": 3, "n_heads": 2, "hidden_dim": 40, "max_position_embeddings": 40}
DEBERTA = {**SIZES, "max_position_embeddings": 40, "relative_attention": True, "max_relative_positions": -1}
DEBERTA |= {"pos_att_type": ["p2c", "c2p"], "norm_rel_ebd": "layer_norm", "position_biased_input": False}
DEBERTA |= {"share_att_key": True, "position_buckets": 6, "type_vocab_size": 0}

# Name of the case: model type and settings.
CASES = {
    "bert": ("bert", {**SIZES, "max_position_embeddings": 40}),
    "roberta": ("roberta", {**SIZES, "max_position_embeddings": 40, "pad_token_id": 1, "type_vocab_size": 1}),
    "xlm-roberta": ("xlm-roberta", {**SIZES, "max_position_embeddings": 40, "pad_token_id": 1, "type_vocab_size": 1}),
    "electra": ("electra", {**SIZES, "embedding_size": 24, "max_position_embeddings": 40}),
    "distilbert": ("distilbert", DISTILBERT),
    "deberta-v2": ("deberta-v2", DEBERTA),
    "deberta-v2 with convolution": ("deberta-v2", {**DEBERTA, "conv_kernel_size": 3, "conv_act": "gelu"}),
    "deberta-v2 with both projections": ("deberta-v2", {**DEBERTA, "share_att_key": False, "type_vocab_size": 2}),
    "modernbert": (
        "modernbert",
        {
            **SIZES,
            "max_position_embeddings": 40,
            "local_attention": 4,
            "global_attn_every_n_layers": 2,
            "pad_token_id": 0,
            "bos_token_id": 2,
            "eos_token_id": 3,
            "cls_token_id": 2,
            "sep_token_id": 3,
        },
    ),
}
LENGTHS = (9, 5, 1, 12)


def make_config(case, **changes):
    model_type, settings = CASES[case]
    return AutoConfig.for_model(model_type, **{**settings, **changes})


def make_encoder(case="bert", *, attention=None, seed=0, **changes):
    """An encoder whose weights are large enough for every part of it to be felt."""
    torch.manual_seed(seed)
    chosen = {} if attention is None else {"attn_implementation": attention}
    encoder = AutoModel.from_config(make_config(case, **changes), **chosen).eval()
    with torch.no_grad():
        for name, weight in encoder.named_parameters():
            if weight.ndim > 1:
                weight.normal_(std=0.2)
            elif "norm" not in name.lower():
                weight.normal_(std=0.1)
    return encoder


def make_batch(case="bert", *, lengths=LENGTHS, seed=1):
    """Texts of these lengths, padded on the right, as a tokenizer returns them."""
    padding = make_config(case).pad_token_id or 0
    generator = torch.Generator().manual_seed(seed)
    longest = max(lengths)
    ids = torch.randint(4, 60, (len(lengths), longest), generator=generator)
    mask = (torch.arange(longest)[None] < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": torch.where(mask.bool(), ids, padding), "attention_mask": mask}


def attentions(case):
    """Those the library has for this family; in transformers 4 fewer."""
    return ("eager", "sdpa") if MODEL_MAPPING[type(make_config(case))]._supports_sdpa else ("eager",)


BOTH = [(case, attention) for case in CASES for attention in attentions(case)]


def make_tokenizer(words):
    """BERT's tokenizer with a vocabulary of these words and word pieces."""
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *words]
    core = Tokenizer(models.WordPiece({word: index for index, word in enumerate(vocabulary)}, unk_token="[UNK]"))
    core.normalizer = normalizers.BertNormalizer()
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )
