"""AST-Seg in one file: Unsupervised Multi-object Segmentation Using Attention and Soft-argmax.

Paper: B. Sauvalle and A. de La Fortelle, arXiv 2205.13271. [38] is their earlier paper on
backgrounds, arXiv 2112.08001. From unlabelled images alone the model finds each object, says
where it is, what it looks like and which pixels are its own.

Letters: B batch, K slots (the paper's object queries), H W image (its h, w), h w feature map (its
h*, w*), C channels, D width of a slot's features (its d_Phi), Z width of z_what, G side of a
glimpse (the small picture of an object), N any number. One batch, from images to loss:

    images (B, 3, H, W)
     |-- generator ------------------> K logit maps (B, K, h, w), features Phi (B, D, h, w)
     |     softmax over pixels (11) -> attention maps A (B, K, h, w)
     |     soft-argmax (12)-(15) ----> first position (B, K, 2)
     |     A times Phi (16) ---------> pooled features (B, K, D)
     |     refinement of all slots --> position, scale, activation alpha, z_what
     |     glimpses of z_what -------> colours and mask (B, K, 4, G, G)
     |     moved and shrunk ---------> layers L (B, K, 3, H, W), masks M (B, K, H, W)
     |     alpha M, normalised (17) -> weights w (B, K + 1, H, W); their argmax is the segmentation
     `-- background autoencoder -----> L_0 (B, 3, H, W)
    sum of w L (18) -> reconstruction (B, 3, H, W); error (19)(20) + entropy of w (21) -> loss (22)

    >>> import torch, astseg
    >>> model = astseg.ASTSeg(astseg.Config(height=64, width=64, slots=4, backbone="tiny")).eval()
    >>> output = model(torch.rand(2, 3, 64, 64))           # RGB in [0, 1] -> Output
    >>> labels = model.segment(torch.rand(2, 3, 64, 64))   # (2, 64, 64), 0 is the background

    section 2, (1) (4) (10)   translate, center_of_mass, spatial_softmax, soft_argmax
    section 4.1               SegformerGenerator
    Algorithm 1, (11)-(16)    normalized_coordinates, Refinement, Encoder
    Algorithm 2, Table 7      GlimpseGenerator, spatial_transformer
    Algorithm 2, (17)-(18)    occlusion_weights, compose, Renderer
    section 4.1, [38]         BackgroundAutoencoder
    Table 6, Figure 1         Config, ASTSeg
    section 4.2, (19)-(21)    reconstruction_loss, pixel_entropy_loss
    section 4.2, (22)         quadratic_warmup, full_loss
    section 5.1, Table 6      learning_rate
    section 4.2.2, [38]       robust_background_loss
    section 5.1               mean_iou, adjusted_rand_index, segmentation_covering
    Table 8                   UNetGenerator

Conventions: colours, masks and attention lie in [0, 1]. Positions are (x, y), tensors are indexed
[row, column], so that the paper's (i, j) is [j, i]. Label 0 is the background, label k is slot k.
"# open:" marks a choice that the paper leaves open, "# differs:" what we do otherwise than it does;
the reason stands at the line. A fork adds a generator to GENERATORS, a term to full_loss, a data
set to DATASETS.
"""

import math
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial
from typing import Annotated, Callable, Literal, NamedTuple, get_args, get_origin

import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from transformers import SegformerConfig, SegformerForSemanticSegmentation, SegformerModel


def require(holds, sentence):
    """Raise ValueError with the sentence unless the condition holds."""
    if not holds:
        raise ValueError(sentence)


@contextmanager
def explained(sentence, kind=Exception):
    """Raise OSError in place of another library's error: the sentence, then its words in a line."""
    try:
        yield
    except kind as error:
        words = " ".join(f"{type(error).__name__}: {error}".split())
        raise OSError(f"{sentence} ({words[:300]})") from error


# ---- Section 2: attention maps and soft-argmax for localisation ----


def translate(phi, u, v):
    """Shift maps (..., H, W) by u columns and v rows; what leaves the window is lost."""
    height, width = phi.shape[-2:]
    u = max(-width, min(u, width))
    v = max(-height, min(v, height))
    return F.pad(phi, (u, -u, v, -v))  # eq. (1); a negative padding crops


def center_of_mass(attention, x=None, y=None):
    """Sum of phi(p) p over the pixels p, the operator of Proposition 2.1 with C = 0.

    attention (..., h, w), sum 1 each, at columns x (w,) and rows y (h,), by default pixels from 0
    -> (..., 2), the pair (x, y) in the same units.
    """
    if x is None:
        x = torch.arange(attention.shape[-1], device=attention.device)
        y = torch.arange(attention.shape[-2], device=attention.device)
    center_x = (attention.sum(-2) * x).sum(-1)  # eqs. (4), (14)
    center_y = (attention.sum(-1) * y).sum(-1)  # eqs. (4), (15)
    return torch.stack((center_x, center_y), dim=-1)


def spatial_softmax(logits):
    """Softmax over all pixels of each map (..., h, w), at least in fp32."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return logits.flatten(-2).softmax(-1, dtype).unflatten(-1, logits.shape[-2:])


def soft_argmax(logits, x=None, y=None):
    """Differentiable position of each map's maximum: (..., h, w) -> (..., 2), (x, y)."""
    return center_of_mass(spatial_softmax(logits), x, y)  # eq. (10)


# ---- Section 4.1: the feature map generator, (B, 3, H, W) -> (B, K + D, h, w) ----

# Mix Transformers: blocks per stage, widths, attention heads, width of the MLP decoder.
MIT_SIZES = {
    "tiny": ([1, 1, 1, 1], [16, 32, 64, 128], [1, 2, 4, 8], 64),  # ours, for two CPU cores
    "b0": ([2, 2, 2, 2], [32, 64, 160, 256], [1, 2, 5, 8], 256),
    "b3": ([3, 4, 18, 3], [64, 128, 320, 512], [1, 2, 5, 8], 768),  # the paper's
}


class SegformerGenerator(nn.Module):
    """Segformer (arXiv 2105.15203): images (B, 3, H, W) -> (B, channels, H/4, W/4), rounded up."""

    def __init__(self, channels, size="b3", dropout=0.1):
        super().__init__()
        depths, widths, heads, decoder = MIT_SIZES[size]
        config = SegformerConfig(
            depths=depths, hidden_sizes=widths, num_attention_heads=heads,
            decoder_hidden_size=decoder, drop_path_rate=dropout, classifier_dropout_prob=dropout,
            num_labels=channels,  # open: one head makes both attention logits and features
        )  # fmt: skip
        self.segformer = SegformerForSemanticSegmentation(config)

    def load_backbone(self, source):
        """Take the backbone of a hub model (nvidia/mit-b3) or a local folder. Raises OSError."""
        config = self.segformer.config
        wanted = f"a Segformer backbone of widths {config.hidden_sizes}"
        with explained(f"{wanted} was not found in {source!r}"):
            options = dict(config=config, dtype=torch.float32, output_loading_info=True)
            backbone, report = SegformerModel.from_pretrained(source, **options)
            require(not report["missing_keys"], f"missing are {report['missing_keys']}")
        self.segformer.segformer = backbone

    def forward(self, images):
        # open: images enter in [0, 1], without ImageNet's mean and deviation
        return self.segformer(images).logits  # (B, channels, h, w)


# ---- Algorithm 1: from feature maps to the latents of each slot ----


def normalized_coordinates(height, width, device=None):
    """x (w,) of the columns and y (h,) of the rows in [-1, 1]; a single cell is at 0.

    Here +-1 are the centres of the outermost cells; for the spatial transformer below they are the
    edges of the image. At x = 1 that is a gap of half a cell, or 2 pixels with the Segformer, and
    in proportion elsewhere. The refinement can learn to close it.
    """
    i = torch.arange(width, device=device)  # from 0, where the paper counts from 1
    j = torch.arange(height, device=device)
    x = (2 * i - (width - 1)) / max(1, width - 1)  # eq. (12)
    y = (2 * j - (height - 1)) / max(1, height - 1)  # eq. (13)
    return x, y


class Latents(NamedTuple):
    """The encoder's result for each slot."""

    position: Tensor  # (B, K, 2), (x_k, y_k) in [-1, 1]
    scale: Tensor  # (B, K, 2), inverse scaling factors (s_k^x, s_k^y) in [s_min, s_max]
    activation: Tensor  # (B, K), alpha_k > 0
    z_what: Tensor  # (B, K, Z), appearance


class Refinement(nn.Module):
    """Transformer encoder over the slots: (B, K, D + 2) -> (B, K, D + 2).

    There is no positional encoding, so that the order of the slots does not matter.
    """

    def __init__(self, dim_slot, width=256, heads=8, feedforward=512, layers=6, dropout=0.1):
        super().__init__()
        # open: PyTorch's layer: norm after the residual, ReLU; all copies start alike
        layer = nn.TransformerEncoderLayer(width, heads, feedforward, dropout, batch_first=True)
        self.embedding = nn.Linear(dim_slot, width)
        self.transformer = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.projection = nn.Linear(width, dim_slot)

    def forward(self, slots):
        return self.projection(self.transformer(self.embedding(slots)))  # (B, K, D + 2)


@torch.no_grad()
def start_as_identity(refinement):
    """Let a Refinement begin as the identity: PyTorch's start idles for thousands of steps.

    First, the last linear map of each attention and each MLP is zero, so that a layer adds nothing
    and only its norms remain. Second, the embedding adds a bias of 1, -1, 1, ..., beside which a
    slot is small: dividing by the deviation, which a norm does, then changes next to nothing.
    Third, the embedding's columns are orthonormal and orthogonal to that bias and to the mean that
    a norm removes, so that the transposed embedding reads the slot back.
    """
    # differs: the paper keeps PyTorch's start; at its 125 000 steps there is time for it
    width, dim_slot = refinement.embedding.weight.shape
    needed = dim_slot + 2
    require(width >= needed, f"dim_transformer is {width}: the identity start needs {needed}")
    for layer in refinement.transformer.layers:
        for last in (layer.self_attn.out_proj, layer.linear2):
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
    mean = torch.ones(width)
    bias = (-1.0) ** torch.arange(width)  # 1, -1, 1, ...
    frame = torch.column_stack((mean, bias, torch.randn(width, dim_slot)))
    basis = torch.linalg.qr(frame).Q[:, 2:]  # (width, D + 2)
    refinement.embedding.weight.copy_(basis)
    refinement.embedding.bias.copy_(bias)
    refinement.projection.weight.copy_(basis.T)
    nn.init.zeros_(refinement.projection.bias)


class Encoder(nn.Module):
    """Algorithm 1: feature maps -> latents, attention maps and their soft-argmax.

    dim_scale is 1 for isotropic and 2 for anisotropic scaling, D = dim_scale + 1 + dim_z_what;
    refinement maps (B, K, D + 2) to the same shape, None leaves it out (Table 4).
    """

    def __init__(self, slots, dim_scale, dim_z_what, s_min=1.3, s_max=24.0, refinement=None):
        super().__init__()
        self.slots = slots
        self.s_min = s_min
        self.s_max = s_max
        self.refinement = refinement or nn.Identity()
        self.split_sizes = [2, dim_scale, 1, dim_z_what]  # open: order (x, y), s, alpha, z_what

    def forward(self, feature_maps):
        """Logits, Phi (B, K + D, h, w) -> Latents, attention (B, K, h, w), position (B, K, 2)."""
        logits, features = feature_maps.tensor_split([self.slots], dim=1)  # K and D channels
        x, y = normalized_coordinates(*features.shape[-2:], device=features.device)
        # The next two lines are soft_argmax(logits, x, y); (16) needs the maps too.
        attention = spatial_softmax(logits)  # (B, K, h, w), eq. (11)
        position = center_of_mass(attention, x, y)  # (B, K, 2), eqs. (14), (15)
        # One matrix product per image, (B, K, h w) times (B, h w, D).
        pooled = attention.flatten(2) @ features.flatten(2).mT  # (B, K, D), eq. (16)
        refined = self.refinement(torch.cat((position, pooled), dim=-1))  # (B, K, D + 2)
        return self.split_latents(refined), attention, position

    def split_latents(self, refined):
        """(B, K, D + 2), the refined (x_k, y_k, phi_k) -> Latents, each in its range."""
        position, scale, activation, z_what = refined.split(self.split_sizes, dim=-1)
        # The clamp has no gradient outside: a position that is driven there by too high a
        # learning rate stays there. The column "clamped" of the log counts such positions.
        position = position.clamp(-1, 1)  # (B, K, 2)
        scale = self.s_min + (self.s_max - self.s_min) * scale.sigmoid()  # (B, K, 1 or 2)
        scale = scale.expand_as(position)  # (B, K, 2); isotropic: one number serves both axes
        activation = activation.squeeze(-1).exp()  # (B, K)
        return Latents(position, scale, activation, z_what)


# ---- Algorithm 2: from latents to layers and their weights ----


class GlimpseGenerator(nn.Module):
    """Colours o_k and mask m_k of an object (Table 7): (N, Z) -> (N, 3 + 1, G, G) in [0, 1]."""

    def __init__(self, dim_z_what=32, size=64):
        super().__init__()
        channels = [2 * size]  # 2 G, G, ..., 8, 4: colours and mask at the end
        while channels[-1] > 4:
            channels.append(channels[-1] // 2)
        # Table 7 prints stride 2 for the first layer, which does nothing on a single pixel.
        layers = [nn.ConvTranspose2d(dim_z_what, channels[0], 2, bias=False)]  # 1 x 1 -> 2 x 2
        for c_in, c_out in zip(channels, channels[1:]):  # each layer doubles the side
            bias = c_out == 4  # open: the last layer alone has one
            layers += [nn.GroupNorm(max(1, c_in // 16), c_in), nn.CELU()]
            layers += [nn.ConvTranspose2d(c_in, c_out, 4, stride=2, padding=1, bias=bias)]
        self.layers = nn.Sequential(*layers, nn.Sigmoid())

    def forward(self, z_what):
        return self.layers(z_what[:, :, None, None])  # (N, Z, 1, 1) -> (N, 4, G, G)


def spatial_transformer(glimpses, position, scale, height, width):
    """Shrink glimpses by s and move them to (x, y) (Algorithm 2).

    glimpses (N, C, G, G), position (N, 2) in [-1, 1], scale (N, 2) -> (N, C, height, width).
    """
    # The pixel p of the image shows the glimpse at s (p - position). There is no rotation, so that
    # each axis can be computed by itself; F.affine_grid would multiply by a matrix half of zeros.
    # open: bilinear, zero outside the glimpse, +-1 at the outer edges (align_corners=False)
    columns = (2 * torch.arange(width, device=scale.device) + 1) / width - 1  # (width,)
    rows = (2 * torch.arange(height, device=scale.device) + 1) / height - 1  # (height,)
    u = scale[:, :1] * (columns - position[:, :1])  # (N, width)
    v = scale[:, 1:] * (rows - position[:, 1:])  # (N, height)
    u, v = torch.broadcast_tensors(u[:, None, :], v[:, :, None])  # (N, height, width) each
    return F.grid_sample(glimpses, torch.stack((u, v), dim=-1), align_corners=False)


def occlusion_weights(activation, masks, alpha_0):
    """The share of each layer in each pixel, the background first.

    activation (B, K), masks (B, K, H, W), alpha_0 () or (H, W) -> (B, K + 1, H, W), sums to 1.
    """
    strength_k = activation[:, :, None, None] * masks  # (B, K, H, W), alpha_k M_k
    strength_0 = alpha_0.expand_as(strength_k[:, :1])  # (B, 1, H, W), alpha_0 M_0 with M_0 = 1
    strength = torch.cat((strength_0, strength_k), dim=1)  # (B, K + 1, H, W)
    return strength / strength.sum(1, keepdim=True)  # eq. (17)


def compose(weights, background, layers):
    """(B, K + 1, H, W), (B, 3, H, W), (B, K, 3, H, W) -> (B, 3, H, W), the sum of all layers."""
    objects = (weights[:, 1:, None] * layers).sum(1)  # (B, 3, H, W)
    return weights[:, :1] * background + objects  # eq. (18)


class Renderer(nn.Module):
    """Algorithm 2, all but its last line: latents -> weights, layers, masks and glimpses."""

    def __init__(self, height, width, dim_z_what=32, glimpse=64, log_alpha_0=11.0, per_pixel=False):
        super().__init__()
        self.size = height, width
        self.glimpse_generator = GlimpseGenerator(dim_z_what, glimpse)
        # A large alpha_0 hides all objects at first, and they grow only where they help. With a
        # small one the first random glimpses hurt, and all slots die.
        # open: the logarithm of alpha_0 is learned and, for alpha_0(i, j), a map that is added
        self.log_alpha_0 = nn.Parameter(torch.tensor(float(log_alpha_0)))
        self.log_alpha_0_map = nn.Parameter(torch.zeros(self.size), requires_grad=per_pixel)

    def forward(self, latents):
        """-> weights (B, K + 1, H, W), layers (B, K, 3, H, W), masks (B, K, H, W), glimpses."""
        slots = latents.activation.shape[1]  # K
        position, scale, _, z_what = (x.flatten(0, 1) for x in latents)  # (B K, 2 or Z)
        glimpses = self.glimpse_generator(z_what)  # (B K, 4, G, G)
        moved = spatial_transformer(glimpses, position, scale, *self.size)  # (B K, 4, H, W)
        layers, masks = moved.unflatten(0, (-1, slots)).split([3, 1], dim=2)  # (B, K, 3 or 1, H, W)
        masks = masks.squeeze(2)  # (B, K, H, W)
        alpha_0 = (self.log_alpha_0 + self.log_alpha_0_map).exp()  # (H, W)
        weights = occlusion_weights(latents.activation, masks, alpha_0)
        return weights, layers, masks, glimpses.unflatten(0, (-1, slots))


# ---- Section 4.1: background model, the autoencoder of [38] ----

# Channels of encoder and decoder, both from image to latents, by number of blocks, as the authors
# use [38] for this paper.
BACKGROUND_CHANNELS = {
    ("simple", 5): ([3, 64, 160, 160, 32, 16], [4, 144, 256, 256, 32, 16]),
    ("simple", 6): ([3, 64, 160, 320, 160, 32, 16], [4, 144, 256, 512, 256, 32, 16]),
    ("simple", 7): ([3, 64, 160, 320, 160, 160, 32, 16], [4, 144, 256, 512, 256, 256, 32, 16]),
    ("complex", 5): ([3, 64, 160, 160, 16, 16], [4, 144, 640, 640, 16, 16]),
    ("complex", 6): ([3, 64, 160, 320, 160, 16, 16], [4, 144, 640, 1280, 640, 16, 16]),
    ("complex", 7): ([3, 64, 320, 640, 640, 320, 16, 16], [4, 144, 640, 1280, 640, 320, 16, 16]),
}


def shrink_side(side):
    """One step of the schedule of [38] -> (kernel, stride, padding, remainder), the next side.

    The remainder is what the stride leaves over; the mirrored convolution adds it again. A side of
    64 gives (5, 2, 2, 1), 32.
    """
    if side > 5:
        kernel, stride, padding = 5, 2, 2
    elif side > 3:
        kernel, stride, padding = 4, 2, 1
    else:
        kernel, stride, padding = side, 1, 0
    steps, remainder = divmod(side + 2 * padding - kernel, stride)
    return (kernel, stride, padding, remainder), steps + 1


def background_blocks(height, width):
    """The convolutions that bring an image to 1 x 1.

    A list of (kernel, stride, padding, remainder), each a pair (of the rows, of the columns).
    """
    blocks = []
    while max(height, width) > 1:
        rows, height = shrink_side(height)  # open: each axis has its own kernels
        columns, width = shrink_side(width)
        blocks.append(tuple(zip(rows, columns)))
    return blocks


class CoordConv(nn.Module):
    """A convolution of x, row and column, group norm and CELU: (B, C, h, w) -> (B, C', h', w')."""

    def __init__(self, convolution, norm=True):
        super().__init__()
        channels = convolution.out_channels
        self.convolution = convolution
        self.norm = nn.GroupNorm(max(1, channels // 16), channels) if norm else None

    def forward(self, x):
        def coordinates(n):  # from -0.5 to 0.5; [38] puts a single one at 1
            return torch.linspace(-0.5 if n > 1 else 1, 0.5, n, device=x.device)

        # Made on x's own device: a CUDA graph cannot record a copy from the CPU.
        axes = [coordinates(n) for n in x.shape[2:]]  # rows (h,) and columns (w,)
        rows_columns = torch.stack(torch.meshgrid(*axes, indexing="ij")).to(x.dtype)  # (2, h, w)
        x = torch.cat((x, rows_columns.expand(x.shape[0], -1, -1, -1)), dim=1)  # (B, C + 2, h, w)
        x = self.convolution(x)  # (B, C', h', w')
        return x if self.norm is None else F.celu(self.norm(x))


class BackgroundAutoencoder(nn.Module):
    """Background of an image, through 16 latents that have no room for objects ([38]).

    images (B, 3, H, W) -> background (B, 3, H, W) and a prediction (B, H, W) of its error, all in
    [0, 1]. [38] finds objects where the true error is larger than the predicted one. Here the
    prediction is only learned along with the background, as the authors do; nothing reads it
    afterwards. factor scales the hidden channels.
    """

    def __init__(self, height, width, kind="complex", factor=1.0):
        super().__init__()
        blocks = background_blocks(height, width)
        down, up = (list(channels) for channels in BACKGROUND_CHANNELS[kind, len(blocks)])
        for channels in (down, up):  # in multiples of a norm's group, 16
            channels[1:-1] = [max(16, 16 * round(c * factor / 16)) for c in channels[1:-1]]
        encoder, decoder = [], []
        for i, (kernel, stride, padding, remainder) in enumerate(blocks):
            shape = dict(kernel_size=kernel, stride=stride, padding=padding, bias=False)
            conv = nn.Conv2d(down[i] + 2, down[i + 1], **shape)
            back = nn.ConvTranspose2d(up[i + 1] + 2, up[i], output_padding=remainder, **shape)
            encoder.append(CoordConv(conv))
            decoder.insert(0, CoordConv(back, norm=i > 0))
        self.encoder = nn.Sequential(*encoder)
        self.decoder = nn.Sequential(*decoder)

    def forward(self, images):
        # open: images enter the autoencoder in [0, 1], not in the authors' 0..255
        latents = self.encoder(images)  # (B, 16, 1, 1)
        output = self.decoder(latents).to(images.dtype).sigmoid()  # (B, 4, H, W), not in bf16
        return output[:, :3], output[:, 3]


# ---- Table 6 and Figure 1: the whole model ----

# Numbers of the settings are positive, but for these and log_alpha_0.
IntOrZero = Annotated[int, "or 0"]
FloatOrZero = Annotated[float, "or 0"]


@dataclass(frozen=True)
class Config:
    """The architecture, by default the paper's for CLEVRTEX (Table 6)."""

    height: int = 128  # height H of the images, 32..192 pixels
    width: int = 128  # width W of the images, 32..192 pixels
    slots: int = 10  # K, the most objects in a scene
    anisotropic: bool = True  # scale width and height of a glimpse apart
    generator: str = "segformer"  # of the feature maps: segformer or unet
    backbone: Literal["tiny", "b0", "b3"] = "b3"  # size of the Segformer
    unet_width: float = 1.0  # factor on the U-Net's channels
    transformer: bool = True  # refine the slots with a transformer encoder
    dim_transformer: int = 256  # d_T, width of the transformer
    transformer_heads: int = 8  # attention heads of a transformer layer
    dim_feedforward: int = 512  # hidden width of a transformer layer's MLP
    transformer_layers: int = 6  # number of transformer layers
    dropout: FloatOrZero = 0.1  # of Segformer and transformer, and the Segformer's drop-path
    dim_z_what: int = 32  # Z, width of the appearance vector
    scale_min: float = 1.3  # s_min, the least inverse scaling factor of a glimpse
    scale_max: float = 24.0  # s_max, the largest inverse scaling factor of a glimpse
    log_alpha_0: float = 11.0  # logarithm of the background's activation at the start
    alpha_0_per_pixel: bool = False  # learn an activation per pixel, for fixed cameras
    background_kind: Literal["simple", "complex"] = "complex"  # fixed or varying backgrounds
    background_width: float = 1.0  # factor on the background autoencoder's channels

    def __post_init__(self):
        for field in fields(self):
            name = field.name
            value = getattr(self, name)
            if get_origin(field.type) is Literal:
                choices = get_args(field.type)
                require(value in choices, f"{name} is {value!r}: use one of {', '.join(choices)}")
                continue
            kind, *or_zero = get_args(field.type) or [field.type]  # IntOrZero has int and "or 0"
            if kind in (int, float):
                fits = isinstance(value, (int, kind)) and math.isfinite(value)
                fits = fits and (value > 0 or (or_zero and value == 0) or name == "log_alpha_0")
                number = "a positive whole number" if kind is int else "a positive number"
                require(fits, f"{name} is {value}: use {' '.join([number, *or_zero])}")
        known = ", ".join(GENERATORS)
        fits = self.generator in GENERATORS
        require(fits, f"generator is {self.generator!r}: use one of {known}")
        sides = self.height, self.width
        heads = self.transformer_heads
        dim = self.dim_transformer
        low = self.scale_min
        high = self.scale_max
        require(32 <= min(sides) <= max(sides) <= 192, f"images are {sides}: use sides of 32..192")
        require(self.dropout < 1, f"dropout is {self.dropout}: use 0..1, without 1")
        require(self.slots <= 255, f"slots is {self.slots}: label maps hold 255 objects at most")
        require(dim % heads == 0, f"{heads} heads do not divide dim_transformer {dim}")
        require(low < high, f"scale_min is {low} and scale_max {high}: the first must be smaller")


class Output(NamedTuple):
    """All that the model says of a batch of images."""

    reconstruction: Tensor  # (B, 3, H, W), the composed image
    background: Tensor  # (B, 3, H, W), L_0 in [0, 1]
    weights: Tensor  # (B, K + 1, H, W), w_0..w_K, sums to 1
    layers: Tensor  # (B, K, 3, H, W), L_1..L_K in [0, 1]
    masks: Tensor  # (B, K, H, W), M_1..M_K in [0, 1]
    glimpses: Tensor  # (B, K, 4, G, G), colours o_k and mask m_k in [0, 1]
    latents: Latents  # position, scale, activation and z_what of each slot
    attention: Tensor  # (B, K, h, w), A_1..A_K, each sums to 1
    attention_position: Tensor  # (B, K, 2), its soft-argmax, before the refinement, in [-1, 1]


class ASTSeg(nn.Module, PyTorchModelHubMixin, library_name="astseg", license="mit"):
    """The whole model (Figure 1), with `save_pretrained(folder)` and `from_pretrained(folder)`."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        dim_scale = 2 if config.anisotropic else 1
        dim = dim_scale + 1 + config.dim_z_what  # D: scaling factor, activation, z_what
        size = config.height, config.width
        self.generator = GENERATORS[config.generator](config.slots + dim, config)
        refinement = None
        if config.transformer:
            refinement = Refinement(
                dim + 2, width=config.dim_transformer, heads=config.transformer_heads,
                feedforward=config.dim_feedforward, layers=config.transformer_layers,
                dropout=config.dropout,
            )  # fmt: skip
        self.encoder = Encoder(
            config.slots, dim_scale, config.dim_z_what,
            s_min=config.scale_min, s_max=config.scale_max, refinement=refinement,
        )  # fmt: skip
        self.renderer = Renderer(
            *size, config.dim_z_what,
            glimpse=32 if max(size) <= 64 else 64,  # open: 64 above 128 px too (Table 7)
            log_alpha_0=config.log_alpha_0, per_pixel=config.alpha_0_per_pixel,
        )  # fmt: skip
        self.background = BackgroundAutoencoder(
            *size, kind=config.background_kind, factor=config.background_width
        )

    def forward(self, images, background=None):
        """images (B, 3, H, W) in [0, 1] and, if it is known, their background -> Output."""
        self.check_images(images)
        feature_maps = self.generator(images).to(images.dtype)  # (B, K + D, h, w)
        if background is None:
            background, _ = self.background(images)  # (B, 3, H, W)
        # Softmax over pixels, exp(activation) and (17) do not survive half precision.
        with torch.autocast(images.device.type, enabled=False):
            latents, attention, attention_position = self.encoder(feature_maps)
            weights, layers, masks, glimpses = self.renderer(latents)
            reconstruction = compose(weights, background, layers)  # (B, 3, H, W)
        return Output(
            reconstruction, background, weights, layers, masks, glimpses,
            latents, attention, attention_position,
        )  # fmt: skip

    @torch.no_grad()
    def segment(self, images):
        """images (B, 3, H, W) in [0, 1] -> label maps (B, H, W), int64, 0..K, 0 the background."""
        require(not self.training, "call model.eval() before model.segment: dropout is on")
        # The weights do not depend on the background image (section 4.1): any will do.
        return self(images, background=images).weights.argmax(1)

    def check_images(self, images):
        """Raise ValueError for a wrong shape or type or, outside training, wrong values."""
        # if and raise in place of require: torch.export must not put a symbolic shape into words.
        height, width = self.config.height, self.config.width
        dtype = self.renderer.log_alpha_0.dtype
        if images.ndim != 4 or images.shape[1:] != (3, height, width) or images.shape[0] == 0:
            seen = tuple(images.shape)
            raise ValueError(f"images are {seen}: this model takes (B, 3, {height}, {width})")
        if dtype.itemsize < 4:
            raise ValueError(f"the model is in {dtype}: keep it in float32 and use torch.autocast")
        if images.dtype != dtype:
            raise ValueError(f"images are {images.dtype}: give {dtype} in [0, 1], bytes / 255")
        if not (self.training or torch.compiler.is_compiling()):
            low, high = images.aminmax()
            if low.isnan():
                raise ValueError("images hold NaN (not a number): mend or leave them out")
            if low < -1e-3 or high > 1 + 1e-3:  # resampling rounds a little beyond
                raise ValueError(f"images have values {low:.4g}..{high:.4g}: scale them to [0, 1]")

    @classmethod
    def from_pretrained(cls, source, strict=True, **options):
        """The model of a folder or hub name; all its weights must be there. Raises OSError."""
        with explained(f"{source} holds no whole model"):
            return super().from_pretrained(str(source), strict=strict, **options)


# ---- Section 4.2: losses and schedules ----


def reconstruction_loss(images, reconstruction):
    """Mean over pixels of the squared L1 error over colours: two (B, 3, H, W) -> ()."""
    error = (reconstruction - images).abs().sum(1)  # (B, H, W), eq. (19)
    return error.square().mean()  # eq. (20)


def pixel_entropy_loss(weights):
    """Mean over pixels of the squared entropy of the weights: (B, K + 1, H, W) -> ().

    Squared, since the gradient of the entropy itself is singular where one weight is 1 (4.2.1).
    """
    entropy = -(weights * (weights + 1e-20).log()).sum(1)  # (B, H, W)
    return entropy.square().mean()  # eq. (21)


def quadratic_warmup(step, steps):
    """min(1, step / steps)^2, and 1 where steps is 0 (section 4.2.1)."""
    return min(1.0, step / steps) ** 2 if steps else 1.0


def full_loss(images, output, step, entropy_weight=1e-2, entropy_warmup=10_000):
    """The terms of the loss of phases 2 and 3 by name, () each; the loss is their sum, eq. (22).

    images (B, 3, H, W), what the model says of them, the number of the step from 0.
    """
    weight = entropy_weight * quadratic_warmup(step, entropy_warmup)
    return {
        "reconstruction": reconstruction_loss(images, output.reconstruction),
        "entropy": weight * pixel_entropy_loss(output.weights),  # eq. (22)
    }


def learning_rate(step, peak, total, warmup=0, decay_at=0.9, decay="step"):
    """Rate of a step: quadratic warm-up to peak, then a fall from decay_at * total on.

    It falls to a tenth ("step", as in the paper) or along a line to zero at total ("linear").
    """
    start = decay_at * total
    if step < start:
        fall = 1.0
    elif decay == "step":
        fall = 0.1
    else:
        fall = (total - step) / max(1.0, total - start)
    return peak * quadratic_warmup(step, warmup) * fall


def robust_background_loss(images, background, predicted_error, strength=6.0, threshold=0.25):
    """The loss of phase 1 [38], deaf to pixels that the background does not explain.

    images, background (B, 3, H, W), predicted_error (B, H, W), all in [0, 1] -> (). strength and
    threshold are beta and tau_1 of [38].
    """
    # Smooth L1 is quadratic below 3 of 255 grey levels, linear above.
    distance = partial(F.smooth_l1_loss, reduction="none", beta=3 / 255)
    error = distance(background, images).sum(1)  # (B, H, W)
    error_of_prediction = distance(predicted_error, error.detach() / 3)  # (B, H, W)
    with torch.no_grad():  # pixels around a large error are objects, and should not teach
        unexplained = (error / threshold).tanh()  # (B, H, W)
        # [38] averages over a window of 2 W / 75 + 1 pixels, W / 75 rounded down.
        radius = images.shape[-1] // 75
        window = dict(kernel_size=2 * radius + 1, stride=1, padding=radius)
        average = F.avg_pool2d(unexplained, **window, count_include_pad=False)  # (B, H, W)
        weight = (-strength * average).exp()  # (B, H, W)
    return ((error + error_of_prediction) * weight).mean()


# ---- Section 5.1: metrics, per image. Labels: 0 background, 1.. objects or slots ----


def contingency(target, predicted):
    """Pixels that each pair of labels shares: two (B, H, W) -> a list of B tables (n, n), fp64.

    Rows are target labels, columns predicted ones. Both are the n labels that occur in the image on
    either side; 0, the background, comes first, even where it does not occur. On the CPU. Raises
    ValueError for anything but two batches of label maps of one shape.
    """
    for labels in (target, predicted):
        fits = isinstance(labels, Tensor) and not labels.is_floating_point() and labels.ndim == 3
        fits = fits and labels.numel() and labels.cpu().long().min() >= 0
        seen = f"{getattr(labels, 'dtype', type(labels).__name__)} {tuple(np.shape(labels))}"
        require(fits, f"a label map is {seen}: use tensors (B, H, W) of integers from 0")
    shapes = tuple(predicted.shape), tuple(target.shape)
    require(shapes[0] == shapes[1], f"a label map is {shapes[0]}, its target {shapes[1]}")
    both = torch.stack((target.cpu().long(), predicted.cpu().long()), dim=1).flatten(2)
    tables = []
    for pair in both:  # (2, H W)
        labels, places = F.pad(pair, (1, 0)).unique(return_inverse=True)  # label 0 is always there
        target_place, predicted_place = places[:, 1:]  # (H W) each, 0..n - 1
        n = len(labels)
        counts = torch.bincount(target_place * n + predicted_place, minlength=n * n)
        tables.append(counts.view(n, n).double())
    return tables


def iou_matrix(table):
    """IoU of each pair of labels, and whether one of the two is in the image: (n, n) each."""
    union = table.sum(1, keepdim=True) + table.sum(0, keepdim=True) - table
    return table / union.clamp(min=1), union > 0


def mean_iou(target, predicted):
    """mIoU with and without the background pair (mIoU, mIoU-FG), after a Hungarian matching.

    Two (B, H, W) integers -> two (B,), fp64: the sum of the matched IoUs over the number of matched
    pairs of which at least one side is in the image. That is the authors' definition; others count
    the true masks alone. Where several matchings have the same sum, which happens when some IoU is
    0, they may differ in the number of pairs, and the metric is that of one of them.
    """
    scores = []
    for table in contingency(target, predicted):
        iou, present = iou_matrix(table)
        matching = linear_sum_assignment(iou, maximize=True)  # rows 0, 1, ... and their columns
        matched = iou[matching]
        counted = present[matching]
        # open: nothing to be found and nothing found counts 1 in mIoU-FG
        foreground = matched[1:].sum() / counted[1:].sum() if counted[1:].any() else 1.0
        scores.append((matched.sum() / counted.sum(), foreground))
    return tuple(torch.tensor(scores, dtype=torch.float64).T)


def adjusted_rand_index(target, predicted):
    """ARI-FG, over the pixels whose target is an object: two (B, H, W) integers -> (B,), fp64.

    Pixels predicted as background form an ordinary cluster; an image without objects counts 1.
    """

    def pairs(counts):
        return (counts * (counts - 1) / 2).sum()

    scores = []
    for table in contingency(target, predicted):
        table = table[1:]  # without the background's row
        same_both = pairs(table)
        same_target = pairs(table.sum(1))
        same_predicted = pairs(table.sum(0))
        expected = same_target * same_predicted / pairs(table.sum()).clamp(min=1)
        best = (same_target + same_predicted) / 2
        trivial = best == expected  # no pixel, or one cluster on both sides
        scores.append(1.0 if trivial else (same_both - expected) / (best - expected))
    return torch.tensor(scores, dtype=torch.float64)


def segmentation_covering(target, predicted):
    """MSC-FG, the mean over the objects of their best IoU with any label: two (B, H, W) -> (B,)."""
    scores = []
    for table in contingency(target, predicted):
        iou, _ = iou_matrix(table)
        is_there = table[1:].sum(1) > 0  # (n - 1,), without the background
        best = iou[1:].amax(1)[is_there]  # one an object
        scores.append(best.mean() if len(best) else 0.0)
    return torch.tensor(scores, dtype=torch.float64)


# ---- Table 8: the U-Net of the ablation study, another feature map generator ----


def conv_block(c_in, c_out, kernel=3, stride=1):
    """A convolution, batch norm and CELU (section 7.3)."""
    convolution = nn.Conv2d(c_in, c_out, kernel, stride, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(c_out), nn.CELU())


class Residual(nn.Sequential):
    """x + layers(x): (B, C, h, w) -> (B, C, h, w)."""

    def forward(self, x):
        return x + super().forward(x)


class UNetGenerator(nn.Module):
    """The U-Net of the ablation study (Table 8): images (B, 3, H, W) -> (B, channels, H, W).

    channels is K + D, where Table 8 prints d_Phi; factor scales the hidden channels.
    """

    def __init__(self, channels, height=128, width=128, factor=1.0):
        super().__init__()
        widths = [max(8, round(c * factor)) for c in (80, 128, 192, 256, 256, 256)]
        self.first = conv_block(3, widths[0])
        self.center = conv_block(widths[5], widths[5])
        self.down = nn.ModuleList()
        self.up = nn.ModuleList()
        for c_in, c_out in zip(widths, widths[1:]):
            residual = Residual(conv_block(c_out, c_out))
            self.down.append(nn.Sequential(conv_block(c_in, c_out, 4, 2), residual))
        for level in (4, 3, 2, 1, 0):
            both = 2 * widths[level + 1]  # what comes from below, and the skip
            odd = (height >> level) % 2, (width >> level) % 2  # open: odd sizes are padded
            up = nn.ConvTranspose2d(both, widths[level], 4, 2, 1, odd, bias=False)
            norm = nn.BatchNorm2d(widths[level])
            residual = Residual(conv_block(both, both))
            self.up.append(nn.Sequential(residual, up, norm, nn.CELU()))
        # open: no convolution has a bias, and the last two neither norm nor CELU
        residual = Residual(nn.Conv2d(channels, channels, 3, padding=1, bias=False))
        head = nn.Conv2d(channels, channels, 1, bias=False)
        self.last = nn.Sequential(conv_block(2 * widths[0], channels), residual, head)

    def forward(self, images):
        skips = [self.first(images)]  # (B, 80, H, W)
        for down in self.down:
            skips.append(down(skips[-1]))  # (B, 128, H/2, W/2) ... (B, 256, H/32, W/32)
        x = self.center(skips[-1])  # (B, 256, H/32, W/32)
        for up in self.up:
            x = up(torch.cat((x, skips.pop()), dim=1))  # (B, 256, H/16, W/16) ... (B, 80, H, W)
        return self.last(torch.cat((x, skips.pop()), dim=1))  # (B, channels, H, W)


# Name of a generator -> what makes it, given its channels (K + D, the K logit maps first) and the
# Config c. A fork's own is a line here.
GENERATORS = {
    "segformer": lambda channels, c: SegformerGenerator(channels, c.backbone, c.dropout),
    "unet": lambda channels, c: UNetGenerator(channels, c.height, c.width, c.unet_width),
}


# =================================================================================================
# Data: nothing below is needed to understand the model; notebooks and forks import it from here.

import colorsys
import gzip
import hashlib
import itertools
import os
import re
from collections import Counter
from contextlib import suppress
from pathlib import Path

from PIL import Image, ImageOps
from tqdm import tqdm


class Images(NamedTuple):
    """Images as bytes, in memory or mapped from a file."""

    images: Tensor  # (N, 3, H, W), uint8
    labels: Tensor | None  # (N, H, W), uint8, 0 background, 1.. objects


# ---- The embedded data set: textured objects before textured walls ----

WALLS = 12  # the same ones in every part of the data


def draw_shapes(count, seed, size=64):
    """The embedded data set -> Images: two to four objects before one of twelve walls.

    Colour tells the objects of an image neither from each other nor from the wall.
    """
    random = np.random.default_rng(seed)
    walls = [draw_wall(number, size) for number in range(WALLS)]
    steps = tqdm(range(count), "drawing", disable=None, leave=False)
    scenes = [draw_scene(walls[random.integers(WALLS)], random) for _ in steps]
    return Images(*(torch.from_numpy(np.stack(arrays)) for arrays in zip(*scenes)))


def draw_wall(number, size):
    """A wall (3, size, size) in [0, 1]: pattern and two colours are fixed by its number."""
    random = np.random.default_rng(number)
    x, y = pixel_centers(size)
    u, v = rotate(x, y, random.uniform(0, np.pi))
    pace = random.uniform(14, 26)  # radians across the image
    patterns = (
        np.sin(pace * u),  # waves
        2 * np.sin(pace * u) * np.sin(pace * v),  # checks
        np.sin(pace * np.hypot(x - random.uniform(), y - random.uniform())),  # rings
        np.sin(pace * u + 2 * np.sin(pace * v / 2)),  # bent stripes
        np.sin(pace * u) + np.sin(pace * v) + np.sin(pace * x),  # blobs
    )
    hue = number / WALLS
    first = colorsys.hsv_to_rgb(hue, 0.45, 0.6)
    second = colorsys.hsv_to_rgb((hue + random.uniform(-0.3, 0.3)) % 1, 0.45, 0.4)
    return blend(first, second, 3 * patterns[number % 5])


def draw_scene(wall, random):
    """Image (3, size, size) of objects before a wall, and label map (size, size), both uint8."""
    size = wall.shape[-1]
    x, y = pixel_centers(size)
    across, _ = rotate(x - 0.5, y - 0.5, random.uniform(0, 2 * np.pi))
    light = random.uniform(0.8, 1.1) * (1 + random.uniform(0.2, 0.5) * across)
    image = wall * light  # its strength and direction differ from image to image
    labels = np.zeros((size, size), np.uint8)
    hue = random.uniform()
    hues = hue, hue + random.uniform(0.25, 0.75)  # two for all objects of the image
    centers, radii = place_objects(random.integers(2, 5), random)
    for label, (center, radius) in enumerate(zip(centers, radii), start=1):
        dx, dy = (x - center[0]) / radius, (y - center[1]) / radius
        u, v = rotate(dx, dy, random.uniform(-0.35, 0.35))  # the object lies within about -1..1
        shade = 0.8 - 0.25 * (dx + dy)  # lit from the upper left
        color = shade * draw_texture(u, v, random.choice(hues), random)
        outline = OUTLINES[random.integers(len(OUTLINES))]
        cover = (0.5 - outline(u, v) * radius * size).clip(0, 1)  # an edge one pixel wide
        image = image + cover * (color - image)
        labels[cover > 0.5] = label
    return (image.clip(0, 1) * 255).round().astype(np.uint8), labels


def pixel_centers(size):
    """x and y (size, size) of the pixels' centres, from 0 to 1 across the image."""
    y, x = (np.mgrid[:size, :size] + 0.5) / size
    return x, y


def rotate(x, y, angle):
    """The same points in axes that are turned by an angle."""
    return x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)


def blend(first, second, pattern):
    """The first colour (3,) where a pattern (h, w) is high, the second where it is low."""
    share = 1 / (1 + np.exp(-pattern))
    return np.multiply.outer(first, share) + np.multiply.outer(second, 1 - share)  # (3, h, w)


def place_objects(count, random):
    """Centres (count, 2) and radii (count,) of objects that may overlap, but hide none."""
    radii = random.uniform(0.15, 0.23, count)
    while True:
        centers = random.uniform(0.14, 0.86, (count, 2))
        pairs = itertools.combinations(range(count), 2)
        gaps = [np.hypot(*(centers[a] - centers[b])) / (radii[a] + radii[b]) for a, b in pairs]
        if min(gaps) > 0.75:
            return centers, radii


# What an object is painted with and its outline, at a point (u, v).
TEXTURES = (  # high in one tone, low in the other
    lambda u, v: np.full_like(u, np.inf),  # plain
    lambda u, v: 4 * np.sin(5 * u),  # stripes
    lambda u, v: 8 * np.sin(5 * u) * np.sin(5 * v),  # checks
    lambda u, v: 10 * (np.hypot(u, v) - 0.5),  # a spot
)
CORNERS = (0.95, 0.0), (-0.475, 0.823), (-0.475, -0.823)
OUTLINES = (  # distance from the edge, below 0 inside
    lambda u, v: np.hypot(u, v) - 0.95,  # disc
    lambda u, v: np.sqrt(np.hypot(u * u, v * v)) - 0.9,  # square with round corners
    lambda u, v: (np.hypot(u, v / 0.8) - 1) * 0.8,  # ellipse
    lambda u, v: np.max([np.hypot(u - a, v - b) for a, b in CORNERS], axis=0) - 1.645,  # triangle
)


def draw_texture(u, v, hue, random):
    """Two tones of a hue in one of the textures: (3, size, size) in [0, 1]."""
    texture = TEXTURES[random.integers(len(TEXTURES))]
    bright = colorsys.hsv_to_rgb(hue % 1, 0.85, 1.0)
    dark = colorsys.hsv_to_rgb((hue + random.uniform(-0.12, 0.12)) % 1, 0.85, 0.6)
    return blend(bright, dark, texture(u, v))


# ---- Files: what is written is whole or not there, what fails says why ----


@contextmanager
def written_whole(path):
    """A binary file to write, which becomes path once it is whole. Raises OSError."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(f"{path}.{os.getpid()}.tmp")  # processes that start together have their own
    try:
        # torch.save has a RuntimeError for a full disk.
        with explained(f"{path} could not be written, is the disk full?", RuntimeError):
            with open(temporary, "wb") as file:
                yield file
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_tensors(path):
    """What torch.save wrote, mapped from the file. Raises OSError."""
    with explained(f"{path} could not be read"):
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)


def open_image(path, mask=False):
    """An image as RGB, or a mask in its own mode, turned as its EXIF tag says."""
    kinds = ["PNG"] if mask else ["PNG", "JPEG", "WEBP"]
    wanted = " or ".join(kinds)
    with explained(f"{path} is no readable {wanted}"), Image.open(path, formats=kinds) as image:
        deep = ";16" in str(image.tile)  # the mode of RGB does not tell
        image.load()
    with suppress(Exception):  # a malformed EXIF block turns nothing
        image = ImageOps.exif_transpose(image)
    if mask:
        return image
    require(not deep, f"{path} has more than 8 bits per channel: scale its range to 8")
    if "A" in image.getbands():
        opaque = image.getchannel("A").getextrema()[0] == 255
        require(opaque, f"{path} is transparent somewhere: lay it on a colour first")
    return image.convert("RGB")


MASK_RULE = "a mask is a single-channel PNG whose values are the labels, 0 the background"


def read_labels(path, dataset="folder"):
    """A label map (h, w), integers; in a folder, values are renumbered 1, 2, ... in their order."""
    image = open_image(path, mask=True)
    if dataset == "shapestacks":
        return np.array(image.getchannel(0)) // 32
    require(image.mode in ("1", "L", "P", "I", "I;16"), f"{path} is {image.mode}: {MASK_RULE}")
    labels = np.array(image)
    return np.searchsorted(np.union1d(0, labels), labels) if dataset == "folder" else labels


# ---- Readers: generators of (image, label map or None, part or "" to cut by index) ----


def decoded(items, dataset):
    """Open the files of (image path, mask path or None, part); name up to ten damaged ones."""
    damaged = []
    for path, mask, part in tqdm(items, "decoding", disable=None, leave=False):
        try:
            image = open_image(path)
            labels = mask and read_labels(mask, dataset)
        except OSError as error:
            damaged.append(str(error))
            require(len(damaged) < 10, "; ".join(damaged))
            continue
        fits = labels is None or labels.shape == image.size[::-1]
        require(fits, f"{mask} and its image differ in size, turned as their EXIF tags say")
        yield image, labels, part
    require(not damaged, "; ".join(damaged))


def list_files(folder):
    """Files of a folder and below it, sorted; links are followed, hidden names passed over."""

    def refuse(error):  # a folder that cannot be read
        raise error

    walk = os.walk(folder, followlinks=True, onerror=refuse)
    paths = [Path(where, name).relative_to(folder) for where, _, names in walk for name in names]
    paths = [folder / p for p in paths if not any(part[0] == "." for part in p.parts)]
    once = len({os.path.realpath(path) for path in paths}) == len(paths)
    require(once, f"{folder} shows a file twice: does a link lead in a circle?")
    return sorted(paths)


def most_common(words):
    """The ten most frequent words and how often each is there, in a line."""
    return ", ".join(f"{word} {n}" for word, n in Counter(words).most_common(10))


def by_stem(folder, paths, kinds, notes):
    """{sub-folder and stem: path} of the files of some kinds; a note says what was taken."""
    taken = [path for path in paths if path.suffix.lower() in kinds]
    rest = [path.suffix or path.name for path in paths if path.suffix.lower() not in kinds]
    other = f"passed over {most_common(rest) or 'no file'}"
    require(taken, f"{folder} has no file {', '.join(kinds)}, {other}")
    folders = [str(path.relative_to(folder).parent) for path in taken]
    notes.append(f"{len(taken)} files, by sub-folder {most_common(folders)}; {other}")
    stems = {path.relative_to(folder).with_suffix(""): path for path in taken}
    require(len(stems) == len(taken), f"{folder} has two files that differ only in their suffix")
    return stems


def read_folder(data, masks, notes):
    """PNG, JPEG and WebP images; masks of the same sub-folder and stem in a folder of their own."""
    files = [path for path in list_files(data) if not masks or masks not in path.parents]
    images = by_stem(data, files, (".png", ".jpg", ".jpeg", ".webp"), notes)
    test = list(images)[: tenth(len(images))]
    notes.append(f"the test part is {test[0]} to {test[-1]}")
    labels = by_stem(masks, list_files(masks), (".png",), notes) if masks else {}
    for stem, path in images.items():
        fits = not masks or stem in labels
        require(fits, f"{path} has no mask {masks}/{stem}.png: {MASK_RULE}")
    for stem, path in labels.items():
        require(stem in images, f"{path} has no image {data}/{stem}")
    yield from decoded([(path, labels.get(stem), "") for stem, path in images.items()], "folder")


def read_clevrtex(data, masks, notes, variant):
    """CLEVRTEX_<variant>_NNNNNN.png with ..._NNNNNN_flat.png, whose palette indices are labels."""
    paths = {}
    for path in list_files(data):
        match = re.fullmatch(rf"CLEVRTEX_{variant}_(\d+)\.png", path.name)
        if match:
            paths.setdefault(int(match[1]), path)
    if sorted(paths) != [*range(len(paths))]:
        notes.append(f"warning: the numbers of {variant} have gaps, or do not begin with 0")
    # open: outd is one test set; camo too has a test part, its first 10 %
    part = "test" if variant == "outd" else ""
    images = [paths[number] for number in sorted(paths)]
    items = [(path, path.with_name(f"{path.stem}_flat.png"), part) for path in images]
    yield from decoded(items, "clevrtex")


def read_shapestacks(data, masks, notes):
    """recordings/<scenario>/rgb-*.png and iseg/<scenario>/*.map, by splits/default/<part>.txt."""
    items = []
    for part, name in {"test": "test", "val": "eval", "train": "train"}.items():
        for scenario in (data / f"splits/default/{name}.txt").read_text().split():
            paths = sorted(data.glob(f"recordings/{scenario}/rgb-*-cam_*-mono-0.png"))
            require(paths, f"{data}/recordings/{scenario} has no pictures, and {name}.txt lists it")
            for path in paths:
                camera = path.stem.split("-cam_")[1]
                mask = data / "iseg" / scenario / f"iseg-w=0-f=0-l=0-c=original-cam_{camera}.map"
                items.append((path, mask, part))
    yield from decoded(items, "shapestacks")


def read_tfrecords(data, masks, notes, name, shape, scenery):
    """tf.train.Examples with `image` and `mask`, GZIP or not; the first masks are scenery.

    shape is (height, width, masks). A record is its length in 8 bytes, a checksum in 4, an
    Example, a checksum in 4; checking is left to gzip.
    """
    height, width, count = shape
    path = data if data.is_file() else data / f"{name}.tfrecords"
    with open(path, "rb") as file:
        opener = gzip.open if file.read(2) == b"\x1f\x8b" else open
    with opener(path, "rb") as file:
        for number in tqdm(itertools.count(), "decoding", disable=None, leave=False):
            with explained(f"{path}, record {number}, is damaged"):
                head = file.read(12)
                if not head:
                    return
                size = int.from_bytes(head[:8], "little")
                record = file.read(min(size, 1 << 30) + 4)
                require(len(record) == size + 4, "it is cut short, or no record")
                image = example_bytes(record, b"image", (height, width, 3))
                mask = example_bytes(record, b"mask", (count, height, width))
            labels = (mask.argmax(0) - (scenery - 1)).clip(0)
            yield Image.fromarray(image), labels, "test" if "_test_" in name else ""


def example_bytes(example, name, shape):
    """The bytes of a feature of a tf.train.Example, where each is an entry of its own."""
    require(name in example, f"it has no {name.decode()}")
    count = math.prod(shape)
    # An entry is the tag 10, the length 1 and the byte. Between the name and the first entry stand
    # only the tags and lengths of the feature and of its list, where 10, 1 does not occur.
    start = example.find(b"\n\1", example.index(name))
    end = start + 3 * count
    entries = np.frombuffer(example[start:end], np.uint8)
    whole = len(entries) == 3 * count and example[end : end + 2] != b"\n\1"  # and no entry more
    whole = whole and (entries.reshape(-1, 3)[:, :2] == (10, 1)).all()
    require(whole, f"{name.decode()} is not {count} entries of one byte")
    return entries[2::3].reshape(shape)


class DataSet(NamedTuple):
    """How a data set is read."""

    reader: Callable  # (data, masks, notes) -> generator of (image, label map or None, part)
    crop: float = 1.0  # share of the largest centre crop that is kept
    label_at: float = 0.5  # where in its cell a label is taken, 0.5 as Pillow does, 0 as PyTorch


def textures(variant):
    return DataSet(partial(read_clevrtex, variant=variant), crop=0.8)


def rooms(name, masks):
    name = f"objects_room_{name}"
    return DataSet(partial(read_tfrecords, name=name, shape=(64, 64, masks), scenery=4))


# open: CLEVR's first tenths by index, as the authors take them
CLEVR = partial(read_tfrecords, name="clevr_with_masks_train", shape=(240, 320, 11), scenery=1)

# A fork's own data set is a line here: its reader yields the parts "test", "val" and "train" in
# any order, or "" for all images, which are then cut by index. What it appends to notes is printed.
DATASETS = {
    "folder": DataSet(read_folder),
    "clevr": DataSet(CLEVR, crop=0.8),
    "clevrtex": textures("full"),
    "outd": textures("outd"),
    "camo": textures("camo"),
    "pbg": textures("pbg"),
    "vbg": textures("vbg"),
    "grassbg": textures("grassbg"),
    "objectsroom": rooms("train", 7),
    "six_objects": rooms("test_six_objects", 10),
    "identical_color": rooms("test_identical_color", 10),
    "empty_room": rooms("test_empty_room", 4),
    "shapestacks": DataSet(read_shapestacks, crop=196 / 224, label_at=0.0),
}


# ---- From files to tensors ----


def centre_crop(size, height, width, crop=1.0):
    """Box of the largest centre crop of an image of size (w, h) to an aspect, times crop."""
    w, h = size
    side_x = max(1, int(crop * min(w, h * width / height)))
    side_y = max(1, int(crop * min(h, w * height / width)))
    left, top = round((w - side_x) / 2), round((h - side_y) / 2)
    return left, top, left + side_x, top + side_y


def crop_and_resize(image, labels, height, width, crop=1.0, label_at=0.5):
    """Centre crop, then bilinear resize: (3, height, width) uint8, (height, width) or None."""
    box = left, top, right, bottom = centre_crop(image.size, height, width, crop)
    pixels = np.array(image.crop(box).resize((width, height), Image.Resampling.BILINEAR))
    if labels is not None:
        rows = top + ((np.arange(height) + label_at) * (bottom - top) / height).astype(int)
        columns = left + ((np.arange(width) + label_at) * (right - left) / width).astype(int)
        labels = labels[rows][:, columns]
    return pixels.transpose(2, 0, 1), labels


PARTS = ("test", "val", "train")


def tenth(count):
    """Size of the test part, and of the validation part, where images come without parts."""
    return min(10_000, max(1, count // 10))  # 10 000 of ObjectsRoom


def prepare(dataset, data, masks, height, width):
    """Decode a data set -> a dictionary of its tensors, the sizes of its parts, what was taken."""
    reader, crop, label_at = DATASETS[dataset]
    notes, parts = [], []
    images, maps = bytearray(), bytearray()  # millions of images hardly fit twice
    for image, labels, part in reader(data, masks, notes):
        pixels, labels = crop_and_resize(image, labels, height, width, crop, label_at)
        images += pixels.tobytes()
        parts.append(part)
        if labels is not None:
            low, high = labels.min(), labels.max()
            fits = 0 <= low and high <= 255
            require(fits, f"image {len(parts)} has labels {low}..{high}, not 0..255: soft edges?")
            maps += labels.astype(np.uint8).tobytes()
    number = len(parts)
    require(number > 2, f"{data} holds {number} images of {dataset}: three parts need three")
    images = np.frombuffer(images, np.uint8).reshape(-1, 3, height, width)
    maps = np.frombuffer(maps, np.uint8).reshape(-1, height, width)
    require(len(maps) in (0, number), f"{data} has {len(maps)} label maps for {number} images")
    if set(parts) == {""}:
        n = tenth(number)
        parts = ["test"] * n + ["val"] * n + ["train"] * (number - 2 * n)
    unknown = set(parts) - set(PARTS)
    require(not unknown, f"{dataset} yields parts {unknown}: use {PARTS}, or '' for all images")
    order = sorted(range(number), key=lambda n: PARTS.index(parts[n]))
    if order != [*range(number)]:
        images = images[order]
        maps = maps[order] if len(maps) else maps
    taken = f"{dataset} {data}: {number} images, mean brightness {images.mean() / 255:.2f}"
    objects = [0]
    if len(maps):
        objects = [np.unique(labels[labels > 0]).size for labels in maps]
        empty = (maps == 0).mean()
        fits = 0 < empty < 1 or dataset != "folder"  # a published set may have no object
        require(fits, f"{masks}: {empty:.0%} of the pixels are background")
        taken += f", {min(objects)}..{max(objects)} labels each, background {empty:.0%}"
    return {
        "images": torch.from_numpy(images),
        "labels": torch.from_numpy(maps) if len(maps) else None,
        "sizes": [parts.count(part) for part in PARTS],
        "most": max(objects),
        "taken": "\n".join([taken, *notes]),
    }


CACHE_FORMAT = 3  # with another number everything is decoded anew


def cache_key(*settings):
    """A name for some settings and, by size and time of change, the files of paths among them."""
    key = hashlib.sha1(repr((CACHE_FORMAT, *settings)).encode())
    for path in settings:
        if isinstance(path, Path):
            for file in list_files(path) if path.is_dir() else [path]:
                about = file.stat()
                key.update(os.fsencode(f"{file} {about.st_size} {about.st_mtime_ns}"))
    return key.hexdigest()[:12]


def load_dataset(dataset, data, masks, height, width, slots=255, cache="cache"):
    """The parts "test", "val", "train" and "all" of a data set, Images each, mapped from a cache.

    The first call decodes it, and so does one after a change of its files; every call prints what
    was taken. slots is K, to warn of soft edges.
    """
    fits = not masks or dataset == "folder"
    require(fits, f"--masks belong to the images of a folder, not to {dataset}")
    data, masks = (Path(os.path.abspath(path)) if path else None for path in (data, masks))
    settings = dataset, data, masks, height, width
    path = Path(cache, f"{dataset}-{height}x{width}-{cache_key(*settings)}.pt")
    if not path.exists():
        with written_whole(path) as file:  # first of all: a full or closed folder is found out here
            torch.save(prepare(*settings), file)
    found = load_tensors(path)
    print(f"{found['taken']}\ncached in {path}")
    if found["most"] > 4 * slots:
        print(f"warning: up to {found['most']} labels per image for {slots} slots: soft edges?")
    images = found["images"]
    labels = found["labels"]
    sizes = found["sizes"]
    parts = {"all": Images(images, labels)}
    label_parts = [None] * len(PARTS) if labels is None else labels.split(sizes)
    for name, *pair in zip(PARTS, images.split(sizes), label_parts):
        parts[name] = Images(*pair)
    return parts
