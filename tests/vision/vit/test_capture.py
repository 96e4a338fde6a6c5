"""One forward pass hands out what enters the blocks and what they attend to, and leaves the model alone."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from mhex_vision import MHEXClassifier, PlainClassifier
from mhex_vision.plain import PlainConfig
from mhex_vision.vit import architecture_of, capture


def everything(model):
    """What could be switched or left behind on a model."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    modules = [
        (name, module.training, sorted(vars(module)), [len(getattr(module, kind)) for kind in kinds])
        for name, module in model.named_modules()
    ]
    fused = [getattr(module, "fused_attn", None) for module in model.modules()]
    forms = [getattr(getattr(module, "config", None), "_attn_implementation", None) for module in model.modules()]
    grads = [(id(p), p.requires_grad, p.grad is None, p._version) for p in model.parameters()]
    return modules, fused, forms, grads


def rows(images):
    return torch.arange(len(images))


def test_what_is_captured(make_vit, own_logits, images, family, prefix_of, heads_of):
    model = make_vit(family).double()
    images = images.double()
    captured = capture(model, images)
    n = prefix_of(family) + 16
    assert_close(captured.logits, own_logits(model, images), rtol=1e-12, atol=1e-12)
    for tensors in (captured.inputs, captured.normed, captured.outputs):
        assert [tuple(tensor.shape) for tensor in tensors] == [(3, n, 24)] * 3
    assert all(torch.equal(a, b) for a, b in zip(captured.inputs[1:], captured.outputs[:-1], strict=True))
    for attention in captured.attentions:
        assert attention.shape == (3, heads_of(family), n, n)
        assert bool((attention > 0).all())
        assert_close(attention.sum(dim=-1), torch.ones(3, heads_of(family), n).double())
    assert (captured.grid, captured.prefix) == ((4, 4), prefix_of(family))
    assert captured.readout.shape == (n,)
    assert captured.readout.dtype == torch.float64
    architecture = architecture_of(model)
    assert captured.block_names == architecture.block_names(model)
    assert_close(architecture.classify(model, captured.features), captured.logits)


def hooked(model, images):
    """Inputs, outputs and first norms of the blocks by hooks, and the attention from the weights of q and k alone."""
    architecture, found = architecture_of(model), {"inputs": [], "normed": [], "outputs": []}
    handles = []
    norms = ("ln_1", "norm1", "layernorm_before")
    for block in architecture.blocks(model):
        norm = next(getattr(block, name) for name in norms if hasattr(block, name))
        handles.append(block.register_forward_pre_hook(lambda _, args: found["inputs"].append(args[0])))
        handles.append(block.register_forward_hook(lambda _, args, output: found["outputs"].append(output)))
        handles.append(norm.register_forward_hook(lambda _, args, output: found["normed"].append(output)))
    with torch.no_grad():
        model(images)
    for handle in handles:
        handle.remove()
    return found


def test_it_is_what_hooks_would_have_seen(make_vit, images, family):
    model, images = make_vit(family).double(), images.double()
    captured, found = capture(model, images), hooked(model, images)
    for name, tensors in found.items():
        assert_close([tensor.detach() for tensor in getattr(captured, name)], tensors, rtol=1e-10, atol=1e-10)


def test_attention_is_that_of_the_library(make_vit, images):
    """The weights that transformers itself shows, and for torchvision those that its attention returns."""
    model = make_vit("DINOv2")
    model.set_attn_implementation("eager")
    with torch.no_grad():
        shown = model(images, output_attentions=True).attentions
    assert_close([a.detach() for a in capture(model, images).attentions], list(shown), rtol=1e-5, atol=1e-6)
    model = make_vit("torchvision")
    captured = capture(model, images)
    for block, normed, attention in zip(
        architecture_of(model).blocks(model), captured.normed, captured.attentions, strict=True
    ):
        weights = block.self_attention(normed, normed, normed, need_weights=True, average_attn_weights=False)[1]
        assert_close(attention, weights, rtol=1e-5, atol=1e-6)


def test_gradients_of_the_last_block_reach_patches_through_its_norm_only(make_vit, images, family, reads_patches):
    model = make_vit(family).double()
    captured = capture(model, images.double())
    last = (captured.inputs[-1], captured.normed[-1], captured.outputs[-1], captured.attentions[-1])
    entering, normed, leaving, attention = captured.gradients(torch.tensor([0, 4, 2]), last)
    patches = slice(captured.prefix, None)
    assert normed[:, patches].abs().amax(dim=(1, 2)).min() > 1e-6
    assert bool(attention.abs().amax(dim=(1, 2, 3)).min() > 0)
    assert bool((leaving[:, patches] != 0).any()) == reads_patches(family)
    if not reads_patches(family):
        # They reach the logit through a normalisation, which does not feel their length.
        product = (entering * captured.inputs[-1]).sum(dim=-1)[:, patches]
        assert product.abs().max() < 1e-3 * (normed * captured.normed[-1]).sum(dim=-1)[:, patches].abs().max()


def test_gradients_are_those_of_each_image(make_vit, images, some_family):
    model, images = make_vit(some_family).double(), images.double()
    targets = torch.tensor([1, 0, 3])
    captured = capture(model, images)
    of = (*captured.inputs, *captured.attentions)
    together = captured.gradients(targets, of)
    for index, target in enumerate(targets):
        alone = capture(model, images[index : index + 1])
        parts = alone.gradients(target.reshape(1), (*alone.inputs, *alone.attentions))
        for whole, part in zip(together, parts, strict=True):
            assert_close(whole[index : index + 1], part, rtol=1e-9, atol=1e-12)
        assert_close(captured.logits[index : index + 1], alone.logits, rtol=1e-10, atol=1e-12)
    # A finite difference of the first block's input says the same.
    step = 1e-6 * torch.randn(images.shape[0], *captured.inputs[-1].shape[1:], dtype=torch.float64)
    moved = captured.inputs[-1] + step
    after = captured.tail.logits(moved, captured.tail.normalize(moved), rows(images))
    change = (after - captured.logits).gather(1, targets.unsqueeze(1)).squeeze(1)
    assert_close(change, (together[2] * step).sum(dim=(1, 2)), rtol=1e-3, atol=1e-10)


@pytest.mark.parametrize("turned_off", [torch.no_grad, torch.inference_mode])
def test_gradients_can_be_had_where_they_were_turned_off(make_vit, images, some_family, turned_off):
    model = make_vit(some_family)
    expected = capture(model, images)
    (gradient,) = expected.gradients(torch.tensor([0, 1, 2]), expected.normed[:1])
    with turned_off():
        captured = capture(model, images.clone())
        (found,) = captured.gradients(torch.tensor([0, 1, 2]), captured.normed[:1])
    assert_close(found, gradient)
    assert not found.is_inference()


def test_without_a_graph_there_is_none(make_vit, images):
    captured = capture(make_vit("timm"), images, graph=False)
    assert not captured.logits.requires_grad
    assert not captured.inputs[0].requires_grad
    with pytest.raises(ValueError, match=r"logits must have a graph, which capture\(..., graph=True\) keeps"):
        captured.gradients(torch.zeros(3, dtype=torch.int64), captured.inputs)


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_alone(make_vit, images, family, training):
    model = make_vit(family).train(training)
    model.get_submodule(architecture_of(model).block_names(model)[1]).train(not training)
    before = everything(model)
    captured = capture(model, images)
    captured.logits.sum().backward()
    captured.tail.logits(captured.inputs[-1], captured.normed[-1], rows(images)).sum()
    assert everything(model) == before
    assert_close(captured.logits, capture(model.eval(), images).logits, rtol=0, atol=0)


class Broken(nn.Module):
    def forward(self, hidden):
        raise RuntimeError("out of memory, say")


def test_also_when_something_raises(make_vit, images, some_family):
    model = make_vit(some_family).train()
    block = architecture_of(model).blocks(model)[1]
    block.mlp = Broken()
    before = everything(model)
    with pytest.raises(RuntimeError, match="out of memory, say"):
        capture(model, images)
    assert everything(model) == before
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("family", ["torchvision", "timm", "timm, distilled"])  # the others run no empty batch
def test_an_empty_batch_gives_empty_results(make_vit, images, family):
    captured = capture(make_vit(family), images[:0])
    assert captured.logits.shape == (0, 5)
    assert captured.attentions[0].shape[:2] == (0, 4)
    assert captured.gradients(torch.zeros(0, dtype=torch.int64), captured.normed)[0].shape == captured.normed[0].shape


def test_the_tail_gives_the_captured_logits(make_vit, images, family):
    captured = capture(make_vit(family).double(), images.double())
    hidden, normed = captured.inputs[-1], captured.normed[-1]
    assert torch.equal(captured.tail.normalize(hidden), normed)
    # Not to the bit: no more of the last block is computed than the prediction reads.
    assert_close(captured.tail.logits(hidden, normed, rows(images)), captured.logits, rtol=1e-12, atol=1e-12)
    assert_close(captured.tail.features(hidden, normed), captured.features, rtol=1e-12, atol=1e-12)


def test_the_tail_runs_what_is_read_and_no_more(make_vit, images, family, reads_patches):
    captured = capture(make_vit(family), images)
    parts, tokens = captured.tail._parts, captured.inputs[-1].shape[1]
    expected = None if reads_patches(family) else 2 if family in ("timm, distilled", "DeiT with teacher") else 1
    assert parts.tokens_read(tokens) == expected
    run = parts.run(-1, captured.inputs[-1], captured.normed[-1], captured.grid, queries=expected)
    assert run.output.shape[1] == (expected or tokens)
    assert_close(run.output, captured.outputs[-1][:, :expected], rtol=1e-4, atol=1e-5)
    assert_close(run.attention, captured.attentions[-1][:, :, :expected], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("options", [{"gate": False, "classifier": "keep"}, {"classifier": "keep"}, {}])
@pytest.mark.parametrize("objective", ["layerwise", "joint"])
def test_heads_that_predict_need_the_whole_block(make_vit, images, options, objective):
    model = MHEXClassifier.from_backbone(make_vit("timm"), 5, objective=objective, **options).eval()
    captured = capture(model, images)
    watched = options.get("gate") is False and objective == "layerwise"
    assert captured.tail._parts.tokens_read(17) == (1 if watched else None)
    found = captured.tail.logits(captured.inputs[-1], captured.normed[-1], rows(images))
    assert_close(found, captured.logits, rtol=1e-4, atol=1e-5)


def test_the_tail_goes_on_from_another_norm(make_vit, images, family):
    captured = capture(make_vit(family).double(), images.double())
    hidden = captured.inputs[-1].detach()
    normed = captured.normed[-1].detach().clone().requires_grad_()
    repeated = captured.tail.logits(hidden.repeat(2, 1, 1), normed.repeat(2, 1, 1), rows(images).repeat(2))
    (gradient,) = torch.autograd.grad(repeated[3:, 1].sum(), normed)
    (expected,) = captured.gradients(torch.ones(3, dtype=torch.int64), captured.normed[-1:])
    assert_close(gradient, expected, rtol=1e-8, atol=1e-11)


def test_scores_become_maps(make_vit, images, prefix_of, takes_any_size, family, make_images):
    wide = make_images(2, (21, 42)) if takes_any_size(family) else images
    captured = capture(make_vit(family), wide)
    h, w = captured.grid
    assert captured.grid == ((3, 6) if takes_any_size(family) else (4, 4))
    n = prefix_of(family) + h * w
    scores = torch.arange(2 * 3 * n).reshape(2, 3, n)
    maps = captured.maps(scores)
    assert maps.shape == (2, 3, h, w)
    assert maps[1, 2, 2, 1] == scores[1, 2, prefix_of(family) + 2 * w + 1]
    assert torch.equal(captured.maps(scores[:, 0]), maps[:, 0])
    with pytest.raises(ValueError, match=f"scores must hold {n} tokens"):
        captured.maps(scores[..., 1:])


@pytest.mark.parametrize("autocast", [True, False])
def test_half_precision(make_vit, images, some_family, autocast):
    model = make_vit(some_family)
    expected = capture(model, images).logits
    if not autocast:
        model, images = model.bfloat16(), images.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        captured = capture(model, images)
        gradient = captured.gradients(torch.tensor([0, 1, 2]), captured.normed)
        again = captured.tail.logits(captured.inputs[-1], captured.normed[-1], rows(images))
        assert_close(again, captured.logits, rtol=0.05, atol=0.05)
    assert all(bool(part.isfinite().all()) for part in gradient)
    assert_close(captured.logits.float(), expected, rtol=0.2, atol=0.2)


def test_a_compiled_part_is_run_without_its_compilation(make_vit, images):
    model = make_vit("timm")
    expected = capture(model, images).logits
    model.blocks[0].mlp._compiled_call_impl = lambda *args: pytest.fail("ran what was compiled")
    assert torch.equal(capture(model, images).logits, expected)


# ------------------------------------------------------------------------------------------------------- classifiers


def with_blocks(model, **options):
    torch.manual_seed(0)
    classifier = MHEXClassifier.from_backbone(model, 5, **options)
    for name, parameter in classifier.blocks.named_parameters():
        with torch.no_grad():
            parameter.mul_(3 if "head" in name else 1)
    return classifier


def test_a_plain_classifier_is_its_network(make_vit, images):
    model = make_vit("torchvision")
    plain = PlainClassifier(PlainConfig(backbone="vit_b_16", num_classes=5), model)
    assert torch.equal(capture(plain, images).logits, capture(model, images).logits)


@pytest.mark.parametrize(
    ("objective", "classifier", "gate"),
    [("layerwise", "drop", True), ("joint", "keep", True), ("joint", "drop", False), ("layerwise", "keep", False)],
)
def test_a_classifier_with_blocks_is_captured_with_them(make_vit, images, family, objective, classifier, gate):
    model = with_blocks(make_vit(family), objective=objective, classifier=classifier, gate=gate).double().train()
    images = images.double()
    before = everything(model)
    captured = capture(model, images)
    assert everything(model) == before
    output = model.eval()(images)
    assert_close(captured.logits, output.logits, rtol=1e-10, atol=1e-10)
    tail, last = captured.tail, (captured.inputs[-1], captured.normed[-1])
    assert_close(tail.logits(*last, rows(images)), captured.logits, rtol=1e-10, atol=1e-10)
    swapped = tail.logits(*(part.flip(0) for part in last), rows(images).flip(0))
    assert_close(swapped, captured.logits.flip(0), rtol=1e-10, atol=1e-10)
    assert_close(captured.readout.sum(), torch.tensor(1.0).double())
    # What leaves a block is what its MHEX block calls the activation.
    maps = captured.outputs[1][:, captured.prefix :].transpose(1, 2).unflatten(2, captured.grid)
    assert_close(maps, output.activations[1], rtol=1e-10, atol=1e-10)
    if classifier == "keep":
        assert_close(tail.features(*last), captured.features, rtol=1e-10, atol=1e-10)
    else:
        assert captured.features is None
        assert captured.readout[: captured.prefix].sum() == 0
        with pytest.raises(ValueError, match="features need the model's own classifier"):
            tail.features(*last)
    gradients = captured.gradients(torch.tensor([0, 1, 2]), captured.attentions)
    # A head that averages what enters and what the feed-forward part adds reads the last attention, too.
    assert all(bool(gradient.abs().amax() > 0) for gradient in gradients)


def test_a_closed_form_of_the_last_blocks_gradient(make_vit, images):
    """Patches of a block whose class token is read get there through keys and values of that token's query alone."""
    model = make_vit("torchvision").double()
    captured = capture(model, images.double())
    (gradient,) = captured.gradients(torch.tensor([0, 1, 2]), captured.normed[-1:])
    (attention,) = captured.gradients(torch.tensor([0, 1, 2]), captured.attentions[-1:])
    assert bool((attention[:, :, 1:] == 0).all())
    mha = architecture_of(model).blocks(model)[-1].self_attention
    normed = captured.normed[-1]
    weights = mha.in_proj_weight.chunk(3), mha.in_proj_bias.chunk(3)
    query, key, value = (
        F.linear(normed, weight, bias).reshape(3, 17, 4, 6).transpose(1, 2)
        for weight, bias in zip(*weights, strict=True)
    )
    shares = captured.attentions[-1][:, :, 0]
    mixed = torch.einsum("bhi,bhid->bhd", shares, value)
    # d logit / d mixed, from d logit / d attention = <d logit / d mixed, value>: solved, not differentiated.
    for_mixed = torch.linalg.lstsq(value, attention[:, :, 0].unsqueeze(-1)).solution.squeeze(-1)
    no_bias_value = value - weights[1][2].reshape(4, 1, 6)
    no_bias_key = key - weights[1][1].reshape(4, 1, 6)
    through_value = torch.einsum("bhd,bhid->bhi", for_mixed, no_bias_value)
    centred = torch.einsum("bhd,bhid->bhi", for_mixed, value - mixed.unsqueeze(2))
    through_key = centred * torch.einsum("bhd,bhid->bhi", query[:, :, 0], no_bias_key) / 6**0.5
    expected = (shares * (through_value + through_key)).sum(dim=1)[:, 1:]
    assert_close((gradient * normed).sum(dim=-1)[:, 1:], expected, rtol=1e-8, atol=1e-10)


def test_what_cannot_be_captured_is_named(make_vit, networks, images):
    model = make_vit("timm")
    for arguments, error, words in (
        (("vit", images), TypeError, "model must be an nn.Module, got str"),
        ((networks.Net(), images), ValueError, "model must be a vision transformer of .*, got Net"),
        ((model, images[0]), ValueError, "images must have 4 dimensions"),
        ((model, images.to(torch.uint8)), TypeError, "images must be of a floating-point dtype"),
    ):
        with pytest.raises(error, match=words):
            capture(*arguments)
    with pytest.raises(TypeError, match="graph must be a bool"):
        capture(model, images, graph=1)
    with pytest.raises(ValueError, match="targets must lie in"):
        capture(model, images).gradients(torch.tensor([0, 1, 5]), ())
