"""The specification of AST-Seg, executable: `pytest test_astseg.py`.

Each part is compared with something independent of it: a loop over pixels, a closed form,
scikit-learn, an exhaustive search, a number of the paper, or a property.
"""

import ast
import gzip
import inspect
import io
import itertools
import json
import math
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import tokenize
import weakref
from collections import defaultdict
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import asdict, fields, replace
from pathlib import Path
from types import SimpleNamespace

# The sizes here are tiny: several threads would only wait for each other. The bits are a CPU's.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import nbclient
import nbformat
import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
import transformers
from filelock import FileLock
from PIL import Image
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import astseg
import train
from astseg import ASTSeg, Config

HERE = Path(__file__).parent
SMALL = dict(
    height=32, width=32, slots=3, backbone="tiny", dim_transformer=64, transformer_layers=2,
    dim_feedforward=64, background_kind="simple", background_width=0.1,
)  # fmt: skip


def parameters(module):
    return sum(p.numel() for p in module.parameters())


def close(found, expected, tolerance=1e-5):
    """Fail unless shapes are equal and no entry differs by more than the tolerance."""
    expected = torch.as_tensor(expected, dtype=found.dtype)
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


def differ(a, b, tolerance=1e-4):
    return (a - b).abs().max().item() > tolerance


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# ---- Section 2 ----


@pytest.mark.parametrize("u, v", [(0, 0), (2, 1), (-3, 2), (1, -4), (9, 0), (0, -9)])
def test_translate_is_equation_1_with_zeros_outside(u, v):
    phi = torch.randn(2, 5, 7)
    shifted = astseg.translate(phi, u, v)
    assert shifted.shape == phi.shape
    for j, i in itertools.product(range(5), range(7)):
        inside = 0 <= i - u < 7 and 0 <= j - v < 5
        assert torch.equal(shifted[:, j, i], phi[:, j - v, i - u] if inside else torch.zeros(2))


def test_center_of_mass_is_the_sum_of_phi_p_times_p():
    phi = torch.randn(3, 4, 6, dtype=torch.float64)
    expected = torch.zeros(3, 2, dtype=torch.float64)
    for j, i in itertools.product(range(4), range(6)):
        expected += phi[:, j, i, None] * torch.tensor([i, j])
    close(astseg.center_of_mass(phi), expected, 1e-12)


@pytest.mark.parametrize("u, v", [(3, 2), (-2, 1), (0, -3)])
def test_center_of_mass_and_soft_argmax_follow_a_translation(u, v):
    phi = torch.zeros(16, 16, dtype=torch.float64)
    phi[5:10, 5:10] = torch.randn(5, 5).double()
    phi /= phi.sum()
    shift = torch.tensor([u, v], dtype=torch.float64)
    moved = astseg.center_of_mass(astseg.translate(phi, u, v))
    close(moved, astseg.center_of_mass(phi) + shift, 1e-10)
    logits = torch.full((16, 16), -200.0).double()
    logits[5:10, 5:10] = torch.randn(5, 5).double()
    moved = astseg.soft_argmax(logits.roll((v, u), (0, 1)))
    close(moved, astseg.soft_argmax(logits) + shift, 1e-10)


def test_soft_argmax_is_in_fp32_under_autocast_and_for_half_precision():
    logits = torch.randn(8, 8).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        position = astseg.soft_argmax(logits)
    assert position.dtype == torch.float32
    assert torch.equal(position, astseg.soft_argmax(logits.float()))
    assert astseg.soft_argmax(logits.double()).dtype == torch.float64


def test_soft_argmax_takes_any_leading_dimensions_and_logits_of_any_size():
    logits = torch.zeros(2, 3, 4, 6)
    logits[..., 2, 5] = 1e30
    assert torch.equal(astseg.soft_argmax(logits), torch.tensor([5.0, 2.0]).expand(2, 3, 2))
    logits = logits.clamp(max=3)
    close(astseg.soft_argmax(logits + 1e4), astseg.soft_argmax(logits))


def test_soft_argmax_is_in_the_units_of_the_coordinates_that_it_is_given():
    logits, x, y = torch.randn(2, 4, 6).double(), torch.randn(6).double(), torch.randn(4).double()
    softmax = logits.exp() / logits.exp().sum((1, 2), keepdim=True)
    expected = torch.stack(((softmax * x).sum((1, 2)), (softmax * y[:, None]).sum((1, 2))), dim=1)
    close(astseg.soft_argmax(logits, x, y), expected, 1e-12)


def test_gradient_of_soft_argmax_is_s_times_p_minus_mean():
    logits = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    mean = astseg.soft_argmax(logits)
    softmax = logits.detach().flatten().softmax(0).view(4, 5)
    for axis in range(2):
        (gradient,) = torch.autograd.grad(mean[axis], logits, retain_graph=True)
        p = torch.arange(5) if axis == 0 else torch.arange(4)[:, None]
        close(gradient, softmax * (p - mean[axis].detach()), 1e-12)


# ---- Configuration ----


def test_the_defaults_are_table_6():
    t = train.Training()
    assert (t.dim_z_what, t.log_alpha_0, t.scale_min, t.scale_max) == (32, 11, 1.3, 24)
    assert (t.entropy_weight, t.entropy_warmup, t.dropout) == (1e-2, 10_000, 0.1)
    assert (t.dim_transformer, t.transformer_heads, t.dim_feedforward) == (256, 8, 512)
    assert (t.transformer_layers, t.backbone, t.pretrained) == (6, "b3", "nvidia/mit-b3")
    assert (t.background_batch, t.background_lr, t.background_steps) == (128, 2e-3, 500_000)
    assert (t.batch, t.lr, t.steps, t.phase2_steps) == (64, 4e-5, 125_000, 30_000)
    assert (t.warmup, t.decay_at, t.decay) == (5_000, 0.9, "step")
    assert (t.scenario, t.flip) == ("CT", False)
    factors = t.refinement_lr_factor, t.alpha_0_lr_factor, t.glimpse_lr_factor
    assert (t.refinement_start, *factors) == ("stock", 1, 1, 1)
    assert t.transformer and t.anisotropic and not t.alpha_0_per_pixel


@pytest.mark.parametrize(
    "name, side, slots, isotropic, channels, background, steps",
    [("clevrtex", 128, 10, False, 45, "complex", 500_000),
     ("clevr", 128, 10, True, 44, "simple", 2_500),
     ("objectsroom", 64, 3, False, 38, "complex", 500_000),
     ("shapestacks", 64, 6, True, 40, "complex", 500_000)],
)  # fmt: skip
def test_the_paper_settings_of_each_data_set(
    name, side, slots, isotropic, channels, background, steps
):
    t = train.PRESETS[name]
    assert (t.dataset, t.height, t.width, t.slots) == (name, side, side, slots)
    assert (t.anisotropic, t.background_kind, t.background_steps) == (
        not isotropic, background, steps
    )  # fmt: skip
    own = {"dataset", "height", "width", "slots", "anisotropic"}
    for field in fields(train.Training):  # all else is Table 6
        if field.name not in own | {"background_kind", "background_steps"}:
            assert getattr(t, field.name) == getattr(train.Training(), field.name), field.name
    with torch.device("meta"):
        generator = ASTSeg(t).generator
    assert generator.segformer.config.num_labels == channels


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(slots=0), "slots is 0: use a positive whole number"),
        (dict(slots=256), "slots is 256: label maps hold 255 objects at most"),
        (dict(dim_z_what=-1), "dim_z_what is -1: use a positive whole number"),
        (dict(slots=2.5), "slots is 2.5: use a positive whole number"),
        (dict(log_alpha_0=math.nan), "log_alpha_0 is nan"),
        (dict(lr="1e-3"), "lr is 1e-3: use a positive number"),
        (dict(scale_min=0), "scale_min is 0: use a positive number"),
        (dict(scale_max=math.inf), "scale_max is inf: use a positive number"),
        (dict(dropout=-0.1), "dropout is -0.1: use a positive number or 0"),
        (dict(backbone="b9"), "backbone is 'b9': use one of tiny, b0, b3"),
        (dict(background_kind="hard"), "background_kind is 'hard'"),
        (dict(height=64, width=193), "use sides of 32..192"),
        (dict(dropout=1.0), "dropout is 1.0: use 0..1, without 1"),
        (dict(scale_min=5, scale_max=5), "scale_min is 5 and scale_max 5"),
        (dict(generator="resnet"), "generator is 'resnet': use one of segformer, unet"),
        (dict(height=31, width=64), "images are (31, 64): use sides of 32..192"),
        (dict(transformer_heads=7), "7 heads do not divide dim_transformer 256"),
        (dict(lr=math.nan), "lr is nan: use a positive number"),
        (dict(warmup=-1), "warmup is -1: use a positive whole number or 0"),
        (dict(scenario="XT"), "scenario is 'XT': use one of CT, BT, frozen"),
        (dict(phase2_steps=125_001), "phase2_steps is 125001: use a part of 125000 steps"),
    ],
)
def test_a_configuration_that_cannot_work_is_refused_in_one_sentence(change, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        train.Training(**change)
    assert "\n" not in str(error.value)


def test_what_may_be_0_may_be_0_and_sizes_reach_their_limits():
    train.Training(dropout=0, warmup=0, entropy_weight=0, phase2_steps=0, seed=0, log_alpha_0=-3)
    train.Training(height=32, width=192, slots=255, phase2_steps=125_000)


# ---- Section 4.1: generators ----


@pytest.mark.parametrize("channels, count", [(38, 22_237_860), (40, 22_242_304), (45, 22_253_764)])
def test_unet_has_the_parameters_of_table_8(channels, count):
    assert parameters(astseg.UNetGenerator(channels)) == count


def test_unet_is_the_graph_of_table_8():
    unet = astseg.UNetGenerator(7, 48, 48, factor=0.1).eval()
    with torch.no_grad():
        for p in unet.parameters():
            p += 0.1 * torch.randn_like(p)
    images = torch.rand(1, 3, 48, 48)

    def block(x, convolution, norm):
        return F.celu(norm(convolution(x)))

    x = block(images, *unet.first[:2])
    maps = [x]
    for (convolution, norm, _), (residual,) in unet.down:
        assert (convolution.kernel_size, convolution.stride) == ((4, 4), (2, 2))
        x = block(x, convolution, norm)
        x = x + block(x, *residual[:2])
        maps.append(x)
    x = block(x, *unet.center[:2])
    for (residual,), transposed, norm, _ in unet.up:
        x = torch.cat((x, maps.pop()), dim=1)
        x = block(x + block(x, *residual[:2]), transposed, norm)
    x = block(torch.cat((x, maps.pop()), dim=1), *unet.last[0][:2])
    x = x + unet.last[1][0](x)
    close(unet(images), unet.last[2](x))


@pytest.mark.parametrize("channels, count", [(38, 47_251_686), (45, 47_257_069)])
def test_segformer_b3_has_the_parameters_of_the_authors(channels, count):
    with torch.device("meta"):
        assert parameters(astseg.SegformerGenerator(channels, "b3")) == count


def test_the_backbone_b0_has_its_published_parameters_and_heads_divide_widths():
    assert parameters(astseg.SegformerGenerator(7, "b0").segformer.segformer) == 3_319_392
    for _, widths, heads, _ in astseg.MIT_SIZES.values():
        assert all(width % n == 0 for width, n in zip(widths, heads))


@pytest.mark.parametrize("height, width", [(32, 32), (33, 47), (64, 40)])
def test_generators_take_even_and_odd_sizes(height, width):
    images = torch.rand(2, 3, height, width)
    quarter = (math.ceil(height / 4), math.ceil(width / 4))
    assert astseg.SegformerGenerator(7, "tiny")(images).shape == (2, 7, *quarter)
    unet = astseg.UNetGenerator(7, height, width, factor=0.1)
    assert unet(images).shape == (2, 7, height, width)


def test_segformer_sees_the_images_as_they_are_and_has_its_stock_dropout():
    generator, images = astseg.SegformerGenerator(7, "tiny", 0.3).eval(), torch.rand(2, 3, 32, 32)
    assert torch.equal(generator(images), generator.segformer(images).logits)
    config = generator.segformer.config
    assert config.drop_path_rate == config.classifier_dropout_prob == 0.3
    assert config.hidden_dropout_prob == config.attention_probs_dropout_prob == 0


def save_segformer(folder, size, dtype=torch.float32):
    """A classifier in the layout of nvidia/mit-b3: its backbone under the prefix segformer."""
    depths, widths, heads, _ = astseg.MIT_SIZES[size]
    config = transformers.SegformerConfig(
        depths=depths, hidden_sizes=widths, num_attention_heads=heads
    )
    model = transformers.SegformerForImageClassification(config).to(dtype)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_pretrained_backbone_is_taken_whole_and_in_float32(dtype, tmp_path):
    stored = save_segformer(tmp_path, "tiny", dtype).segformer.state_dict()
    generator = astseg.SegformerGenerator(7, "tiny", dropout=0.2)
    generator.load_backbone(str(tmp_path))
    for name, tensor in generator.segformer.segformer.state_dict().items():
        assert torch.equal(tensor, stored[name].float()) and tensor.dtype != torch.float16
    assert generator.segformer.segformer.config.drop_path_rate == 0.2  # ours, not the file's
    assert generator(torch.rand(1, 3, 32, 32)).shape == (1, 7, 8, 8)


def test_a_backbone_that_is_missing_damaged_or_of_another_size_is_refused(tmp_path):
    generator = astseg.SegformerGenerator(7, "tiny")
    before = generator.segformer.segformer
    save_segformer(tmp_path / "b0", "b0")
    save_segformer(tmp_path / "cut", "tiny")
    (tmp_path / "cut" / "model.safetensors").write_text("version https://git-lfs.github.com")
    transformers.SegformerForImageClassification(
        transformers.SegformerConfig(depths=[1], hidden_sizes=[16], num_attention_heads=[1],
                                     num_encoder_blocks=1)
    ).save_pretrained(tmp_path / "half")  # fmt: skip
    words = r"a Segformer backbone of widths \[16, 32, 64, 128\] was not found in '.*\(\w+: "
    for name in ("nothing", "b0", "cut", "half"):
        with pytest.raises(OSError, match=words) as error:
            generator.load_backbone(str(tmp_path / name))
        assert "\n" not in str(error.value)
    assert generator.segformer.segformer is before


# ---- Algorithm 1 ----


class Spy(torch.nn.Module):
    """A refinement that adds a constant and keeps what it saw."""

    def __init__(self, shift=0.0):
        super().__init__()
        self.shift = shift

    def forward(self, slots):
        self.seen = slots
        return slots + self.shift


@pytest.mark.parametrize("dim_scale", [1, 2])
def test_encoder_is_algorithm_1_pixel_by_pixel(dim_scale):
    K, Z, h, w = 2, 3, 3, 4
    encoder = astseg.Encoder(K, dim_scale, Z, 1.3, 24.0, refinement=Spy(shift=0.1))
    maps = torch.randn(1, K + dim_scale + 1 + Z, h, w)
    latents, attention, position = encoder(maps)
    for k in range(K):
        total = sum(math.exp(maps[0, k, j, i]) for j in range(h) for i in range(w))
        x0 = y0 = 0.0
        phi0 = torch.zeros(dim_scale + 1 + Z)
        for j, i in itertools.product(range(h), range(w)):
            a = math.exp(maps[0, k, j, i]) / total  # (11)
            assert abs(attention[0, k, j, i].item() - a) < 1e-6
            x0 += a * (2 * i / (w - 1) - 1)  # (12), (14)
            y0 += a * (2 * j / (h - 1) - 1)  # (13), (15)
            phi0 += a * maps[0, K:, j, i]  # (16)
        close(position[0, k], [x0, y0])
        close(encoder.refinement.seen[0, k], torch.cat((torch.tensor([x0, y0]), phi0)))
        close(latents.position[0, k], [x0 + 0.1, y0 + 0.1])
        for axis in range(2):
            s = phi0[min(axis, dim_scale - 1)].item() + 0.1
            scale = 1.3 + (24.0 - 1.3) / (1 + math.exp(-s))
            assert abs(latents.scale[0, k, axis].item() - scale) < 1e-4
        alpha = math.exp(phi0[dim_scale].item() + 0.1)
        assert abs(latents.activation[0, k].item() - alpha) < 1e-5
        close(latents.z_what[0, k], phi0[dim_scale + 1 :] + 0.1)
    x, y = astseg.normalized_coordinates(h, w)
    assert torch.equal(position, astseg.soft_argmax(maps[:, :K], x, y))


def test_a_single_cell_is_at_0():
    x, y = astseg.normalized_coordinates(1, 5)
    assert x.tolist() == [-1, -0.5, 0, 0.5, 1] and y.tolist() == [0]


@pytest.mark.parametrize("dim_scale", [1, 2])
def test_each_column_moves_only_its_own_latent(dim_scale):
    encoder = astseg.Encoder(2, dim_scale, 4)
    slots = torch.randn(1, 2, 2 + dim_scale + 1 + 4) * 0.1
    before = encoder.split_latents(slots)
    owners = ["position"] * 2 + ["scale"] * dim_scale + ["activation"] + ["z_what"] * 4
    for column, owner in enumerate(owners):
        changed = slots.clone()
        changed[..., column] += 0.3
        after = encoder.split_latents(changed)
        for name in astseg.Latents._fields:
            same = torch.equal(getattr(before, name), getattr(after, name))
            assert same != (name == owner), (column, name)


def test_latents_stay_in_their_ranges():
    latents = astseg.Encoder(3, 1, 4, 1.3, 24.0).split_latents(torch.randn(5, 3, 8) * 10)
    assert latents.position.max() == 1 and latents.position.min() == -1
    assert latents.scale.min() >= 1.3 and latents.scale.max() <= 24
    assert torch.equal(latents.scale[..., 0], latents.scale[..., 1])  # isotropic
    assert latents.activation.min() > 0
    zero = astseg.Encoder(3, 2, 4, 1.3, 24.0).split_latents(torch.zeros(1, 3, 9))
    close(zero.scale, torch.full((1, 3, 2), (1.3 + 24) / 2))
    assert torch.equal(zero.activation, torch.ones(1, 3))


@pytest.mark.parametrize("dim, embedding, projection", [(37, 9_728, 9_509), (36, 9_472, 9_252)])
def test_refinement_has_the_parameters_of_the_paper(dim, embedding, projection):
    refinement = astseg.Refinement(dim)
    assert parameters(refinement.transformer) == 3_162_624
    assert parameters(refinement.embedding) == embedding
    assert parameters(refinement.projection) == projection


def test_refinement_is_embedding_stock_layers_and_projection():
    refinement = astseg.Refinement(12, 16, 4, 24, 2, dropout=0.3).eval()
    stock = torch.nn.TransformerEncoderLayer(16, 4, 24, batch_first=True).eval()
    slots = torch.randn(2, 5, 12)
    x = slots @ refinement.embedding.weight.T + refinement.embedding.bias
    for layer in refinement.transformer.layers:
        assert {m.p for m in layer.modules() if isinstance(m, torch.nn.Dropout)} == {0.3}
        assert layer.self_attn.dropout == 0.3 and not layer.norm_first
        stock.load_state_dict(layer.state_dict())
        x = stock(x)
    expected = x @ refinement.projection.weight.T + refinement.projection.bias
    close(refinement(slots), expected)


@pytest.mark.parametrize("start", ["stock", "identity"])
def test_a_permutation_of_the_slots_permutes_the_refined_slots(start):
    refinement = astseg.Refinement(12, 64, 4, 32, 2).eval()
    if start == "identity":
        astseg.start_as_identity(refinement)
    with torch.no_grad():
        for p in refinement.parameters():
            p += 0.02 * torch.randn_like(p)
    slots, order = torch.randn(2, 5, 12), torch.tensor([3, 0, 4, 1, 2])
    close(refinement(slots)[:, order], refinement(slots[:, order]))
    other = slots.clone()
    other[:, 0] += 1  # the slots see one another
    assert differ(refinement(slots)[:, 1:], refinement(other)[:, 1:])


def test_the_identity_start_begins_as_the_identity_and_the_stock_start_does_not():
    slots = 0.3 * torch.randn(2, 5, 12)
    identity, stock = (astseg.Refinement(12, 128).eval() for _ in range(2))
    astseg.start_as_identity(identity)
    assert not differ(identity(slots), slots, 0.02)
    assert differ(stock(slots), slots, 0.2)
    with pytest.raises(ValueError, match="dim_transformer is 16: the identity start needs 18"):
        astseg.start_as_identity(astseg.Refinement(16, 16))


def test_the_identity_start_lets_every_weight_learn():
    refinement = astseg.Refinement(12, 64, 4, 32, 2)
    astseg.start_as_identity(refinement)
    optimizer = torch.optim.SGD(refinement.parameters(), lr=0.1)
    for _ in range(3):  # zero maps open first, what is behind them next
        optimizer.zero_grad()
        (refinement(torch.randn(4, 5, 12)) - torch.randn(4, 5, 12)).square().sum().backward()
        optimizer.step()
    assert all(p.grad.abs().max() > 0 for p in refinement.parameters())


# ---- Algorithm 2 ----


@pytest.mark.parametrize("size, count", [(32, 51_956), (64, 191_476)])
def test_glimpse_generator_has_the_shape_and_parameters_of_table_7(size, count):
    generator = astseg.GlimpseGenerator(32, size)
    glimpses = generator(torch.randn(2, 32))
    assert parameters(generator) == count
    assert glimpses.shape == (2, 4, size, size)
    assert glimpses.min() >= 0 and glimpses.max() <= 1


def test_glimpse_generator_is_the_stack_of_table_7():
    generator, z_what = astseg.GlimpseGenerator(8, 16), torch.randn(3, 8)
    kinds = "ConvTranspose2d " + "GroupNorm CELU ConvTranspose2d " * 3 + "Sigmoid"
    assert [type(layer).__name__ for layer in generator.layers] == kinds.split()
    x = z_what.view(3, 8, 1, 1)
    for number, layer in enumerate(generator.layers[::3]):
        if number == 4:
            break
        bias = layer.bias
        assert (bias is not None) == (number == 3)  # the last one alone
        x = F.conv_transpose2d(x, layer.weight, bias, *((2, 1) if number else (1, 0)))
        if number < 3:
            x = F.celu(F.group_norm(x, (2, 1, 1)[number]))  # 32, 16 and 8 channels
    close(generator(z_what), x.sigmoid())


def test_spatial_transformer_is_bilinear_sampling_pixel_by_pixel():
    G, H, W = 4, 6, 8
    glimpse = torch.rand(1, 1, G, G)
    (x, y), (sx, sy) = (0.2, -0.3), (1.4, 2.2)
    warped = astseg.spatial_transformer(
        glimpse, torch.tensor([[x, y]]), torch.tensor([[sx, sy]]), H, W
    )

    def pixel(row, column):
        return glimpse[0, 0, row, column].item() if 0 <= row < G and 0 <= column < G else 0.0

    for j, i in itertools.product(range(H), range(W)):
        u = sx * ((2 * i + 1) / W - 1 - x)  # image point -> glimpse point, edges at +-1
        v = sy * ((2 * j + 1) / H - 1 - y)
        column, row = ((u + 1) * G - 1) / 2, ((v + 1) * G - 1) / 2
        c, r = math.floor(column), math.floor(row)
        value = sum(
            (1 - abs(row - rr)) * (1 - abs(column - cc)) * pixel(rr, cc)
            for rr in (r, r + 1)
            for cc in (c, c + 1)
        )
        assert abs(warped[0, 0, j, i].item() - value) < 1e-5


@pytest.mark.parametrize("alpha_0", [torch.tensor(0.7), torch.rand(4, 5) + 0.1])
def test_weights_and_composition_are_equations_17_and_18_pixel_by_pixel(alpha_0):
    B, K, H, W = 2, 3, 4, 5
    activation, masks = torch.rand(B, K) * 3, torch.rand(B, K, H, W)
    background, layers = torch.rand(B, 3, H, W), torch.rand(B, K, 3, H, W)
    weights = astseg.occlusion_weights(activation, masks, alpha_0)
    image = astseg.compose(weights, background, layers)
    close(weights.sum(1), torch.ones(B, H, W))
    for b, j, i in itertools.product(range(B), range(H), range(W)):
        strength = [alpha_0.expand(H, W)[j, i]] + [
            activation[b, k] * masks[b, k, j, i] for k in range(K)
        ]
        expected = torch.stack(strength) / sum(strength)
        close(weights[b, :, j, i], expected)
        color = expected[0] * background[b, :, j, i]
        color = color + sum(expected[k + 1] * layers[b, k, :, j, i] for k in range(K))
        close(image[b, :, j, i], color)


@pytest.mark.parametrize("per_pixel", [False, True])
def test_renderer_is_algorithm_2_slot_by_slot(per_pixel):
    B, K, H, W = 2, 3, 20, 24
    renderer = astseg.Renderer(H, W, 8, 16, log_alpha_0=0.5, per_pixel=per_pixel)
    torch.nn.init.normal_(renderer.log_alpha_0_map)
    latents = astseg.Latents(
        torch.rand(B, K, 2) * 2 - 1, torch.rand(B, K, 2) * 3 + 1.3, torch.rand(B, K) * 4,
        torch.randn(B, K, 8),
    )  # fmt: skip
    weights, layers, masks, glimpses = renderer(latents)
    for b, k in itertools.product(range(B), range(K)):
        glimpse = renderer.glimpse_generator(latents.z_what[b, k][None])
        close(glimpses[b, k], glimpse[0])
        (x, y), (sx, sy) = latents.position[b, k].tolist(), latents.scale[b, k].tolist()
        theta = torch.tensor([[[sx, 0, -x * sx], [0, sy, -y * sy]]])
        grid = F.affine_grid(theta, (1, 4, H, W), align_corners=False)
        moved = F.grid_sample(glimpse, grid, align_corners=False)[0]
        close(layers[b, k], moved[:3], 1e-4)
        close(masks[b, k], moved[3], 1e-4)
    alpha_0 = (0.5 + renderer.log_alpha_0_map).exp()
    objects = latents.activation[..., None, None] * masks
    strength = torch.cat((alpha_0.expand(B, 1, H, W), objects), dim=1)
    close(weights, strength / strength.sum(1, keepdim=True))
    weights[:, 1].sum().backward()
    assert renderer.log_alpha_0.grad.abs() > 0
    assert (renderer.log_alpha_0_map.grad is not None) == per_pixel


def test_renderer_starts_at_alpha_0():
    assert math.isclose(astseg.Renderer(32, 32).log_alpha_0.exp().item(), math.e**11, rel_tol=1e-5)
    renderer = astseg.Renderer(32, 40, glimpse=32, log_alpha_0=2, per_pixel=True)
    close(renderer.log_alpha_0 + renderer.log_alpha_0_map, torch.full((32, 40), 2.0))


# ---- Background model ----


@pytest.mark.parametrize(
    "side, kind, encoder, decoder",
    [(64, "simple", 2_942_624, 7_679_368), (64, "complex", 2_900_096, 43_572_712),
     (128, "simple", 3_590_944, 9_331_080), (128, "complex", 21_183_616, 48_633_192)],
)  # fmt: skip
def test_background_autoencoder_has_the_parameters_of_the_authors(side, kind, encoder, decoder):
    with torch.device("meta"):
        model = astseg.BackgroundAutoencoder(side, side, kind)
    assert (parameters(model.encoder), parameters(model.decoder)) == (encoder, decoder)


@pytest.mark.parametrize(
    "height, width", [(25, 25), (48, 48), (49, 61), (64, 96), (97, 33), (192, 150), (30, 180)]
)
def test_background_autoencoder_returns_every_size_that_has_a_schedule(height, width):
    model = astseg.BackgroundAutoencoder(height, width, "simple", 0.05)
    background, error = model(torch.rand(1, 3, height, width))
    assert background.shape == (1, 3, height, width) and error.shape == (1, height, width)
    assert background.min() >= 0 and background.max() <= 1
    assert model.encoder(torch.rand(1, 3, height, width)).shape == (1, 16, 1, 1)


def test_background_is_the_first_three_channels_and_its_error_the_fourth():
    model, images = astseg.BackgroundAutoencoder(40, 32, "simple", 0.05), torch.rand(2, 3, 40, 32)
    x = images
    for layer in [*model.encoder, *model.decoder]:
        x = layer(x)
    background, error = model(images)
    assert torch.equal(background, x[:, :3].sigmoid()) and torch.equal(error, x[:, 3].sigmoid())
    norms = [layer.norm for layer in [*model.encoder, *model.decoder]]
    assert norms.index(None) == len(norms) - 1  # all but the last one
    with torch.autocast("cpu", torch.bfloat16):
        assert model(images)[0].dtype == torch.float32


def test_background_schedule_has_the_blocks_of_the_authors():
    for sides, blocks in [((25, 48), 5), ((49, 96), 6), ((97, 192), 7)]:
        for side in sides:
            assert len(astseg.background_blocks(side, side)) == blocks
    sides = {}
    for side in range(1, 193):  # kernel, stride, padding, remainder by hand
        shape = (5, 2, 2) if side > 5 else (4, 2, 1) if side > 3 else (side, 1, 0)
        kernel, stride, padding = shape
        (*found, remainder), sides[side] = astseg.shrink_side(side)
        smaller = math.floor((side + 2 * padding - kernel) / stride) + 1
        mirrored = (smaller - 1) * stride - 2 * padding + kernel + remainder
        assert (*found, sides[side], mirrored) == (*shape, smaller, side)
    height, width = 97, 33
    for rows_columns in astseg.background_blocks(97, 33):
        expected = astseg.shrink_side(height)[0], astseg.shrink_side(width)[0]
        assert list(rows_columns) == [*zip(*expected)]
        height, width = sides[height], sides[width]
    assert height == width == 1


@pytest.mark.parametrize("kind", [torch.nn.Conv2d, torch.nn.ConvTranspose2d])
@pytest.mark.parametrize("height, width", [(3, 5), (1, 1), (1, 4)])
def test_row_and_column_are_two_more_channels_and_one_on_a_single_pixel(kind, height, width):
    block = astseg.CoordConv(kind(5, 32, 3, 1, 1, bias=False))
    x = torch.randn(2, 3, height, width)
    rows = torch.linspace(-0.5, 0.5, height) if height > 1 else torch.ones(1)
    columns = torch.linspace(-0.5, 0.5, width) if width > 1 else torch.ones(1)
    grid = torch.stack((rows[:, None].expand(height, width), columns.expand(height, width)))
    appended = torch.cat((x, grid.expand(2, 2, height, width)), dim=1)
    convolved = block.convolution(appended)
    close(block(x), F.celu(F.group_norm(convolved, 2)))
    bare = astseg.CoordConv(block.convolution, norm=False)
    close(bare(x), convolved)


@pytest.mark.parametrize("width, radius", [(74, 0), (80, 1), (150, 2)])
def test_robust_background_loss_is_that_of_a_loop_over_pixels(width, radius):
    H, W, r = 3, width, radius
    images, background = torch.rand(2, 1, 3, H, W)
    predicted = torch.rand(1, H, W)
    background[..., :40] = images[..., :40] + 0.01 * torch.randn(1, 3, H, 40)

    def smooth_l1(a, b):
        d = abs(float(a) - float(b))
        return d * d / 2 / (3 / 255) if d < 3 / 255 else d - 3 / 255 / 2

    e, total = np.zeros((H, W)), 0.0
    for c, j, i in itertools.product(range(3), range(H), range(W)):
        e[j, i] += smooth_l1(background[0, c, j, i], images[0, c, j, i])
    for j, i in itertools.product(range(H), range(W)):
        window = e[max(j - r, 0) : j + r + 1, max(i - r, 0) : i + r + 1]
        weight = math.exp(-6 * np.tanh(window / 0.25).mean())
        total += (e[j, i] + smooth_l1(predicted[0, j, i], e[j, i] / 3)) * weight
    loss = astseg.robust_background_loss(images, background, predicted)
    assert abs(loss.item() - total / (H * W)) < 1e-5


def test_robust_background_loss_sends_no_gradient_through_its_weight_nor_its_target():
    images = torch.rand(1, 3, 4, 4)
    background = (images + 0.5).requires_grad_()  # all errors 0.5 a channel, far in the linear part
    predicted = torch.full((1, 4, 4), 0.9, requires_grad=True)
    astseg.robust_background_loss(images, background, predicted).backward()
    error = 3 * (0.5 - 1.5 / 255)
    expected = math.exp(-6 * math.tanh(error / 0.25)) / 16
    close(background.grad, torch.full((1, 3, 4, 4), expected), 1e-7)
    close(predicted.grad, torch.full((1, 4, 4), expected), 1e-7)  # 0.9 is above error / 3


# ---- The whole model ----


@pytest.mark.parametrize(
    "change",
    [{}, dict(anisotropic=False), dict(transformer=False), dict(generator="unet", unet_width=0.1),
     dict(height=40, width=56), dict(alpha_0_per_pixel=True), dict(height=32, width=65)],
)  # fmt: skip
def test_the_model_names_everything_it_says(change):
    model = ASTSeg(Config(**{**SMALL, **change})).eval()
    c, B, K = model.config, 2, 3
    H, W = size = (c.height, c.width)
    output = model(torch.rand(B, 3, *size))
    h, w = size if c.generator == "unet" else (math.ceil(H / 4), math.ceil(W / 4))
    G = 32 if max(size) <= 64 else 64
    shapes = dict(
        reconstruction=(B, 3, H, W), background=(B, 3, H, W), weights=(B, K + 1, H, W),
        layers=(B, K, 3, H, W), masks=(B, K, H, W), glimpses=(B, K, 4, G, G),
        attention=(B, K, h, w), attention_position=(B, K, 2), position=(B, K, 2),
        scale=(B, K, 2), activation=(B, K), z_what=(B, K, 32),
    )  # fmt: skip
    tensors = output._asdict() | output.latents._asdict()
    del tensors["latents"]
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == shapes
    close(output.weights.sum(1), torch.ones(B, *size))


@pytest.mark.parametrize("anisotropic", [False, True])
def test_the_model_is_figure_1_part_by_part(anisotropic):
    model = ASTSeg(Config(**SMALL | dict(anisotropic=anisotropic, scale_min=2.0, scale_max=7.0)))
    images = torch.rand(2, 3, 32, 32)
    output = model.eval()(images)
    latents, attention, position = model.encoder(model.generator(images))
    weights, layers, masks, glimpses = model.renderer(latents)
    background = model.background(images)[0]
    expected = astseg.Output(
        astseg.compose(weights, background, layers), background, weights, layers, masks, glimpses,
        latents, attention, position,
    )  # fmt: skip
    for found, other in zip(output, expected):
        for a, b in zip(found, other):
            assert torch.equal(a, b)
    assert 2 <= latents.scale.min() and latents.scale.max() <= 7
    assert model.encoder.split_sizes == [2, 1 + anisotropic, 1, 32]


def test_segmentation_is_the_argmax_of_the_weights_and_needs_no_background():
    model = ASTSeg(Config(**SMALL, log_alpha_0=-3.0)).eval()
    images = torch.rand(2, 3, 32, 32)
    expected = model(images).weights.argmax(1)
    model.background = None
    labels = model.segment(images)
    with pytest.raises(ValueError, match="call model.eval.. before model.segment"):
        model.train().segment(images)
    assert torch.equal(labels, expected)
    assert labels.dtype == torch.int64 and labels.unique().numel() > 1


def test_a_known_background_replaces_the_autoencoder():
    model = ASTSeg(Config(**SMALL)).eval()
    images, background = torch.rand(2, 3, 32, 32), torch.rand(2, 3, 32, 32)
    assert torch.equal(model(images, background).background, background)
    model.background = None
    output = model(images, background)
    assert torch.equal(
        output.reconstruction, astseg.compose(output.weights, background, output.layers)
    )


def test_no_gradient_of_the_full_loss_reaches_the_prediction_of_the_error():
    model, images = ASTSeg(Config(**SMALL)), torch.rand(2, 3, 32, 32)
    sum(astseg.full_loss(images, model(images), 9).values()).backward()
    gradient = model.background.decoder[-1].convolution.weight.grad  # (C, 4, k, k)
    assert gradient[:, :3].abs().amax((0, 2, 3)).min() > 0 and gradient[:, 3].abs().max() == 0


def test_the_gradient_from_loss_to_feature_maps_is_that_of_finite_differences():
    K, Z, size = 2, 3, 8
    encoder = astseg.Encoder(K, 2, Z, 1.3, 4.0, refinement=Spy())
    renderer = astseg.Renderer(size, size, Z, 8, log_alpha_0=0.3).double()
    image, background = torch.rand(2, 1, 3, size, size, dtype=torch.float64)
    maps = torch.randn(1, K + 3 + Z, 3, 4, dtype=torch.float64, requires_grad=True)

    def loss(maps, background):
        latents, *_ = encoder(maps)
        weights, layers, *_ = renderer(latents)
        reconstruction = astseg.compose(weights, background, layers)
        output = SimpleNamespace(reconstruction=reconstruction, weights=weights)
        return tuple(astseg.full_loss(image, output, 9, entropy_warmup=9).values())

    assert torch.autograd.gradcheck(loss, (maps, background.requires_grad_()))


@pytest.mark.parametrize(
    "images, message",
    [
        (torch.rand(3, 32, 32), "images are (3, 32, 32): this model takes (B, 3, 32, 32)"),
        (torch.rand(0, 3, 32, 32), "images are (0, 3, 32, 32)"),
        (torch.rand(1, 4, 32, 32), "images are (1, 4, 32, 32)"),
        (torch.zeros(1, 3, 32, 32).byte(),
         "images are torch.uint8: give torch.float32 in [0, 1], bytes / 255"),
        (torch.rand(1, 3, 64, 64), "images are (1, 3, 64, 64)"),
        (torch.rand(1, 3, 32, 32).double(), "images are torch.float64"),
        (torch.full((1, 3, 32, 32), -0.1), "images have values -0.1..-0.1: scale them to [0, 1]"),
        (torch.full((1, 3, 32, 32), 1.1), "images have values 1.1..1.1"),
        (torch.full((1, 3, 32, 32), math.nan), "images hold NaN (not a number)"),
    ],
)  # fmt: skip
def test_images_that_the_model_cannot_take_are_refused(images, message):
    model = ASTSeg(Config(**SMALL)).eval()
    for call in (model, model.segment):
        with pytest.raises(ValueError, match=re.escape(message)):
            call(images)


def test_a_model_in_half_precision_is_refused_by_that_name():
    model = ASTSeg(Config(**SMALL)).half()
    with pytest.raises(ValueError, match="the model is in torch.float16: keep it in float32"):
        model(torch.rand(1, 3, 32, 32).half())


def test_images_that_resampling_rounded_beyond_1_are_taken():
    white = F.interpolate(torch.ones(1, 3, 100, 130), (32, 32), mode="bilinear", antialias=True)
    assert white.max() > 1 and ASTSeg(Config(**SMALL)).eval().segment(white).shape == (1, 32, 32)


def test_the_model_can_be_exported_for_any_size_of_a_batch():
    model = ASTSeg(Config(**SMALL | dict(transformer_layers=1))).eval()
    images = torch.rand(2, 3, 32, 32)
    batch = torch.export.Dim("batch", min=1, max=64)
    with torch.no_grad():
        exported = torch.export.export(model, (images,), dynamic_shapes=({0: batch},)).module()
        images = torch.rand(5, 3, 32, 32)
        close(exported(images).weights, model(images).weights)


def test_a_saved_model_loads_with_its_configuration_and_says_the_same(tmp_path):
    model = ASTSeg(Config(**SMALL, anisotropic=False)).eval()
    model.save_pretrained(tmp_path / "model")
    loaded = ASTSeg.from_pretrained(tmp_path / "model").eval()
    assert loaded.config == model.config
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(model(images).reconstruction, loaded(images).reconstruction)


@pytest.mark.parametrize("damage", ["cut", "pointer", "half", "other", "no weights", "no config"])
def test_a_folder_without_a_whole_model_is_refused_in_a_sentence(damage, tmp_path):
    model = ASTSeg(Config(**SMALL, anisotropic=False))
    model.save_pretrained(tmp_path)
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:100_000])
    elif damage == "pointer":
        weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    elif damage == "half":
        tensors = {n: t for n, t in model.state_dict().items() if not n.startswith("background")}
        safetensors.torch.save_file(tensors, weights)
    elif damage == "other":
        ASTSeg(Config(**SMALL)).save_pretrained(tmp_path / "other")  # anisotropic
        os.replace(tmp_path / "other" / "model.safetensors", weights)
    else:
        (weights if damage == "no weights" else config).unlink()
    with pytest.raises(OSError, match=re.escape(f"{tmp_path} holds no whole model (")) as error:
        ASTSeg.from_pretrained(tmp_path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


def test_the_output_under_bf16_autocast_is_fp32_where_it_must_be():
    model = ASTSeg(Config(**SMALL)).eval()
    images = torch.rand(2, 3, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(images)
    for tensor in (output.attention, *output.latents, output.weights, output.reconstruction):
        assert tensor.dtype == torch.float32
    close(output.latents.position, model(images).latents.position, 0.05)
    rounded = output.background.bfloat16().float()
    assert differ(output.background, rounded, 1e-4)  # its sigmoid is finer than bf16


# ---- Section 4.2 ----


def test_reconstruction_loss_by_hand():
    images = torch.zeros(1, 3, 1, 2)
    reconstruction = torch.tensor([[[[0.1, 0.0]], [[-0.2, 0.0]], [[0.3, 0.5]]]])
    # l = 0.6 and 0.5, mean of the squares
    close(astseg.reconstruction_loss(images, reconstruction), (0.36 + 0.25) / 2, 1e-6)


def test_pixel_entropy_loss_by_hand():
    weights = torch.tensor([[[[1.0, 0.5]], [[0.0, 0.5]]]])  # one-hot, and a coin
    close(astseg.pixel_entropy_loss(weights), math.log(2) ** 2 / 2, 1e-6)
    one_hot = torch.tensor([[[[1.0]], [[0.0]]]], requires_grad=True)
    astseg.pixel_entropy_loss(one_hot).backward()
    assert one_hot.grad.isfinite().all()


def test_full_loss_names_its_terms_and_weighs_the_entropy_by_its_warm_up():
    model = ASTSeg(Config(**SMALL, log_alpha_0=0.0)).eval()
    images = torch.rand(1, 3, 32, 32)
    output = model(images)
    entropy = astseg.pixel_entropy_loss(output.weights)
    for step, share in [(0, 0), (5_000, 0.25), (10_000, 1), (99_999, 1)]:
        terms = astseg.full_loss(images, output, step)
        assert list(terms) == ["reconstruction", "entropy"]
        close(terms["reconstruction"], astseg.reconstruction_loss(images, output.reconstruction), 0)
        close(terms["entropy"], share * 1e-2 * entropy, 1e-8)
    close(astseg.full_loss(images, output, 3, 0.5, 6)["entropy"], 0.5 * 0.25 * entropy, 1e-7)
    close(astseg.full_loss(images, output, 0, 0.5, 0)["entropy"], 0.5 * entropy, 1e-7)


def test_the_learning_rate_at_its_corners():
    def rate(step):
        return astseg.learning_rate(step, 4e-5, 125_000, 5_000)

    assert rate(0) == 0
    assert rate(2_500) == pytest.approx(1e-5)  # quadratic
    assert rate(5_000) == rate(112_499) == 4e-5
    assert rate(112_500) == rate(125_000) == pytest.approx(4e-6)
    background = [astseg.learning_rate(s, 2e-3, 2_500, decay_at=0.8) for s in (1, 1_999, 2_000)]
    assert background == pytest.approx([2e-3, 2e-3, 2e-4])
    linear = [astseg.learning_rate(s, 1.0, 100, 0, 0.6, "linear") for s in (0, 59, 60, 70, 99, 100)]
    assert linear == pytest.approx([1, 1, 1, 0.75, 0.025, 0])
    never = [astseg.learning_rate(s, 1.0, 100, 0, 1.0, "linear") for s in (0, 99)]
    assert never == [1, 1]


# ---- Section 5.1: metrics ----


def test_ari_fg_is_that_of_scikit_learn_over_the_foreground():
    target, predicted = torch.randint(4, (20, 6, 6)), torch.randint(5, (20, 6, 6))
    predicted[:10] = torch.where(torch.rand(10, 6, 6) < 0.8, target[:10] + 1, predicted[:10])
    ours = astseg.adjusted_rand_index(target, predicted)
    for t, p, score in zip(target, predicted, ours):
        assert abs(adjusted_rand_score(t[t > 0], p[t > 0]) - score.item()) < 1e-9


def exhaustive_mean_iou(target, predicted, labels):
    """The best of all one-to-one matchings, and its score with and without the background."""
    best = (-1.0, 0.0)
    for order in itertools.permutations(range(labels)):
        total, pairs, background = 0.0, 0, 0.0
        for t, p in enumerate(order):
            union = ((target == t) | (predicted == p)).sum().item()
            iou = ((target == t) & (predicted == p)).sum().item() / union if union else 0.0
            total, pairs = total + iou, pairs + (union > 0)
            background = iou if t == 0 else background
        scores = total / pairs, (total - background) / (pairs - 1)
        best = max(best, (round(total, 12), -pairs, *scores))
    return best[2:]


def test_mean_iou_is_the_best_of_all_matchings():
    target, predicted = torch.randint(4, (2, 10, 5, 5))
    predicted[:5] = torch.where(torch.rand(5, 5, 5) < 0.7, (target[:5] + 1) % 4, predicted[:5])
    ours, ours_foreground = astseg.mean_iou(target, predicted)
    for i in range(10):
        best = exhaustive_mean_iou(target[i], predicted[i], 4)
        assert (ours[i].item(), ours_foreground[i].item()) == pytest.approx(best)


def labels_of(drawing):
    return torch.tensor([[int(c) for c in row] for row in drawing.split()])[None]


CASES = {  # target, prediction, mIoU, mIoU-FG, ARI-FG, MSC-FG
    "perfect, other names": ("0011 0011 2200 2200", "0033 0033 1100 1100", 1, 1, 1, 1),
    "nothing found": ("0011 0011 2200 2200", "0000 0000 0000 0000", 0.5 / 3, 0, 0, 0.25),
    "one missing": ("0011 0011 2200 2200", "0011 0011 0000 0000", 5 / 9, 0.5, 1, 2 / 3),
    "one split": ("0011 0011 0000 0000", "0012 0012 0000 0000", (1 + 0.5) / 3, 0.25, 0, 0.5),
    "two merged": ("0011 0011 0022 0022", "0011 0011 0011 0011", (1 + 0.5) / 3, 0.25, 0, 0.5),
    "an extra one": ("0011 0011 0000 0000", "3011 0011 0000 0000", (11 / 12 + 1) / 3, 0.5, 1, 1),
    "the last label only": ("3333 3333 0000 0000", "0000 0000 3333 3333", 1, 1, 1, 1),
    "no background at all": ("1122 1122 1122 1122", "3311 3311 3311 3311", 1, 1, 1, 1),
    "no object, none found": ("0000 0000 0000 0000", "0000 0000 0000 0000", 1, 1, 1, 0),
    "no object, one found": ("0000 0000 0000 0000", "1000 0000 0000 0000", 15 / 16 / 2, 0, 1, 0),
    "a label above K": ("0055 0055 0000 0000", "0011 0011 0000 0000", 1, 1, 1, 1),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_metrics_of_images_drawn_by_hand(name):
    target, predicted, *expected = CASES[name]
    target, predicted = labels_of(target), labels_of(predicted)
    ours = (
        *astseg.mean_iou(target, predicted),
        astseg.adjusted_rand_index(target, predicted),
        astseg.segmentation_covering(target, predicted),
    )
    assert [value.item() for value in ours] == pytest.approx(expected)
    assert all(value.shape == (1,) and value.dtype == torch.float64 for value in ours)


def test_covering_is_the_best_iou_of_each_object_not_weighted_by_its_size():
    target, predicted = torch.randint(4, (2, 10, 6, 6))
    for t, p, score in zip(target, predicted, astseg.segmentation_covering(target, predicted)):
        best = [
            max(((t == k) & (p == m)).sum().item() / ((t == k) | (p == m)).sum().item()
                for m in p.unique())
            for k in t.unique() if k > 0
        ]  # fmt: skip
        assert score.item() == pytest.approx(sum(best) / len(best))


def test_more_objects_than_slots_cost_mean_iou():
    target = torch.arange(6).repeat(6, 1)[None]  # five objects
    predicted = target * (target < 4)  # three slots found three of them
    assert astseg.mean_iou(target, predicted)[0].item() == pytest.approx((6 / 18 + 3) / 6)


def test_label_maps_that_do_not_fit_are_refused():
    zeros = torch.zeros(1, 4, 4).long()
    for wrong, message in [
        (torch.zeros(1, 4, 5).long(), "a label map is (1, 4, 5), its target (1, 4, 4)"),
        (zeros * 0.9, "a label map is torch.float32 (1, 4, 4): use tensors (B, H, W) of integers"),
        (zeros[0], "a label map is torch.int64 (4, 4)"),
        (zeros - 1, "of integers from 0"),
        (zeros[:0], "a label map is torch.int64 (0, 4, 4)"),
        (zeros.numpy(), "a label map is int64 (1, 4, 4): use tensors"),
        ([[0]], "a label map is list (1, 1): use tensors"),
    ]:
        with pytest.raises(ValueError, match=re.escape(message)):
            astseg.mean_iou(zeros, wrong)


def test_labels_of_any_size_and_kind_count_as_one_each():
    target = torch.tensor([[[0, 26_001], [7, 7]]])
    assert astseg.mean_iou(target, target // 5)[0].item() == 1
    assert astseg.mean_iou(target.to(torch.uint16), target.int())[0].item() == 1
    target = torch.randint(25, (2, 8, 8), dtype=torch.uint8)
    assert astseg.mean_iou(target, target)[0].tolist() == [1, 1]
    assert astseg.adjusted_rand_index(target, target).tolist() == [1, 1]


# ---- The embedded data set ----


def test_shapes_are_a_function_of_the_seed_and_differ_from_image_to_image():
    a, b, c = astseg.draw_shapes(12, 1), astseg.draw_shapes(12, 1), astseg.draw_shapes(12, 2)
    assert torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels)
    assert not torch.equal(a.images, c.images)
    assert a.images.shape == (12, 3, 64, 64) and a.images.dtype == torch.uint8
    assert a.labels.shape == (12, 64, 64) and a.labels.dtype == torch.uint8
    background = torch.stack([image[:, label == 0].float().mean(1) for image, label in zip(*a)])
    assert background.std(0).min() > 2  # backgrounds differ


def test_shapes_show_two_to_four_objects_of_which_none_is_hidden_and_some_overlap():
    labels = astseg.draw_shapes(300, 3, 48).labels
    areas = torch.stack([(labels == k).sum((1, 2)) for k in range(1, 5)], dim=1)
    assert labels.max() == 4 and (areas > 0).sum(1).unique().tolist() == [2, 3, 4]
    assert areas[areas > 0].min() > 25
    touching = (
        (labels[:, :, 1:] != labels[:, :, :-1]) & (labels[:, :, 1:] > 0) & (labels[:, :, :-1] > 0)
    )
    assert touching.any(2).any(1).float().mean() > 0.2


def test_labels_are_where_objects_are_drawn():
    shape = (3, 48, 48)
    for n in range(20):
        dark, labels = astseg.draw_scene(np.zeros(shape), np.random.default_rng(n))
        bright, again = astseg.draw_scene(np.ones(shape), np.random.default_rng(n))
        assert np.array_equal(labels, again)
        wall = np.abs(bright.astype(int) - dark).max(0)  # how much of the wall a pixel shows
        assert (wall[labels > 0] < 160).all() and (wall[labels == 0] > 60).all()
        assert (wall[labels > 0] == 0).mean() > 0.7 and (dark.max(0)[labels > 0] > 0).all()


def test_all_twelve_walls_are_shown_and_are_the_same_in_every_part(monkeypatch):
    walls = [astseg.draw_wall(n, 32) for n in range(12)]
    assert all(wall.shape == (3, 32, 32) and 0 <= wall.min() < wall.max() <= 1 for wall in walls)
    assert all(differ(torch.tensor(a - b), 0, 0.1) for a, b in itertools.combinations(walls, 2))
    assert np.array_equal(walls[3], astseg.draw_wall(3, 32))
    assert all(wall.std((1, 2)).max() > 0.05 for wall in walls)  # textured
    monkeypatch.setattr(astseg, "draw_wall", lambda number, size: np.array(number))
    monkeypatch.setattr(astseg, "draw_scene", lambda wall, random: (wall, wall))
    for part in (1, 2, 3):
        counts = astseg.draw_shapes(600, part, 32).images.bincount()
        assert len(counts) == 12 and counts.min() > 20


def test_colours_tell_objects_neither_from_each_other_nor_from_the_wall():
    data, scores = astseg.draw_shapes(12, 3, 48), []
    for image, label in zip(data.images, data.labels):
        clusters = int(label.max()) + 1
        found = KMeans(clusters, n_init=2, random_state=0).fit_predict(image.flatten(1).T)
        found = torch.tensor(found).view(1, 48, 48).long()
        scores.append(astseg.mean_iou(label[None].long(), found)[0].item())
    assert np.mean(scores) < 0.6


# ---- train.py: the curriculum, and the loop step by step ----


def test_the_schedule_of_each_scenario():
    t = train.Training()
    background = ("background", 0, 500_000, 128)
    both = [("foreground", 0, 30_000, 64), ("joint", 30_000, 125_000, 64)]
    assert train.curriculum(t) == [background, *both]
    assert train.curriculum(replace(t, scenario="BT")) == [("joint", 0, 125_000, 64)]
    frozen = train.curriculum(replace(t, scenario="frozen"))
    assert frozen == [background, ("foreground", 0, 125_000, 64)]
    assert train.curriculum(replace(t, phase2_steps=0)) == [background, ("joint", 0, 125_000, 64)]


def test_each_epoch_shows_each_image_once():
    seen = torch.cat([train.batch_indices(step, 4, 22, 7) for step in range(10)])
    assert len(seen[:20].unique()) == len(seen[20:].unique()) == 20  # 5 batches of 4 of 22
    assert not torch.equal(seen[:20], seen[20:])
    assert torch.equal(train.batch_indices(7, 4, 22, 7), seen[28:32])
    assert not torch.equal(train.batch_indices(0, 4, 22, 8), seen[:4])


def test_processes_share_a_batch(monkeypatch):
    whole = train.batch_indices(3, 8, 30, 0)
    monkeypatch.setattr(train, "RANKS", 2)
    shares = []
    for rank in range(2):
        monkeypatch.setattr(train, "RANK", rank)
        shares.append(train.batch_indices(3, 8, 30, 0))
    assert torch.equal(torch.stack(shares, dim=1).flatten(), whole)


@pytest.mark.parametrize("flip", [False, True])
def test_flip_mirrors_an_image_and_its_background_alike(flip):
    images = torch.randint(0, 256, (40, 3, 32, 32), dtype=torch.uint8)
    training = train.Training(flip=flip)
    found, behind = train.load_batch([images, 255 - images], 3, 40, training, "cpu")
    index = train.batch_indices(3, 40, 40, training.seed)
    straight = ((found * 255).round() == images[index]).all(3).all(2).all(1)
    mirrored = ((found * 255).round() == images[index].flip(3)).all(3).all(2).all(1)
    assert (straight ^ mirrored).all() and mirrored.any() == flip and straight.any()
    close(found + behind, torch.ones(40, 3, 32, 32))


def test_memorised_backgrounds_are_those_of_the_autoencoder_at_8_bits():
    model, images = ASTSeg(Config(**SMALL)), astseg.draw_shapes(105, 0, 32).images
    modes = []  # a fork's background may have dropout or batch norm
    model.background.register_forward_hook(lambda part, *_: modes.append(part.training))
    memory = train.memorise_backgrounds(model.train(), images)
    assert modes == [False, False]
    live = model.background(images / 255)[0]
    assert memory.dtype == torch.uint8 and memory.shape == images.shape
    close(memory / 255, live.detach(), 0.5 / 255 + 1e-6)


# The factor on the learning rate of each part, by the beginning of its parameters' names.
PARTS = {
    "generator.": None,
    "encoder.": "refinement_lr_factor",
    "renderer.glimpse_generator.": "glimpse_lr_factor",
    "renderer.log_alpha_0": "alpha_0_lr_factor",
    "background.": None,
}
LOOP = replace(
    train.PRESETS["shapes"], height=32, width=32, slots=3, dim_transformer=64, dim_feedforward=32,
    transformer_layers=1, background_width=0.1, log_alpha_0=0.5, dropout=0.0, device="cpu",
    background_steps=5, background_batch=4, background_lr=3e-3, background_warmup=2,
    steps=7, phase2_steps=4, batch=3, lr=4e-3, warmup=3, decay_at=0.8, decay="step",
    entropy_weight=2.0, entropy_warmup=5,
    refinement_lr_factor=0.5, alpha_0_lr_factor=0.25, glimpse_lr_factor=2.0,
    log_every=2, evaluate_every=3, checkpoint_every=4,
)  # fmt: skip


class Loop:
    """A run of `train.train`, its weights and random state before the first and after each step."""

    def __init__(self, training, folder, monkeypatch, frozen=()):
        self.training, self.folder = training, folder
        self.data = astseg.draw_shapes(11, 1, 32)
        self.model = train.build_model(training)
        for name in frozen:
            self.model.get_submodule(name).requires_grad_(False)
        self.states = [self.state()]
        clock = SimpleNamespace(time=lambda: float(len(self.states)))  # a step takes a second
        monkeypatch.setattr(train, "time", clock)
        hook = register_optimizer_step_post_hook(lambda *_: self.states.append(self.state()))
        try:
            train.train(training, folder, self.model, self.data, self.data, self.data)
        finally:
            hook.remove()
        self.log = [json.loads(row) for row in (folder / "log.jsonl").read_text().splitlines()]

    def state(self):
        return deepcopy(self.model.state_dict()), torch.get_rng_state()

    def by_hand(self, phases):
        """(phase, step, rate, terms of the loss, state dict) of each step, computed from its own
        images, number and settings, and from the weights that the loop had before it."""
        t, model, images = self.training, self.model, self.data.images
        names = [name for name, p in model.named_parameters() if p.requires_grad]
        states = iter(self.states)
        for phase, first, stop in phases:
            weights, random = next(states)
            states = itertools.chain([(weights, random)], states)
            model.load_state_dict(weights)
            behind = model.eval().background(images / 255)[0].mul(255).round() / 255
            moments = defaultdict(lambda: (0.0, 0.0))
            model.train()
            for number, step in enumerate(range(first, stop), start=1):
                weights, random = next(states)
                model.load_state_dict(weights)
                torch.set_rng_state(random)
                if phase == "background":
                    x = images[train.batch_indices(step, 4, 11, t.seed)] / 255
                    terms = {"background": astseg.robust_background_loss(x, *model.background(x))}
                    rate = 3e-3 * min(1, step / 2) ** 2
                    rate *= 1 if step < 4 else 0.1  # a tenth from 80 % of 5 on
                    (beta1, beta2), eps = (0.9, 0.999), 1e-8
                else:
                    index = train.batch_indices(step, 3, 11, t.seed)
                    x = images[index] / 255
                    output = model(x, behind[index].detach()) if phase == "foreground" else model(x)
                    weight = t.entropy_weight * min(1, step / 5) ** 2
                    terms = {
                        "reconstruction": astseg.reconstruction_loss(x, output.reconstruction),
                        "entropy": weight * astseg.pixel_entropy_loss(output.weights),
                    }
                    rate = 4e-3 * min(1, (step + 1) / 3) ** 2
                    if t.decay == "step":
                        rate *= 1 if step + 1 < 0.8 * 7 else 0.1
                    else:  # from 80 % of 7, at 5.6, to 0 at 7
                        rate *= min(1, (7 - (step + 1)) / 1.4)
                    (beta1, beta2), eps = (0.9, 0.98), 1e-9
                tensors = [model.get_parameter(name) for name in names]
                gradients = torch.autograd.grad(sum(terms.values()), tensors, allow_unused=True)
                expected = deepcopy(model.state_dict())  # with the new statistics of batch norm
                for name, g in zip(names, gradients):
                    (part,) = (part for part in PARTS if name.startswith(part))
                    if phase != "joint" and (part == "background.") != (phase == "background"):
                        assert g is None or phase == "foreground", name
                        continue
                    m = beta1 * moments[name][0] + (1 - beta1) * g
                    v = beta2 * moments[name][1] + (1 - beta2) * g**2
                    moments[name] = m, v
                    m, v = m / (1 - beta1**number), v / (1 - beta2**number)
                    factor = getattr(t, PARTS[part]) if PARTS[part] else 1
                    expected[name] = weights[name] - rate * factor * m / (v.sqrt() + eps)
                values = {name: term.item() for name, term in terms.items()}
                yield phase, step, rate, values, expected


@pytest.mark.parametrize(
    "change, frozen, phases",
    [
        ({}, (), [("background", 0, 5), ("foreground", 0, 4), ("joint", 4, 7)]),
        (dict(scenario="BT", dropout=0.2, alpha_0_per_pixel=True), (), [("joint", 0, 7)]),
        (dict(scenario="frozen", dropout=0.2), (), [("background", 0, 5), ("foreground", 0, 7)]),
        (dict(entropy_weight=0.0), ["generator"],
         [("background", 0, 5), ("foreground", 0, 4), ("joint", 4, 7)]),
        (dict(decay="linear"), (), [("background", 0, 5), ("foreground", 0, 4), ("joint", 4, 7)]),
    ],
    ids=["CT", "BT", "frozen background", "frozen generator, no entropy", "linear decay"],
)  # fmt: skip
def test_each_step_of_the_loop_is_the_one_computed_by_hand(
    change, frozen, phases, tmp_path, monkeypatch
):
    loop = Loop(replace(LOOP, **change), tmp_path, monkeypatch, frozen)
    rows, losses = iter(loop.log), []
    for n, (phase, step, rate, terms, expected) in enumerate(loop.by_hand(phases), start=1):
        found, _ = loop.states[n]
        before, _ = loop.states[n - 1]
        for name, tensor in expected.items():
            close(found[name], tensor, 5e-7)
            own = phase == "joint" or name.startswith("background.") == (phase == "background")
            if not own or name.startswith(tuple(frozen)):
                known = "running" in name or "batches" in name  # statistics, no weights
                assert known or torch.equal(found[name], before[name]), name
        if phase == "joint":  # (22) teaches the background, but not its prediction of the error
            name = "background.decoder.4.convolution.weight"
            assert torch.equal(found[name][:, 3], before[name][:, 3])
            learns = rate > 0  # all but the last update of a linear fall
            assert differ(found[name][:, :3], before[name][:, :3], 1e-4) == learns
        losses.append(terms | {"loss": sum(terms.values())})
        stop = {p: last for p, _, last in phases}[phase]
        judge = (step + 1) % 3 == 0 or step + 1 == stop
        if judge or (step + 1) % 2 == 0:
            row = next(rows)
            assert (row["phase"], row["step"], row["lr"]) == (phase, step + 1, pytest.approx(rate))
            for name in losses[0]:
                mean = sum(values[name] for values in losses) / len(losses)
                assert row[name] == pytest.approx(mean, rel=1e-4, abs=1e-7), name
            assert ("entropy" in row, "mIoU" in row) == (
                phase != "background", judge and phase != "background"
            )  # fmt: skip
            if "mIoU" in row:
                shown = deepcopy(loop.model)
                shown.load_state_dict(found)
                metrics = train.evaluate(shown, loop.data)
                assert {name: row[name] for name in metrics} == pytest.approx(metrics, rel=1e-4)
            assert row["alpha_0"] == pytest.approx(found["renderer.log_alpha_0"].exp().item())
            assert row["images/s"] == (4 if phase == "background" else 3)  # a step a second
            assert row["left"] == stop - step - 1
            losses = []
    assert next(rows, None) is None and n == len(loop.states) - 1
    for folder_or_file in ("model", "checkpoint.pt"):  # the last step saves what it leaves
        path = tmp_path / folder_or_file
        saved = ASTSeg.from_pretrained(path).state_dict() if path.is_dir() else None
        saved = saved or torch.load(path, weights_only=True)["model"]
        assert all(torch.equal(saved[name], tensor) for name, tensor in found.items())


@pytest.mark.parametrize(
    "phase, parts",
    [("background", {"background"}), ("foreground", {"generator", "encoder", "renderer"}),
     ("joint", {"background", "generator", "encoder", "renderer"})],
)  # fmt: skip
def test_an_optimiser_holds_what_its_phase_trains_and_nothing_twice(phase, parts):
    model = ASTSeg(Config(**SMALL))
    groups = train.make_optimizer(model, phase, train.Training()).param_groups
    held = [p for group in groups for p in group["params"]]
    expected = [p for name, part in model.named_children() if name in parts
                for p in part.parameters()]  # fmt: skip
    assert {*map(id, held)} == {*map(id, expected)} and len(held) == len(expected)


def test_no_graph_of_a_step_outlives_its_phase(tmp_path, monkeypatch):
    """CUDA graphs cannot record a phase while some of the phase before is left."""
    terms = []
    paper_loss, accelerate = astseg.full_loss, train.accelerate

    def kept(*arguments):
        loss = paper_loss(*arguments)
        terms.extend(weakref.ref(term) for term in loss.values())
        return loss

    def recorded(*arguments):
        assert all(term() is None for term in terms)
        return accelerate(*arguments)

    monkeypatch.setattr(astseg, "full_loss", kept)
    monkeypatch.setattr(train, "accelerate", recorded)
    Loop(LOOP, tmp_path, monkeypatch)
    assert len(terms) == 14


def test_a_parameter_in_no_group_is_refused_by_name():
    model = ASTSeg(Config(**SMALL))
    model.extra = torch.nn.Linear(2, 2, bias=False)
    with pytest.raises(ValueError, match=re.escape("no optimiser holds ['extra.weight']")):
        train.make_optimizer(model, "background", train.Training())
    model.extra.requires_grad_(False)
    train.make_optimizer(model, "background", train.Training())


class SeenDevices(TorchDispatchMode):
    """Collects the kind of device on which each operation puts its results."""

    def __init__(self):
        super().__init__()
        self.kinds = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        self.kinds |= {x.device.type for x in tree_leaves(results) if isinstance(x, torch.Tensor)}
        return results


@pytest.mark.parametrize("generator", ["segformer", "unet"])
def test_the_model_makes_nothing_on_the_cpu_that_a_cuda_graph_could_not_copy(
    generator, monkeypatch
):
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # meta has none
    model = ASTSeg(Config(**SMALL, generator=generator, unet_width=0.1)).train().to("meta")
    images = torch.empty(2, 3, 32, 32, device="meta")
    with SeenDevices() as seen:
        sum(astseg.full_loss(images, model(images), 1).values()).backward()
        astseg.robust_background_loss(images, *model.background(images)).backward()
    assert seen.kinds == {"meta"}


def test_a_step_is_one_graph_for_the_compiler():
    training = replace(train.PRESETS["shapes"], **SMALL | dict(transformer_layers=1))
    model = train.build_model(training)
    images = torch.rand(2, 3, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        output = torch.compile(model, backend="eager", fullgraph=True)(images)
    assert output.weights.shape == (2, 4, 32, 32)


# ---- train.py: runs ----

TINY = (
    "--height 32 --width 32 --slots 4 --dim_transformer 64 --transformer_layers 1 "
    "--train_images 40 --background_steps 6 --steps 12 --phase2_steps 6 --background_batch 4 "
    "--batch 4 --warmup 2 --log_every 2 --evaluate_every 6 --checkpoint_every 4"
).split()
DRAW = astseg.draw_shapes


def draw_few(count, seed, size):
    """40 images where a run draws hundreds for validation and test."""
    return DRAW(min(count, 40), seed, size)


def run_tiny(folder, *more):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(astseg, "draw_shapes", draw_few)
        train.main([*TINY, "--output", str(folder), *map(str, more)])
    return json.loads((folder / "metrics.json").read_text())


def command(monkeypatch, *arguments):
    """What a command line asks for: the training that would start, and its output."""
    asked = []
    monkeypatch.setattr(train, "start", lambda *given, **_: asked.append(given))
    monkeypatch.setattr(train, "refuse_taken", lambda folder: None)  # runs/shapes may be there
    train.main(arguments)
    return asked[0]


def weights_of(folder):
    return (folder / "model" / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    return folder, run_tiny(folder)


def test_a_run_leaves_all_that_it_promises(whole_run):
    folder, metrics = whole_run
    assert set(metrics) == {*train.METRICS, "images", "seconds", "seed"}
    assert all(type(value) in (int, float) for value in metrics.values())
    assert Image.open(folder / "training.gif").n_frames == 2
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6, 2, 4, 6, 8, 10, 12]
    pictures = {"segmentation.png", "slots.png", "curves.png", "training.gif", "backgrounds.png"}
    files = {"settings.json", "log.jsonl", "metrics.json", "checkpoint.pt", "model", "training"}
    assert {path.name for path in folder.iterdir()} == pictures | files | {".lock"}
    for name in pictures:
        assert Image.open(folder / name).size[0] > 300
    assert train.read_settings(folder) == replace(
        train.PRESETS["shapes"], height=32, width=32, slots=4, dim_transformer=64,
        transformer_layers=1, train_images=40, background_steps=6, steps=12, phase2_steps=6,
        background_batch=4, batch=4, warmup=2, log_every=2, evaluate_every=6, checkpoint_every=4,
        cache=os.path.abspath("cache"),
    )  # fmt: skip


def test_a_run_is_evaluated_again_and_several_have_mean_and_deviation(
    whole_run, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(astseg, "draw_shapes", draw_few)
    folder, metrics = whole_run
    shutil.copytree(folder / "model", tmp_path / "other" / "model")
    shutil.copy(folder / "settings.json", tmp_path / "other")
    model = ASTSeg.from_pretrained(folder / "model")
    model.renderer.log_alpha_0.data.fill_(-3.0)
    model.save_pretrained(tmp_path / "other" / "model")
    train.main(["evaluate", str(folder), str(tmp_path / "other")])
    lines = capsys.readouterr().out.splitlines()[-5:]
    assert lines[0].split() == list(train.METRICS)
    rows = [line.split() for line in lines[1:]]
    assert [row[0] for row in rows] == ["run", "other", "mean", "deviation"]
    read = [json.loads((f / "evaluation-shapes-test.json").read_text())
            for f in (folder, tmp_path / "other")]  # fmt: skip
    assert all(read[0][name] == pytest.approx(metrics[name]) for name in train.METRICS)
    for column, name in enumerate(train.METRICS, start=1):
        a, b = (100 ** (name != "MSE") * row[name] for row in read)
        expected = [a, b, (a + b) / 2, abs(a - b) / math.sqrt(2)]
        assert [float(row[column]) for row in rows] == pytest.approx(expected, abs=0.006)
    train.main(["evaluate", str(folder), "--part", "val"])
    assert (folder / "evaluation-shapes-val.json").exists()


def test_evaluation_is_the_mean_over_the_images_of_what_each_shows():
    model = ASTSeg(Config(**SMALL, log_alpha_0=-2.0))
    model.encoder.refinement = Spy(shift=1.0)  # some positions are clamped
    data = astseg.draw_shapes(53, 0, 32)  # more than one batch of 50
    expected = defaultdict(list)
    for image, label in zip(*data):
        x = image[None] / 255
        output = model.eval()(x)
        found = output.weights.argmax(1)
        expected["MSE"].append(((x - output.reconstruction) ** 2).sum().item())
        expected["foreground"].append((found > 0).sum().item() / 32**2)
        expected["active"].append(len({*found.flatten().tolist()} - {0}))
        at_border = [max(abs(v) for v in p) == 1 for p in output.latents.position[0].tolist()]
        expected["clamped"].append(sum(at_border) / 3)
        expected["mIoU"].append(astseg.mean_iou(label[None], found)[0].item())
        expected["mIoU-FG"].append(astseg.mean_iou(label[None], found)[1].item())
        expected["ARI-FG"].append(astseg.adjusted_rand_index(label[None], found).item())
        expected["MSC-FG"].append(astseg.segmentation_covering(label[None], found).item())
    assert 0 < np.mean(expected["clamped"]) < 1 and 0 < np.mean(expected["foreground"]) < 1
    for count in (None, 7, 52):
        found = train.evaluate(model.train(), data, count)
        means = {name: np.mean(values[:count]) for name, values in expected.items()}
        assert found == pytest.approx(means, rel=1e-4)
    assert "mIoU" not in train.evaluate(model, data._replace(labels=None), 3)


DRIVER = """
import os, signal, sys
sys.path.insert(0, {here!r})
import astseg, train
draw, rate = astseg.draw_shapes, train.set_learning_rate
def killed(optimizer, phase, step, training):
    if (phase, step) == ("foreground", 5):
        os.kill(os.getpid(), signal.SIGKILL)
    return rate(optimizer, phase, step, training)
astseg.draw_shapes = lambda count, *rest: draw(min(count, 40), *rest)
train.set_learning_rate = killed
train.main(sys.argv[1:])
"""


def assert_resumes_to_the_same_bits(folder, whole_run):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(astseg, "draw_shapes", draw_few)
        train.main(["resume", str(folder)])
    ours = json.loads((folder / "metrics.json").read_text())
    assert ours | {"seconds": 0} == whole_run[1] | {"seconds": 0}
    assert weights_of(folder) == weights_of(whole_run[0])
    timeless = [
        [{k: v for k, v in json.loads(line).items() if k not in ("images/s", "left")}
         for line in (f / "log.jsonl").read_text().splitlines()]
        for f in (folder, whole_run[0])
    ]  # fmt: skip
    steps = [[(row["phase"], row["step"]) for row in rows] for rows in timeless]
    assert steps[0] == steps[1]


def test_a_killed_run_resumes_to_bit_identical_results(tmp_path, whole_run):
    script = DRIVER.format(here=str(HERE))
    line = [sys.executable, "-c", script, *TINY, "--output", str(tmp_path / "run")]
    assert subprocess.run(line, stdout=subprocess.DEVNULL).returncode == -signal.SIGKILL
    assert_resumes_to_the_same_bits(tmp_path / "run", whole_run)


@pytest.mark.parametrize("moment", [("background", 5), ("foreground", 1), ("joint", 11)])
def test_an_interrupted_run_says_what_was_saved_is_usable_and_resumes(
    moment, tmp_path, whole_run, monkeypatch
):
    rate = train.set_learning_rate

    def interrupt(optimizer, phase, step, training):
        if (phase, step) == moment:
            raise KeyboardInterrupt
        return rate(optimizer, phase, step, training)

    with monkeypatch.context() as patch:
        patch.setattr(train, "set_learning_rate", interrupt)
        words = f"interrupted; python train.py resume {tmp_path}/run goes on from its last checkp"
        with pytest.raises(SystemExit, match=words):
            run_tiny(tmp_path / "run")
        patch.setattr(astseg, "draw_shapes", draw_few)
        train.main(["evaluate", str(tmp_path / "run")])
        with pytest.raises(ValueError, match="run holds a run: go on by `train.py resume"):
            train.main([*TINY, "--output", str(tmp_path / "run")])
    assert_resumes_to_the_same_bits(tmp_path / "run", whole_run)


def test_a_run_that_is_interrupted_before_its_first_checkpoint_says_so(tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "set_learning_rate", interrupt)
    with pytest.raises(SystemExit, match="resume .*/run begins anew: nothing was saved yet"):
        run_tiny(tmp_path / "run")
    with pytest.raises(ValueError, match="run has no model yet: a run saves one with its first"):
        train.main(["evaluate", str(tmp_path / "run")])


def test_a_folder_belongs_to_one_run_at_a_time(whole_run):
    with FileLock(whole_run[0] / ".lock"):
        with pytest.raises(ValueError, match="belongs to a run that is going on"):
            train.main(["resume", str(whole_run[0])])


def test_a_finished_run_prints_its_table_again_though_its_pictures_are_gone(
    whole_run, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(astseg, "draw_shapes", draw_few)
    shutil.copytree(whole_run[0], tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "training")
    train.main(["resume", str(tmp_path / "run")])
    table = f"AST-Seg, seed 0{100 * whole_run[1]['mIoU']:15.2f}"
    assert table in capsys.readouterr().out
    monkeypatch.setattr(train, "picture_rows", None)  # results come first
    with pytest.raises(TypeError):
        train.main(["resume", str(tmp_path / "run")])
    assert table in capsys.readouterr().out


TOGETHER = """
import runpy, sys
sys.path.insert(0, {here!r})
import astseg, torch
draw = astseg.draw_shapes
astseg.draw_shapes = lambda count, *rest: draw(min(count, 40), *rest)
astseg.GENERATORS["plain"] = lambda channels, config: torch.nn.Conv2d(3, channels, 8, 4, 2)
torch.optim.Adam = lambda groups, **options: torch.optim.SGD(groups, lr=1.0)
runpy.run_path({here!r} + "/train.py", run_name="__main__")
"""


def test_two_processes_train_as_one_in_all_three_phases(tmp_path, monkeypatch):
    """Exactly but for rounding, with a generator without batch norm, whose statistics are those of
    a process on a CPU, and with plain gradient descent, since Adam turns rounding into steps."""
    flags = "--generator plain --dropout 0 --background_steps 3 --steps 6 --phase2_steps 3".split()
    flags += "--lr 0.2 --background_lr 0.5 --background_warmup 0".split()
    flags += "--decay_at 0.65 --log_alpha_0 1".split()
    (tmp_path / "driver.py").write_text(TOGETHER.format(here=str(HERE)))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    output = ["--output", str(tmp_path / "two")]
    line = [*launcher, str(tmp_path / "driver.py"), *TINY, *flags, *output]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count("phase 2 of 3") == 1, done.stderr[-2000:]
    assert "on cpu, processes: 2, output: " in done.stdout
    plain = {"plain": lambda channels, config: torch.nn.Conv2d(3, channels, 8, 4, 2)}
    monkeypatch.setattr(astseg, "GENERATORS", astseg.GENERATORS | plain)  # as a fork's own
    monkeypatch.setattr(torch.optim, "Adam", lambda groups, **_: torch.optim.SGD(groups, lr=1.0))
    run_tiny(tmp_path / "one", *flags)
    start = train.build_model(train.read_settings(tmp_path / "one")).state_dict()
    one, two = (torch.load(tmp_path / n / "checkpoint.pt")["model"] for n in ("one", "two"))
    assert one.keys() == two.keys() == start.keys()
    moved = {name.split(".")[0] for name in one if differ(one[name], start[name], 1e-3)}
    assert moved == {"background", "generator", "encoder", "renderer"}
    for name in one:
        close(two[name], one[name], 1e-5)


# ---- train.py: what each setting changes ----


def test_each_ablation_of_table_4_changes_what_it_says(monkeypatch):
    def model_of(*flags):
        training, _ = command(monkeypatch, *TINY, *flags)
        return train.build_model(training).eval(), training

    images = torch.rand(2, 3, 32, 32)
    full, training = model_of("--anisotropic")
    output = full(images)

    model, _ = model_of("--no-transformer")
    assert parameters(model.encoder) == 0
    maps = model.generator(images)
    columns = torch.cat((model.encoder(maps)[2], model(images).latents.z_what), dim=2)
    assert torch.equal(columns[..., :2], model(images).latents.position)  # nothing between them

    model, _ = model_of("--slots", "5")
    assert model(images).weights.shape == (2, 6, 32, 32)

    model, _ = model_of("--generator", "unet", "--unet_width", "0.1")
    assert output.attention.shape == (2, 4, 8, 8)
    assert model(images).attention.shape == (2, 4, 32, 32)

    model, _ = model_of()
    assert torch.equal(*model(images).latents.scale.unbind(2))
    assert differ(*output.latents.scale.unbind(2))

    model, t = model_of("--entropy_weight", "0")
    for weight, same in ((t.entropy_weight, True), (training.entropy_weight, False)):
        terms = astseg.full_loss(images, model(images), 10**6, weight)
        (all_,) = torch.autograd.grad(
            sum(terms.values()), model.renderer.log_alpha_0, retain_graph=True
        )
        (one,) = torch.autograd.grad(terms["reconstruction"], model.renderer.log_alpha_0)
        assert torch.equal(all_, one) == same

    slots = torch.randn(1, 4, 64)
    for flag, same in (("0", True), ("0.1", False)):
        model, _ = model_of("--dropout", flag, "--refinement_start", "stock")
        model.train()
        assert torch.equal(model(images).attention, model(images).attention) == same
        layer = model.encoder.refinement.transformer.layers[0]
        assert torch.equal(layer(slots), layer(slots)) == same

    for start, same in (("identity", True), ("stock", False)):
        model, _ = model_of("--refinement_start", start)
        slots = 0.1 * torch.randn(1, 4, model.encoder.refinement.embedding.in_features)
        assert differ(model.encoder.refinement(slots), slots, 0.05) != same

    for flags, reached in (((), False), (["--alpha_0_per_pixel"], True)):
        model, _ = model_of(*flags)
        sum(astseg.full_loss(images, model(images), 9).values()).backward()
        assert (model.renderer.log_alpha_0_map.grad is not None) == reached


def test_pretrained_loads_the_backbone_and_nothing_else_changes(tmp_path, monkeypatch):
    stored = save_segformer(tmp_path / "mit", "tiny").segformer.state_dict()
    training, _ = command(monkeypatch, *TINY, "--pretrained", str(tmp_path / "mit"))
    loaded = train.build_model(training).generator.segformer.segformer
    assert all(torch.equal(tensor, stored[name]) for name, tensor in loaded.state_dict().items())
    with pytest.raises(ValueError, match="the generator unet has no backbone to load: add --pretr"):
        train.build_model(replace(training, generator="unet", unet_width=0.1))
    price = "--pretrained '' starts from random weights; the paper's mIoU is then 61.74 for 79.58"
    with pytest.raises(OSError, match=price):
        train.build_model(replace(training, pretrained=str(tmp_path / "nothing")))


def test_a_model_is_a_function_of_its_seed_and_trains_in_training_mode():
    a, b, c = (train.build_model(replace(LOOP, seed=seed)) for seed in (1, 1, 2))
    assert a.training and all(part.training for part in a.modules())
    same = [torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values())]
    assert all(same) and differ(a.generator.segformer.decode_head.classifier.weight,
                                c.generator.segformer.decode_head.classifier.weight)  # fmt: skip
    assert a.config == Config(**{f.name: getattr(LOOP, f.name) for f in fields(Config)})


def test_processes_have_the_same_weights_and_a_dropout_of_their_own(monkeypatch):
    states = []
    for rank in (0, 1):
        monkeypatch.setattr(train, "RANK", rank)
        model = train.build_model(LOOP)
        states.append((model.encoder.refinement.embedding.weight, torch.get_rng_state()))
    assert torch.equal(states[0][0], states[1][0])
    assert not torch.equal(states[0][1], states[1][1])


def test_data_of_the_embedded_set_are_parts_that_differ():
    parts = train.load_data(replace(LOOP, train_images=20), "train", "val", "test")
    assert [len(part.images) for part in parts] == [20, 200, 500]
    for a, b in itertools.combinations(parts, 2):
        assert not torch.equal(a.images[:20], b.images[:20])
    assert parts[0].images.shape[2:] == (32, 32)


def test_a_loss_that_is_not_finite_stops_the_run_before_it_saves(tmp_path):
    with pytest.raises(FloatingPointError) as error:
        run_tiny(tmp_path, "--lr", "1e30", "--warmup", "0")
    found = r"the loss of phase foreground is (nan|inf) by step \d: start again with a lower --lr$"
    assert re.match(found, str(error.value))
    model = torch.load(tmp_path / "checkpoint.pt")["model"]
    assert all(tensor.isfinite().all() for tensor in model.values())
    row = dict(phase="background", step=7, loss=math.nan)
    with pytest.raises(FloatingPointError, match="nan by step 7: .* lower --background_lr$"):
        train.report(None, None, row, tmp_path, [])


def test_dead_runs_are_named(tmp_path, capsys):
    model = ASTSeg(Config(**SMALL, transformer=False))
    validation = astseg.draw_shapes(4, 0, 32)
    row = dict(phase="joint", step=1, loss=0.0, left=61.0)
    train.report(model, validation, dict(row), tmp_path, [])
    out = capsys.readouterr().out
    assert "warning: no foreground yet: train longer" in out and "clamped at" not in out
    assert "1:01" in out
    model.encoder.refinement = Spy(shift=5.0)
    train.report(model, validation, dict(row), tmp_path, [])
    assert "warning: most positions are clamped" in capsys.readouterr().out


def test_a_short_training_lowers_the_loss_and_wakes_the_foreground(tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(astseg, "draw_shapes", lambda n, *rest: DRAW(min(n, 200), *rest))
        train.main(
            ["--output", str(tmp_path), *"--height 32 --width 32 --train_images 200 --warmup 50 "
             "--background_steps 60 --steps 200 --phase2_steps 180 --decay_at 1 --log_every 20 "
             "--log_alpha_0 1 --lr 1.5e-3 --batch 8 --transformer_layers 1".split()]
        )  # fmt: skip
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["phase"] == "foreground"]
    assert losses[-1] < 0.87 * losses[0]
    assert max(line.get("foreground", 0) for line in lines) > 0.02


# ---- train.py: pictures ----


def test_pictures_show_what_they_are_named():
    model, data = ASTSeg(Config(**SMALL, log_alpha_0=-2.0)), astseg.draw_shapes(4, 0, 32)
    rows, slots = train.picture_rows(model, data, 4)
    images = data.images / 255
    with torch.no_grad():
        output = model.eval()(images)
    palette = train.PALETTE
    assert palette.shape == (256, 3) and palette[0].sum() == 0
    labels = output.weights.argmax(1)
    for b, j, i in itertools.product(range(4), (3, 30), (5, 17)):
        assert torch.equal(rows["true labels"][b, :, j, i], palette[data.labels[b, j, i].long()])
        assert torch.equal(rows["segmentation"][b, :, j, i], palette[labels[b, j, i]])
    assert torch.equal(rows["input"], images)
    assert torch.equal(rows["reconstruction"], output.reconstruction)
    assert torch.equal(rows["background"], output.background)
    assert list(slots) == [f"{n} {b}" for b in (1, 2, 3) for n in ("attention", "glimpse", "layer")]
    for b in range(3):
        attention = slots[f"attention {b + 1}"]
        glimpse = slots[f"glimpse {b + 1}"]
        layer = slots[f"layer {b + 1}"]
        assert torch.equal(attention[0], images[b])
        assert torch.equal(glimpse[0], output.background[b])
        assert torch.equal(layer[0], output.reconstruction[b])
        for k in range(3):
            x, y = (output.attention_position[b, k] + 1) / 2 * 31  # pixels, as (12) counts
            spot = (attention[k + 1] == torch.tensor([1.0, 0, 0])[:, None, None]).all(0).nonzero()
            close(spot.float().mean(0), torch.stack((y, x)), 0.6)
            shade = attention[k + 1][:, 0, 0] * output.attention[b, k].max()
            close(shade, output.attention[b, k, 0, 0].expand(3))
            color, mask = output.glimpses[b, k, :3], output.glimpses[b, k, 3]
            close(glimpse[k + 1], 1 - mask + mask * color)
            weight = output.weights[b, k + 1]
            close(layer[k + 1], 1 - weight + weight * output.layers[b, k])


def test_a_grid_holds_a_row_of_pictures_for_each_name(tmp_path):
    rows = {"one": torch.rand(2, 3, 8, 10), "two": torch.rand(2, 3, 8, 10)}
    train.picture_grid(rows, tmp_path / "grid.png")
    picture = np.array(Image.open(tmp_path / "grid.png"))
    assert picture.shape == (2 * 2 * 10, 2 * (2 * 12 + 55), 3)
    for n, name in enumerate(rows):
        for b in range(2):
            top, left = 2 * (10 * n + 1), 2 * (55 + 12 * b + 1)
            part = picture[top : top + 16 : 2, left : left + 20 : 2]
            assert np.abs(part - 255 * rows[name][b].permute(1, 2, 0).numpy()).max() <= 1
        assert (picture[20 * n : 20 * n + 20, :110] < 100).any()  # its name


def test_curves_show_the_terms_of_the_loss_beside_the_metrics(monkeypatch, tmp_path):
    figures = []
    monkeypatch.setattr(train.Figure, "savefig", lambda figure, path: figures.append(figure))
    log = [dict(phase="joint", step=s, reconstruction=s / 2, entropy=s / 3) for s in (2, 4, 6)]
    log.insert(0, dict(phase="background", step=2, background=0.1))
    log[3] |= {"mIoU": 0.5, "ARI-FG": 0.7}
    train.draw_curves(log, tmp_path / "curves.png")
    found = {
        line.get_label(): [*zip(*map(list, line.get_data()))]
        for axes in figures[0].axes
        for line in axes.lines
    }
    assert found == {
        "reconstruction": [(2, 1), (4, 2), (6, 3)], "mIoU": [(6, 0.5)], "ARI-FG": [(6, 0.7)],
        "entropy": [(s, s / 3) for s in (2, 4, 6)],
    }  # fmt: skip


# ---- train.py: commands ----


def test_segment_writes_what_it_found_in_the_pixels_of_the_image(tmp_path, whole_run, capsys):
    model = ASTSeg.from_pretrained(whole_run[0] / "model")
    model.renderer.log_alpha_0.data.fill_(-3.0)  # an early model shows nothing: make it show
    model.save_pretrained(tmp_path / "run" / "model")
    pixels = np.random.default_rng(0).integers(0, 255, (100, 160, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    (tmp_path / "bad.png").write_bytes(b"<html>404</html>")
    photos = [str(tmp_path / name) for name in ("bad.png", "photo.png")]
    with pytest.raises(ValueError, match="1 of 2 images could not be read"):
        train.main(["segment", str(tmp_path / "run"), *photos])
    said = capsys.readouterr()
    assert "bad.png is no readable PNG or JPEG or WEBP" in said.err and "passed over" in said.err
    out = tmp_path / "run" / "segmented"
    image = Image.open(out / "photo_labels.png")
    labels, overlay = np.array(image), np.array(Image.open(out / "photo_overlay.png"))
    assert image.mode == "P" and labels.shape == overlay.shape[:2] == (100, 160)
    assert labels[:, :30].max() == labels[:, 130:].max() == 0
    crop = Image.fromarray(pixels[:, 30:130]).resize((32, 32), Image.Resampling.BILINEAR)
    found = model.eval().segment(torch.tensor(np.array(crop)).movedim(2, 0)[None] / 255)[0]
    where = ((np.arange(100) + 0.5) * 0.32).astype(int)
    assert np.array_equal(labels[:, 30:130], found.numpy()[where][:, where]) and labels.any()
    assert f"{len(np.unique(labels[labels > 0]))} objects" in said.out
    assert np.array_equal(overlay[labels == 0], pixels[labels == 0])
    colors = (train.PALETTE * 255).byte().numpy()[labels]
    blend = (colors * 128.0 + pixels * 127.0) / 255
    assert np.abs(overlay - blend)[labels > 0].max() < 2
    train.main(["segment", str(tmp_path / "run"), photos[1], "--output", str(tmp_path / "there")])
    assert len(list((tmp_path / "there").iterdir())) == 2


def test_segment_counts_the_objects_of_an_image_without_background(
    tmp_path, whole_run, capsys, monkeypatch
):
    full = torch.tensor([1, 2]).repeat(1, 32, 16)  # two objects, no label 0
    monkeypatch.setattr(ASTSeg, "segment", lambda model, images: full)
    picture(40, 40).save(tmp_path / "full.png")
    out = str(tmp_path / "out")
    train.main(["segment", str(whole_run[0]), str(tmp_path / "full.png"), "--output", out])
    assert "full.png: 2 objects" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--slots 0", "slots is 0: use a positive whole number"),
        ("--batch 0", "batch is 0: use a positive whole number"),
        ("--lr nan", "lr is nan: use a positive number"),
        ("--generator vit", "generator is 'vit'"),
        ("--backbone b9", "invalid choice 'b9'"),
        ("--colour blue", "Unrecognized options: --colour"),
        ("--slotz 3", "Perhaps you meant: --slots"),
        ("smal", "Available subcommands: shapes, small, folder, clevrtex"),
        ("small", "Missing from train.py small: --data"),
        ("clevrtex", "Missing from train.py clevrtex: --data"),
        ("folder --data /nowhere", "/nowhere does not exist"),
        ("resume", "Missing from train.py resume"),
        ("resume /nowhere", "/nowhere holds no run: /nowhere/settings.json is missing"),
        ("evaluate /nowhere", "/nowhere holds no run: /nowhere/settings.json is missing"),
        ("evaluate /nowhere --slots 9", "Unrecognized or misplaced options: --slots"),
        ("evaluate", "evaluate takes at least one run folder"),
        ("segment /nowhere", "segment takes a run folder and then at least one image"),
        ("segment /nowhere a.png", "/nowhere has no model yet"),
        ("segment /nowhere a.png b/a.png", "two images have one name"),
        ("--flip maybe", "Unrecognized options: maybe"),
        ("resume /nowhere --lr 1", "Unrecognized or misplaced options: --lr"),
        ("--dim_transformer 16", "the identity start needs 38"),
        ("small --data . --output runs/x", "runs/x is inside the data: name another --output"),
        ("--phase2_steps 99999", "phase2_steps is 99999: use a part of 10000 steps"),
        ("--height 40", "shapes are drawn on squares"),
        ("--data /dev/null", "shapes are drawn, they have no --data"),
        ("--dataset folder", "the data set folder is read from files: name them by --data"),
        ("small --dataset clevr --data /dev/null --masks M", "--masks belong to the"),
        ("--train_images 3", "3 training images do not fill a batch of 16"),
        ("--background_batch 500 --train_images 40", "40 training images do not fill a"),
    ],
)
def test_impossible_arguments_are_refused_in_a_sentence(
    arguments, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(astseg, "draw_shapes", draw_few)
    with pytest.raises((SystemExit, ValueError, OSError)) as error:
        train.main(arguments.split())
    assert message in words_of(capsys.readouterr().err) + str(error.value)
    assert not list(tmp_path.iterdir())


def words_of(panel):
    """The words of a text that tyro has drawn a frame around."""
    return " ".join(re.sub("[│╭╮╰╯─]", " ", panel).split())


def test_help_says_what_each_setting_means_and_the_value_of_this_preset(capsys):
    with pytest.raises(SystemExit):
        train.main(["small", "--help"])
    text = words_of(capsys.readouterr().out)
    source = inspect.getsource(Config) + inspect.getsource(train.Training)
    sentences = re.findall(r"^    (\w+): .* = .*?  # (.*)$", source, re.MULTILINE)
    assert {name for name, _ in sentences} == {f.name for f in fields(train.Training)}
    for name, sentence in sentences:
        assert f"--{name}" in text and sentence in text, name
    assert "(default: 17000)" in text and "(default: 0.015)" in text


def test_other_data_of_an_evaluation_come_with_their_own_masks(whole_run, monkeypatch, tmp_path):
    asked = []

    def remember(training, part):
        asked.append((training.dataset, training.data, training.masks, part))
        return [astseg.draw_shapes(2, 0, 32)]

    (tmp_path / "model").symlink_to(whole_run[0] / "model")
    settings = asdict(train.read_settings(whole_run[0]))
    settings |= dict(dataset="folder", data="D", masks="M")
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    monkeypatch.setattr(train, "load_data", remember)
    evaluate = ["evaluate", str(tmp_path)]
    train.main(evaluate)
    train.main([*evaluate, "--data", "other", "--part", "all"])
    train.main([*evaluate, "--dataset", "outd", "--data", "X"])
    train.main([*evaluate, "--masks", "N"])
    assert asked == [("folder", "D", "M", "test"), ("folder", "other", "", "all"),
                     ("outd", "X", "", "test"), ("folder", "D", "N", "test")]  # fmt: skip
    monkeypatch.setattr(train, "load_data", lambda *_: [DRAW(2, 0, 32)._replace(labels=None)])
    with pytest.raises(ValueError, match="D has no label maps: name them by --masks"):
        train.main(evaluate)


@pytest.mark.parametrize("part", ["all", "val"])
def test_parts_that_are_not_there_are_refused(part, monkeypatch):
    if part == "all":
        with pytest.raises(ValueError, match="shapes are drawn apart: there is no all part"):
            train.load_data(LOOP, part)
    empty = astseg.Images(torch.zeros(0, 3, 32, 32), None)
    monkeypatch.setattr(astseg, "load_dataset", lambda *_: {part: empty})
    with pytest.raises(ValueError, match=f"folder D has no {part} part"):
        train.load_data(replace(LOOP, dataset="folder", data="D"), part)


def test_a_batch_that_processes_cannot_share_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(train, "RANKS", 2)
    with pytest.raises(ValueError, match="2 processes cannot share a batch of 3"):
        train.start(replace(LOOP, train_images=10), tmp_path)


def test_the_first_line_says_what_runs(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    training, output = command(monkeypatch, "small", "--data", "photos", "--slots", "7")
    assert (training.slots, training.data) == (7, str(tmp_path / "photos"))
    line = f"small: folder {tmp_path}/photos on cpu, processes: 1, output: runs/small\n"
    assert capsys.readouterr().out == line and output == Path("runs/small")
    assert str(train.choose_device("mps")) == "mps"
    assert "warning: nobody has tried mps yet" in capsys.readouterr().out
    assert train.choose_device("cpu").type == "cpu"


def test_flags_are_taken_with_either_dash_and_shapes_is_the_preset_of_none(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for line, expected in [
        ("", {}),
        ("shapes", {}),
        ("--no-flip --log-alpha-0 2", dict(log_alpha_0=2.0)),
        ("--flip --log_alpha_0 2", dict(log_alpha_0=2.0, flip=True)),
        ("--anisotropic --no_transformer", dict(anisotropic=True, transformer=False)),
    ]:
        training, _ = command(monkeypatch, *line.split())
        cache = str(tmp_path / "cache")
        assert training == replace(train.PRESETS["shapes"], cache=cache, **expected)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("checkpoint.pt", None, "checkpoint.pt could not be read"),
        ("settings.json", b'{"slots": 4', "settings.json is damaged, or of another version"),
        ("settings.json", b'{"slotz": 4}', r"of another version \(TypeError: .*slotz"),
        ("settings.json", b'{"slots": 0}', r"of another version \(ValueError: slots is 0"),
    ],
)
def test_a_damaged_run_is_named(name, content, message, tmp_path, whole_run):
    for file in ("settings.json", "checkpoint.pt"):
        shutil.copy(whole_run[0] / file, tmp_path)
    path = tmp_path / name
    path.write_bytes(path.read_bytes()[:5000] if content is None else content)
    with pytest.raises((OSError, ValueError), match=message) as error:
        train.main(["resume", str(tmp_path)])
    assert "delete" not in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("left", ["settings.json", "checkpoint.pt"])
def test_what_is_left_of_a_run_is_neither_overwritten_nor_continued(
    left, tmp_path, whole_run, monkeypatch
):
    def draw_too_early(*arguments):
        raise AssertionError("data were drawn before the folder was refused")

    monkeypatch.setattr(astseg, "draw_shapes", draw_too_early)
    shutil.copy(whole_run[0] / left, tmp_path)
    with pytest.raises(ValueError, match="holds a run: go on by `train.py resume"):
        train.main(["shapes", "--output", str(tmp_path)])
    assert [path.name for path in tmp_path.iterdir()] == [left]


def test_a_refusal_of_the_program_is_one_line_and_a_run_is_not_overwritten(whole_run):
    line = [sys.executable, str(HERE / "train.py"), "--output", str(whole_run[0])]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    words = "holds a run: go on by `train.py resume .*, or name another --output"
    assert re.search(words, done.stderr)


SHELL = """#!/bin/sh
for word in "$@"; do printf '%s\\037' "$word" >> {record}; done
echo >> {record}
"""


def test_the_commands_of_the_readme_are_taken(tmp_path, monkeypatch, capsys):
    """Its bash blocks, and its cells that are commands, run in a shell whose python writes down
    what it is asked for; no other program can be found there."""
    readme = (HERE / "README.md").read_text()
    block = re.compile(r"^```bash\n(.*?)^```", re.MULTILINE | re.DOTALL)
    cells = re.findall(r"\| `(python train\.py[^`\n]*)` \|", block.sub("", readme))
    blocks = block.findall(readme)
    programs = tmp_path / ".venv" / "bin"
    programs.mkdir(parents=True)
    (programs / "python").write_text(SHELL.format(record=tmp_path / "record"))
    (programs / "python").chmod(0o755)
    for name in ("python3", "torchrun"):
        (programs / name).symlink_to(programs / "python")
    for script in blocks + cells:
        subprocess.run(["/bin/bash", "-c", script], cwd=tmp_path, env={"PATH": str(programs)},
                       stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)  # fmt: skip
    asked = [line.split("\x1f")[:-1] for line in (tmp_path / "record").read_text().splitlines()]
    asked = [words[words.index("train.py") + 1 :] for words in asked if "train.py" in words]
    assert len(asked) >= len(re.findall("^ *python train.py", "\n".join(blocks), re.MULTILINE))

    class Taken(Exception):
        pass

    def taken(*_, **__):
        raise Taken

    monkeypatch.chdir(tmp_path)
    for door in ("start", "read_settings", "load_model"):
        monkeypatch.setattr(train, door, taken)
    monkeypatch.setattr(os.path, "exists", lambda path: True)  # photos and the like
    for words in asked:
        words = [re.sub("^[A-Z]$", "1", word) for word in words if word != "..."]  # --seed S
        try:
            train.main(words)
        except Taken:
            continue
        except SystemExit as error:
            assert error.code in (0, None) and "--help" in words, (words, capsys.readouterr().err)
            continue
        raise AssertionError(f"{words} asks for nothing")
    assert len(asked) > 5


# ---- Data sets, in tiny files of the exact formats ----


def varint(n):
    return bytes([n]) if n < 128 else bytes([n & 127 | 128]) + varint(n >> 7)


def message(*fields):
    """A protocol buffer message of length-delimited fields (number, content)."""
    return b"".join(varint(n << 3 | 2) + varint(len(content)) + content for n, content in fields)


def example(**arrays):
    """A tf.train.Example in which every byte is an entry of its own, as in the published files."""
    entries = [(1, message((1, b"visibility"), (2, message((2, message((1, b"\0\0\x80\x3f")))))))]
    for name, array in arrays.items():
        values = message(*((1, bytes([value])) for value in array.astype(np.uint8).flatten()))
        entries.append((1, message((1, name.encode()), (2, message((1, values))))))
    return message((1, message(*entries)))


def record(body):
    return struct.pack("<Q", len(body)) + b"sums" + body + b"sums"


def masks_of(owner, count):
    return 255 * (owner == np.arange(count)[:, None, None])[..., None]


def rooms(count, masks=7):
    """ObjectsRoom at random: images (n, 64, 64, 3), owners of the pixels (n, 64, 64), records."""
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (count, 64, 64, 3), dtype=np.uint8)
    owners = random.integers(0, masks, (count, 8, 8)).repeat(8, 1).repeat(8, 2)
    bodies = [example(mask=masks_of(o, masks), image=i) for i, o in zip(images, owners)]
    return images, owners, b"".join(map(record, bodies))


def load(tmp_path, dataset, data, size=(64, 64), masks=None, **options):
    return astseg.load_dataset(dataset, data, masks, *size, cache=tmp_path / "cache", **options)


@pytest.mark.parametrize("compress", [gzip.compress, bytes])
@pytest.mark.parametrize(
    "dataset, name, masks, test",
    [("objectsroom", "train", 7, 1), ("six_objects", "test_six_objects", 10, 12),
     ("identical_color", "test_identical_color", 10, 12), ("empty_room", "test_empty_room", 4, 12)],
)  # fmt: skip
def test_rooms_are_read_byte_by_byte(dataset, name, masks, test, compress, tmp_path):
    images, owners, records = rooms(12, masks)
    (tmp_path / f"objects_room_{name}.tfrecords").write_bytes(compress(records))
    parts = load(tmp_path, dataset, tmp_path)
    assert torch.equal(parts["all"].images, torch.from_numpy(images).movedim(3, 1))
    assert torch.equal(parts["all"].labels, torch.from_numpy(np.maximum(0, owners - 3)).byte())
    assert len(parts["test"].images) == test


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda data: gzip.compress(data)[:-2000], r"record \d"),
        (lambda data: data[: len(data) // 2], "record 1, .* it is cut short, or no record"),
        (lambda data: data[:-3], "record 2, .* it is cut short"),
        (lambda data: b"these are no records, but a text", "record 0, .* it is cut short"),
        (lambda data: record(b"x" * 20), "record 0, .* it has no image"),
        (lambda data: record(example(image=np.zeros(12288))), "record 0, .* it has no mask"),
        (lambda data: record(example(image=np.zeros(12), mask=np.zeros(4))),
         "record 0, .* image is not 12288 entries of one byte"),
        (lambda data: record(example(image=np.zeros(12289), mask=np.zeros(4))), "image is not"),
    ],
)  # fmt: skip
def test_a_damaged_tfrecord_is_named_and_leaves_nothing(damage, message, tmp_path):
    path = tmp_path / "objects_room_train.tfrecords"
    path.write_bytes(damage(rooms(3)[2]))
    with pytest.raises(OSError, match=message) as error:
        load(tmp_path, "objectsroom", path)
    assert str(path) in str(error.value) and not [*(tmp_path / "cache").iterdir()]


def test_clevr_is_cropped_and_resized_as_the_paper_does(tmp_path):
    random = np.random.default_rng(1)
    small = random.integers(0, 256, (24, 32, 3)).repeat(10, 0).repeat(10, 1)
    image = (small + random.integers(-20, 20, small.shape)).clip(0, 255).astype(np.uint8)
    owner = random.integers(0, 11, (24, 32)).repeat(10, 0).repeat(10, 1)
    records = 3 * record(example(image=image, mask=masks_of(owner, 11)))
    path = tmp_path / "clevr_with_masks_train.tfrecords"
    path.write_bytes(gzip.compress(records, 1))
    images, labels = load(tmp_path, "clevr", path, (128, 128))["all"]
    crop = torch.from_numpy(image[24:216, 64:256]).movedim(2, 0)[None].float()
    resized = F.interpolate(crop, (128, 128), mode="bilinear", antialias=True)[0]
    assert (images[0] - resized).abs().max() <= 1
    nearest = Image.fromarray(owner[24:216, 64:256].astype(np.uint8)).resize((128, 128), 0)
    assert np.array_equal(labels[0], nearest)


@pytest.mark.parametrize("variant, test", [("full", 2), ("outd", 20), ("camo", 2)])
def test_clevrtex_is_read_in_the_order_of_its_numbers(variant, test, tmp_path, capsys):
    random = np.random.default_rng(0)
    for i in reversed(range(20)):
        folder = tmp_path / f"clevrtex_{variant}" / str(i % 3)
        folder.mkdir(parents=True, exist_ok=True)
        pixels = random.integers(0, 256, (240, 320, 4), dtype=np.uint8)
        pixels[..., 0], pixels[..., 3] = i, 255
        number = i if i < 19 else 30  # a gap
        Image.fromarray(pixels).save(folder / f"CLEVRTEX_{variant}_{number:06d}.png")
        labels = random.choice([0, 2, 5, 12], (24, 32)).repeat(10, 0).repeat(10, 1)
        flat = Image.fromarray(labels.astype(np.uint8), "P")
        flat.putpalette(list(range(255, -1, -1)) * 3)  # colours that have nothing to do with it
        flat.save(folder / f"CLEVRTEX_{variant}_{number:06d}_flat.png")
    dataset = variant.replace("full", "clevrtex")
    parts = load(tmp_path, dataset, tmp_path, (128, 128))
    assert parts["all"].images[:, 0].flatten(1).float().mean(1).tolist() == list(range(20))
    assert parts["all"].labels.unique().tolist() == [0, 2, 5, 12]  # indices as they are
    assert len(parts["test"].images) == test
    first = labels[24:216, 64:256].astype(np.uint8)  # of the image that was written last, 0
    nearest = Image.fromarray(first).resize((128, 128), Image.Resampling.NEAREST)
    assert np.array_equal(parts["all"].labels[0], nearest)
    assert "have gaps, or do not begin with 0" in capsys.readouterr().out
    (folder / f"CLEVRTEX_{variant}_000000_flat.png").unlink()
    with pytest.raises(ValueError, match=f"CLEVRTEX_{variant}_000000_flat.png is no readable PNG"):
        load(tmp_path, dataset, tmp_path, (64, 64))


@pytest.fixture
def stacks(tmp_path):
    """ShapeStacks at random: its folder and the owners of the pixels by scenario and camera."""
    random, owners, data = np.random.default_rng(0), {}, tmp_path / "stacks"
    (data / "splits" / "default").mkdir(parents=True)
    for part, scenarios in {"test": ["a-1"], "eval": ["b-2"], "train": ["c-3", "d-4"]}.items():
        (data / "splits" / "default" / f"{part}.txt").write_text("\n".join(scenarios))
        for name, camera in itertools.product(scenarios, (1, 10)):
            for folder in ("recordings", "iseg"):
                (data / folder / name).mkdir(parents=True, exist_ok=True)
            pixels = random.integers(0, 256, (224, 224, 3), dtype=np.uint8)
            stem = f"rgb-w=2-f=1-l=0-c=unique-cam_{camera}-mono-0.png"
            Image.fromarray(pixels).save(data / "recordings" / name / stem)
            owners[name, camera] = owner = random.integers(0, 6, (28, 28)).repeat(8, 0).repeat(8, 1)
            values = np.stack((owner * 32 + 5, owner, owner), axis=2).astype(np.uint8)
            stem = f"iseg-w=0-f=0-l=0-c=original-cam_{camera}-mono-0.map"
            Image.fromarray(values).save(data / "iseg" / name / stem, format="PNG")
    return data, owners


def test_shapestacks_has_its_own_splits_and_label_maps(stacks, tmp_path):
    data, owners = stacks
    parts = load(tmp_path, "shapestacks", data)
    assert [len(parts[name].images) for name in ("test", "val", "train")] == [2, 2, 4]
    rows = [14 + i * 196 // 64 for i in range(64)]
    for k, camera in enumerate((1, 10)):
        assert np.array_equal(parts["val"].labels[k], owners["b-2", camera][rows][:, rows])
    shutil.rmtree(data / "recordings" / "b-2")
    with pytest.raises(ValueError, match="recordings/b-2 has no pictures, and eval.txt lists it"):
        load(tmp_path, "shapestacks", data)


@pytest.fixture
def photos(tmp_path):
    """Twelve images of several kinds with label maps of several kinds, and other files."""
    random, data = np.random.default_rng(0), tmp_path / "photos"
    for i in range(12):
        sub, suffix = ("", "more/")[i % 2], ("png", "jpg", "webp", "JPEG")[i % 4]
        pixels = random.integers(0, 256, (50 + i, 80 - i, 3), dtype=np.uint8)
        values = random.choice([0, 40, 255], (6, 8)).astype(np.uint8).repeat(12, 0).repeat(12, 1)
        mask = Image.fromarray(values[: 50 + i, : 80 - i])
        mask = [mask, mask.convert("1"), mask.convert("P"), mask.convert("I;16")][i // 2 % 4]
        for folder in ("images", "masks"):
            (data / folder / sub).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(data / "images" / f"{sub}{i:02d}.{suffix}")
        mask.save(data / "masks" / f"{sub}{i:02d}.png")
    (data / "images" / "notes.txt").write_text("no image")
    (data / "images" / ".hidden.png").write_text("no image")
    (data / "images" / ".thumbnails").mkdir()
    Image.new("RGB", (9, 9)).save(data / "images" / ".thumbnails" / "00.png")
    (data / "images" / "more").rename(tmp_path / "elsewhere")
    (data / "images" / "more").symlink_to(tmp_path / "elsewhere")
    return data


def test_a_folder_says_what_it_took_and_is_decoded_once(tmp_path, photos, capsys, monkeypatch):
    images, masks = photos / "images", photos / "masks"
    parts = load(tmp_path, "folder", images, (32, 48), masks)
    out = capsys.readouterr().out
    for words in ("12 images", "passed over .txt 1", "1..2 labels each", "brightness 0.5",
                  "12 files, by sub-folder . 6, more 6", "background 42%",
                  "the test part is 00 to 00"):  # fmt: skip
        assert words in out
    assert [len(parts[name].images) for name in ("test", "val", "train", "all")] == [1, 1, 10, 12]
    for name, part in dict(test=slice(1), val=slice(1, 2), train=slice(2, None)).items():
        assert torch.equal(parts[name].images, parts["all"].images[part])
        assert torch.equal(parts[name].labels, parts["all"].labels[part])
    assert parts["all"].images.shape == (12, 3, 32, 48)
    assert parts["all"].labels.unique().tolist() == [0, 1, 2]  # 40 and 255, renumbered
    with monkeypatch.context() as patch:
        patch.setattr(astseg, "prepare", None)  # the cache suffices
        again = load(tmp_path, "folder", images, (32, 48), masks, slots=0)
    assert torch.equal(again["all"].images, parts["all"].images)
    said = capsys.readouterr().out
    assert "warning: up to 2 labels per image for 0 slots" in said
    assert out.splitlines()[0] == said.splitlines()[0]
    time = os.stat(masks / "00.png").st_mtime + 5  # a mask is mended under its name
    old = np.array(Image.open(masks / "00.png"))
    Image.fromarray(np.where(old == 0, 40, 0).astype(np.uint8)).save(masks / "00.png")
    os.utime(masks / "00.png", (time, time))
    mended = load(tmp_path, "folder", images, (32, 48), masks)
    assert not torch.equal(mended["all"].labels[0] > 0, parts["all"].labels[0] > 0)
    picture(mode="RGB").save(images / "new.png")
    assert len(load(tmp_path, "folder", images, (32, 48))["all"].images) == 13
    assert load(tmp_path, "folder", images, (32, 48))["all"].labels is None


def test_the_cache_knows_the_time_of_change_and_the_settings(tmp_path):
    picture().save(tmp_path / "00.png")
    first = astseg.cache_key("folder", tmp_path, None, 32)
    assert astseg.cache_key("folder", tmp_path, None, 32) == first
    assert astseg.cache_key("folder", tmp_path, None, 64) != first
    os.utime(tmp_path / "00.png", (1, 1))  # the same name and size
    assert astseg.cache_key("folder", tmp_path, None, 32) != first


def picture(*size, mode="RGB"):
    return Image.new(mode, size or (80, 50))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda m: (m / "00.png").unlink(), "00.png has no mask .*masks/00.png: a mask is a"),
        (lambda m: picture().save(m / "77.png"), "77.png has no image"),
        (lambda m: picture(5, 5, mode="L").save(m / "00.png"), "its image differ in size"),
        (lambda m: picture(50, 80, mode="L").save(m / "00.png"), "its image differ in size"),
        (lambda m: picture().save(m / "00.png"), "00.png is RGB: a mask is a single-channel PNG"),
        (lambda m: picture(mode="LA").save(m / "00.png"), "00.png is LA: a mask is a"),
        (lambda m: (m / "00.png").rename(m / "00.jpg"), r"00.png has no mask"),
        (lambda m: picture(mode="L").save(m / "00.png", format="JPEG"), "00.png is no readable"),
        (lambda m: [picture(*Image.open(p).size, mode="L").save(p) for p in m.rglob("*.png")],
         "100% of the pixels are background"),
        (lambda m: Image.fromarray(np.arange(4000, dtype=np.uint16).reshape(50, 80)).save(
            m / "00.png"), r"image 1 has labels \d+..\d{4}, not 0..255: soft edges\?"),
        (lambda m: picture().save(m.parent / "images" / "00.webp"), "differ only in their suffix"),
        (lambda m: picture().save(m / "00.PNG"), "two files that differ only in their suffix"),
        (lambda m: (m / "more" / "up").symlink_to(m), "shows a file twice: does a link lead"),
        (lambda m: Image.fromarray(np.zeros((50, 80), np.uint16)).save(
            m.parent / "images" / "00.png"), "00.png has more than 8 bits per channel"),
        (lambda m: picture(mode="RGBA").save(m.parent / "images" / "00.png"),
         "00.png is transparent somewhere: lay it on a colour first"),
        (lambda m: [p.unlink() for p in m.rglob("*.png")], "masks has no file .png"),
    ],
)  # fmt: skip
def test_what_is_no_image_or_mask_by_the_rules_is_refused(change, message, tmp_path, photos):
    change(photos / "masks")
    with pytest.raises(ValueError, match=message):
        load(tmp_path, "folder", photos / "images", masks=photos / "masks")
    assert not [*(tmp_path / "cache").glob("*")]


def test_a_folder_of_masks_within_the_images_is_no_folder_of_images(tmp_path, capsys):
    (tmp_path / "D" / "masks").mkdir(parents=True)
    for i in range(4):
        picture().save(tmp_path / "D" / f"{i}.png")
        Image.fromarray(np.eye(50, 80, dtype=np.uint8)).save(tmp_path / "D" / "masks" / f"{i}.png")
    load(tmp_path, "folder", tmp_path / "D")
    assert "8 files, by sub-folder . 4, masks 4" in capsys.readouterr().out
    parts = load(tmp_path, "folder", tmp_path / "D", masks=tmp_path / "D" / "masks")
    assert len(parts["all"].images) == 4


def test_a_folder_without_images_says_what_lies_there_and_what_is_looked_for(tmp_path):
    for name, words in {
        "tif": "has no file .png, .jpg, .jpeg, .webp, passed over .tif 2",
        "empty": "has no file .png, .jpg, .jpeg, .webp, passed over no file",
    }.items():
        (tmp_path / name).mkdir()
        for i in range(2 * (name == "tif")):
            (tmp_path / name / f"{i}.tif").touch()
        with pytest.raises(ValueError, match=words):
            load(tmp_path, "folder", tmp_path / name)
    with pytest.raises(FileNotFoundError, match="nothing"):
        load(tmp_path, "folder", tmp_path / "nothing")
    for i in range(2):
        picture().save(tmp_path / "empty" / f"{i}.png")
    with pytest.raises(ValueError, match="holds 2 images of folder: three parts need three"):
        load(tmp_path, "folder", tmp_path / "empty")


def test_damaged_images_are_named_together_and_a_malformed_exif_costs_none(tmp_path):
    junk = b"\x00\x08\x00\x02\x01\x12\x00\x03\x00\x00"
    for i in range(20):
        picture().save(tmp_path / f"{i:02d}.png", exif=junk)
    assert len(load(tmp_path, "folder", tmp_path, (32, 32))["all"].images) == 20
    for i in (7, 11, 13):
        (tmp_path / f"{i:02d}.png").write_bytes(b"<html>404</html>")
    found = r"07.png is no readable PNG or JPEG or WEBP \(UnidentifiedImageError: .*11.png.*13.png"
    with pytest.raises(ValueError, match=found) as error:
        load(tmp_path, "folder", tmp_path, (64, 64))
    assert "\n" not in str(error.value)
    for i in range(20):
        (tmp_path / f"{i:02d}.png").write_bytes(b"")
    with pytest.raises(ValueError) as error:
        load(tmp_path, "folder", tmp_path, (64, 64))
    assert str(error.value).count("no readable") == 10


def test_image_and_mask_are_turned_as_exif_says(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    pixels = np.zeros((40, 60, 3), np.uint8)
    pixels[:, :20] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    Image.fromarray(pixels[..., 0]).save(tmp_path / "b.png", exif=exif)
    turned = np.rot90(pixels, -1)
    assert np.array_equal(astseg.open_image(tmp_path / "a.png"), turned)
    assert np.array_equal(astseg.read_labels(tmp_path / "b.png"), turned[..., 0] > 0)


def test_a_mask_without_background_has_no_label_0(tmp_path):
    values = np.array([[7, 7, 40], [40, 200, 7]], np.uint8)
    Image.fromarray(values).save(tmp_path / "full.png")
    assert astseg.read_labels(tmp_path / "full.png").tolist() == [[1, 1, 2], [2, 3, 1]]


def test_an_opaque_alpha_channel_and_a_palette_are_taken(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    alpha = np.full((9, 7, 1), 255, np.uint8)
    Image.fromarray(np.concatenate((pixels, alpha), axis=2)).save(tmp_path / "a.png")
    assert np.array_equal(astseg.open_image(tmp_path / "a.png"), pixels)
    Image.fromarray(pixels).quantize(8).save(tmp_path / "p.png")
    assert astseg.open_image(tmp_path / "p.png").mode == "RGB"


@pytest.mark.parametrize("size", [(80, 50), (50, 80), (64, 48), (7, 5)])
@pytest.mark.parametrize("crop, label_at", [(1.0, 0.5), (0.8, 0.5), (0.8, 0.0)])
def test_image_and_labels_are_the_same_centre_crop(size, crop, label_at):
    (w, h), (height, width) = size, (32, 48)
    scale = min(w / width, h / height)
    side_x, side_y = max(1, int(crop * scale * width)), max(1, int(crop * scale * height))
    box = astseg.centre_crop(size, height, width, crop)
    assert (box[2] - box[0], box[3] - box[1]) == (side_x, side_y)
    assert abs(box[0] - (w - box[2])) <= 1 and abs(box[1] - (h - box[3])) <= 1
    pixels = np.random.default_rng(0).integers(0, 256, (h, w, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    found, labels = astseg.crop_and_resize(image, pixels[..., 0], height, width, crop, label_at)
    resized = image.crop(box).resize((width, height), Image.Resampling.BILINEAR)
    assert np.array_equal(found, np.array(resized).transpose(2, 0, 1))
    for j, i in itertools.product(range(height), range(width)):
        row, column = int((j + label_at) * side_y / height), int((i + label_at) * side_x / width)
        assert labels[j, i] == pixels[box[1] + row, box[0] + column, 0]
    assert astseg.crop_and_resize(image, None, height, width)[1] is None


def reader_of(parts, labels=None):
    """A fork's own data set: an image of each part, whose red is its number."""

    def reader(data, masks, notes):
        for n, part in enumerate(parts):
            found = None if labels is None else labels[n]
            yield Image.new("RGB", (32, 32), (n, 0, 0)), found, part

    return astseg.DataSet(reader)


def test_parts_are_collected_by_name_in_any_order(tmp_path, monkeypatch):
    names = ["train", "test", "val", "train", "test", "train"]
    maps = [np.full((32, 32), n) for n in range(len(names))]
    monkeypatch.setitem(astseg.DATASETS, "own", reader_of(names, maps))
    parts = load(tmp_path, "own", tmp_path, (32, 32))
    for part in parts.values():
        assert torch.equal(part.labels, part.images[:, 0])
    found = {name: part.images[:, 0, 0, 0].tolist() for name, part in parts.items()}
    assert found == dict(test=[1, 4], val=[2], train=[0, 3, 5], all=[1, 4, 2, 0, 3, 5])


def test_a_set_without_parts_is_cut_by_index_into_tenths_of_10_000_at_most(monkeypatch):
    for count, tenth in ((3, 1), (25, 2), (120_000, 10_000)):
        small = np.zeros((3, 1, 1), np.uint8), None
        with monkeypatch.context() as patch:
            patch.setattr(astseg, "crop_and_resize", lambda *_: small)
            patch.setitem(astseg.DATASETS, "own", reader_of([""] * count))
            if count > 1000:
                one = Image.new("RGB", (1, 1))
                repeated = astseg.DataSet(lambda *_: itertools.repeat((one, None, ""), 120_000))
                patch.setitem(astseg.DATASETS, "own", repeated)
            counts = astseg.prepare("own", "D", None, 1, 1)["sizes"]
        assert counts == [tenth, tenth, count - 2 * tenth]


@pytest.mark.parametrize(
    "parts, labels, message",
    [
        (["train", "test", "dev"], None, r"own yields parts \{'dev'\}: use"),
        (["", "test", "val"], None, r"own yields parts \{''\}"),
        ([""] * 3, [np.zeros((32, 32), int) + n for n in (0, 0, 256)], "3 has labels 256..256"),
        ([""] * 3, [np.zeros((32, 32), int) + n for n in (0, -1, 1)], "image 2 has labels -1..-1"),
        ([""] * 3, [np.eye(32, dtype=int), None, None], "has 1 label maps for 3 images"),
    ],
)
def test_a_reader_that_breaks_the_rules_is_refused(parts, labels, message, tmp_path, monkeypatch):
    monkeypatch.setitem(astseg.DATASETS, "own", reader_of(parts, labels))
    with pytest.raises(ValueError, match=message):
        load(tmp_path, "own", tmp_path, (32, 32))


# ---- Files ----


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "file"
    with astseg.written_whole(path) as file:
        file.write(b"whole")
        assert not path.exists() and str(os.getpid()) in os.listdir(path.parent)[0]
    for failure, kind, words in [
        (RuntimeError("unexpected pos 64"), OSError, "file could not be written, is the disk full"),
        (PermissionError(13, "Permission denied"), PermissionError, "Permission denied"),
        (KeyboardInterrupt("stop"), KeyboardInterrupt, "stop"),
    ]:
        with pytest.raises(kind, match=words):
            with astseg.written_whole(path) as file:
                file.write(b"ha")
                raise failure
        assert path.read_bytes() == b"whole" and os.listdir(path.parent) == ["file"]


def test_runs_that_start_together_decode_into_files_of_their_own(tmp_path, photos, monkeypatch):
    prepare, inner = astseg.prepare, []

    def slow(*arguments):
        """While the first process decodes, a second one starts and is done before it."""
        monkeypatch.setattr(astseg, "prepare", prepare)
        monkeypatch.setattr(astseg.os, "getpid", lambda: 1)
        assert len(list((tmp_path / "cache").iterdir())) == 1  # opened before it decodes
        inner.append(load(tmp_path, "folder", photos / "images"))
        return prepare(*arguments)

    monkeypatch.setattr(astseg, "prepare", slow)
    parts = load(tmp_path, "folder", photos / "images")
    assert torch.equal(parts["all"].images, inner[0]["all"].images)
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_a_cache_that_cannot_be_written_is_found_out_before_anything_is_decoded(
    tmp_path, photos, monkeypatch
):
    (tmp_path / "cache").write_text("a file")
    monkeypatch.setattr(astseg, "prepare", None)
    with pytest.raises(OSError, match="cache"):
        load(tmp_path, "folder", photos / "images")


def test_a_file_that_cannot_be_read_keeps_the_words_of_the_cause(tmp_path):
    (tmp_path / "cut.pt").write_bytes(b"PK\3\4 and no more")
    for name, cause in (("cut.pt", "RuntimeError"), ("none.pt", "FileNotFoundError")):
        with pytest.raises(OSError, match=rf"{name} could not be read \({cause}: ") as error:
            astseg.load_tensors(tmp_path / name)
        assert "delete" not in str(error.value)


# ---- The notebook ----

NOTEBOOK = HERE / "equivariance_proof.ipynb"


def test_the_notebook_runs_from_top_to_bottom_in_a_clean_kernel():
    """Each of its claims is an assert, so that running it is the check."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(HERE)}}
    )
    client.execute()  # raises what a cell raises
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert sum(cell.source.count("assert ") for cell in code) > 40
    assert not [o for cell in code for o in cell.outputs if o.get("name") == "stderr"]


def test_the_notebook_is_stored_with_its_outputs_and_nothing_of_the_machine():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    cells, code = notebook.cells, [c for c in notebook.cells if c.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    text = "".join(o.get("text", "") for o in outputs)
    assert len(outputs) > 40 and not re.search(r"Warning|/tmp|/home|/root|site-packages", text)
    for before, cell in zip(cells, cells[1:]):
        assert {before.cell_type, cell.cell_type} != {"code"}  # prose between


# ---- The map to the paper, and the shapes ----

MODEL_PART = (HERE / "astseg.py").read_text().partition("# Data: nothing below")[0]


def numbers_in(text):
    """The equations that a text names: "(1) (4), (10)-(12)" -> {1, 4, 10, 11, 12}."""
    ends = re.findall(r"\((\d+)\)(?:-\((\d+)\))?", text)
    return {n for first, last in ends for n in range(int(first), int(last or first) + 1)}


def table_of_the_head():
    """The rows of the module's table: (equations, names)."""
    line = r"^    ((?:section|Table|Algorithm).*?)  +(\w.*)$"
    rows = re.findall(line, astseg.__doc__, re.MULTILINE)
    return [(numbers_in(paper), names.split(", ")) for paper, names in rows]


def test_the_table_at_the_head_of_the_module_names_what_is_there_in_its_order():
    names = [name for _, row in table_of_the_head() for name in row]
    places = [re.search(rf"^(?:def|class) {name}\b", MODEL_PART, re.MULTILINE) for name in names]
    assert len(names) > 22 and all(places)
    assert [place.start() for place in places] == sorted(place.start() for place in places)


def test_each_equation_stands_in_what_the_table_names_for_it():
    found = defaultdict(set)  # equation -> names of the functions and classes that hold its tag
    for node in ast.parse(MODEL_PART).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            lines = MODEL_PART.splitlines()[node.lineno - 1 : node.end_lineno]
            for tag in re.findall(r"# .*?\beqs?\. (.*)", "\n".join(lines)):
                for number in numbers_in(tag):
                    found[number].add(node.name)
    table = {number: set(names) for numbers, names in table_of_the_head() for number in numbers}
    assert found.keys() == table.keys() == {1, 4, *range(10, 23)}
    # center_of_mass is the sum of (4), of which (14) and (15) are the two coordinates.
    elsewhere = {14: {"center_of_mass"}, 15: {"center_of_mass"}}
    for number, names in found.items():
        assert names & table[number], number
        assert names - table[number] == elsewhere.get(number, set()), number
    assert len(re.findall(r"\beqs?\. \(", MODEL_PART)) > 15


def shape_comments(source):
    """{line: comment} of the trailing comments that begin with a shape."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {
        token.start[0]: token.string[2:]
        for token in tokens
        if token.type == tokenize.COMMENT
        and token.string.startswith("# (")
        and token.line[: token.start[1]].strip()
    }


def fits(shape, sizes, symbols):
    """Whether a comment's shape "B K, 2 or Z, H/4" is that of a tensor."""
    entries = [entry.strip() for entry in shape.split(",") if entry.strip()]
    if len(entries) != len(sizes):
        return False
    for entry, size in zip(entries, sizes):
        choices = [re.sub(r"(?<=[\w']) (?=\w)", "*", choice) for choice in entry.split(" or ")]
        choices = [choice.replace("/", "//").replace("'", "_") for choice in choices]
        if size not in [eval(choice, {}, symbols) for choice in choices]:
            return False
    return True


class ShapeTrace:
    """Runs code, and notes each tensor that is assigned or returned at a line with a shape comment.

    The letters of a comment have the values of `symbols`, words those of the local variables.
    """

    def __init__(self, source):
        self.comments = shape_comments(source)
        self.fields, self.statements = [], {}
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.For):
                self.statements[node.lineno] = node
            elif isinstance(node, ast.AnnAssign):
                self.fields.append((node.lineno, node.target.id))
            elif isinstance(node, ast.stmt) and not hasattr(node, "body"):
                for line in range(node.lineno, node.end_lineno + 1):
                    self.statements[line] = node
        self.last, self.letters, self.seen = {}, {}, defaultdict(list)

    def run(self, symbols, function, *arguments):
        self.symbols = symbols
        sys.settrace(self.enter)
        try:
            return function(*arguments)
        finally:
            sys.settrace(None)

    def enter(self, frame, event, returned):
        if frame.f_code.co_filename != astseg.__file__ or frame.f_code.co_name.startswith("<"):
            return None
        self.last[frame] = None
        self.letters[frame] = letters = dict(self.symbols)
        if frame.f_code.co_qualname == "CoordConv.forward":  # C, h, w and C', h', w' are its own
            x, convolution = frame.f_locals["x"], frame.f_locals["self"].convolution
            letters.update(zip("Chw", x.shape[1:]))
            after = convolution(torch.zeros(1, convolution.in_channels, *x.shape[2:]))
            letters.update(zip(("C_", "h_", "w_"), after.shape[1:]))
        return self.step

    def step(self, frame, event, returned):
        statement = self.statements.get(frame.f_lineno) if event == "line" else None
        before = self.last[frame]
        if before is not None and statement is not before and event in ("line", "return"):
            self.note(before, frame, returned)
        self.last[frame] = statement
        return self.step

    def note(self, statement, frame, returned):
        """Note what a statement that is done has made."""
        end = statement.lineno if isinstance(statement, ast.For) else statement.end_lineno
        known = frame.f_locals
        words = {n: v for n, v in known.items() if isinstance(v, int) and (len(n) > 1 or n == "n")}
        for line in range(statement.lineno, end + 1):
            if line not in self.comments:
                continue
            if isinstance(statement, ast.Return):
                values = [returned]
            elif isinstance(statement, ast.Expr):  # list.append(tensor)
                values = [known[statement.value.func.value.id][-1]]
            else:
                targets = getattr(statement, "targets", None) or [statement.target]
                nodes = [node for target in targets for node in ast.walk(target)]
                names = [node.id for node in nodes if isinstance(node, ast.Name) and node.id != "_"]
                values = [known[name] for name in names]
            for value in values:
                for tensor in value if isinstance(value, list) else [value]:
                    self.seen[line].append((tuple(tensor.shape), self.letters[frame] | words))

    def wrong(self):
        """The comments that do not fit, as (line, comment, shape of the tensor)."""
        for line, tensors in self.seen.items():
            pattern = r"\(([^()]*)\)(?: (->|\.\.\.) \(([^()]*)\))?"
            first, link, last = re.match(pattern, self.comments[line]).groups()
            shapes = [(first if link != "->" else last, *tensor) for tensor in tensors]
            if link == "...":  # of a loop
                shapes = [(first, *tensors[0]), (last, *tensors[-1])]
            for shape, sizes, symbols in shapes:
                if not fits(shape, sizes, symbols):
                    yield line, self.comments[line], sizes


def test_each_shape_comment_of_the_model_is_the_shape_of_the_tensor_at_its_line():
    trace = ShapeTrace(MODEL_PART)
    B, K, H, W, Z = 2, 5, 52, 60, 9
    for change in (
        dict(anisotropic=True), dict(anisotropic=False), dict(generator="unet", backbone="b0")
    ):  # fmt: skip
        config = Config(**SMALL | dict(height=H, width=W, slots=K, dim_z_what=Z) | change)
        model, images = ASTSeg(config).eval(), torch.rand(B, 3, H, W)
        D = Z + 2 + config.anisotropic
        h, w = (H, W) if config.generator == "unet" else (H // 4, W // 4)
        symbols = dict(B=B, K=K, H=H, W=W, h=h, w=w, Z=Z, D=D, G=32, C=4, N=B * K, channels=K + D)
        with torch.no_grad():
            output = trace.run(symbols, model, images)
            trace.run(symbols, model.segment, images)
            background, error = model.background(images)
            trace.run(symbols, astseg.robust_background_loss, images, background, error)
            trace.run(symbols, astseg.full_loss, images, output, 9)
        trace.run(symbols, astseg.start_as_identity, model.encoder.refinement)
        for line, name in trace.fields:
            values = output._asdict() | output.latents._asdict()
            if line in trace.comments and name in values:
                trace.seen[line].append((tuple(values[name].shape), symbols))
    labels = torch.randint(9, (2, B, H, W))
    for metric in (astseg.mean_iou, astseg.adjusted_rand_index, astseg.segmentation_covering):
        trace.run(dict(B=B, H=H, W=W, n=9), metric, *labels)
    assert not [*trace.wrong()]
    unseen = {line: text for line, text in trace.comments.items() if line not in trace.seen}
    assert not unseen and len(trace.seen) > 45


def test_the_usage_example_runs_as_written():
    lines = [line.strip() for line in astseg.__doc__.splitlines()]
    names = {}
    exec("\n".join(line[4:] for line in lines if line.startswith(">>>")), names)
    assert names["labels"].shape == (2, 64, 64)


def test_importing_the_module_is_silent_and_touches_no_random_state():
    code = "import torch as t; a = t.get_rng_state(); import astseg"
    code += "; assert a.equal(t.get_rng_state())"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=HERE)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


# ---- The README's examples ----


def python_blocks():
    readme = (HERE / "README.md").read_text()
    return re.findall(r"^```python\n(.*?)^```", readme, re.MULTILINE | re.DOTALL)


def run_examples(folder, *examples):
    """Side by side, as they are written but for the settings and steps of a tiny run."""
    environment = {**os.environ, "PYTHONPATH": str(HERE)}
    started = []
    for code in examples:
        code = as_a_tiny_run(code)
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        command = [sys.executable, "-c", code]
        started.append(subprocess.Popen(command, cwd=folder, env=environment, **pipes))
    ended = [(process.communicate(), process.returncode) for process in started]
    for (_, errors), code in ended:
        assert code == 0, errors[-2000:]
    return [printed for (printed, _), _ in ended]


def as_a_tiny_run(code):
    code = re.sub(r"train\.main\(\[(.*?)\]\)", rf"train.main([\1, *{TINY}])", code, flags=re.DOTALL)
    return code.replace("range(100)", "range(2)")


def test_the_lines_of_the_readme_on_a_trained_model_run_as_written(tmp_path):
    model = ASTSeg(Config(**SMALL | dict(height=48, width=48), log_alpha_0=-3.0))
    model.save_pretrained(tmp_path / "runs" / "shapes" / "model")
    use, pixels, *_ = python_blocks()
    assert "box:" in run_examples(tmp_path, use + pixels)[0]


def test_each_fork_of_the_readme_runs_as_written(tmp_path):
    _, _, generator, loss, data, loop = python_blocks()
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (20, 50, 60, 3), dtype=np.uint8)
    np.savez(tmp_path / "scenes.npz", image=images, mask=random.integers(0, 4, (20, 50, 60)))
    run_examples(tmp_path, generator, loss, data, loop)
    runs = tmp_path / "runs"
    asked = json.loads((runs / "convolutions" / "settings.json").read_text())
    assert asked["generator"] == "convolutions"
    rows = [json.loads(row) for row in (runs / "sparse" / "log.jsonl").read_text().splitlines()]
    for row in rows[-3:]:
        assert row["loss"] == pytest.approx(
            row["reconstruction"] + row["entropy"] + row["sparsity"], rel=1e-5
        )
        assert row["sparsity"] > 0
    read = json.loads((runs / "small" / "settings.json").read_text())
    assert read["dataset"] == "npz" and (runs / "small" / "metrics.json").exists()


def test_the_links_and_names_of_the_readme_exist():
    readme = (HERE / "README.md").read_text()
    links = re.findall(r"\]\(([^)#]+)\)", readme)
    local = [link for link in links if not link.startswith("http")]
    assert len(local) > 4 and all((HERE / link).exists() for link in local)
    anchors = re.findall(r"\]\(#([^)]+)\)", readme)
    heads = re.findall(r"^#+ (.*)$", readme, re.MULTILINE)
    heads = {re.sub(r"[^\w -]", "", head).lower().replace(" ", "-") for head in heads}
    assert set(anchors) <= heads
    steps = re.findall(r"^.*\| `(\w+)`$", readme.partition("## How it works")[2], re.MULTILINE)
    assert len(steps) == 7 and all(hasattr(astseg, name) for name in steps)
    flags = {flag.replace("no_", "") for flag in re.findall(r"`--(\w+)", readme)}
    settings = {field.name for field in fields(train.Training)} | {"output", "help"}
    assert flags <= settings, flags - settings
