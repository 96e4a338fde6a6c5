"""Small vision transformers of every family, with weights that show."""

from __future__ import annotations

import pytest
import torch

SIZE = 28


def torchvision_model(classes=5, **options):
    from torchvision.models.vision_transformer import VisionTransformer

    return VisionTransformer(SIZE, 7, 3, 4, 24, 48, num_classes=classes, **options)


def timm_model(classes=5, *, distilled=False, **options):
    pytest.importorskip("timm")
    from timm.models.deit import VisionTransformerDistilled
    from timm.models.vision_transformer import VisionTransformer

    kind = VisionTransformerDistilled if distilled else VisionTransformer
    wanted = {"img_size": SIZE, "patch_size": 7, "embed_dim": 24, "depth": 3, "num_heads": 4, "mlp_ratio": 2}
    return kind(num_classes=classes, **(wanted | options))


def eva_model(classes=5, **options):
    pytest.importorskip("timm")
    from timm.models.eva import Eva

    wanted = {"img_size": SIZE, "patch_size": 7, "embed_dim": 24, "depth": 3, "num_heads": 3, "mlp_ratio": 2}
    return Eva(num_classes=classes, **(wanted | options))


def beit_model(classes=5, **options):
    pytest.importorskip("timm")
    from timm.models.beit import Beit

    return Beit(
        img_size=SIZE, patch_size=7, embed_dim=24, depth=3, num_heads=4, mlp_ratio=2, num_classes=classes, **options
    )


def huggingface_model(name, classes=5, **options):
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{name.partition('For')[0]}Config")(
        image_size=SIZE,
        patch_size=7,
        hidden_size=24,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=48,
        mlp_ratio=2,
        num_labels=classes,
        **options,
    )
    return getattr(transformers, name)(config)


FAMILIES = {
    "torchvision": torchvision_model,
    "torchvision, two-layer head": lambda classes=5: torchvision_model(classes, representation_size=8),
    "timm": timm_model,
    "timm, every option": lambda classes=5: timm_model(
        classes, qk_norm=True, scale_attn_norm=True, init_values=0.5, pre_norm=True, no_embed_class=True
    ),
    "timm, registers": lambda classes=5: timm_model(classes, reg_tokens=4, init_values=0.5, no_embed_class=True),
    "timm, averaged": lambda classes=5: timm_model(classes, global_pool="avg"),
    "timm, no prefix": lambda classes=5: timm_model(classes, global_pool="avg", class_token=False),
    "timm, any size": lambda classes=5: timm_model(classes, dynamic_img_size=True),
    "timm, distilled": lambda classes=5: timm_model(classes, distilled=True),
    "EVA-02": lambda classes=5: eva_model(
        classes, use_rot_pos_emb=True, qkv_fused=False, swiglu_mlp=True, scale_mlp=True, scale_attn_inner=True
    ),
    "EVA": lambda classes=5: eva_model(classes, global_pool="token", init_values=0.5),
    "DINOv3": lambda classes=5: eva_model(
        classes,
        use_rot_pos_emb=True,
        use_abs_pos_emb=False,
        rope_type="dinov3",
        rope_rotate_half=True,
        num_reg_tokens=4,
        init_values=0.5,
        dynamic_img_size=True,
        qkv_bias=False,
        use_fc_norm=False,
    ),
    "ViT with mixed rotations": lambda classes=5: eva_model(
        classes, use_rot_pos_emb=True, rope_type="mixed", attn_type="rope", class_token=False, no_embed_class=True
    ),
    "BEiT": lambda classes=5: beit_model(classes, use_rel_pos_bias=True, init_values=0.5),
    "BEiT, shared places": lambda classes=5: beit_model(
        classes, use_shared_rel_pos_bias=True, use_abs_pos_emb=True, global_pool="token"
    ),
    "ViT": lambda classes=5: huggingface_model("ViTForImageClassification", classes),
    "DeiT": lambda classes=5: huggingface_model("DeiTForImageClassification", classes),
    "DeiT with teacher": lambda classes=5: huggingface_model("DeiTForImageClassificationWithTeacher", classes),
    "DINOv2": lambda classes=5: huggingface_model("Dinov2ForImageClassification", classes, use_swiglu_ffn=True),
    "DINOv2 with registers": lambda classes=5: huggingface_model(
        "Dinov2WithRegistersForImageClassification", classes, num_register_tokens=2
    ),
}
PREFIXES = {"timm, registers": 5, "timm, no prefix": 0, "timm, distilled": 2, "DeiT": 2, "DeiT with teacher": 2}
PREFIXES |= {"DINOv2 with registers": 3, "DINOv3": 5, "ViT with mixed rotations": 0}
ROTATED = {"EVA", "EVA-02", "DINOv3", "ViT with mixed rotations"}
AVERAGED = {
    *("EVA-02", "DINOv3", "ViT with mixed rotations", "BEiT"),
    "timm, averaged",
    "timm, no prefix",
    "DINOv2",
    "DINOv2 with registers",
}
ANY_SIZE = {"DINOv3"} | {"timm, any size", "ViT", "DeiT", "DeiT with teacher", "DINOv2", "DINOv2 with registers"}


def shaken(model, seed=0):
    """The model with weights that no layer hides."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture(scope="session")
def make_vit():
    """A small vision transformer in evaluation mode, by the name of its family."""

    def make(family, classes=5, *, seed=0):
        torch.manual_seed(seed)
        return shaken(FAMILIES[family](classes), seed).eval()

    return make


@pytest.fixture(params=list(FAMILIES))
def family(request):
    """The name of each family."""
    return request.param


@pytest.fixture(params=["torchvision", "timm, registers", "DINOv2"])
def some_family(request):
    """One family of each library."""
    return request.param


@pytest.fixture(scope="session")
def own_logits():
    """What a model says when it runs itself."""

    def own(model, images):
        asks = hasattr(model, "vit") or hasattr(model, "deit")
        options = {"interpolate_pos_encoding": tuple(images.shape[2:]) != (SIZE, SIZE)} if asks else {}
        result = model(images, **options)
        return getattr(result, "logits", result)

    return own


@pytest.fixture(scope="session")
def heads_of():
    """How many heads the attention has; those that are rotated need an even quarter of their width."""
    return lambda family: 3 if family in ROTATED else 4


@pytest.fixture(scope="session")
def prefix_of():
    """How many tokens precede the patches."""
    return lambda family: PREFIXES.get(family, 1)


@pytest.fixture(scope="session")
def reads_patches():
    """Whether the classifier of a family averages over patches."""
    return lambda family: family in AVERAGED


@pytest.fixture(scope="session")
def takes_any_size():
    """Whether a family's model takes images of other sizes than its own."""
    return lambda family: family in ANY_SIZE


@pytest.fixture
def images(make_images):
    """Three images of the models' own size."""
    return make_images(3, (SIZE, SIZE))
