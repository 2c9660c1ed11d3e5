"""AST-Seg in one file: Unsupervised Multi-object Segmentation Using Attention and Soft-argmax.

Paper: B. Sauvalle and A. de La Fortelle, arXiv 2205.13271. Code: github.com/BrunoSauvalle/AST.
[38] is their earlier paper on backgrounds, arXiv 2112.08001. From unlabelled images alone the model
finds each object, says where it is, what it looks like and which pixels are its own.

Letters: B batch, K slots (the paper's object queries), H W image, h w feature map, C channels,
D width of a slot's features (the paper's d_Phi), Z width of z_what, G side of a glimpse (the small
picture of an object), N any number. Beware: the paper writes h w for the image and h* w* for the
feature map. One batch, from images to loss:

    images (B, 3, H, W)
     |-- generator ------------------> K logit maps (B, K, h, w), features Phi (B, D, h, w)
     |     softmax over pixels (11) -> attention maps A (B, K, h, w)
     |     soft-argmax (12)-(15) ----> attention position (B, K, 2)
     |     A times Phi (16) ---------> pooled features (B, K, D)
     |     refinement of all slots --> Latents: position, scale, activation alpha, z_what
     |     glimpses of z_what -------> colours and mask (B, K, 4, G, G)
     |     moved and shrunk ---------> layers L (B, K, 3, H, W), masks M (B, K, H, W)
     |     alpha M, normalised (17) -> weights w (B, K + 1, H, W); their argmax is the segmentation
     `-- background autoencoder -----> L_0 (B, 3, H, W)
    sum of w L (18) -> reconstruction (B, 3, H, W); error (19)(20) + entropy of w (21) -> loss (22)

    >>> import torch, astseg
    >>> model = astseg.ASTSeg(astseg.Config(height=64, width=64, slots=4, backbone="tiny")).eval()
    >>> output = model(torch.rand(2, 3, 64, 64))           # RGB in [0, 1] -> Output
    >>> labels = model.segment(torch.rand(2, 3, 64, 64))   # (2, 64, 64), 0 is the background

    section 2, (1) (4) (10)    translate, center_of_mass, spatial_softmax, soft_argmax
    section 4.1                SegformerGenerator
    Algorithm 1, (11)-(16)     normalized_coordinates, Latents, Refinement, Encoder
    Algorithm 2, Table 7       GlimpseGenerator, spatial_transformer
    Algorithm 2, (17) (18)     occlusion_weights, compose, Renderer
    section 4.2.1, (19)-(22)   reconstruction_loss, pixel_entropy_loss, quadratic_warmup, full_loss
    Table 6, Figure 1          Config, Output, ASTSeg
    sections 4.1, 4.2.2, [38]  BackgroundAutoencoder, robust_background_loss
    section 5.1                mean_iou, adjusted_rand_index, segmentation_covering, METRICS
    Table 8                    UNetGenerator, GENERATORS

Equations (2), (3) and (5)-(9) are in equivariance_proof.ipynb; phases, optimiser and rates of the
training (sections 4.2.2, 5.1) are in train.py. Colours, masks and attention lie in [0, 1].
Positions are (x, y); tensors are indexed [row, column] from 0, the paper's (i, j) is (column, row)
from 1. Label 0 is the background, label k is slot k, whose index among K slots is k - 1. "# open:"
marks a choice that the paper leaves open, "# differs:" what we do otherwise than the paper.
"""

from dataclasses import dataclass, fields
from typing import Callable, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from transformers import SegformerConfig, SegformerForSemanticSegmentation, SegformerModel

# ---- Section 2: attention maps and soft-argmax for localisation ----


def translate(phi, u, v):
    """Shift maps (..., H, W) by u columns and v rows; what leaves the window is lost."""
    height, width = phi.shape[-2:]
    u = max(-width, min(u, width))  # a shift by more than the window empties it as well
    v = max(-height, min(v, height))
    return F.pad(phi, (u, -u, v, -v))  # eq. (1); a negative padding crops


def center_of_mass(attention, x=None, y=None):
    """Sum of phi(p) p over the pixels p: Proposition 2.1 with C = 0.

    Maps (..., h, w) that sum to 1 -> (..., 2), the pair (x, y). x (w,) are the positions of the
    columns and y (h,) of the rows, by default 0, 1, 2, ...; the result is in their units.
    """
    if x is None:
        x = torch.arange(attention.shape[-1], device=attention.device)
        y = torch.arange(attention.shape[-2], device=attention.device)
    center_x = (attention.sum(-2) * x).sum(-1)  # eqs. (4), (14)
    center_y = (attention.sum(-1) * y).sum(-1)  # eqs. (4), (15)
    return torch.stack((center_x, center_y), dim=-1)


def spatial_softmax(logits):
    """Softmax over all pixels of each map: (..., h, w) -> (..., h, w), sums to 1."""
    return logits.flatten(-2).softmax(-1).unflatten(-1, logits.shape[-2:])  # eq. (11)


def soft_argmax(logits, x=None, y=None):
    """Differentiable estimate of where each map is largest: (..., h, w) -> (..., 2), (x, y)."""
    return center_of_mass(spatial_softmax(logits), x, y)  # eq. (10)


# ---- Section 4.1: the feature map generator, (B, 3, H, W) -> (B, K + D, h, w) ----

SEGFORMER_SIZES = {
    "tiny": dict(  # ours, for two CPU cores
        depths=[1, 1, 1, 1], hidden_sizes=[16, 32, 64, 128], num_attention_heads=[1, 2, 4, 8],
        decoder_hidden_size=64,
    ),
    "b0": dict(
        depths=[2, 2, 2, 2], hidden_sizes=[32, 64, 160, 256], num_attention_heads=[1, 2, 5, 8],
        decoder_hidden_size=256,
    ),
    "b3": dict(  # the paper's
        depths=[3, 4, 18, 3], hidden_sizes=[64, 128, 320, 512], num_attention_heads=[1, 2, 5, 8],
        decoder_hidden_size=768,
    ),
}  # fmt: skip


class SegformerGenerator(nn.Module):
    """Segformer (arXiv 2105.15203): images (B, 3, H, W) -> (B, channels, H/4, W/4), rounded up."""

    def __init__(self, channels, size="b3", dropout=0.1):
        super().__init__()
        # open: one head makes both the attention logits and the features
        config = SegformerConfig(
            **SEGFORMER_SIZES[size], num_labels=channels,
            drop_path_rate=dropout, classifier_dropout_prob=dropout,
        )  # fmt: skip
        self.network = SegformerForSemanticSegmentation(config)

    def load_backbone(self, source):
        """Take the backbone of a hub model or folder, in eval mode: call model.train() after it."""
        options = dict(config=self.network.config, dtype=torch.float32, output_loading_info=True)
        backbone, report = SegformerModel.from_pretrained(source, **options)
        larger = [key for key in report["unexpected_keys"] if "encoder." in key]  # a head is fine
        if report["missing_keys"] or larger:  # transformers would only warn
            raise ValueError(f"{source} has no Segformer backbone of this size")
        self.network.segformer = backbone

    def forward(self, images):
        # open: images enter in [0, 1], without ImageNet's mean and deviation
        return self.network(images).logits  # (B, channels, h, w)


# ---- Algorithm 1: from feature maps to the latents of each slot ----


def normalized_coordinates(height, width, device=None):
    """x (w,) of the columns and y (h,) of the rows, from -1 to 1."""
    i = torch.arange(1, width + 1, device=device)
    j = torch.arange(1, height + 1, device=device)
    x = 2 * (i - 1) / (width - 1) - 1  # eq. (12)
    y = 2 * (j - 1) / (height - 1) - 1  # eq. (13)
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

    def __init__(self, dim_phi, width=256, heads=8, feedforward=512, layers=6, dropout=0.1):
        super().__init__()
        # The standard PyTorch layer: ReLU, and norm after the residual. TransformerEncoder copies
        # it, so that all layers start with equal weights. Nested tensors would be for padded slots.
        layer = nn.TransformerEncoderLayer(width, heads, feedforward, dropout, batch_first=True)
        self.embedding = nn.Linear(dim_phi + 2, width)
        self.transformer = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.projection = nn.Linear(width, dim_phi + 2)

    def forward(self, slots):
        return self.projection(self.transformer(self.embedding(slots)))  # (B, K, D + 2)


class Encoder(nn.Module):
    """Algorithm 1 from the feature maps on: -> latents, attention maps and their soft-argmax.

    D = dim_scale + 1 + dim_z_what, where dim_scale is 1 for isotropic and 2 for anisotropic
    scaling. refinement maps (B, K, D + 2) to the same shape; None leaves it out (Table 4).
    """

    def __init__(self, slots, dim_scale, dim_z_what, s_min=1.3, s_max=24.0, refinement=None):
        super().__init__()
        self.slots = slots
        self.s_min = s_min
        self.s_max = s_max
        self.refinement = refinement or nn.Identity()
        self.split_sizes = [2, dim_scale, 1, dim_z_what]  # (x, y), s, alpha, z_what

    def forward(self, feature_maps):
        """(B, K + D, h, w) -> Latents, attention (B, K, h, w), attention position (B, K, 2)."""
        # open: the logits are the first K channels
        logits = feature_maps[:, : self.slots]  # (B, K, h, w)
        features = feature_maps[:, self.slots :]  # (B, D, h, w), Phi
        x, y = normalized_coordinates(*features.shape[-2:], device=features.device)
        # The next two lines are soft_argmax(logits, x, y); (16) needs the maps too.
        attention = spatial_softmax(logits)  # (B, K, h, w), eq. (11)
        attention_position = center_of_mass(attention, x, y)  # (B, K, 2), x0 y0 of eqs. (14), (15)
        pooled = attention.flatten(2) @ features.flatten(2).mT  # (B, K, D), phi0 of eq. (16)
        refined = self.refinement(torch.cat((attention_position, pooled), dim=-1))  # (B, K, D + 2)
        return self.split_latents(refined), attention, attention_position

    def split_latents(self, refined):
        """(B, K, D + 2), the refined (x_k, y_k, phi_k) -> Latents, each in its range."""
        position, s, activation, z_what = refined.split(self.split_sizes, dim=-1)
        # Outside, the clamp has no gradient. We saw too high a learning rate drive positions there;
        # only updates of the shared weights by other slots and images may bring them back.
        position = position.clamp(-1, 1)  # (B, K, 2)
        s = self.s_min + (self.s_max - self.s_min) * s.sigmoid()  # (B, K, 1 or 2)
        scale = s.expand_as(position)  # (B, K, 2); isotropic: one number serves both axes
        # With isotropic scaling the authors' code differs from the paper and from this: it reads
        # alpha from the first number of z_what, and leaves alpha's own column unused.
        activation = activation.squeeze(-1).exp()  # (B, K)
        return Latents(position, scale, activation, z_what)


# ---- Algorithm 2: from latents to layers and their weights ----

GLIMPSE_CHANNELS = {  # side G of the glimpse -> channels at 2 x 2, 4 x 4, ..., G x G (Table 7)
    32: (64, 32, 16, 8, 4),
    64: (128, 64, 32, 16, 8, 4),
}


class GlimpseGenerator(nn.Module):
    """Colours o_k and mask m_k of an object (Table 7): (N, Z) -> (N, 3 + 1, G, G) in [0, 1]."""

    def __init__(self, dim_z_what=32, side=64):
        super().__init__()
        channels = GLIMPSE_CHANNELS[side]
        # Table 7 prints stride 2 here, which on a single pixel gives the same 2 x 2.
        layers = [nn.ConvTranspose2d(dim_z_what, channels[0], 2, bias=False)]
        for c_in, c_out in zip(channels, channels[1:]):  # each layer doubles the side
            last = c_out == channels[-1]  # open: the last layer alone has a bias
            layers += [nn.GroupNorm(max(1, c_in // 16), c_in), nn.CELU()]
            layers += [nn.ConvTranspose2d(c_in, c_out, 4, stride=2, padding=1, bias=last)]
        self.layers = nn.Sequential(*layers, nn.Sigmoid())

    def forward(self, z_what):
        return self.layers(z_what[:, :, None, None])  # (N, Z, 1, 1) -> (N, 4, G, G)


def spatial_transformer(glimpses, position, scale, height, width):
    """Shrink glimpses by s_k and move them to (x_k, y_k) (Algorithm 2).

    glimpses (N, C, G, G), position (N, 2) in [-1, 1], scale (N, 2) -> (N, C, height, width).
    """
    # The pixel (x, y) of the image shows the point theta (x, y, 1) of the glimpse, where
    # theta = [[s_x, 0, -s_x x_k], [0, s_y, -s_y y_k]].
    # open: -1 and 1 are the image's edges. In (12) and (13) they are the centres of the outermost
    # cells, which lie half a cell further in, nominally 2 pixels with the Segformer. Attention and
    # refinement can learn this difference.
    x = (2 * torch.arange(width, device=scale.device) + 1) / width - 1  # (W,), pixel centres
    y = (2 * torch.arange(height, device=scale.device) + 1) / height - 1  # (H,)
    glimpse_x = scale[:, :1] * (x - position[:, :1])  # (N, W)
    glimpse_y = scale[:, 1:] * (y - position[:, 1:])  # (N, H)
    grid = torch.broadcast_tensors(glimpse_x[:, None, :], glimpse_y[:, :, None])  # (N, H, W) each
    # open: bilinear, and zero outside the glimpse
    return F.grid_sample(glimpses, torch.stack(grid, dim=-1), align_corners=False)


def occlusion_weights(activation, masks, alpha_0):
    """The share of each layer in each pixel, the background first.

    activation (B, K), masks (B, K, H, W), alpha_0 () or (H, W) -> (B, K + 1, H, W), sums to 1.
    """
    strength_0 = alpha_0 * torch.ones_like(masks[:, :1])  # (B, 1, H, W), alpha_0 M_0 with M_0 = 1
    strength_k = activation[:, :, None, None] * masks  # (B, K, H, W), alpha_k M_k
    strength = torch.cat((strength_0, strength_k), dim=1)  # (B, K + 1, H, W)
    return strength / strength.sum(1, keepdim=True)  # eq. (17)


def compose(weights, background, layers):
    """(B, K + 1, H, W), (B, 3, H, W), (B, K, 3, H, W) -> (B, 3, H, W), the sum of all layers."""
    objects = (weights[:, 1:, None] * layers).sum(1)  # (B, 3, H, W)
    return weights[:, :1] * background + objects  # eq. (18)


class Renderer(nn.Module):
    """Algorithm 2 up to the weights (17): latents -> weights, layers, masks and glimpses."""

    def __init__(self, height, width, dim_z_what=32, side=64, log_alpha_0=11.0, per_pixel=False):
        super().__init__()
        self.size = height, width
        self.glimpse_generator = GlimpseGenerator(dim_z_what, side)
        # An object starts with an activation of about 1. Beside e^11 = 59 874 it is invisible, and
        # grows only where it helps.
        # open: the logarithm is learned; for Algorithm 2's alpha_0(i, j), a map is added to it
        self.log_alpha_0 = nn.Parameter(torch.tensor(float(log_alpha_0)))
        self.log_alpha_0_map = nn.Parameter(torch.zeros(self.size)) if per_pixel else 0.0

    def forward(self, latents):
        """-> weights, layers, masks and glimpses, with the shapes of Output."""
        batch_slots = latents.activation.shape  # B, K; the slots are drawn as N = B K glimpses
        position = latents.position.flatten(0, 1)  # (N, 2)
        scale = latents.scale.flatten(0, 1)  # (N, 2)
        glimpses = self.glimpse_generator(latents.z_what.flatten(0, 1))  # (N, 4, G, G)
        moved = spatial_transformer(glimpses, position, scale, *self.size)  # (N, 4, H, W)
        moved = moved.unflatten(0, batch_slots)  # (B, K, 4, H, W)
        layers = moved[:, :, :3]  # (B, K, 3, H, W), L_1..L_K
        masks = moved[:, :, 3]  # (B, K, H, W), M_1..M_K
        alpha_0 = (self.log_alpha_0 + self.log_alpha_0_map).exp()  # () or (H, W)
        weights = occlusion_weights(latents.activation, masks, alpha_0)  # (B, K + 1, H, W)
        return weights, layers, masks, glimpses.unflatten(0, batch_slots)


# ---- Section 4.2.1: the loss of phases 2 and 3. Phase 1 has robust_background_loss, below ----


def reconstruction_loss(images, reconstruction):
    """Mean over pixels of the squared L1 error over colours: two (B, 3, H, W) in [0, 1] -> ()."""
    error = (reconstruction - images).abs().sum(1)  # (B, H, W), eq. (19)
    return error.square().mean()  # eq. (20)


def pixel_entropy_loss(weights):
    """Mean over pixels of the squared entropy of the weights: (B, K + 1, H, W) -> ().

    Squared, since the gradient of the entropy itself is singular where one weight is 1.
    """
    entropy = -(weights * (weights + 1e-20).log()).sum(1)  # (B, H, W)
    return entropy.square().mean()  # eq. (21)


def quadratic_warmup(step, steps):
    """min(1, step / steps)^2, or 1 where steps is 0."""
    return min(1.0, step / steps) ** 2 if steps else 1.0


def full_loss(images, output, step, entropy_weight=1e-2, entropy_warmup=10_000):
    """The terms of the loss by name, () each. Their sum is the loss, eq. (22).

    images (B, 3, H, W), the model's Output for them, and the number of the step from 0.
    """
    weight = entropy_weight * quadratic_warmup(step, entropy_warmup)
    return {
        "reconstruction": reconstruction_loss(images, output.reconstruction),
        "weighted_entropy": weight * pixel_entropy_loss(output.weights),  # eq. (22)
    }


# ---- Table 6 and Figure 1: the whole model ----


@dataclass(frozen=True)
class Config:
    """The architecture, by default the paper's for CLEVRTEX (section 5.1, Tables 5 and 6)."""

    height: int = 128  # height H of the images in pixels, 32..192
    width: int = 128  # width W of the images in pixels, 32..192
    slots: int = 10  # K, the most objects in a scene
    anisotropic: bool = True  # scale width and height of a glimpse separately
    generator: str = "segformer"  # of the feature maps: segformer or unet
    backbone: Literal["tiny", "b0", "b3"] = "b3"  # size of the Segformer
    unet_width: float = 1.0  # factor on the U-Net's channels
    transformer: bool = True  # refine the slots with a transformer encoder
    dim_transformer: int = 256  # d_T, width of the transformer
    transformer_heads: int = 8  # attention heads of a transformer layer
    dim_feedforward: int = 512  # hidden width of a transformer layer's MLP
    transformer_layers: int = 6  # number of transformer layers
    dropout: float = 0.1  # rate of dropout and drop-path, in Segformer and transformer
    dim_z_what: int = 32  # Z, width of the appearance vector
    scale_min: float = 1.3  # s_min of the inverse scale, above 1: no glimpse fills the image
    scale_max: float = 24.0  # s_max of the inverse scale: no glimpse is too small for a gradient
    log_alpha_0: float = 11.0  # logarithm of the background's activation at the start
    alpha_0_per_pixel: bool = False  # learn the background's activation per pixel
    background_kind: Literal["simple", "complex"] = "complex"  # fixed or varying backgrounds
    background_width: float = 1.0  # factor on the background autoencoder's channels

    def __post_init__(self):
        # Above 192 pixels BACKGROUND_CHANNELS has no row. Below 32, maps have under 8 x 8 cells.
        if not 32 <= min(self.height, self.width) <= max(self.height, self.width) <= 192:
            raise ValueError(f"images are {self.height} x {self.width}: use sides of 32..192")
        if not 1 < self.scale_min < self.scale_max:
            raise ValueError(f"scales are {self.scale_min}..{self.scale_max}: use 1 < min < max")
        if self.generator not in GENERATORS:
            raise ValueError(f"no generator is registered as {self.generator!r}: {[*GENERATORS]}")


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


class ASTSeg(
    nn.Module, PyTorchModelHubMixin, library_name="astseg", pipeline_tag="image-segmentation",
    paper_url="https://arxiv.org/abs/2205.13271",
):  # fmt: skip
    """The whole model (Figure 1), with `save_pretrained(folder)` and `from_pretrained(folder)`."""

    def __init__(self, config):
        super().__init__()
        if isinstance(config, dict):  # from config.json; missing: KeyError, unknown: TypeError
            config = Config(**({f.name: config[f.name] for f in fields(Config)} | config))
        self.config = config
        size = config.height, config.width
        dim_scale = 2 if config.anisotropic else 1
        dim_phi = dim_scale + 1 + config.dim_z_what  # D: scaling factor, activation, z_what
        self.generator = GENERATORS[config.generator](config.slots + dim_phi, config)
        refinement = None
        if config.transformer:
            refinement = Refinement(
                dim_phi, width=config.dim_transformer, heads=config.transformer_heads,
                feedforward=config.dim_feedforward, layers=config.transformer_layers,
                dropout=config.dropout,
            )  # fmt: skip
        self.encoder = Encoder(
            config.slots, dim_scale, config.dim_z_what,
            s_min=config.scale_min, s_max=config.scale_max, refinement=refinement,
        )  # fmt: skip
        self.renderer = Renderer(
            *size, config.dim_z_what,
            side=32 if max(size) <= 64 else 64,  # open: Table 7 has 64 and 128 pixels alone
            log_alpha_0=config.log_alpha_0, per_pixel=config.alpha_0_per_pixel,
        )  # fmt: skip
        self.background = BackgroundAutoencoder(
            *size, config.background_kind, config.background_width
        )
        self.seen_images = False

    def forward(self, images, background=None):
        """images (B, 3, H, W) in [0, 1] -> Output.

        background (B, 3, H, W), if given, takes the place of the autoencoder's (section 5.2).
        """
        self.check_images(images)
        feature_maps = self.generator(images).to(images.dtype)  # (B, K + D, h, w)
        if background is None:
            background, _ = self.background(images)  # (B, 3, H, W); the other is for phase 1
        # On a GPU, train.py runs the networks above in bf16. The 8 significant bits of bf16 are too
        # few from here on, for positions, exponentials and (17).
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
        if self.training:
            raise ValueError("call model.eval() before model.segment: dropout is on")
        # The weights do not depend on the background image (section 4.1): any will do.
        return self(images, background=images).weights.argmax(1)

    def check_images(self, images):
        """Raise ValueError for what is no image. In training, values are looked at once."""
        size = 3, self.config.height, self.config.width
        shape = getattr(images, "shape", ())
        dtype = getattr(images, "dtype", type(images))
        if shape[1:] != size or dtype not in (torch.float32, torch.float64):
            raise ValueError(f"images are {dtype} {tuple(shape)}: use float32 tensors (B, *{size})")
        if torch.compiler.is_compiling() or (self.training and self.seen_images):
            return
        low, high = images.aminmax()
        if not (-0.01 <= low and high <= 1.01):  # NaN, too, is not in this range
            raise ValueError(f"images have values {low:.4g}..{high:.4g}: scale them to [0, 1]")
        self.seen_images = True

    @classmethod
    def from_pretrained(cls, source, **options):
        """The model of a folder or a hub name. Raises RuntimeError where a weight is missing."""
        return super().from_pretrained(str(source), **{"strict": True, **options})


# ==== The paper's own text ends here. Below: what it cites, [38] and metrics, and Table 8. ====

# ---- Sections 4.1 and 4.2.2: the background model of [38], and its loss in phase 1 ----

# (kind, number of convolutions) -> channels of the encoder, and of the decoder in the same order,
# from image to latents.
# open: they are those of background/models.py in the authors' code
BACKGROUND_CHANNELS = {
    ("simple", 5): ([3, 64, 160, 160, 32, 16], [4, 144, 256, 256, 32, 16]),
    ("simple", 6): ([3, 64, 160, 320, 160, 32, 16], [4, 144, 256, 512, 256, 32, 16]),
    ("simple", 7): ([3, 64, 160, 320, 160, 160, 32, 16], [4, 144, 256, 512, 256, 256, 32, 16]),
    ("complex", 5): ([3, 64, 160, 160, 16, 16], [4, 144, 640, 640, 16, 16]),
    ("complex", 6): ([3, 64, 160, 320, 160, 16, 16], [4, 144, 640, 1280, 640, 16, 16]),
    # The irregular numbers of this encoder are the authors'.
    ("complex", 7): ([3, 64, 320, 640, 640, 320, 16, 16], [4, 144, 640, 1280, 640, 320, 16, 16]),
}


def shrink_schedule(side, count):
    """The convolutions that bring a side to 1: a list of (kernel, stride, padding, remainder).

    The remainder is what the stride leaves over; the decoder's convolution adds it again. 64 has
    (5, 2, 2, 1) for 64 -> 32, ..., (4, 2, 1, 0) for 4 -> 2 and (2, 1, 0, 0) for 2 -> 1.
    """
    schedule = []
    for _ in range(count):
        if side > 5:
            kernel, stride, padding = 5, 2, 2
        elif side > 3:
            kernel, stride, padding = 4, 2, 1
        else:
            kernel, stride, padding = side, 1, 0
        reach = side + 2 * padding - kernel
        schedule.append((kernel, stride, padding, reach % stride))
        side = reach // stride + 1
    return schedule


def row_and_column(x):
    """Two more channels for x (B, C, h, w): row and column, from -0.5 to 0.5 -> (B, 2, h, w)."""
    axes = []
    for n in x.shape[2:]:
        line = torch.linspace(-0.5, 0.5, n, device=x.device)  # (n,)
        axes.append(line if n > 1 else torch.ones_like(line))  # a single one is at 1 in [38]
    grid = torch.stack(torch.meshgrid(*axes, indexing="ij"))  # (2, h, w)
    return grid.to(x.dtype).expand(x.shape[0], -1, -1, -1)


class CoordConv(nn.Module):
    """Convolution of x, row and column, then group norm and CELU: (B, C, h, w) -> (B, C', h', w').

    convolution takes C + 2 channels; is_last leaves out norm and CELU.
    """

    def __init__(self, convolution, is_last=False):
        super().__init__()
        channels = convolution.out_channels
        self.convolution = convolution
        self.norm = None if is_last else nn.GroupNorm(max(1, channels // 16), channels)

    def forward(self, x):
        x = self.convolution(torch.cat((x, row_and_column(x)), dim=1))  # (B, C', h', w')
        return x if self.norm is None else F.celu(self.norm(x))


class BackgroundAutoencoder(nn.Module):
    """The background of an image, from 16 latents: backgrounds lie on a low-dimensional manifold.

    images (B, 3, H, W) -> background (B, 3, H, W) and a prediction (B, H, W) of its error, all in
    [0, 1]. [38] finds objects by that prediction; here it is only learned along with the background
    in phase 1. factor scales the hidden channels.
    """

    def __init__(self, height, width, kind="complex", factor=1.0):
        super().__init__()
        longest = max(height, width)
        count = 5 if longest <= 48 else 6 if longest <= 96 else 7  # convolutions each way

        def scaled(channels):  # the hidden ones, rounded to multiples of a norm's group, 16
            hidden = [max(16, 16 * round(c * factor / 16)) for c in channels[1:-1]]
            return [channels[0], *hidden, channels[-1]]

        down, up = (scaled(channels) for channels in BACKGROUND_CHANNELS[kind, count])
        # open: each axis has its own kernels
        rows = shrink_schedule(height, count)
        columns = shrink_schedule(width, count)
        encoder, decoder = [], []
        for i in range(count):
            kernel, stride, padding, remainder = zip(rows[i], columns[i])  # each (row's, column's)
            options = dict(kernel_size=kernel, stride=stride, padding=padding, bias=False)
            conv = nn.Conv2d(down[i] + 2, down[i + 1], **options)
            back = nn.ConvTranspose2d(up[i + 1] + 2, up[i], output_padding=remainder, **options)
            encoder.append(CoordConv(conv))
            decoder.append(CoordConv(back, is_last=i == 0))
        self.encoder = nn.Sequential(*encoder)
        self.decoder = nn.Sequential(*reversed(decoder))

    def forward(self, images):
        # open: images enter in [0, 1]. The authors feed 0..255, beside which the coordinates of the
        # first convolution weigh less.
        latents = self.encoder(images)  # (B, 16, 1, 1)
        # The sigmoid is in fp32: bf16 has steps of 1/256 below 1, and a colour is one of 256.
        output = self.decoder(latents).to(images.dtype).sigmoid()  # (B, 4, H, W)
        return output[:, :3], output[:, 3]


def robust_background_loss(images, background, predicted_error, strength=6.0, threshold=0.25):
    """The loss of phase 1 [38], deaf to pixels that the background does not explain.

    images, background (B, 3, H, W), predicted_error (B, H, W), all in [0, 1] -> (). strength and
    threshold are beta and tau_1 of [38].
    """

    def distance(a, b):  # quadratic below 3 of 255 grey levels, linear above
        return F.smooth_l1_loss(a, b, reduction="none", beta=3 / 255)

    error = distance(background, images).sum(1)  # (B, H, W)
    # A third of the sum over three colours is in [0, 1], as the prediction is.
    error_of_prediction = distance(predicted_error, error.detach() / 3)  # (B, H, W)
    with torch.no_grad():  # pixels around a large error are objects, and should not teach
        unexplained = (error / threshold).tanh()  # (B, H, W), near 1 from twice the threshold on
        radius = images.shape[-1] // 75  # [38]; at 64 pixels it is 0, and nothing is averaged
        average = F.avg_pool2d(  # which takes (B, H, W) for channels, each averaged by itself
            unexplained, 2 * radius + 1, stride=1, padding=radius, count_include_pad=False
        )  # (B, H, W)
        weight = (-strength * average).exp()  # (B, H, W)
    return ((error + error_of_prediction) * weight).mean()


# ---- Section 5.1: metrics of an image. Labels: 0 background, 1.. objects or slots ----


def contingency_tables(target, predicted, slots):
    """Pixels that each pair of labels shares: two integer (B, H, W) -> (B, n, n), fp64, on the CPU.

    Rows are target labels, columns predicted ones, 0 to n - 1 on both sides. n is K + 1, or more
    where an image has more objects.
    """
    if target.is_floating_point() or predicted.is_floating_point():
        raise ValueError("labels are floating-point numbers: use integers")
    target = target.cpu().long()
    predicted = predicted.cpu().long()
    n = 1 + max(slots, target.max().item(), predicted.max().item())
    tables = [pair.flatten().bincount(minlength=n * n) for pair in target * n + predicted]
    return torch.stack(tables).view(-1, n, n).double()


def iou_matrix(table):
    """IoU of each pair of labels, 0 where both are missing: (n, n) -> (n, n)."""
    union = table.sum(1, keepdim=True) + table.sum(0, keepdim=True) - table
    return table / union.clamp(min=1)


def mean_iou(table, background=True):
    """mIoU after a Hungarian matching, or mIoU-FG without the true background: (n, n) -> a number.

    The sum of the matched IoUs over the number of matched pairs of which at least one side is in
    the image, as in the authors' code. Section 5.1 refers to [29], whose own tables seem to leave
    the background pair out. A true and a predicted label that overlap nothing may be matched to
    each other, which is one pair, or each to an absent label, which are two. SciPy decides: the
    IoUs are 0 either way.
    """
    iou = iou_matrix(table)
    rows, columns = linear_sum_assignment(iou.numpy(), maximize=True)  # rows is 0, 1, ..., n - 1
    matched = iou[rows, columns]  # (n,)
    counted = (table.sum(1)[rows] > 0) | (table.sum(0)[columns] > 0)  # (n,)
    if not background:
        matched, counted = matched[1:], counted[1:]
    if not counted.any():  # open: nothing to be found and nothing found counts 1
        return 1.0
    return (matched.sum() / counted.sum()).item()


def adjusted_rand_index(table):
    """ARI-FG, over the pixels whose target is an object: (n, n) -> a number.

    Pixels predicted as background form an ordinary cluster.
    """

    def pairs(counts):
        return (counts * (counts - 1) / 2).sum()

    objects = table[1:]  # (n - 1, n), without the background's row
    same_both = pairs(objects)
    same_target = pairs(objects.sum(1))
    same_predicted = pairs(objects.sum(0))
    expected = same_target * same_predicted / pairs(objects.sum()).clamp(min=1)
    best = (same_target + same_predicted) / 2
    if best == expected:  # open: no object, or a single one found whole, counts 1
        return 1.0
    return ((same_both - expected) / (best - expected)).item()


def segmentation_covering(table):
    """MSC-FG, the mean over the objects of their best IoU with any label: (n, n) -> a number."""
    is_there = table[1:].sum(1) > 0  # (n - 1,), for each object's label
    best = iou_matrix(table)[1:].amax(1)[is_there]  # one number for each object
    return best.mean().item() if len(best) else 0.0  # open: an image without objects counts 0


METRICS = {  # the MSE, which needs no labels, is in train.py
    "mIoU": mean_iou,
    "mIoU-FG": lambda table: mean_iou(table, background=False),
    "ARI-FG": adjusted_rand_index,
    "MSC-FG": segmentation_covering,
}


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
        # open: norm and CELU follow the first convolution too, and the one that takes the last skip
        self.first = conv_block(3, widths[0])
        self.center = conv_block(widths[5], widths[5])
        self.down = nn.ModuleList()
        self.up = nn.ModuleList()
        for c_in, c_out in zip(widths, widths[1:]):
            residual = Residual(conv_block(c_out, c_out))
            self.down.append(nn.Sequential(conv_block(c_in, c_out, kernel=4, stride=2), residual))
        for level in (4, 3, 2, 1, 0):
            both = 2 * widths[level + 1]  # what comes from below, and the skip
            odd = (height >> level) % 2, (width >> level) % 2  # open: odd sizes are padded
            shape = dict(kernel_size=4, stride=2, padding=1, output_padding=odd)
            up = nn.ConvTranspose2d(both, widths[level], bias=False, **shape)
            residual = Residual(conv_block(both, both))
            self.up.append(nn.Sequential(residual, up, nn.BatchNorm2d(widths[level]), nn.CELU()))
        # open: the last two convolutions have neither norm nor CELU, and no convolution has a bias
        residual = Residual(nn.Conv2d(channels, channels, 3, padding=1, bias=False))
        head = nn.Conv2d(channels, channels, 1, bias=False)
        self.last = nn.Sequential(conv_block(2 * widths[0], channels), residual, head)

    def forward(self, images):
        # Channels are those of factor 1. Sides are rounded down.
        skips = [self.first(images)]  # (B, 80, H, W)
        for down in self.down:
            skips.append(down(skips[-1]))  # (B, 128, H/2, W/2) ... (B, 256, H/32, W/32)
        x = self.center(skips[-1])  # (B, 256, H/32, W/32)
        for up in self.up:
            x = up(torch.cat((x, skips.pop()), dim=1))  # (B, 256, H/16, W/16) ... (B, 80, H, W)
        return self.last(torch.cat((x, skips.pop()), dim=1))  # (B, channels, H, W)


# Name of a generator -> what makes it, given its channels (K + D, the K logit maps first) and the
# Config c. A fork adds its own here.
GENERATORS = {
    "segformer": lambda channels, c: SegformerGenerator(channels, c.backbone, c.dropout),
    "unet": lambda channels, c: UNetGenerator(channels, c.height, c.width, c.unet_width),
}


# ==== Data: nothing below is needed to understand the model. Forks import it from here. ====

import colorsys
import gzip
import hashlib
import inspect
import itertools
import math
import os
from collections import Counter
from contextlib import suppress
from functools import partial
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

    Hue tells the objects of an image neither from each other nor from the wall.
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
        np.sin(pace * u + 2 * np.sin(pace * v / 2)),  # bent waves
        np.sin(pace * u) + np.sin(pace * v) + np.sin(pace * x),  # crossed waves
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
        pixels_outside = outline(u, v) * radius * size
        cover = (0.5 - pixels_outside).clip(0, 1)  # an edge one pixel wide
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
    lambda u, v: np.full_like(u, np.inf),  # plain: the first tone everywhere
    lambda u, v: 4 * np.sin(5 * u),  # stripes
    lambda u, v: 8 * np.sin(5 * u) * np.sin(5 * v),  # checks
    lambda u, v: 10 * (np.hypot(u, v) - 0.5),  # a spot
)
CORNERS = (0.95, 0.0), (-0.475, 0.823), (-0.475, -0.823)
OUTLINES = (  # distance from the edge, below 0 inside
    lambda u, v: np.hypot(u, v) - 0.95,  # disc
    lambda u, v: np.sqrt(np.hypot(u * u, v * v)) - 0.9,  # superellipse, a square with round corners
    lambda u, v: (np.hypot(u, v / 0.8) - 1) * 0.8,  # ellipse
    # A Reuleaux triangle, common to three discs around its corners.
    lambda u, v: np.max([np.hypot(u - a, v - b) for a, b in CORNERS], axis=0) - 1.645,
)


def draw_texture(u, v, hue, random):
    """Two tones of a hue in one of the textures: (3, size, size) in [0, 1]."""
    texture = TEXTURES[random.integers(len(TEXTURES))]
    bright = colorsys.hsv_to_rgb(hue % 1, 0.85, 1.0)
    dark = colorsys.hsv_to_rgb((hue + random.uniform(-0.12, 0.12)) % 1, 0.85, 0.6)
    return blend(bright, dark, texture(u, v))


# ---- Image files ----


def open_image(path, mask=False):
    """An image as RGB of 8 bits or a mask as it is, turned as its EXIF tag says. Raises OSError."""
    try:
        image = Image.open(path, formats=("PNG",) if mask else None)
        # The mode RGB does not tell that a file has 16 bits; the name of its raw data does.
        deep = ";16" in str(image.tile) or image.mode[0] in "IF"
        image.load()
    except Exception as error:  # Pillow has a dozen kinds, and few of them name the file
        raise OSError(f"{path} is no readable image ({error})") from error
    with suppress(Exception):  # a malformed EXIF block turns nothing
        image = ImageOps.exif_transpose(image)
    if mask:
        return image
    if deep:
        raise OSError(f"{path} has more than 8 bits per channel: scale its range to 8")
    if image.getbands()[-1] == "A" and image.getchannel("A").getextrema()[0] < 255:
        raise OSError(f"{path} is transparent somewhere: lay it on a colour first")
    return image.convert("RGB")


def open_labels(path):
    """A label map (h, w), integers: the values of a single-channel PNG. Raises OSError."""
    image = open_image(path, mask=True)
    if len(image.getbands()) != 1:
        raise OSError(f"{path} is no mask: use a single-channel PNG, whose values are the labels")
    return np.array(image).astype(int)


def crop_box(size, height, width, crop=1.0):
    """Box (left, top, right, bottom) of the largest centre crop to an aspect, times crop.

    size is (w, h) of an image.
    """
    w, h = size
    side_x = max(1, int(crop * min(w, h * width / height)))
    side_y = max(1, int(crop * min(h, w * height / width)))
    left, top = round((w - side_x) / 2), round((h - side_y) / 2)
    return left, top, left + side_x, top + side_y


def to_model(image, height, width, crop=1.0):
    """A Pillow image as the model takes it: centre crop, bilinear resize -> (3, H, W), uint8.

    Training, evaluation and `train.py segment` pass here; divided by 255 it is in [0, 1].
    """
    image = image.convert("RGB").crop(crop_box(image.size, height, width, crop))
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(image)).movedim(2, 0)


def labels_to_model(labels, height, width, crop=1.0, label_at=0.5):
    """A label map (h, w) of an image as the same crop: (H, W). Labels are picked, never mixed."""
    left, top, right, bottom = crop_box(labels.shape[::-1], height, width, crop)
    rows = top + ((np.arange(height) + label_at) * (bottom - top) / height).astype(int)
    columns = left + ((np.arange(width) + label_at) * (right - left) / width).astype(int)
    return labels[rows][:, columns]


def labels_to_image(labels, size, crop=1.0):
    """The model's labels (H, W) on an image of size (w, h): (h, w), uint8, 0 around the crop."""
    left, top, right, bottom = crop_box(size, *labels.shape, crop)
    rows = ((np.arange(bottom - top) + 0.5) * labels.shape[0] / (bottom - top)).astype(int)
    columns = ((np.arange(right - left) + 0.5) * labels.shape[1] / (right - left)).astype(int)
    whole = np.zeros(size[::-1], np.uint8)
    whole[top:bottom, left:right] = labels.byte().cpu().numpy()[rows][:, columns]
    return whole


# ---- Readers: generators of (image, label map or None, part or "" to cut by order) ----


def part_of(name):
    """The part of an image of a folder: its first sub-folder, or else a hash of its name.

    So an image stays in its part when others are added. The hash puts a tenth each into two parts.
    """
    if name.parts[0] in ("train", "val", "test"):
        return name.parts[0]
    number = int(hashlib.sha1(os.fsencode(name.as_posix())).hexdigest(), 16)
    return {0: "test", 1: "val"}.get(number % 10, "train")


def read_folder(data, masks=None):
    """PNG, JPEG and WebP images; masks of the same sub-folder and name in a folder of their own."""
    suffixes = ".png", ".jpg", ".jpeg", ".webp"
    paths = [path for path in sorted(data.rglob("*")) if path.suffix.lower() in suffixes]
    names = [path.relative_to(data) for path in paths if masks not in path.parents]
    names = [name for name in names if not any(part.startswith(".") for part in name.parts)]
    folders = Counter(name.parent.as_posix() for name in names)
    print(f"{data}: images by sub-folder:", ", ".join(f"{f} {n}" for f, n in folders.items()))
    if masks and len({name.with_suffix("") for name in names}) < len(names):
        raise ValueError(f"{data} has two images that differ only in their suffix, and one mask")
    for name in names:
        labels = None
        if masks:
            labels = open_labels(masks / name.with_suffix(".png"))
            labels = np.searchsorted(np.union1d(0, labels), labels)  # renumbered 1, 2, ...
        yield open_image(data / name), labels, part_of(name)


def read_clevrtex(data, variant):
    """CLEVRTEX_<variant>_NNNNNN.png with ..._NNNNNN_flat.png, whose palette indices are labels."""
    # open: outd is one test set; camo too has a test part, its first 10 %
    part = "test" if variant == "outd" else ""
    paths = data.rglob(f"CLEVRTEX_{variant}_??????.png")
    for path in sorted(paths, key=lambda path: path.name):
        yield open_image(path), open_labels(path.with_name(f"{path.stem}_flat.png")), part


def read_shapestacks(data):
    """recordings/<scenario>/rgb-*.png and iseg/<scenario>/*.map, by splits/default/<part>.txt."""
    for part, name in {"test": "test", "val": "eval", "train": "train"}.items():
        for scenario in (data / f"splits/default/{name}.txt").read_text().split():
            for path in sorted((data / f"recordings/{scenario}").iterdir()):
                if path.match("rgb-*-mono-0.png"):
                    camera = path.stem.split("-cam_")[1]
                    mask = f"iseg/{scenario}/iseg-w=0-f=0-l=0-c=original-cam_{camera}.map"
                    labels = np.array(open_image(data / mask, mask=True).getchannel(0)) // 32
                    yield open_image(path), labels, part


def read_tfrecords(path, shape, scenery):
    """tf.train.Examples with `image` and `mask`, GZIP or not; the first masks are scenery.

    shape is (height, width, masks). A record is its length in 8 bytes, a checksum in 4, an
    Example, a checksum in 4. The checksums are not looked at.
    """
    height, width, count = shape
    with open(path, "rb") as file:
        opener = gzip.open if file.read(2) == b"\x1f\x8b" else open
    with opener(path, "rb") as file:
        for number in itertools.count():
            head = file.read(12)
            if not head:
                return
            size = int.from_bytes(head[:8], "little")
            record = file.read(min(size, 1 << 30) + 4)
            where = f"{path}, record {number}"
            image = example_bytes(record, b"image", (height, width, 3), where)
            mask = example_bytes(record, b"mask", (count, height, width), where)
            labels = (mask.argmax(0) - (scenery - 1)).clip(0)
            yield Image.fromarray(image), labels, ""


def example_bytes(example, name, shape, where):
    """The feature of a tf.train.Example that has an entry for each byte. Raises OSError.

    An entry is the bytes 10 and 1, its tag and length, and then the byte itself. Entries follow
    each other. Only other tags and lengths, never 10 before 1, lie between the name and the first.
    """
    count = math.prod(shape)
    start = example.find(b"\n\1", example.find(name))
    entries = np.frombuffer(example[max(0, start) : start + 3 * count], np.uint8)
    if len(entries) != 3 * count or (entries.reshape(-1, 3)[:, :2] != (10, 1)).any():
        raise OSError(f"{where}, has no {name.decode()} of {count} entries of one byte")
    return entries[2::3].reshape(shape)


class DataSet(NamedTuple):
    """How a data set is read."""

    reader: Callable  # of a path, and of a path of masks if --masks are given
    crop: float = 1.0  # share of the largest centre crop that is kept
    label_at: float = 0.5  # where in its cell a label is taken, 0.5 as Pillow does, 0 as PyTorch


# A fork's own data set is a line here. Its reader yields the parts "test", "val" and "train" in any
# order, or "" for all images, which are then cut by order.
DATASETS = {
    "folder": DataSet(read_folder),
    # open: CLEVR's first tenths, as the authors take them
    "clevr": DataSet(partial(read_tfrecords, shape=(240, 320, 11), scenery=1), crop=0.8),
    "clevrtex": DataSet(partial(read_clevrtex, variant="full"), crop=0.8),
    "outd": DataSet(partial(read_clevrtex, variant="outd"), crop=0.8),
    "camo": DataSet(partial(read_clevrtex, variant="camo"), crop=0.8),
    "objectsroom": DataSet(partial(read_tfrecords, shape=(64, 64, 7), scenery=4)),
    "shapestacks": DataSet(read_shapestacks, crop=196 / 224, label_at=0.0),
}


# ---- From files to tensors ----


def decode(dataset, data, masks, height, width):
    """The parts of a data set, (images, labels or None) by name, from its files."""
    reader, crop, label_at = DATASETS[dataset]
    found = {}  # part -> bytes of its images, bytes of its label maps
    items = reader(data, masks) if masks else reader(data)
    for image, labels, part in tqdm(items, "decoding", disable=None, leave=False):
        images, maps = found.setdefault(part, (bytearray(), bytearray()))
        images += to_model(image, height, width, crop).numpy().tobytes()
        if labels is not None:
            bytes_ = labels.astype(np.uint8)
            if labels.shape != image.size[::-1] or (bytes_ != labels).any():
                seen = f"{labels.shape} up to {labels.max()} for an image {image.size[::-1]}"
                raise ValueError(f"{data}: a label map is {seen}: use its size, and labels 0..255")
            maps += labels_to_model(bytes_, height, width, crop, label_at).tobytes()
    parts = {}
    for part, (images, maps) in found.items():
        images = torch.frombuffer(images, dtype=torch.uint8).view(-1, 3, height, width)
        labels = torch.frombuffer(maps, dtype=torch.uint8).view(-1, height, width) if maps else None
        if maps and len(labels) != len(images):
            raise ValueError(f"{data} has {len(labels)} label maps for {len(images)} images")
        parts[part] = images, labels
    if [*parts] != [""]:
        if not parts.keys() <= {"test", "val", "train"}:
            raise ValueError(f"{dataset} has parts {[*parts]}: use test, val, train, or '' alone")
        return parts
    images, labels = parts[""]
    tenth = min(10_000, max(1, len(images) // 10))  # ObjectsRoom has parts of 10 000
    sizes = [tenth, tenth, len(images) - 2 * tenth]
    label_parts = [None] * 3 if labels is None else labels.split(sizes)
    return dict(zip(("test", "val", "train"), zip(images.split(sizes), label_parts)))


def save_whole(value, path):
    """torch.save to a file that is whole or not there, even if the process is killed."""
    temporary = Path(f"{path}.{os.getpid()}.tmp")  # runs that start together have their own
    try:
        torch.save(value, temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def cache_key(dataset, *settings):
    """A name for settings and for all that decides what they decode to: files, their age, code."""
    reader, *options = DATASETS[dataset]
    code = Path(__file__).read_text().partition("# ==== Data")[2]
    if isinstance(reader, partial):
        options += [reader.args, reader.keywords]
        reader = reader.func
    code += inspect.getsource(reader)
    module = inspect.getmodule(reader)
    if module.__name__ != __name__ and hasattr(module, "__file__"):  # a fork's own file
        code += inspect.getsource(module)
    key = hashlib.sha1(repr((dataset, settings, options, code)).encode())
    for folder in (path for path in settings if isinstance(path, Path)):
        for path in (folder, *sorted(folder.rglob("*"))):
            if path.is_file():  # no folder, nor a link that leads nowhere
                about = path.stat()
                key.update(repr((path, about.st_size, about.st_mtime_ns)).encode())
    return key.hexdigest()[:12]


def load_dataset(dataset, data, masks, height, width, cache="cache"):
    """The parts "test", "val" and "train" of a data set, Images each, mapped from a cache.

    The first call decodes the files, and so does one after a change of files or reader.
    """
    if dataset not in DATASETS:
        raise ValueError(f"no data set is registered as {dataset!r}: {[*DATASETS]}")
    os.stat(data)  # raises FileNotFoundError; rglob would find nothing there
    settings = dataset, Path(data), Path(masks) if masks else None, height, width
    path = Path(cache, f"{dataset}-{height}x{width}-{cache_key(*settings)}.pt")
    source = "from the cache" if path.exists() else "decoded into"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        for left in path.parent.glob("*.tmp"):
            print(f"warning: {left} is of a process that was killed, or that still decodes")
        save_whole(decode(*settings), path)
    parts = torch.load(path, mmap=True, weights_only=True)
    parts = {name: Images(*part) for name, part in parts.items()}
    counts = ", ".join(f"{len(part.images)} {name}" for name, part in parts.items())
    print(f"{dataset} {data}: {counts} images, {source} {path}")
    maps = [part.labels for part in parts.values() if part.labels is not None]
    if maps:
        background = torch.cat([(m[:1000] == 0).flatten() for m in maps]).float().mean()
        print(f"up to {max(m.max() for m in maps)} objects, {background:.0%} background")
    return parts
