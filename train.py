"""Train, evaluate and use AST-Seg: the paper's whole curriculum in one plain loop.

    python train.py                                   the embedded data set, minutes on two cores
    python train.py --dataset clevrtex --data DIR     a data set of the paper, with its settings
    python train.py --resume RUN                      go on from the last checkpoint of a run
    python train.py --evaluate RUN [RUN ...]          metrics; of several runs mean and deviation
    python train.py --segment RUN IMAGE [IMAGE ...]   label map, overlay and objects of each image
    torchrun --nproc_per_node N train.py ...          the same on several GPUs

A run folder gets model/, checkpoint.pt, settings.json, log.jsonl, metrics.json and pictures.
The defaults of --help are the paper's; the presets shapes (without flags) and small replace some.
"""

import argparse
import json
import math
import os
import sys
import time
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from matplotlib import color_sequences
from matplotlib.figure import Figure
from PIL import Image, ImageDraw

import astseg
from astseg import PAPER_SETTINGS, ASTSeg, Config, require

RANK, RANKS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # by torchrun
GPU = torch.cuda.is_available()
DEVICE = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if GPU else "cpu")


@dataclass(frozen=True)
class Training(Config):
    """The architecture, and data, curriculum and optimisers, by default the paper's (Table 6)."""

    dataset: Literal[("shapes", *astseg.DATASETS)] = "shapes"
    data: str = ""  # folder or file; shapes are drawn
    masks: str = ""  # folder of label maps for the images of a folder
    cache: str = "cache"  # folder of decoded data sets
    scenario: Literal["CT", "BT", "frozen"] = "CT"  # curriculum, baseline, frozen background
    background_steps: int = 500_000  # phase 1; 2 500 for a fixed background
    background_batch: int = 128
    background_lr: float = 2e-3
    steps: int = 125_000  # phases 2 and 3 together
    phase2_steps: int = 30_000  # of these before a frozen background
    batch: int = 64
    lr: float = 4e-5
    warmup: int = 5_000  # steps in which lr grows
    decay_at: float = 0.9  # share of the steps after which it falls to a tenth
    entropy_weight: float = 1e-2  # lambda_pixel
    entropy_warmup: int = 10_000  # N_pixel
    refinement_start: Literal["stock", "identity"] = "stock"  # identity: for short runs
    refinement_lr_factor: float = 1.0  # on lr, as the next two
    alpha_0_lr_factor: float = 1.0
    glimpse_lr_factor: float = 1.0
    # open: weights are random unless named, since not every machine reaches a hub
    pretrained: str = ""  # backbone, a hub name or a folder; the paper's is nvidia/mit-b3
    flip: bool = False  # mirror training images at random; not in the paper
    train_images: int = 10_000  # shapes that are drawn for training
    bf16: bool = True  # open: mixed precision, on a GPU
    compile: bool = True  # on a GPU
    seed: int = 0
    log_every: int = 100
    evaluate_every: int = 500
    checkpoint_every: int = 5_000

    zero = (*Config.zero, "seed", "phase2_steps", "warmup", "entropy_weight", "entropy_warmup")

    def __post_init__(self):
        super().__post_init__()
        part = f"phase2_steps is {self.phase2_steps}: use a part of {self.steps} steps"
        require(self.phase2_steps <= self.steps, part)
        fits = (self.dataset == "shapes") == (not self.data)
        require(fits, f"dataset {self.dataset} with data {self.data!r}: all but shapes need --data")


# Two CPU cores: small sizes and short schedules, every component (the README says why).
SMALL = dict(
    height=64, width=64, anisotropic=False, backbone="tiny", dim_transformer=128,
    dim_feedforward=256, transformer_layers=2, scale_max=10.0, log_alpha_0=4.0,
    background_kind="simple", background_width=0.25, background_steps=1500, background_batch=16,
    background_lr=5e-4, steps=17_000, phase2_steps=15_000, batch=32, lr=1e-3, warmup=500,
    decay_at=0.6, entropy_weight=0.015, entropy_warmup=3000, refinement_start="identity",
    refinement_lr_factor=0.1, alpha_0_lr_factor=0.33, glimpse_lr_factor=3.0, checkpoint_every=500,
)  # fmt: skip
SHAPES = SMALL | dict(
    height=48, width=48, slots=4, scale_max=6.0, log_alpha_0=4.5, background_batch=8, steps=11_500,
    phase2_steps=9500, batch=16, lr=7e-4, warmup=200, decay_at=0.65, entropy_weight=0.02,
    entropy_warmup=2000, glimpse_lr_factor=6.0, train_images=8000,
)  # fmt: skip


# ---- Data ----


def load_data(training, *names):
    """Images of the parts that are named, of "train", "val", "test" and, from files, "all"."""
    t = training
    if t.dataset == "shapes":
        require(t.height == t.width, "shapes are drawn on squares: width is not height")
        counts = {"train": (t.train_images, 1), "val": (200, 2), "test": (500, 3)}
        require(counts.keys() >= {*names}, "shapes are drawn apart: there is no all part")
        return [astseg.draw_shapes(*counts[name], t.height) for name in names]
    where = t.dataset, t.data, t.masks, t.height, t.width, t.slots, t.cache
    for rank in range(RANKS):  # one process after the other: the first one decodes
        if rank == RANK:
            parts = astseg.load_dataset(*where)
        wait()
    for name in names:
        require(len(parts[name].images), f"{t.dataset} {t.data} has no {name} part")
    return [parts[name] for name in names]


def to_float(images):
    """Bytes to floats in [0, 1] on the device."""
    return images.to(DEVICE).float() / 255


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


def load_batch(arrays, step, batch, training):
    """The images of a step, and of their backgrounds if they are given: (B, 3, H, W) in [0, 1]."""
    images = arrays[0]
    index = batch_indices(step, batch, len(images), training.seed, images.device)
    found = [to_float(x[index]) for x in arrays]
    if training.flip:  # an image and its background alike
        mirrored = torch.rand(len(index), 1, 1, 1, device=DEVICE) < 0.5
        found = [torch.where(mirrored, x.flip(3), x) for x in found]
    return found


@torch.no_grad()
def memorise_backgrounds(model, images, path):
    """Backgrounds (N, 3, H, W), uint8, of all images: in a mapped file, or on the GPU as they."""
    memory = torch.from_file(str(path), shared=True, size=images.numel(), dtype=torch.uint8)
    memory = memory.view(images.shape)
    if RANK == 0:
        for part, target in zip(images.split(100), memory.split(100)):
            background, _ = model.eval().background(to_float(part))
            target.copy_((background * 255).round())  # open: at 8 bits per channel, rounded
    wait()
    return memory.to(images.device)


# ---- The curriculum (section 4.2.2) ----


def curriculum(training):
    """The phases of a scenario: (name, first step, stop); "foreground" has a frozen background."""
    t = training
    middle = {"CT": t.phase2_steps, "BT": 0, "frozen": t.steps}[t.scenario]
    background = ("background", 0, 0 if t.scenario == "BT" else t.background_steps)
    # open: phases 2 and 3 share one step counter
    phases = [background, ("foreground", 0, middle), ("joint", middle, t.steps)]
    return [phase for phase in phases if phase[1] < phase[2]]


def make_optimizer(model, phase, training):
    """The optimiser of a phase; only what the phase trains has gradients from here on."""
    model.requires_grad_(phase != "background")
    model.background.requires_grad_(phase != "foreground")
    if phase == "background":  # open: AdamW with its default betas and no weight decay
        return torch.optim.AdamW(model.background.parameters(), weight_decay=0.0, fused=True)
    factors = [  # on the learning rate; a background without gradients stays as it is
        (model.background.parameters(), 1.0),
        (model.generator.parameters(), 1.0),
        (model.encoder.parameters(), training.refinement_lr_factor),
        (model.renderer.glimpse_generator.parameters(), training.glimpse_lr_factor),
        ([model.renderer.log_alpha_0], training.alpha_0_lr_factor),
    ]
    groups = [dict(params=parameters, factor=factor) for parameters, factor in factors]
    # open: phase 3 starts a fresh Adam, at full rate, and (22) alone teaches the background
    return torch.optim.Adam(groups, betas=(0.9, 0.98), eps=1e-9, fused=True)


def set_learning_rate(optimizer, phase, step, training):
    """Set and return the rate of the update after `step` others."""
    t = training
    if phase == "background":  # open: a tenth of the rate from 80 % of phase 1 on
        lr = astseg.learning_rate(step, t.background_lr, t.background_steps, decay_at=0.8)
    else:  # open: update t uses the rate of step t + 1, the entropy weight of step t
        lr = astseg.learning_rate(step + 1, t.lr, t.steps, t.warmup, t.decay_at)
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("factor", 1.0)
    return lr


# ---- The loop ----


def build_model(training):
    """A model of random, or partly pretrained, weights, on the device."""
    torch.manual_seed(training.seed)
    model = ASTSeg(Config(**{f.name: getattr(training, f.name) for f in fields(Config)}))
    if training.transformer and training.refinement_start == "identity":
        astseg.start_as_identity(model.encoder.refinement)
    if training.pretrained:
        model.generator.load_backbone(training.pretrained)
    # In a first call transformers installs hooks, which torch.compile could not trace.
    model.eval().segment(torch.zeros(1, 3, training.height, training.width))
    if GPU and RANKS > 1:
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    torch.manual_seed(training.seed + 1000 * RANK)  # processes draw their own dropout
    return model.train().to(DEVICE)


def train(training, folder, resume=False):
    """The whole curriculum, from the start or a checkpoint, and its results."""
    t, state = training, dict(phase=0, seconds=0.0, log=[])
    model = build_model(replace(t, pretrained="") if resume else t)
    data, val, test = load_data(t, "train", "val", "test")
    images, count = data.images, len(data.images)
    for batch in (t.batch, t.background_batch):
        require(count >= batch, f"{count} training images do not fill a batch of {batch}")
        require(batch % RANKS == 0, f"{RANKS} processes cannot share a batch of {batch}")
    if GPU and 4 * images.nbytes < torch.cuda.mem_get_info()[0]:
        images = images.to(DEVICE)  # and later their backgrounds
    if resume:
        state = astseg.load_tensors(folder / "checkpoint.pt")
        model.load_state_dict(state["model"])
    elif RANK == 0:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "settings.json").write_text(json.dumps(asdict(t), indent=1))
    started = time.time() - state["seconds"]

    for number, (phase, start, stop) in [*enumerate(curriculum(t))][state["phase"] :]:
        optimizer = make_optimizer(model, phase, t)
        if resume and number == state["phase"]:
            optimizer.load_state_dict(state["optimizer"])
            start = state["step"]
            if RANK == 0:  # the other processes draw their own dropout
                torch.set_rng_state(state["random"])
        alone = phase == "background"
        batch, network = (t.background_batch, model.background) if alone else (t.batch, model)
        if GPU and t.compile:  # a step is short: without CUDA graphs its kernels wait for Python
            network = torch.compile(network, mode="reduce-overhead" if RANKS == 1 else None)
        network = torch.nn.parallel.DistributedDataParallel(network) if RANKS > 1 else network
        arrays = [images]
        if phase == "foreground":  # its background is frozen
            arrays.append(memorise_backgrounds(model, images, folder / "backgrounds.u8"))
        print(f"\nphase {number + 1}, {phase}: steps {start} to {stop}\n{LOG_HEAD}")
        losses, clock = [], time.time()
        model.train()
        for step in range(start, stop):
            lr = set_learning_rate(optimizer, phase, step, t)
            x, *behind = load_batch(arrays, step, batch, t)
            with torch.autocast(DEVICE.type, torch.bfloat16, enabled=GPU and t.bf16):
                if alone:
                    loss = astseg.robust_background_loss(x, *network(x))
                else:
                    output = network(x, *behind)
                    loss = astseg.full_loss(x, output, step, t.entropy_weight, t.entropy_warmup)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

            # Plumbing from here on: log, evaluate, save.
            losses.append(loss.detach())
            every = t.log_every, t.evaluate_every, t.checkpoint_every
            log, judge, save = ((step + 1) % n == 0 or step + 1 == stop for n in every)
            if not (log or judge or save):
                continue
            mean = torch.stack(losses).mean().item()
            line = dict(phase=phase, step=step + 1, lr=lr, loss=mean)
            line["images/s"] = len(losses) * batch / (time.time() - clock)
            if RANK == 0:
                report(model, val if judge and not alone else None, line, state["log"], folder)
            if RANK == 0 and save:
                state |= dict(
                    phase=number, step=step + 1, seconds=time.time() - started,
                    model=model.state_dict(), optimizer=optimizer.state_dict(),
                    random=torch.get_rng_state(),
                )  # fmt: skip
                torch.save(state, folder / "checkpoint.tmp")
                os.replace(folder / "checkpoint.tmp", folder / "checkpoint.pt")
            losses, clock = [], time.time()
            model.train()
        if RANK == 0:
            (folder / "backgrounds.u8").unlink(missing_ok=True)
    if RANK == 0:
        write_results(model, test, state["log"], folder, t.seed, time.time() - started)
    wait()


COLUMNS = "step lr loss mIoU ARI-FG foreground active clamped alpha_0 images/s".split()
LOG_HEAD = "".join(f"{name:>11}" for name in COLUMNS)


def report(model, validation, line, log, folder):
    """Complete a line of the log, print and write it; stop or warn where nothing learns."""
    failed = f"the loss of {line['phase']} is {line['loss']} by step {line['step']}"
    if not math.isfinite(line["loss"]):
        raise FloatingPointError(f"{failed}: lower the rate, or --resume {folder}")
    line["alpha_0"] = model.renderer.log_alpha_0.exp().mean().item()
    if validation is not None:
        line |= evaluate(model, validation, 200)
        rows, _ = picture_rows(model, validation, 4)
        rows = {f"step {line['step']}": rows.pop("input")} | rows
        (folder / "training").mkdir(exist_ok=True)
        picture_grid(rows, folder / "training" / f"{line['step']:06d}.png")
    log.append(line)
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    cells = (f"{line[n]:{'' if n == 'step' else '.4g'}}" if n in line else "" for n in COLUMNS)
    print("".join(f"{cell:>11}" for cell in cells), flush=True)
    if line.get("foreground", 1) < 0.005:
        print("warning: no foreground yet: train longer, raise --lr or lower --log_alpha_0")
    if line.get("clamped", 0) > 0.5:
        print("warning: most positions are clamped at the border: lower --lr, lengthen --warmup")


# ---- Evaluation (section 5.1) and pictures ----

METRICS = ("mIoU", "mIoU-FG", "ARI-FG", "MSC-FG", "MSE")
PALETTE = torch.tensor([(0, 0, 0), *(color_sequences["tab10"] * 26)[:255]])  # 0 the background


@torch.no_grad()
def evaluate(model, data, count=None):
    """Metrics and signs of health, each the mean over the images; without labels MSE alone."""
    slots, rows = model.eval().config.slots, []
    for start in range(0, len(data.images[:count]), 50):
        part = slice(start, start + 50)
        images = to_float(data.images[part])
        output = model(images)
        labels = output.weights.argmax(1)  # (B, H, W)
        row = {
            "MSE": astseg.squared_error(images, output.reconstruction),
            "foreground": (labels > 0).float().mean((1, 2)),
            "active": F.one_hot(labels, slots + 1).amax((1, 2))[:, 1:].sum(1),
            "clamped": (output.latents.position.abs() == 1).any(2).float().mean(1),
        }
        if data.labels is not None:
            pair = data.labels[part].to(DEVICE), labels, slots
            row["mIoU"], row["mIoU-FG"] = astseg.mean_iou(*pair)
            row["ARI-FG"] = astseg.adjusted_rand_index(*pair)
            row["MSC-FG"] = astseg.segmentation_covering(*pair)
        rows.append(row)
    return {name: torch.cat([r[name].double().cpu() for r in rows]).mean().item() for name in row}


def print_table(rows):
    """Rows (name, metrics) as in Table 1, in per cent but for the MSE."""
    print(f"\n{'':20}" + "".join(f"{name:>10}" for name in METRICS))
    for name, row in rows:
        cells = (row.get(m, math.nan) * (1 if m == "MSE" else 100) for m in METRICS)
        print(f"{name:20}" + "".join(f"{cell:10.2f}" for cell in cells))


@torch.no_grad()
def picture_rows(model, data, count):
    """Rows of pictures of the first images: as in Figure 2, and of the slots of the first three."""
    images = to_float(data.images[:count])
    out, size = model.eval()(images), images.shape[2:]
    rows, slots = {"input": images}, {}
    if data.labels is not None:
        rows["truth"] = PALETTE[data.labels[:count].long()].movedim(3, 1)
    rows["segments"] = PALETTE[out.weights.argmax(1).cpu()].movedim(3, 1)
    rows |= {"reconstruction": out.reconstruction, "background": out.background}
    x, y = astseg.normalized_coordinates(*size, DEVICE)
    places = torch.stack(torch.meshgrid(x, y, indexing="xy"))  # (2, H, W)
    red = torch.tensor([1.0, 0, 0], device=DEVICE).view(3, 1, 1)
    for b in range(len(images[:3])):
        attention = out.attention[b, :, None]  # (K, 1, h, w)
        attention = F.interpolate(attention / attention.amax((2, 3), keepdim=True), size)
        away = (places - out.attention_position[b, :, :, None, None]).norm(dim=1, keepdim=True)
        color, mask = F.interpolate(out.glimpses[b], size).split([3, 1], dim=1)
        pairs = {
            "attention": (images, attention.where(away > 0.08, red)),  # a spot of soft-argmax
            "glimpse": (out.background, 1 - mask * (1 - color)),  # white where there is nothing
            "layer": (out.reconstruction, 1 - out.weights[b, 1:, None] * (1 - out.layers[b])),
        }
        for name, (whole, each) in pairs.items():
            slots[f"{name} {b + 1}"] = torch.cat((whole[b : b + 1], each))
    return rows, slots


def picture_grid(rows, path):
    """Save rows {name: pictures (B, 3, H, W) in [0, 1]} as one picture, twice as large."""
    strips = [F.pad(row.cpu(), (1,) * 4, value=1.0) for row in rows.values()]
    grid = torch.cat([strip.movedim(0, 2).flatten(2) for strip in strips], dim=1)
    grid = F.interpolate(F.pad(grid, (50, 0), value=1.0)[None], scale_factor=2)[0]  # names left
    picture = Image.fromarray((grid.clamp(0, 1) * 255).byte().movedim(0, 2).numpy())
    for i, name in enumerate(rows):
        place = (4, (i + 0.4) * picture.height / len(rows))
        ImageDraw.Draw(picture).text(place, name, "black", font_size=14)
    picture.save(path)


def write_results(model, data, log, folder, seed, seconds):
    """The model, metrics.json and the pictures of a finished run."""
    model.save_pretrained(folder / "model")
    metrics = evaluate(model, data)
    facts = dict(images=len(data.images), seconds=round(seconds), seed=seed)
    results = {name: metrics[name] for name in METRICS if name in metrics} | facts
    (folder / "metrics.json").write_text(json.dumps(results, indent=1))
    rows, slots = picture_rows(model, data, 10)
    picture_grid(rows, folder / "segmentation.png")
    picture_grid(slots, folder / "slots.png")
    steps = [line["step"] for line in log if "MSE" in line]
    frames = (Image.open(folder / "training" / f"{step:06d}.png") for step in steps)
    options = dict(save_all=True, append_images=frames, duration=500, loop=0)
    next(frames).save(folder / "training.gif", **options)
    axes = Figure().subplots()
    for name in ("loss", "mIoU", "ARI-FG"):
        lines = [line for line in log if name in line and line["phase"] != "background"]
        axes.plot([line["step"] for line in lines], [line[name] for line in lines], label=name)
    axes.set_xlabel("step")
    axes.legend()
    axes.figure.savefig(folder / "curves.png")
    print_table([(f"AST-Seg, seed {seed}", metrics)])
    print(f"{folder}: {len(data.images)} test images, {seconds:.0f} s in all")


# ---- Use of a trained model ----


def load_model(folder):
    """The trained model of a run folder, in evaluation mode."""
    done = (folder / "model" / "model.safetensors").exists()
    require(done, f"{folder} is no folder of a finished run")
    return ASTSeg.from_pretrained(str(folder / "model"), strict=True).to(DEVICE).eval()


@torch.no_grad()
def segment_files(folder, *paths, output=None):
    """Write <stem>_labels.png, _overlay.png and _objects.json for each image, one at a time.

    An image is cropped at its centre to the model's aspect; what is reported is in its own pixels.
    """
    require(paths, "--segment takes a run folder and then at least one image")
    once = len({path.stem for path in paths}) == len(paths)
    require(once, "two images have one name: their results would collide")
    model, output = load_model(folder), output or folder / "segmented"
    size = model.config.height, model.config.width
    for path in paths:
        image = astseg.open_image(path)
        box = astseg.centre_crop(image.size, *size)
        corner, crop = np.array(box[:2]), np.subtract(box[2:], box[:2])  # (x, y) each
        pixels, _ = astseg.crop_and_resize(image, None, *size)
        out = model(to_float(torch.from_numpy(pixels)[None]))
        small = Image.fromarray(out.weights[0].argmax(0).byte().cpu().numpy())
        picture = Image.new("P", image.size)  # 0, the background, around the crop
        picture.putpalette((PALETTE * 255).byte().flatten().tolist())
        picture.paste(small.resize(tuple(crop), Image.Resampling.NEAREST), box)
        labels = np.array(picture)
        position, scale, activation, _ = (x[0].cpu().numpy() for x in out.latents)  # (K, ...)
        position, glimpse_size = corner + (position + 1) / 2 * crop, crop / scale
        objects = [
            dict(
                label=k, position=position[k - 1].tolist(), pixels=(labels == k).sum().item(),
                glimpse_size=glimpse_size[k - 1].tolist(), activation=activation[k - 1].item(),
                box=np.subtract(Image.fromarray(labels == k).getbbox(), (0, 0, 1, 1)).tolist(),
            )
            for k in np.unique(labels[labels > 0]).tolist()
        ]  # fmt: skip
        output.mkdir(parents=True, exist_ok=True)
        picture.save(output / f"{path.stem}_labels.png")
        half = Image.fromarray((labels > 0) * np.uint8(128))
        overlay = Image.composite(picture.convert("RGB"), image, half)
        overlay.save(output / f"{path.stem}_overlay.png")
        (output / f"{path.stem}_objects.json").write_text(json.dumps(objects, indent=1))
        print(f"{path}: {len(objects)} objects -> {output}/{path.stem}_labels.png")


def evaluate_runs(folders, part="test", **given):
    """A row of metrics for each run and, for several, their mean and standard deviation."""
    if "data" in given:  # the run's own masks belong to its own data
        given.setdefault("masks", "")
    rows = []
    for folder in folders:
        training = replace(read_settings(folder), **given)
        (data,) = load_data(training, part)
        require(data.labels is not None, f"{training.data} has no label maps: name them by --masks")
        metrics = evaluate(load_model(folder), data)
        (folder / f"evaluation-{training.dataset}-{part}.json").write_text(json.dumps(metrics))
        rows.append((folder.name, metrics))
    if len(rows) > 1:
        table = {m: [row[m] for _, row in rows] for m in METRICS}
        rows.append(("mean", {m: np.mean(column) for m, column in table.items()}))
        rows.append(("deviation", {m: np.std(column, ddof=1) for m, column in table.items()}))
    print_table(rows)


# ---- Command line: a flag for each setting; several processes ----


def wait():
    if RANKS > 1:
        dist.barrier()


def read_settings(folder):
    path = folder / "settings.json"
    require(path.exists(), f"{path} is missing: there is no run in that folder")
    return Training(**json.loads(path.read_text()))


def boolean(text):
    return bool(("false", "true").index(text.lower()))  # a ValueError for anything else


def parse(arguments):
    """The flags that were given, name -> value."""
    parser = argparse.ArgumentParser(
        usage="python train.py [--setting value ...]", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS, allow_abbrev=False,
    )  # fmt: skip
    for name, count in dict(resume=None, evaluate="+", segment="+", output=None).items():
        parser.add_argument(f"--{name}", type=Path, nargs=count)
    parser.add_argument("--part", choices=("test", "val", "train", "all"))
    parser.add_argument("--preset", choices=("shapes", "small", "paper"))
    for field in fields(Training):
        flag, kind, choices = f"--{field.name}", type(field.default), get_args(field.type) or None
        options = dict(help=f"default {field.default}", metavar=None if choices else "X")
        if kind is bool:
            parser.add_argument(flag, type=boolean, nargs="?", const=True, **options)
            no = dict(dest=field.name, action="store_false", help=argparse.SUPPRESS)
            parser.add_argument(f"--no_{field.name}", **no)
        else:
            parser.add_argument(flag, type=kind, choices=choices, **options)
    return vars(parser.parse_args(arguments))


def main(arguments=None):
    given = parse(arguments)
    given |= {n: os.path.abspath(given[n]) for n in ("data", "masks", "cache") if given.get(n)}
    flags = dict(resume=[], segment=["output"], evaluate="part dataset data masks cache".split())
    for command in flags.keys() & given.keys():
        wrong = given.keys() - {command, *flags[command]}
        require(not wrong, f"--{command} takes the run's own settings: leave out {sorted(wrong)}")
    if "segment" in given:
        return segment_files(*given["segment"], output=given.get("output"))
    if "evaluate" in given:
        return evaluate_runs(given.pop("evaluate"), **given)
    if "resume" in given:
        folder = given["resume"]
        require((folder / "checkpoint.pt").exists(), f"{folder} has no checkpoint to resume from")
        return train(read_settings(folder), folder, resume=True)
    require("part" not in given, "--part is for --evaluate only")
    dataset = given.get("dataset", "shapes")
    folder = given.pop("output", Path("runs", dataset))
    exists = (folder / "checkpoint.pt").exists()
    require(not exists, f"{folder} holds a run: --resume it, or name another --output")
    inside = folder.absolute().is_relative_to(given.get("data") or "/dev/null")
    require(not inside, f"{folder} is inside the data: name another --output")
    paper = dict(background_steps=2500) if dataset == "clevr" else {}
    presets = dict(shapes=SHAPES, small=SMALL, paper=paper | PAPER_SETTINGS.get(dataset, {}))
    preset = presets[given.pop("preset", "shapes" if dataset == "shapes" else "paper")]
    train(Training(**preset | given), folder)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # names of files may be no UTF-8
    if RANKS > 1:
        if GPU:
            torch.cuda.set_device(DEVICE)
        dist.init_process_group(timeout=timedelta(days=1))  # the first one may decode for hours
        if RANK > 0:
            sys.stdout = open(os.devnull, "w")
    try:
        main()
    except (OSError, ValueError, FloatingPointError) as error:
        sys.exit(f"train.py: {error}")
    except KeyboardInterrupt:
        sys.exit("train.py: interrupted; a run goes on from its last checkpoint by --resume")
