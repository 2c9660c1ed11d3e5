"""Train, evaluate and use AST-Seg: the paper's whole curriculum in one plain loop.

    python train.py [--setting value ...]               the embedded data set, preset shapes
    python train.py small  --data D [--masks M] ...     your images, two CPU cores
    python train.py folder --data D [--masks M] ...     your images, the paper's model
    python train.py clevrtex --data D ...               a data set of the paper, its settings; also
                                                        clevr, objectsroom, shapestacks
    python train.py resume RUN                          go on from the last checkpoint of a run
    python train.py evaluate RUN [RUN ...]              metrics; of several runs mean and deviation
    python train.py segment RUN IMAGE [IMAGE ...]       label map and overlay of each image
    torchrun --nproc_per_node N train.py ...            the same on several GPUs

Each command has its own --help. A run folder holds settings.json, log.jsonl, model/ and
checkpoint.pt as it trains, and at the end metrics.json and pictures.
"""

import gc
import json
import os
import sys
import time
import warnings
from copy import copy
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro
from filelock import FileLock, Timeout
from matplotlib import color_sequences
from matplotlib.figure import Figure
from PIL import Image, ImageDraw

import astseg
from astseg import ASTSeg, Config, FloatOrZero, IntOrZero, explained, require, written_whole

Device = Literal["auto", "cuda", "mps", "cpu"]
RANK = int(os.environ.get("RANK", 0))  # of this process among RANKS, set by torchrun
RANKS = int(os.environ.get("WORLD_SIZE", 1))


def wait():
    """Let the processes wait for each other."""
    if RANKS > 1:
        dist.barrier()


# ---- Settings: the paper's, and presets that replace some ----


@dataclass(frozen=True)
class Training(Config):
    """The architecture, and data, curriculum and optimisers, by default the paper's (Table 6)."""

    dataset: Literal[("shapes", *astseg.DATASETS)] = "clevrtex"  # how the data are read
    data: str = ""  # folder or file of the data set; shapes are drawn
    masks: str = ""  # folder of label maps, for the images of a folder
    cache: str = "cache"  # folder of decoded data sets
    scenario: Literal["CT", "BT", "frozen"] = "CT"  # curriculum, baseline, frozen background
    background_steps: int = 500_000  # steps of phase 1
    background_batch: int = 128  # images per step of phase 1
    background_lr: float = 2e-3  # learning rate of phase 1
    background_warmup: IntOrZero = 0  # steps over which background_lr grows from 0
    steps: int = 125_000  # steps of phases 2 and 3 together
    phase2_steps: IntOrZero = 30_000  # of these with a frozen background
    batch: int = 64  # images per step of phases 2 and 3
    lr: float = 4e-5  # learning rate of phases 2 and 3
    warmup: IntOrZero = 5_000  # steps over which lr grows from 0
    decay_at: float = 0.9  # share of the steps after which lr falls
    decay: Literal["step", "linear"] = "step"  # at once to a tenth, or along a line to zero
    entropy_weight: FloatOrZero = 1e-2  # weight of the entropy loss, lambda_pixel
    entropy_warmup: IntOrZero = 10_000  # steps over which entropy_weight grows from 0, N_pixel
    refinement_start: Literal["stock", "identity"] = "stock"  # identity is for short runs
    refinement_lr_factor: FloatOrZero = 1.0  # on lr, for the transformer encoder
    alpha_0_lr_factor: FloatOrZero = 1.0  # on lr, for the activation of the background
    glimpse_lr_factor: FloatOrZero = 1.0  # on lr, for the glimpse generator
    pretrained: str = "nvidia/mit-b3"  # backbone: a hub name, a folder or '' for random weights
    flip: bool = False  # mirror training images at random; not in the paper
    train_images: int = 10_000  # how many images are drawn for training
    device: Device = "auto"  # auto is cuda where there is one, else cpu
    bf16: bool = True  # mixed precision, on cuda
    cuda_graphs: bool = True  # on cuda: record the kernels of a step once and replay them
    seed: IntOrZero = 0  # of weights, order of images, dropout
    log_every: int = 100  # steps between rows of the log
    evaluate_every: int = 500  # steps between evaluations on the validation part
    checkpoint_every: int = 5_000  # steps between checkpoints

    def __post_init__(self):
        super().__post_init__()
        fits = self.scenario != "CT" or self.phase2_steps <= self.steps
        require(fits, f"phase2_steps is {self.phase2_steps}: use a part of {self.steps} steps")


# differs: small sizes and short schedules, for two CPU cores; no component is left out.
SMALL = dict(
    dataset="folder",
    height=64,  # a fourth of the pixels of 128 x 128
    width=64,
    anisotropic=False,  # most objects are about as wide as high
    backbone="tiny",  # half a million weights for 47 million
    pretrained="",  # there are none of that size
    dim_transformer=128,  # the next three: enough for a handful of slots
    dim_feedforward=256,
    transformer_layers=2,
    scale_max=10.0,  # no glimpse is smaller than a tenth of such an image
    log_alpha_0=4.0,  # objects must show within hundreds of steps, not thousands
    background_kind="simple",  # learns textured walls too, at this size
    background_width=0.25,
    background_steps=1500,
    background_batch=16,
    background_lr=5e-4,  # steady without a warm-up, in small batches
    steps=17_000,
    phase2_steps=15_000,
    batch=32,
    lr=1e-3,  # small models bear more, and short runs need it
    warmup=500,
    decay_at=0.6,  # a low rate sharpens masks: it is worth two fifths of the run
    entropy_weight=0.015,
    entropy_warmup=3000,
    refinement_start="identity",  # PyTorch's start idles for thousands of steps
    # differs: the paper has one learning rate for all parts.
    refinement_lr_factor=0.1,  # or slots are driven out of the image and stay there
    alpha_0_lr_factor=0.33,  # else alpha_0 falls until objects take their rims
    glimpse_lr_factor=3.0,  # glimpses lag behind positions otherwise
    checkpoint_every=500,
)
SHAPES = SMALL | dict(
    dataset="shapes",
    height=48,
    width=48,
    slots=4,
    dropout=0.0,  # it blurs glimpses, and 8000 images are not learned by heart
    scale_max=6.0,  # the smallest object is a third of the image
    log_alpha_0=3.5,
    background_steps=3000,  # twelve walls in changing light
    background_lr=2e-3,  # the paper's; a low rate does not tell the walls apart in time
    background_warmup=500,  # without it, that rate never tells them apart
    steps=10_000,
    phase2_steps=9500,
    batch=16,  # batches of 32 in half as many steps learn less, of 8 in as many far less
    warmup=200,
    decay="linear",  # goes on learning while it sharpens masks
    entropy_weight=0.08,  # or two slots share an object
    entropy_warmup=6000,  # late, or slots stay asleep
    glimpse_lr_factor=6.0,
    train_images=8000,
)
CLEVR = dict(  # all images show one background
    dataset="clevr", anisotropic=False, background_kind="simple", background_steps=2500
)
PRESETS = {  # the last four are the paper's (section 5.1)
    "shapes": Training(**SHAPES),
    "small": Training(**SMALL),
    "folder": Training(dataset="folder"),
    "clevrtex": Training(dataset="clevrtex"),
    "clevr": Training(**CLEVR),
    "objectsroom": Training(dataset="objectsroom", height=64, width=64, slots=3),
    "shapestacks": Training(dataset="shapestacks", height=64, width=64, slots=6, anisotropic=False),
}


# ---- Data ----


def load_data(t: Training, *names):
    """Images of the parts that are named, of "train", "val", "test" and, from files, "all"."""
    if t.dataset == "shapes":
        require(not t.data, f"shapes are drawn, they have no --data {t.data}: use the preset small")
        require(t.height == t.width, "shapes are drawn on squares: width is not height")
        require("all" not in names, "shapes are drawn apart: there is no all part")
        counts_seeds = {"train": (t.train_images, 1), "val": (200, 2), "test": (500, 3)}
        return [astseg.draw_shapes(*counts_seeds[name], t.height) for name in names]
    require(t.data, f"the data set {t.dataset} is read from files: name them by --data")
    if RANK > 0:
        wait()  # for the first process, which decodes
    parts = astseg.load_dataset(t.dataset, t.data, t.masks, t.height, t.width, t.slots, t.cache)
    if RANK == 0:
        wait()
    for name in names:
        require(len(parts[name].images), f"{t.dataset} {t.data} has no {name} part")
    return [parts[name] for name in names]


@lru_cache(2)
def epoch_order(count, seed, device):
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).to(device)


def batch_indices(step, batch, count, seed, device="cpu"):
    """Indices (batch,) of a step, epochs in random order: a function of the step alone.

    Several processes share a batch; each gets its own part of the indices.
    """
    epoch, position = divmod(step, count // batch)  # open: an epoch's remainder is dropped
    order = epoch_order(count, seed * 100_003 + epoch, device)
    return order[position * batch + RANK : (position + 1) * batch : RANKS]


def load_batch(arrays, step, batch, t: Training, device):
    """The batch of a step from images, or images and backgrounds: (B, 3, H, W) in [0, 1] each."""
    images = arrays[0]
    index = batch_indices(step, batch, len(images), t.seed, images.device)
    batches = [array[index].to(device) / 255 for array in arrays]
    if t.flip:  # an image and its background alike
        mirrored = torch.rand(len(index), 1, 1, 1, device=device) < 0.5
        batches = [torch.where(mirrored, x.flip(3), x) for x in batches]
    return batches


@torch.no_grad()
def memorise_backgrounds(model, images):
    """The background of each image, (N, 3, H, W) uint8, on the images' device (section 5.2)."""
    # open: section 5.2 has it for the scenario frozen; we do so in phase 2 too, and as bytes
    model.eval()
    memory = torch.empty_like(images)
    for chunk, target in zip(images.split(100), memory.split(100)):
        background, _ = model.background(chunk.to(device_of(model)) / 255)
        target.copy_((background * 255).round())
    return memory


# ---- The curriculum (section 4.2.2) ----


def curriculum(t: Training):
    """The phases of a scenario: (name, first step, stop, images per step). Phase 2, "foreground",
    has a frozen background; in phase 3, "joint", all learns. "frozen" is of section 5.2.
    """
    if t.scenario == "BT":
        return [("joint", 0, t.steps, t.batch)]
    phase2_steps = t.phase2_steps if t.scenario == "CT" else t.steps
    phases = [
        ("background", 0, t.background_steps, t.background_batch),
        ("foreground", 0, phase2_steps, t.batch),  # open: phases 2 and 3 share one step counter
        ("joint", phase2_steps, t.steps, t.batch),
    ]
    return [(name, start, stop, batch) for name, start, stop, batch in phases if start < stop]


def make_optimizer(model, phase, t: Training):
    """The optimiser of a phase. What it holds is what the phase trains."""
    alpha_0 = [model.renderer.log_alpha_0, model.renderer.log_alpha_0_map]
    glimpses = [*model.renderer.glimpse_generator.parameters()]
    foreground = [  # each factor is on the learning rate
        dict(params=[*model.generator.parameters()], factor=1.0),
        dict(params=[*model.encoder.parameters()], factor=t.refinement_lr_factor),
        dict(params=glimpses, factor=t.glimpse_lr_factor),
        dict(params=alpha_0, factor=t.alpha_0_lr_factor),
    ]
    background = [dict(params=[*model.background.parameters()], factor=1.0)]
    held = {p for group in foreground + background for p in group["params"]}
    free = [name for name, p in model.named_parameters() if p.requires_grad and p not in held]
    require(not free, f"no optimiser holds {free}: add them to a group in make_optimizer")
    if phase == "background":  # open: Adam with its default betas
        return torch.optim.Adam(background, fused=True)
    # open: phase 3 starts a fresh Adam, without a warm-up; (22) alone teaches the background
    groups = foreground + background if phase == "joint" else foreground
    return torch.optim.Adam(groups, betas=(0.9, 0.98), eps=1e-9, fused=True)


def set_learning_rate(optimizer, phase, step, t: Training):
    """Set and return the rate of the update after `step` others."""
    if phase == "background":  # open: a tenth of the rate from 80 % of phase 1 on
        lr = astseg.learning_rate(
            step, t.background_lr, t.background_steps, t.background_warmup, decay_at=0.8
        )
    else:  # open: update n uses the rate of step n + 1, the entropy weight of step n
        lr = astseg.learning_rate(step + 1, t.lr, t.steps, t.warmup, t.decay_at, t.decay)
    for group in optimizer.param_groups:
        group["lr"] = lr * group["factor"]
    return lr


# ---- The model, and what makes it fast ----


@lru_cache  # to warn once
def choose_device(name="auto"):
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "mps":
        print("warning: nobody has tried mps yet")
    if name == "cuda":
        return torch.device(name, int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device(name)


def device_of(model):
    return model.renderer.log_alpha_0.device


def build_model(t: Training):
    """A model of random, or partly pretrained, weights, in training mode on its device."""
    torch.manual_seed(t.seed)
    model = ASTSeg(Config(**{f.name: getattr(t, f.name) for f in fields(Config)}))
    if t.transformer and t.refinement_start == "identity":
        astseg.start_as_identity(model.encoder.refinement)
    if t.pretrained:
        fits = hasattr(model.generator, "load_backbone")
        require(fits, f"the generator {t.generator} has no backbone to load: add --pretrained ''")
        price = "61.74 for 79.58 on CLEVRTEX, 88.94 for 90.27 on CLEVR"
        way = f"--pretrained '' starts from random weights; the paper's mIoU is then {price}"
        try:
            model.generator.load_backbone(t.pretrained)
        except OSError as error:
            raise OSError(f"{error}; {way}") from error
    # In a first call transformers installs hooks, which a CUDA graph could not record.
    model.eval().segment(torch.zeros(1, 3, t.height, t.width))
    device = choose_device(t.device)
    if device.type == "cuda" and RANKS > 1:
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    torch.manual_seed(t.seed + 1000 * RANK)  # processes draw their own dropout
    return model.train().to(device)


def autocast(device, t: Training):
    enabled = device.type == "cuda" and t.bf16  # open: the paper does not say in what type
    return torch.autocast(device.type, torch.bfloat16, enabled, cache_enabled=False)


def accelerate(network, inputs, t: Training):
    """Share the work among processes, or spare a GPU its wait for Python between short kernels."""
    if RANKS > 1:
        # Given its background, the model leaves the autoencoder out.
        unused = len(inputs) > 1
        return torch.nn.parallel.DistributedDataParallel(network, find_unused_parameters=unused)
    if not (inputs[0].is_cuda and t.cuda_graphs):
        return network
    # The recording makes gradients on a stream of its own, which is meant so.
    warnings.filterwarnings("ignore", "The AccumulateGrad node's stream does not match")
    gc.collect()  # frees the network recorded for the phase before, which refers to itself
    with autocast(inputs[0].device, t):
        # A copy shares the weights; only its forward is replaced by the recorded one.
        network = copy(network)
        return torch.cuda.make_graphed_callables(network, tuple(inputs), allow_unused_input=True)


# ---- The loop ----


def training_step(network, optimizer, phase, step, inputs, t: Training):
    """One update -> the terms of the loss and their sum, by name.

    inputs are images (B, 3, H, W) and, in phase 2, their backgrounds. Nothing of the step's graph
    outlives it, or a CUDA graph could not record the next phase.
    """
    images, *frozen_background = inputs
    with autocast(images.device, t):
        if phase == "background":
            terms = {"background": astseg.robust_background_loss(images, *network(images))}
        else:
            output = network(images, *frozen_background)
            terms = astseg.full_loss(images, output, step, t.entropy_weight, t.entropy_warmup)
        loss = sum(terms.values())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return {name: term.detach() for name, term in (terms | dict(loss=loss)).items()}


def train(t: Training, folder, model, data, val, test):
    """The whole curriculum, from the start or from the folder's checkpoint, and its results."""
    device = device_of(model)
    images = data.images
    if device.type == "cuda" and 4 * images.nbytes < torch.cuda.mem_get_info()[0]:
        images = images.to(device)  # their backgrounds, and the model, want room too
    state = dict(phase=0, seconds=0.0, log=[])
    resumed = (folder / "checkpoint.pt").exists()
    if resumed:
        state = astseg.load_tensors(folder / "checkpoint.pt")
        model.load_state_dict(state["model"])
    log = state["log"]
    run_began = time.time() - state["seconds"]  # as if it had never stopped

    phases = curriculum(t)
    for number, (phase, first, stop, batch) in enumerate(phases):
        if number < state["phase"]:  # done before the checkpoint
            continue
        optimizer = make_optimizer(model, phase, t)
        if resumed:
            optimizer.load_state_dict(state["optimizer"])
            first = state["step"]
        arrays = [images]
        if phase == "foreground":  # its background is frozen
            arrays.append(memorise_backgrounds(model, images))
            if RANK == 0:
                rows = {"input": arrays[0][:10] / 255, "background": arrays[1][:10] / 255}
                picture_grid(rows, folder / "backgrounds.png")
        network = model.background if phase == "background" else model
        model.train()
        network = accelerate(network, load_batch(arrays, first, batch, t, device), t)
        # Only now, since load_batch draws too. The other processes have a dropout of their own.
        if resumed and RANK == 0:
            torch.set_rng_state(state["random"])
        resumed = False  # the next phase starts afresh
        print(f"\nphase {number + 1} of {len(phases)}, {phase}: steps {first} to {stop}\n{HEAD}")
        losses = []
        phase_began = time.time()
        row_began = phase_began
        for step in range(first, stop):
            lr = set_learning_rate(optimizer, phase, step, t)
            inputs = load_batch(arrays, step, batch, t, device)
            losses.append(training_step(network, optimizer, phase, step, inputs, t))

            # Plumbing from here on: log, evaluate, save.
            done = step + 1
            log_now = done == stop or done % t.log_every == 0
            evaluate_now = done == stop or done % t.evaluate_every == 0
            save_now = done == stop or done % t.checkpoint_every == 0
            if not (log_now or evaluate_now or save_now):
                continue
            row = dict(phase=phase, step=done, lr=lr)
            for name in losses[-1]:
                row[name] = torch.stack([loss[name] for loss in losses]).mean().item()
            row["images/s"] = len(losses) * batch / (time.time() - row_began)
            # Seconds to the end of this phase, by its pace so far.
            row["left"] = (stop - done) * (time.time() - phase_began) / (done - first)
            if RANK == 0:
                validation = val if evaluate_now and phase != "background" else None
                report(model, validation, row, folder, log)
                if save_now:
                    place = dict(phase=number, step=done, seconds=time.time() - run_began, log=log)
                    save_checkpoint(model, optimizer, place, folder)
            losses = []
            row_began = time.time()
            model.train()
    if RANK == 0:
        write_results(model, test, log, folder, t.seed, time.time() - run_began)
    wait()


def save_checkpoint(model, optimizer, place, folder):
    """checkpoint.pt, all that a run needs to go on, and model/, all that its users need."""
    state = dict(model=model.state_dict(), optimizer=optimizer.state_dict())
    state["random"] = torch.get_rng_state()
    with written_whole(folder / "checkpoint.pt") as file:
        torch.save(place | state, file)
    with explained(f"{folder}/model could not be written, is the disk full?"):
        model.save_pretrained(folder / "unfinished")
    (folder / "model").mkdir(exist_ok=True)
    for path in (folder / "unfinished").iterdir():
        os.replace(path, folder / "model" / path.name)
    (folder / "unfinished").rmdir()


COLUMNS = "step loss mIoU ARI-FG foreground active clamped alpha_0 images/s left".split()
HEAD = "".join(f"{name:>11}" for name in COLUMNS)


def report(model, validation, row, folder, log):
    """Complete a row of the log, print and write it; stop or warn where nothing learns."""
    if not np.isfinite(row["loss"]):
        flag = "--background_lr" if row["phase"] == "background" else "--lr"
        seen = f"the loss of phase {row['phase']} is {row['loss']} by step {row['step']}"
        raise FloatingPointError(f"{seen}: start again with a lower {flag}")
    row["alpha_0"] = model.renderer.log_alpha_0.exp().item()
    if validation is not None:
        row |= evaluate(model, validation, 200)
        rows, _ = picture_rows(model, validation, 4)
        captioned = {f"step {row['step']}": rows.pop("input")}
        (folder / "training").mkdir(exist_ok=True)
        picture_grid(captioned | rows, folder / "training" / f"{row['step']:06d}.png")
    log.append(row)
    (folder / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in log))
    minutes, seconds = divmod(round(row["left"]), 60)
    cells = {name: f"{row[name]:.4g}" for name in COLUMNS if name in row}
    cells |= dict(left=f"{minutes}:{seconds:02d}", step=str(row["step"]))
    print("".join(f"{cells.get(name, ''):>11}" for name in COLUMNS))
    if row.get("foreground", 1) < 0.005:
        print("warning: no foreground yet: train longer, raise --lr or lower --log_alpha_0")
    if row.get("clamped", 0) > 0.5:
        print("warning: most positions are clamped at the border: lower --lr, lengthen --warmup")


# ---- Evaluation (section 5.1) ----

# Name of a metric -> its factor in the table.
METRICS = {"mIoU": 100, "mIoU-FG": 100, "ARI-FG": 100, "MSC-FG": 100, "MSE": 1}


@torch.no_grad()
def evaluate(model, data, count=None):
    """Signs of health and metrics, of which MSE alone wants no labels: means over the images."""
    model.eval()
    slots = model.config.slots
    rows = []
    for part in torch.arange(len(data.images))[:count].split(50):
        images = data.images[part].to(device_of(model)) / 255
        output = model(images)
        labels = output.weights.argmax(1)  # (B, H, W)
        row = {
            "MSE": (images - output.reconstruction).square().sum((1, 2, 3)),
            "foreground": (labels > 0).float().mean((1, 2)),
            "active": F.one_hot(labels, slots + 1).amax((1, 2))[:, 1:].sum(1),  # slots with a pixel
            "clamped": (output.latents.position.abs() == 1).any(2).float().mean(1),
        }
        if data.labels is not None:
            pair = data.labels[part], labels.cpu()
            row["mIoU"], row["mIoU-FG"] = astseg.mean_iou(*pair)
            row["ARI-FG"] = astseg.adjusted_rand_index(*pair)
            row["MSC-FG"] = astseg.segmentation_covering(*pair)
        rows.append(row)
    columns = {name: torch.cat([row[name].cpu().double() for row in rows]) for name in rows[0]}
    return {name: column.mean().item() for name, column in columns.items()}


def print_table(rows):
    """Rows (name, metrics) as in Table 1, in per cent but for the MSE."""
    print(f"\n{'':20}" + "".join(f"{name:>10}" for name in METRICS))
    for name, row in rows:
        cells = (factor * row.get(metric, np.nan) for metric, factor in METRICS.items())
        print(f"{name:20}" + "".join(f"{cell:10.2f}" for cell in cells))


def write_results(model, data, log, folder, seed, seconds):
    """The table of a finished run; then metrics.json and its pictures."""
    metrics = evaluate(model, data)
    print_table([(f"AST-Seg, seed {seed}", metrics)])
    print(f"{folder}: {len(data.images)} test images, {seconds:.0f} s in all")
    facts = dict(images=len(data.images), seconds=round(seconds), seed=seed)
    results = {name: metrics[name] for name in METRICS if name in metrics} | facts
    (folder / "metrics.json").write_text(json.dumps(results, indent=1))
    rows, slots = picture_rows(model, data, 10)
    picture_grid(rows, folder / "segmentation.png")
    picture_grid(slots, folder / "slots.png")
    paths = sorted((folder / "training").glob("*.png"))
    frames = [Image.open(path).quantize(32) for path in paths]
    if frames:
        options = dict(save_all=True, append_images=frames[1:], duration=500, loop=0)
        frames[0].save(folder / "training.gif", **options)
    draw_curves(log, folder / "curves.png")


# ---- Pictures ----

PALETTE = torch.tensor([(0, 0, 0), *(color_sequences["tab10"] * 26)[:255]])  # 0 the background


@torch.no_grad()
def picture_rows(model, data, count):
    """Rows of pictures of the first images: as in Figure 2, and of the slots of the first three."""
    device = device_of(model)
    images = data.images[:count].to(device) / 255
    size = images.shape[2:]
    out = model.eval()(images)
    rows, slots = {"input": images}, {}
    if data.labels is not None:
        rows["true labels"] = PALETTE[data.labels[:count].long()].movedim(3, 1)
    rows["segmentation"] = PALETTE[out.weights.argmax(1).cpu()].movedim(3, 1)
    rows |= {"reconstruction": out.reconstruction, "background": out.background}
    x, y = astseg.normalized_coordinates(*size, device)
    pixels = torch.stack(torch.meshgrid(x, y, indexing="xy"))  # (2, H, W)
    red = torch.tensor([1.0, 0, 0], device=device).view(3, 1, 1)
    for b in range(len(images[:3])):
        attention = out.attention[b, :, None]  # (K, 1, h, w)
        attention = F.interpolate(attention / attention.amax((2, 3), keepdim=True), size)
        offset = pixels - out.attention_position[b, :, :, None, None]  # (K, 2, H, W)
        away = offset.norm(dim=1, keepdim=True)  # (K, 1, H, W)
        attention = attention.where(away > 0.08, red)  # (K, 3, H, W), a spot at the soft-argmax
        color, mask = F.interpolate(out.glimpses[b], size).split([3, 1], dim=1)
        glimpse = 1 - mask * (1 - color)  # white where there is nothing
        layer = 1 - out.weights[b, 1:, None] * (1 - out.layers[b])
        slots[f"attention {b + 1}"] = torch.cat((images[b, None], attention))
        slots[f"glimpse {b + 1}"] = torch.cat((out.background[b, None], glimpse))
        slots[f"layer {b + 1}"] = torch.cat((out.reconstruction[b, None], layer))
    return rows, slots


def picture_grid(rows, path):
    """Save rows {name: pictures (B, 3, H, W) in [0, 1]} as one picture, twice as large."""
    strips = [F.pad(row.cpu(), (1,) * 4, value=1.0) for row in rows.values()]
    grid = torch.cat([strip.movedim(0, 2).flatten(2) for strip in strips], dim=1)  # (3, H, W)
    grid = F.interpolate(F.pad(grid, (55, 0), value=1.0)[None], scale_factor=2)[0]  # names left
    picture = Image.fromarray((grid.clamp(0, 1) * 255).byte().movedim(0, 2).numpy())
    for i, name in enumerate(rows):
        place = (4, (i + 0.4) * picture.height / len(rows))
        ImageDraw.Draw(picture).text(place, name, "black", font_size=14)
    picture.save(path)


def draw_curves(log, path):
    """The terms of the loss on the left, the metrics on the right, by step of phases 2 and 3."""
    log = [row for row in log if row["phase"] != "background"]
    figure = Figure(figsize=(10, 4))
    left, right = figure.subplots(1, 2)
    curves = {"reconstruction": left, "entropy": left, "mIoU": right, "ARI-FG": right}
    for name, axes in curves.items():
        points = [(row["step"], row[name]) for row in log if name in row]
        axes.plot(*zip(*points), label=name)
        axes.set_xlabel("step")
        axes.legend()
    figure.savefig(path)


# ---- Commands ----


def read_settings(folder):
    path = folder / "settings.json"
    require(path.exists(), f"{folder} holds no run: {path} is missing")
    with explained(f"{path} is damaged, or of another version", (TypeError, ValueError)):
        return Training(**json.loads(path.read_text()))


def load_model(folder, device):
    """The model of a run folder, in evaluation mode."""
    saved = (folder / "model").exists()
    require(saved, f"{folder} has no model yet: a run saves one with its first checkpoint")
    return ASTSeg.from_pretrained(folder / "model").to(choose_device(device)).eval()


def refuse_taken(folder):
    taken = any((folder / name).exists() for name in ("settings.json", "checkpoint.pt"))
    way = f"go on by `train.py resume {folder}`, or name another --output"
    require(not taken, f"{folder} holds a run: {way}")


def start(training, folder, resume=False):
    """Check all that can be refused, and train. What was decoded stays in the cache."""
    parts = load_data(training, "train", "val", "test")
    count = len(parts[0].images)
    for _, _, _, batch in curriculum(training):
        require(count >= batch, f"{count} training images do not fill a batch of {batch}")
        require(batch % RANKS == 0, f"{RANKS} processes cannot share a batch of {batch}")
    # A checkpoint replaces the backbone anyway.
    saved = (folder / "checkpoint.pt").exists()
    model = build_model(replace(training, pretrained="") if saved else training)
    if RANK > 0:
        return train(training, folder, model, *parts)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", timeout=0):  # a killed process lets go of it
            if not resume:
                refuse_taken(folder)  # another run may have begun and ended meanwhile
                (folder / "settings.json").write_text(json.dumps(asdict(training), indent=1))
            train(training, folder, model, *parts)
    except Timeout:
        raise ValueError(f"{folder} belongs to a run that is going on") from None
    except KeyboardInterrupt:
        saved = (folder / "checkpoint.pt").exists()
        on = "goes on from its last checkpoint" if saved else "begins anew: nothing was saved yet"
        sys.exit(f"train.py: interrupted; python train.py resume {folder} {on}")


def training_command(name):
    """The command of a preset, with a flag for each setting."""
    preset = PRESETS[name] if name == "shapes" else replace(PRESETS[name], data=tyro.MISSING)

    def command(
        training: tyro.conf.OmitArgPrefixes[Training] = preset, output: Path = Path("runs", name)
    ):
        for field in ("data", "masks", "cache"):  # absolute, to be resumed from any folder
            path = getattr(training, field)
            if path:
                training = replace(training, **{field: os.path.abspath(path)})
        source = f"{training.dataset} {training.data}".strip()
        device = choose_device(training.device)
        print(f"{name}: {source} on {device}, processes: {RANKS}, output: {output}")
        refuse_taken(output)
        if training.data:
            require(os.path.exists(training.data), f"{training.data} does not exist")
            inside = Path(os.path.abspath(output)).is_relative_to(training.data)
            require(not inside, f"{output} is inside the data: name another --output")
        start(training, output)

    command.__doc__ = f"Train with the preset {name}."
    return command


def resume(run: tyro.conf.Positional[Path]):
    """Go on from the last checkpoint of a run, with its own settings."""
    training = read_settings(run)
    print(f"resume {run} on {choose_device(training.device)}")
    start(training, run, resume=True)


def evaluate_runs(
    runs: tyro.conf.Positional[tuple[Path, ...]],
    part: Literal["test", "val", "train", "all"] = "test",
    dataset: str = "",
    data: str = "",
    masks: str = "",
    device: Device = "auto",
):
    """Metrics of each run and, of several, their mean and standard deviation.

    They are those of the run's own data, unless dataset, data and masks name others.
    """
    require(runs, "evaluate takes at least one run folder")
    rows = []
    for folder in runs:
        t = read_settings(folder)
        if dataset or data or masks:  # the run's own masks belong to its own data
            t = replace(t, dataset=dataset or t.dataset, data=data or t.data, masks=masks)
        (images,) = load_data(t, part)
        labelled = images.labels is not None
        require(labelled, f"{t.data} has no label maps: name them by --masks")
        metrics = evaluate(load_model(folder, device), images)
        (folder / f"evaluation-{t.dataset}-{part}.json").write_text(json.dumps(metrics))
        rows.append((folder.name, metrics))
    if len(rows) > 1:
        table = {m: [row[m] for _, row in rows] for m in METRICS}
        rows.append(("mean", {m: np.mean(column) for m, column in table.items()}))
        rows.append(("deviation", {m: np.std(column, ddof=1) for m, column in table.items()}))
    print_table(rows)


def segment_files(
    run: tyro.conf.Positional[Path],
    images: tyro.conf.Positional[tuple[Path, ...]],
    output: Path | None = None,
    device: Device = "auto",
):
    """Write <stem>_labels.png and <stem>_overlay.png of each image, by default into the run.

    The model sees the largest centre crop of its own aspect; around it labels are 0.
    """
    require(images, "segment takes a run folder and then at least one image")
    once = len({path.stem for path in images}) == len(images)
    require(once, "two images have one name: their results would collide")
    model = load_model(run, device)
    output = output or run / "segmented"
    bad = 0
    for path in images:
        try:
            image = astseg.open_image(path)
        except (OSError, ValueError) as error:
            print(f"train.py: {error}; passed over", file=sys.stderr)
            bad += 1
            continue
        box = astseg.centre_crop(image.size, model.config.height, model.config.width)
        pixels, _ = astseg.crop_and_resize(image, None, model.config.height, model.config.width)
        pixels = torch.tensor(pixels)[None].to(device_of(model)) / 255
        labels = model.segment(pixels)[0].byte().cpu().numpy()
        picture = Image.new("P", image.size)  # 0, the background, around the crop
        picture.putpalette((PALETTE * 255).byte().flatten().tolist())
        crop = box[2] - box[0], box[3] - box[1]
        picture.paste(Image.fromarray(labels).resize(crop, Image.Resampling.NEAREST), box)
        opacity = picture.point(lambda label: 128 * (label > 0), "L")
        output.mkdir(parents=True, exist_ok=True)
        picture.save(output / f"{path.stem}_labels.png")
        overlay = Image.composite(picture.convert("RGB"), image, opacity)
        overlay.save(output / f"{path.stem}_overlay.png")
        objects = np.unique(labels[labels > 0]).size
        print(f"{path}: {objects} objects -> {output}/{path.stem}_labels.png")
    require(not bad, f"{bad} of {len(images)} images could not be read")


def main(arguments):
    first = arguments[0] if arguments else "--setting"
    if first.startswith("-") and first not in ("-h", "--help"):
        arguments = ["shapes", *arguments]
    commands = {name: training_command(name) for name in PRESETS}
    commands |= dict(resume=resume, evaluate=evaluate_runs, segment=segment_files)
    tyro.extras.subcommand_cli_from_dict(
        commands, args=arguments, prog="train.py", description=__doc__, use_underscores=True
    )


if __name__ == "__main__":
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's has no such thing
        # Names of files may be no UTF-8.
        sys.stdout.reconfigure(errors="backslashreplace", line_buffering=True)
    if RANKS > 1:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group(timeout=timedelta(days=1))  # the first one may decode for hours
        if RANK > 0:
            sys.stdout = open(os.devnull, "w")
    try:
        main(sys.argv[1:])
    except (OSError, ValueError, FloatingPointError) as error:
        sys.exit(f"train.py: {error}")
    except KeyboardInterrupt:
        sys.exit("train.py: interrupted before there was anything to save")
