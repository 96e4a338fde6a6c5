"""Explainers of vision transformers: every family, every option, against slow second implementations."""

import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from torch.testing import assert_close

from mhex_core.attention import shapley_enumerated
from mhex_vision import MHEXClassifier, PlainClassifier, Preprocessing
from mhex_vision.concepts import mean_embedding
from mhex_vision.explainers import explainer, parse
from mhex_vision.explainers.cdam import CDAM
from mhex_vision.vit import capture

SPECS = (
    *("cdam", "cdam:mode=smooth,steps=3", "cdam:mode=integrated,steps=4", "cdam:mode=integrated_complete,steps=3"),
    *("cdam:mode=smooth,steps=3,perturb_at=attention_input", "gmar", "gmar:norm=l2,residual=0.2", "attention"),
    *("attention-rollout", "attention-rollout:start=1", "attention-flow:grid=2", "attention-gradcam"),
    *("attention-shapley", "attention-shapley:game=max_mutual,gradient=false", "attention-shapley:game=cls"),
    *("attcat", "generic-relevance", "grad-sam", "vit-cx:distance=0.5"),
)
SIGNED = ("cdam", "attcat", "attention-shapley")
TARGETS = torch.tensor([0, 3, 1])


def made(spec):
    if spec.startswith("vit-cx"):
        pytest.importorskip("sklearn")
    if spec.startswith("attention-flow"):
        pytest.importorskip("scipy")
    return parse(spec)


@pytest.mark.parametrize("spec", SPECS)
def test_every_method_on_every_family(make_vit, images, family, spec):
    model, explain = make_vit(family), made(spec)
    maps = explain(model, images, TARGETS)
    assert maps.shape == (3, 28, 28)
    assert maps.dtype == torch.float32
    assert maps.isfinite().all()
    assert not maps.requires_grad
    assert (maps.flatten(1).amax(dim=1) > maps.flatten(1).amin(dim=1)).any()
    if not spec.startswith(SIGNED):
        assert maps.amin() >= 0 or spec.startswith("vit-cx")
    apart = torch.cat(
        [explain(model, image[None], target[None]) for image, target in zip(images, TARGETS, strict=True)]
    )
    assert_close(maps, apart, rtol=1e-4, atol=1e-5 * float(maps.abs().max()))


@pytest.mark.parametrize("spec", SPECS)
def test_classifiers_with_and_without_blocks_are_explained(make_vit, images, spec):
    explain = made(spec)
    plain = make_vit("timm")
    of_heads = MHEXClassifier.from_backbone(plain, 5, objective="joint").eval()
    on_frozen = MHEXClassifier.from_backbone(plain, 5, freeze_backbone=True, gate=False, classifier="keep").eval()
    assert explain(of_heads, images, TARGETS).isfinite().all()
    same = explain(on_frozen, images, TARGETS)
    assert_close(same, explain(plain, images, TARGETS), rtol=1e-4, atol=1e-5 * float(same.abs().max()))


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("fault", ["target", "channels", None])
def test_the_model_is_left_as_it_was(make_vit, images, spec, fault):
    model, explain = make_vit("DINOv2" if fault is None else "timm").train(), made(spec)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    given = images[:, :2] if fault == "channels" else images
    targets = torch.tensor([0, 5, 1]) if fault == "target" else TARGETS
    with torch.inference_mode():
        if fault is None:
            assert explain(model, given, targets).isfinite().all()
        else:
            with pytest.raises((ValueError, RuntimeError)) as caught:
                explain(model, given, targets)
            if fault == "target":
                assert "[0, 4]" in str(caught.value)
    for module in model.modules():
        assert module.training
        assert not any(getattr(module, name) for name in vars(module) if name.endswith("_hooks"))
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("spec", SPECS)
def test_networks_without_tokens_are_refused(make_classifier, make_images, spec):
    with pytest.raises(ValueError, match="vision transformer"):
        made(spec)(make_classifier(), make_images(2), torch.tensor([0, 1]))


@pytest.mark.parametrize("spec", ["cdam", "gmar", "attcat", "attention-flow:grid=3", "vit-cx"])
def test_images_need_not_be_square(make_vit, make_images, spec):
    maps = made(spec)(make_vit("timm, any size"), make_images(2, (28, 42)), torch.tensor([0, 1]))
    assert maps.shape == (2, 28, 42)


# ------------------------------------------------------------------------------------------------ what they compute


def attended(model, images, targets):
    """Attention (B, H, n, n) of every block, its gradient, and the shares that tokens are read with, in float64."""
    seen = capture(model, images)
    gradients = seen.gradients(targets, seen.attentions)
    return seen, [a.detach().double() for a in seen.attentions], [g.double() for g in gradients]


def as_pixels(scores, seen):
    maps = torch.zeros(len(scores), *seen.grid, dtype=scores.dtype)
    for patch in range(seen.grid[0] * seen.grid[1]):
        maps[:, patch // seen.grid[1], patch % seen.grid[1]] = scores[:, seen.prefix + patch]
    return F.interpolate(maps[:, None], (28, 28), mode="bilinear", align_corners=False)[:, 0].float()


def test_rollout_and_gmar_are_products_of_matrices(make_vit, images, family):
    model = make_vit(family)
    seen, attentions, gradients = attended(model, images, TARGETS)
    identity = torch.eye(attentions[0].shape[2], dtype=torch.float64)
    for spec, norm, alpha in (("attention-rollout", None, 1), ("gmar", 1, 1), ("gmar:norm=l2,residual=0.75", 2, 3)):
        expected = []
        for row in range(3):
            rolled = identity
            for attention, gradient in zip(attentions, gradients, strict=True):
                heads = attention.shape[1]
                sizes = [1.0 if norm is None else float(gradient[row, h].norm(p=norm)) for h in range(heads)]
                mixed = sum(size / sum(sizes) * attention[row, h] for h, size in enumerate(sizes)) + alpha * identity
                rolled = (mixed / mixed.sum(dim=1, keepdim=True)) @ rolled
            expected.append(seen.readout.double() @ rolled)
        assert_close(parse(spec)(model, images, TARGETS), as_pixels(torch.stack(expected), seen), rtol=1e-4, atol=1e-6)


def test_patches_play_the_game_that_attention_defines(make_vit, images, some_family):
    model = make_vit(some_family)
    seen, attentions, gradients = attended(model, images, TARGETS)
    matrix = torch.stack([(a * g.clamp(min=0)).mean(dim=1) for a, g in zip(attentions, gradients, strict=True)])
    matrix = matrix.mean(dim=0)[:, seen.prefix :, seen.prefix :]

    def worth(coalitions, row):
        sides = coalitions.double()
        pairs = torch.einsum("ni,ij,nj->n", sides, matrix[row] - torch.diag(matrix[row].diagonal()), sides)
        alone = sides @ matrix[row].diagonal()
        return torch.where(sides.sum(dim=1) == 1, alone, pairs)

    expected = torch.zeros(3, len(seen.readout), dtype=torch.float64)
    for row in range(3):
        expected[row, seen.prefix :] = shapley_enumerated(lambda c, row=row: worth(c, row), matrix.shape[1])
    found = parse("attention-shapley")(model, images, TARGETS)
    assert_close(found, as_pixels(expected, seen), rtol=1e-4, atol=1e-5 * float(found.abs().max()))


def test_rules_that_multiply_attention_by_its_gradient(make_vit, images, family):
    model = make_vit(family)
    seen, attentions, gradients = attended(model, images, TARGETS)
    readout, heads, blocks = seen.readout.double(), attentions[0].shape[1], len(attentions)
    relevance = torch.eye(len(readout), dtype=torch.float64).repeat(3, 1, 1)
    sam = torch.zeros(3, len(readout), dtype=torch.float64)
    for attention, gradient in zip(attentions, gradients, strict=True):
        relevance = relevance + (attention * gradient).clamp(min=0).mean(dim=1) @ relevance
        sam += (attention * gradient.clamp(min=0)).sum(dim=(1, 3)) / (blocks * heads * len(readout))
    found = parse("generic-relevance")(model, images, TARGETS)
    assert_close(found, as_pixels(readout @ relevance, seen), rtol=1e-4, atol=1e-6)
    found = parse("grad-sam")(model, images, TARGETS)
    assert_close(found, as_pixels(sam, seen), rtol=1e-4, atol=1e-6 * float(found.abs().max()))


def test_attention_gradcam_weighs_the_last_heads(make_vit, images):
    model = make_vit("timm, registers")
    seen, attentions, gradients = attended(model, images, TARGETS)
    expected = torch.zeros(3, attentions[0].shape[1], attentions[0].shape[3], dtype=torch.float64)
    for head in range(expected.shape[1]):
        weight = gradients[-1][:, head, 0, seen.prefix :].mean(dim=1)
        expected[:, head] = weight[:, None] * attentions[-1][:, head, 0]
    expected = expected.mean(dim=1).clamp(min=0)
    found = parse("attention-gradcam")(model, images, TARGETS)
    assert_close(found, as_pixels(expected, seen), rtol=1e-4, atol=1e-6 * float(found.max()))


def test_attcat_reads_behind_the_norm(make_vit, images):
    model = make_vit("ViT")
    seen, attentions, _ = attended(model, images, TARGETS)
    gradients = seen.gradients(TARGETS, seen.normed)
    expected = torch.zeros(3, len(seen.readout), dtype=torch.float64)
    for normed, gradient, attention in zip(seen.normed, gradients, attentions, strict=True):
        expected += attention.mean(dim=(1, 2)) * (normed.detach() * gradient).double().sum(dim=2)
    found = parse("attcat")(model, images, TARGETS)
    assert_close(found, as_pixels(expected, seen), rtol=1e-4, atol=1e-5 * float(found.abs().max()))


def test_flow_on_single_patches_needs_no_groups(make_vit, images):
    pytest.importorskip("scipy")
    model = make_vit("torchvision")
    seen, attentions, _ = attended(model, images, TARGETS)
    from mhex_core.attention import attention_flow

    expected = attention_flow(attentions, queries=[0])[:, 0]
    found = parse("attention-flow:grid=4")(model, images, TARGETS)  # its patch grid is 4 x 4
    assert_close(found, as_pixels(expected, seen), rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------------------- cdam


def test_cdam_is_input_times_gradient_behind_the_last_norm(make_vit, images, family):
    model = make_vit(family)
    seen = capture(model, images)
    scores = []
    for row in range(3):
        one = capture(model, images[row : row + 1])
        (slope,) = torch.autograd.grad(one.logits[0, TARGETS[row]], one.normed[-1])
        scores.append((slope * one.normed[-1]).sum(dim=2)[0].detach())
    found = parse("cdam")(model, images, TARGETS)
    assert_close(found, as_pixels(torch.stack(scores), seen), rtol=1e-3, atol=1e-5 * float(found.abs().max()))


def test_several_targets_at_once_are_those_one_by_one(make_vit, images, some_family):
    model = make_vit(some_family)
    targets = torch.tensor([[0, 1], [2, 2], [4, 0]])
    for mode in ("vanilla", "smooth", "integrated_complete"):
        explain = CDAM(mode=mode, steps=3)
        together = explain.several(model, images, targets)
        assert together.shape == (3, 2, 28, 28)
        apart = torch.stack([explain(model, images, column) for column in targets.unbind(dim=1)], dim=1)
        assert_close(together, apart, rtol=1e-4, atol=1e-6 * float(together.abs().max()))
        assert_close(together[1, 0], together[1, 1])


def test_the_complete_variant_adds_up(make_vit, images, some_family):
    model = make_vit(some_family).double()
    images = images.double()
    seen = capture(model, images, graph=False)
    rows = torch.arange(3)
    change = seen.logits - seen.tail.logits(seen.inputs[-1], torch.zeros_like(seen.normed[-1]), rows)
    # Prefix tokens have their share, which no map shows; so all tokens are asked of the numerics themselves.
    from mhex_core.attention import cdam

    scores = cdam(
        seen.inputs[-1],
        seen.tail.normalize,
        seen.tail.logits,
        TARGETS.unsqueeze(1),
        mode="integrated_complete",
        steps=400,
    )
    assert_close(scores[:, 0].sum(dim=1), change[rows, TARGETS], rtol=1e-4, atol=1e-5)
    found = CDAM(mode="integrated_complete", steps=400, upsample="nearest")(model, images, TARGETS)
    assert_close(found[:, ::7, ::7].flatten(1), scores[:, 0, seen.prefix :].float(), rtol=1e-4, atol=1e-6)


def test_a_concept_takes_the_place_of_the_logit(make_vit, images, make_images, some_family):
    model = make_vit(some_family)
    shown = make_images(5, (28, 28), seed=7)
    latent = mean_embedding(model, shown, batch_size=2)
    features = capture(model, shown, graph=False).features
    assert_close(latent, features.mean(dim=0), rtol=1e-4, atol=1e-5)
    seen = capture(model, images)
    (slope,) = torch.autograd.grad((seen.features @ latent).sum(), seen.normed[-1])
    expected = as_pixels((slope * seen.normed[-1]).sum(dim=2).detach(), seen)
    found = CDAM(concept=latent)(model, images, TARGETS)
    assert_close(found, expected, rtol=1e-3, atol=1e-5 * float(found.abs().max()))
    assert_close(found, CDAM(concept=latent)(model, images, TARGETS.flip(0)))  # whatever the target


def test_a_concept_may_be_a_folder_of_images(make_vit, images, tmp_path):
    model = PlainClassifier.from_name("timm/vit_tiny_patch16_224:img_size=28,patch_size=7,depth=2", 5)
    model = model.with_metadata(preprocessing=Preprocessing(size=28)).eval()
    pixels = torch.randint(0, 256, (3, 28, 28, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for index, picture in enumerate(pixels):
        Image.fromarray(picture.numpy()).save(tmp_path / f"{index}.png")
    prepared = model.config.preprocessing.normalize(pixels.permute(0, 3, 1, 2))
    expected = CDAM(concept=mean_embedding(model, prepared))(model, images, TARGETS)
    explain = parse(f"cdam:concept={tmp_path}")
    assert_close(explain(model, images, TARGETS), expected, rtol=1e-4, atol=1e-6)
    for path in tmp_path.iterdir():
        path.unlink()
    assert_close(explain(model, images, TARGETS), expected, rtol=1e-4, atol=1e-6)  # read once for a model
    with pytest.raises(FileNotFoundError, match="holds none"):
        parse(f"cdam:concept={tmp_path}")(model, images, TARGETS)
    with pytest.raises(ValueError, match="does not say how its images are prepared"):
        parse(f"cdam:concept={tmp_path}")(make_vit("timm"), images, TARGETS)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"mode": "rough"}, ValueError, "mode must be one of"),
        ({"steps": 0}, ValueError, "steps must be at least 1"),
        ({"noise": 0.1}, ValueError, "noise belongs to modes"),
        ({"mode": "smooth", "noise": -1}, ValueError, "noise must be at least 0"),
        ({"perturb_at": "image"}, ValueError, "perturb_at must be one of"),
        ({"seed": 1.5}, TypeError, "seed must be an int"),
        ({"concept": "nowhere"}, FileNotFoundError, "concept must be a tensor or a folder"),
        ({"concept": torch.zeros(2, 3)}, ValueError, "concept must have 1 dimensions"),
        ({"concept": 3}, TypeError, "concept must be a tensor or a folder"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1"),
        ({"upsample": "cubic"}, ValueError, "upsample must be one of"),
        ({"colour": "red"}, ValueError, "options of cdam must be among: mode, .*upsample; got colour"),
    ],
)
def test_cdam_names_what_is_wrong(options, error, words):
    with pytest.raises(error, match=words):
        explainer("cdam", **options)


def test_concepts_need_the_classifier_they_are_compared_with(make_vit, images):
    dropped = MHEXClassifier.from_backbone(make_vit("timm"), 5).eval()
    with pytest.raises(ValueError, match="classifier was dropped"):
        CDAM(concept=torch.zeros(24))(dropped, images, TARGETS)
    with pytest.raises(ValueError, match="classifier was dropped"):
        mean_embedding(dropped, images)
    with pytest.raises(ValueError, match=r"concept must have shape \(24,\), got \(7,\)"):
        CDAM(concept=torch.zeros(7))(make_vit("timm"), images, TARGETS)


# ----------------------------------------------------------------------------------------------- vit-cx, Grad-CAM


def test_vit_cx_is_the_mean_effect_of_its_masks(make_vit, images):
    cluster = pytest.importorskip("sklearn.cluster")
    model = make_vit("timm")
    seen = capture(model, images, graph=False)
    expected = []
    for row in range(3):
        features = seen.normed[-1][row, seen.prefix :].detach().T.reshape(1, -1, *seen.grid)
        masks = F.interpolate(features, (28, 28), mode="bilinear", align_corners=False)[0]
        masks = torch.stack([(mask - mask.min()) / (mask.max() - mask.min()) for mask in masks])
        similar = F.cosine_similarity(masks.flatten(1)[:, None], masks.flatten(1)[None], dim=2)
        apart = (1 - similar).clamp(min=0).fill_diagonal_(0)
        labels = cluster.AgglomerativeClustering(
            n_clusters=None, metric="precomputed", linkage="complete", distance_threshold=0.1
        ).fit_predict(apart.numpy())
        joined = [
            sum(mask for mask, own in zip(masks, labels, strict=True) if own == label) for label in sorted(set(labels))
        ]
        joined = [(mask - mask.min()) / (mask.max() - mask.min()) for mask in joined]
        assert 1 < len(joined) < len(masks)
        generator = torch.Generator().manual_seed(3)
        total = torch.zeros(28, 28)
        with torch.no_grad():
            chance = model(images[row : row + 1]).softmax(dim=1)[0, TARGETS[row]]
            for mask in joined:
                noise = 0.1 * torch.randn((3, 28, 28), generator=generator) * (1 - mask)
                masked = model((images[row] * mask + noise)[None]).softmax(dim=1)[0, TARGETS[row]]
                noisy = model((images[row] + noise)[None]).softmax(dim=1)[0, TARGETS[row]]
                total += (masked - noisy + chance) * mask
        expected.append(total / sum(joined) / len(joined))
    found = explainer("vit-cx", distance=0.1, seed=3, batch_size=2)(model, images, TARGETS)
    assert_close(found, torch.stack(expected), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("block", [None, 1])
def test_grad_cam_reads_the_normalised_patches(make_vit, images, some_family, block):
    pytest.importorskip("pytorch_grad_cam")
    model = make_vit(some_family)
    seen = capture(model, images)
    index = -1 if block is None else block
    (gradient,) = seen.gradients(TARGETS, [seen.normed[index]])
    weights = seen.maps(gradient.transpose(1, 2)).mean(dim=(2, 3), keepdim=True)
    expected = (weights * seen.maps(seen.normed[index].detach().transpose(1, 2))).sum(dim=1).clamp(min=0)
    expected = expected - expected.amin(dim=(1, 2), keepdim=True)
    expected = expected / (expected.amax(dim=(1, 2), keepdim=True) + 1e-7)
    from mhex_vision.vit.tapped import block_names

    layer = None if block is None else block_names(model)[block]
    found = explainer("gradcam", layer=layer)(model, images, TARGETS)
    # The library enlarges its maps by OpenCV, which puts pixels where torch's bilinear does, up to rounding.
    pixels = F.interpolate(expected[:, None], (28, 28), mode="bilinear", align_corners=False)[:, 0]
    pixels = (pixels - pixels.amin(dim=(1, 2), keepdim=True)) / (
        pixels.amax(dim=(1, 2), keepdim=True) - pixels.amin(dim=(1, 2), keepdim=True) + 1e-7
    )
    assert (found - pixels).abs().max() < 0.05
    assert found.amax() > 0.9


def test_a_layer_of_a_vision_transformer_is_one_of_its_blocks(make_vit, images):
    pytest.importorskip("pytorch_grad_cam")
    with pytest.raises(ValueError, match=r"layer must be one of blocks.0, blocks.1, blocks.2, got 'norm'"):
        explainer("gradcam", layer="norm")(make_vit("timm"), images, TARGETS)
