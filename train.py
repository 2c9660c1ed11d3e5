"""Train, evaluate and use AST-Seg: the paper's whole curriculum in one plain loop.

    python train.py                               the embedded data set, in ten minutes on two cores
    python train.py --resume                      go on where a killed run stopped
    python train.py --evaluate runs/shapes        metrics of a trained run
    python train.py --segment runs/shapes a.png   label map, overlay and objects of your images
    python train.py --help                        every setting

A run folder holds model/ (loads with ASTSeg.from_pretrained), checkpoint.pt, settings.json,
log.jsonl, metrics.json, segmentation.png, slots.png and curves.png.
"""

import dataclasses
import json
import os
import shutil
import sys
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal, NamedTuple, Optional

import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm import tqdm
from transformers import HfArgumentParser

import astseg
from astseg import ASTSeg, Config, setting

# -------------------------------------------------------------------------------------------------
# Settings


@dataclass(frozen=True)
class Training:
    """The curriculum and its optimisers, by default the paper's for CLEVRTEX (Table 6)."""

    scenario: Literal["CT", "BT", "frozen"] = setting(
        "CT", "Curriculum training, baseline training, or background frozen to the end (Table 4)."
    )
    background_steps: int = setting(500_000, "Steps of phase 1; 2 500 for a fixed background.")
    background_batch: int = setting(128, "Images a step of phase 1.")
    background_lr: float = setting(2e-3, "Learning rate of phase 1.")
    steps: int = setting(125_000, "Steps of phases 2 and 3 together.")
    phase2_steps: int = setting(30_000, "Steps of phase 2, with a frozen background.")
    batch: int = setting(64, "Images a step of phases 2 and 3.")
    lr: float = setting(4e-5, "Learning rate of phases 2 and 3.")
    warmup: int = setting(5_000, "Steps of the quadratic warm-up of that learning rate.")
    decay_at: float = setting(0.9, "Share of phases 2 and 3 after which it falls to a tenth.")
    refinement_lr_factor: float = setting(1.0, "Factor on it for the whole refinement.")
    renderer_lr_factor: float = setting(1.0, "Factor on it for the glimpse generator and alpha_0.")
    # open: weights are random unless they are named, since not every machine reaches a hub
    pretrained: str = setting(
        "", "Backbone weights, a hub name or a folder; the paper's are nvidia/mit-b3."
    )
    bf16: bool = setting(True, "Use bf16 autocast where there is a GPU.")
    train_images: int = setting(10_000, "Images that the embedded data set draws for training.")
    seed: int = setting(0, "Seed of the weights and of the order of images.")

    def __post_init__(self):
        for name in ("background_batch", "batch"):
            if getattr(self, name) < 2:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 2")
        factors = ("refinement_lr_factor", "renderer_lr_factor")
        for name in ("background_lr", "lr", "steps", "background_steps", *factors):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be above 0")
        if not 0 <= self.phase2_steps <= self.steps:
            raise ValueError(
                f"phase2_steps is {self.phase2_steps} and steps {self.steps}: "
                "phase 2 is a part of all steps"
            )
        if not 0 < self.decay_at <= 1:
            raise ValueError(f"decay_at is {self.decay_at}: it must be in (0, 1]")
        if self.warmup < 0:
            raise ValueError(f"warmup is {self.warmup}: it cannot be negative")
        if self.train_images < max(self.batch, self.background_batch):
            raise ValueError(
                f"train_images is {self.train_images}: one batch needs "
                f"{max(self.batch, self.background_batch)}"
            )


@dataclass(frozen=True)
class Run:
    """What to do, and where."""

    dataset: Literal["shapes"] = setting("shapes", "Data set: shapes is drawn by the program.")
    output: str = setting("", "Run folder; by default runs/<dataset>.")
    resume: bool = setting(False, "Go on from the run folder's last checkpoint.")
    evaluate: str = setting("", "Evaluate this run folder and stop.")
    segment: Optional[list[str]] = dataclasses.field(
        default=None, metadata={"help": "A run folder, then images to segment with its model."}
    )
    log_every: int = setting(100, "Steps between lines of losses.")
    evaluate_every: int = setting(500, "Steps between evaluations on the validation images.")
    checkpoint_every: int = setting(500, "Steps between checkpoints.")

    def __post_init__(self):
        for name in ("log_every", "evaluate_every", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 1")


# Settings of a data set that differ from the paper's for CLEVRTEX.
PRESETS = {
    # Two CPU cores, ten minutes: small sizes and short schedules, every component. The README says
    # what each departure from the paper is for.
    "shapes": dict(
        height=48, width=48, slots=4, anisotropic=False, backbone="tiny", dropout=0.0,
        dim_transformer=128, dim_feedforward=256, transformer_layers=2,
        refinement_start="identity", refinement_lr_factor=0.1, renderer_lr_factor=3.0,
        scale_max=6.0, log_alpha_0=4.5, entropy_weight=0.03, entropy_warmup=1000,
        background_kind="simple", background_width=0.25,
        background_steps=1500, background_batch=8, background_lr=5e-4,
        steps=3800, phase2_steps=3000, batch=32, lr=1e-3, warmup=100, decay_at=0.75,
        train_images=8000,
    ),
}  # fmt: skip


# -------------------------------------------------------------------------------------------------
# Data: uint8 tensors on the device, so that the loop never waits for a decoder


def load_data(dataset: str, part: str, config: Config, training: Training) -> astseg.Images:
    """The images of one part of a data set ("train", "val" or "test")."""
    count, seed = {"train": (training.train_images, 1), "val": (200, 2), "test": (500, 3)}[part]
    return astseg.draw_shapes(count, seed, config.height)


@lru_cache(maxsize=1)
def permutation(count: int, seed: int) -> torch.Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


def batch_indices(step: int, batch: int, count: int, seed: int) -> torch.Tensor:
    """Indices (batch,) of a step: epochs in random order, a function of the step alone."""
    epoch, position = divmod(step, count // batch)
    return permutation(count, seed * 100_003 + epoch)[position * batch : (position + 1) * batch]


def to_float(images: torch.Tensor) -> torch.Tensor:
    """Bytes to floats in [0, 1]."""
    return images.float() / 255


@torch.no_grad()
def memorise_backgrounds(model: ASTSeg, images: torch.Tensor) -> torch.Tensor:
    """Backgrounds of all images by the frozen autoencoder, computed once: (N, 3, H, W) uint8."""
    model.eval()
    parts = [model.background(to_float(part))[0] for part in images.split(100)]
    # open: memorised at 8 bits a channel, rounded
    return torch.cat([(part * 255).round().to(torch.uint8) for part in parts])


# -------------------------------------------------------------------------------------------------
# The curriculum (section 4.2.2)


class Phase(NamedTuple):
    name: str  # "background", "foreground" (frozen background) or "joint"
    start: int  # first step; foreground and joint share one counter
    stop: int


def curriculum(training: Training) -> list[Phase]:
    """The phases of a scenario, in order."""
    background = Phase("background", 0, training.background_steps)
    if training.scenario == "BT":
        return [Phase("joint", 0, training.steps)]
    if training.scenario == "frozen":
        return [background, Phase("foreground", 0, training.steps)]
    return [
        background,
        Phase("foreground", 0, training.phase2_steps),
        Phase("joint", training.phase2_steps, training.steps),
    ]


def make_optimizer(model: ASTSeg, phase: Phase, training: Training) -> torch.optim.Optimizer:
    fused = dict(fused=True)
    if phase.name == "background":
        # open: AdamW with its default betas and no weight decay in phase 1
        return torch.optim.AdamW(model.background.parameters(), weight_decay=0.0, **fused)
    parts = [
        (model.generator, 1.0),
        (model.encoder, training.refinement_lr_factor),  # all its parameters are the refinement's
        (model.renderer, training.renderer_lr_factor),
    ]
    if phase.name == "joint":
        parts.append((model.background, 1.0))
    groups = [dict(params=list(part.parameters()), factor=factor) for part, factor in parts]
    groups = [group for group in groups if group["params"]]  # there may be no refinement
    # open: a fresh Adam takes all parameters at the start of phase 3, at full rate
    return torch.optim.Adam(groups, betas=(0.9, 0.98), eps=1e-9, **fused)


def set_learning_rate(optimizer, phase: Phase, step: int, training: Training) -> float:
    # open: update number t uses the rate of step t + 1, the entropy weight of step t
    if phase.name == "background":
        # open: a tenth of the rate from 80 % of the steps on, in phase 1
        lr = astseg.learning_rate(step + 1, training.background_lr, phase.stop, decay_at=0.8)
    else:
        t = training
        lr = astseg.learning_rate(step + 1, t.lr, t.steps, t.warmup, t.decay_at)
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("factor", 1.0)
    return lr


def compute_loss(model, phase: Phase, step: int, images, background) -> torch.Tensor:
    if phase.name == "background":
        return astseg.robust_background_loss(images, *model.background(images))
    output = model(images, background)
    c = model.config
    return astseg.full_loss(images, output, step, c.entropy_weight, c.entropy_warmup)


# -------------------------------------------------------------------------------------------------
# Checkpoints: written beside and renamed, the previous one kept


@dataclass
class Progress:
    """All that a resumed run needs besides the model's weights."""

    settings: dict  # of the run that it belongs to
    phase: int = 0  # index into curriculum(...)
    step: int = 0  # steps done in that phase's counter
    seconds: float = 0.0  # spent so far
    started: float = 0.0  # when this run would have started, had it not been interrupted
    history: list = dataclasses.field(default_factory=list)  # lines of log.jsonl


def write_beside(path: Path, write) -> None:
    """Write a file whole or not at all: write(temporary path), then rename."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save has RuntimeError for a full disk
        temporary.unlink(missing_ok=True)
        raise OSError(
            f"cannot write {path}: {getattr(error, 'strerror', None) or error}"
        ) from error


def write_json(path: Path, content) -> None:
    write_beside(path, lambda p: p.write_text(json.dumps(content, indent=2) + "\n"))


def save_checkpoint(folder: Path, model: ASTSeg, optimizer, progress: Progress) -> None:
    if not all(torch.isfinite(p).all() for p in model.parameters()):
        raise_not_finite(folder, progress)
    state = dict(
        model=model.state_dict(),
        optimizer=optimizer.state_dict() if optimizer else None,
        progress=dataclasses.asdict(progress),
        random=torch.get_rng_state(),
        random_cuda=torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    )

    def write(path: Path):
        torch.save(state, path)
        if (folder / "checkpoint.pt").exists():
            os.replace(folder / "checkpoint.pt", folder / "checkpoint.previous.pt")

    write_beside(folder / "checkpoint.pt", write)


def load_checkpoint(folder: Path) -> dict:
    """The last checkpoint that is whole; a damaged one is named and the previous one used."""
    for name in ("checkpoint.pt", "checkpoint.previous.pt"):
        path = folder / name
        if not path.exists():
            continue
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # whatever a damaged archive makes torch raise
            reason = str(error).splitlines()[0]
            print(f"warning: {path} is damaged and not used ({reason})", file=sys.stderr)
    raise FileNotFoundError(f"{folder} has no usable checkpoint: start it without --resume")


def raise_not_finite(folder: Path, progress: Progress):
    last = folder / "checkpoint.pt"
    hint = f"the last good checkpoint is {last}" if last.exists() else "no checkpoint was written"
    raise FloatingPointError(
        f"the loss or a weight is not finite at step {progress.step} of phase {progress.phase + 1}"
        f": {hint}; lower the learning rate or, if it came with bf16, pass --no_bf16"
    )


# -------------------------------------------------------------------------------------------------
# Evaluation (section 5.1)


@torch.no_grad()
def evaluate(model: ASTSeg, data: astseg.Images) -> dict[str, float]:
    """Metrics and signs of health, each the mean over the images."""
    model.eval()
    slots, rows = model.config.slots, []
    device = next(model.parameters()).device
    for images, target in zip(data.images.split(50), data.labels.long().split(50)):
        images = to_float(images.to(device))
        output = model(images)
        labels = output.weights.argmax(1)
        target = target.to(device)
        iou, iou_foreground = astseg.mean_iou(target, labels, slots)
        rows.append(
            {
                "mIoU": iou,
                "mIoU-FG": iou_foreground,
                "ARI-FG": astseg.adjusted_rand_index(target, labels, slots),
                "MSC-FG": astseg.segmentation_covering(target, labels, slots),
                "MSE": astseg.squared_error(images, output.reconstruction),
                "foreground": (labels > 0).float().mean((1, 2)),
                "active": sum((labels == k).any(2).any(1).float() for k in range(1, slots + 1)),
                "clamped": (output.position.abs() == 1).any(2).float().mean(1),
            }
        )
    return {
        name: torch.cat([row[name].double().cpu() for row in rows]).mean().item()
        for name in rows[0]
    }


METRICS = ("mIoU", "mIoU-FG", "ARI-FG", "MSC-FG", "MSE")


def table_row(name: str, metrics: dict) -> str:
    """A row as in Table 1."""
    head = f"{'Model':24}{'mIoU (%)':>10}{'mIoU-FG':>10}{'ARI-FG (%)':>12}{'MSC-FG':>9}{'MSE':>8}"
    scores = [100 * metrics[m] for m in METRICS[:4]]
    return head + "\n{:24}{:10.2f}{:10.2f}{:12.2f}{:9.2f}{:8.1f}".format(
        name, *scores, metrics["MSE"]
    )


# -------------------------------------------------------------------------------------------------
# Training


class Job(NamedTuple):
    """What all phases of a run share."""

    model: ASTSeg
    images: torch.Tensor  # (N, 3, H, W), uint8, on the model's device
    validation: astseg.Images
    training: Training
    run: Run
    folder: Path
    progress: Progress


def train(config: Config, training: Training, run: Run, folder: Path) -> Job:
    """The whole curriculum, from random weights or from a checkpoint."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(training.seed)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    started = time.time()
    state = load_checkpoint(folder) if run.resume else None
    settings = flat_settings(config, training, run)
    progress = Progress(**state["progress"]) if state else Progress(settings)
    check_same_settings(folder, progress.settings, settings)
    progress.started = started - progress.seconds
    images = load_data(run.dataset, "train", config, training).images.to(device)
    validation = load_data(run.dataset, "val", config, training)
    model = ASTSeg(config)
    if state:
        model.load_state_dict(state["model"])
    elif training.pretrained:
        model.generator.load_backbone(training.pretrained)
    job = Job(model.to(device), images, validation, training, run, folder, progress)

    phases = curriculum(training)
    for number, phase in enumerate(phases[progress.phase :], progress.phase):
        backgrounds = memorise_backgrounds(model, images) if phase.name == "foreground" else None
        optimizer = make_optimizer(model, phase, training)
        if state:
            optimizer.load_state_dict(state["optimizer"])
            torch.set_rng_state(state["random"])
            if device.type == "cuda" and state["random_cuda"] is not None:
                torch.cuda.set_rng_state(state["random_cuda"])
            state = None
        else:
            progress.phase, progress.step = number, phase.start
        title = f"phase {number + 1} of {len(phases)}, {PHASE_TITLES[phase.name]}"
        print(f"\n{title}: steps {progress.step} to {phase.stop}\n{LINE_HEAD}")
        run_phase(job, phase, optimizer, backgrounds)
    return job


def run_phase(job: Job, phase: Phase, optimizer, backgrounds: Optional[torch.Tensor]) -> None:
    """The loop. It waits for the device only where it logs, evaluates or saves."""
    model, images, _, training, run, folder, progress = job
    batch = training.background_batch if phase.name == "background" else training.batch
    bf16 = training.bf16 and images.is_cuda
    total, since, clock = torch.zeros((), device=images.device), progress.step, time.time()
    model.train()
    bar = tqdm(
        range(progress.step, phase.stop), phase.name, initial=progress.step, total=phase.stop,
        unit="step", disable=None, leave=False,
    )  # fmt: skip
    for step in bar:
        lr = set_learning_rate(optimizer, phase, step, training)
        index = batch_indices(step, batch, len(images), training.seed).to(
            images.device, non_blocking=True
        )
        background = None if backgrounds is None else to_float(backgrounds[index])
        with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
            loss = compute_loss(model, phase, step, to_float(images[index]), background)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.detach()

        progress.step = step + 1
        last = progress.step == phase.stop
        judge = phase.name != "background" and progress.step % run.evaluate_every == 0
        log = last or judge or progress.step % run.log_every == 0
        save = last or progress.step % run.checkpoint_every == 0
        if (log or save) and not torch.isfinite(total):
            raise_not_finite(folder, progress)
        if log:
            steps, seconds = progress.step - since, max(time.time() - clock, 1e-9)
            line = log_line(
                job, phase, lr, total.item() / steps, batch * steps / seconds, judge or last
            )
            bar.write(format_line(line), file=sys.stdout)
            sys.stdout.flush()
            warn_of_known_failures(line, last)
            total.zero_()
            since, clock = progress.step, time.time()
        if save:
            progress.seconds = time.time() - progress.started
            write_log(folder, progress)
            save_checkpoint(folder, model, optimizer, progress)


def log_line(job: Job, phase: Phase, lr, loss, images_per_second, judge: bool) -> dict:
    """One entry of log.jsonl, at intervals with the validation metrics."""
    step = job.progress.step
    line = dict(
        phase=job.progress.phase + 1, name=phase.name, step=step, lr=lr, loss=loss,
        alpha_0=job.model.renderer.alpha_0.mean().item(), images_per_second=images_per_second,
    )  # fmt: skip
    if judge and phase.name != "background":
        line.update(evaluate(job.model, job.validation))
        job.model.train()
    job.progress.history.append(line)
    return line


PHASE_TITLES = {
    "background": "background alone",
    "foreground": "foreground before a frozen background",
    "joint": "foreground and background",
}
LINE_HEAD = (
    "   step       lr      loss   mIoU  ARI-FG  foreground  active  clamped  alpha_0  images/s"
)


def write_log(folder: Path, progress: Progress) -> None:
    lines = "".join(json.dumps(line) + "\n" for line in progress.history)
    write_beside(folder / "log.jsonl", lambda path: path.write_text(lines))


def format_line(line: dict) -> str:
    def column(name: str, form: str, width: int) -> str:
        return f"{line[name]:{form}}" if name in line else " " * (width - 1) + "-"

    return (
        f"{line['step']:7d} {line['lr']:8.1e} {line['loss']:9.5f} {column('mIoU', '6.3f', 6)} "
        f"{column('ARI-FG', '7.3f', 7)} {column('foreground', '11.1%', 11)} "
        f"{column('active', '7.2f', 7)} {column('clamped', '8.1%', 8)} {line['alpha_0']:8.0f} "
        f"{line['images_per_second']:9.0f}"
    )


def warn_of_known_failures(line: dict, last: bool) -> None:
    """Name what a dead run looks like: an empty foreground at a phase's end, clamped positions."""
    if last and line.get("foreground", 1) < 0.005:
        print(
            f"warning: the foreground is still empty ({line['foreground']:.2%} of the pixels): "
            "train longer, raise --lr or lower --log_alpha_0; phase 3 would only let the "
            "background take the objects over",
            file=sys.stderr,
        )
    if line.get("clamped", 0) > 0.5:
        print(
            f"warning: {line['clamped']:.0%} of the positions are clamped at the image's border, "
            "where they get no gradient: lower --lr or lengthen --warmup",
            file=sys.stderr,
        )


# -------------------------------------------------------------------------------------------------
# Results: metrics.json and pictures


def write_results(model: ASTSeg, test: astseg.Images, folder: Path, **facts) -> dict:
    """Evaluate on the test part and write metrics.json and the pictures; returns the metrics."""
    metrics = {name: value for name, value in evaluate(model, test).items() if name in METRICS}
    metrics.update(images=len(test.images), **facts)
    write_json(folder / "metrics.json", metrics)
    draw_segmentation(model, test, folder / "segmentation.png")
    draw_slots(model, test, folder / "slots.png")
    return metrics


def label_colors(count: int) -> np.ndarray:
    """RGB bytes (count, 3): black for the background, then colours that are told apart easily."""
    import matplotlib

    colors = np.array(matplotlib.colormaps["tab20"].colors)
    colors = np.concatenate((colors[0::2], colors[1::2]))
    return (255 * np.vstack(([0, 0, 0], colors[np.arange(count - 1) % 20]))).astype(np.uint8)


def new_figure(rows: int, columns: int, size: tuple[float, float], ticks: bool = False):
    """A grid of axes, made without a display."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False)
    if not ticks:
        plt.setp(axes, xticks=[], yticks=[])
    return figure, axes


def save_figure(figure, path: Path) -> None:
    import matplotlib.pyplot as plt

    figure.tight_layout(pad=0.4)
    write_beside(path, lambda p: figure.savefig(p, dpi=110, bbox_inches="tight", format="png"))
    plt.close(figure)


@torch.no_grad()
def predict(model: ASTSeg, data: astseg.Images, count: int) -> tuple[torch.Tensor, astseg.Output]:
    """The first images of a data set, on the model's device, and what the model says of them."""
    images = to_float(data.images[:count].to(next(model.parameters()).device))
    return images, model.eval()(images)


def channels_last(images: torch.Tensor) -> np.ndarray:
    return images.movedim(-3, -1).cpu().numpy()


def draw_segmentation(model: ASTSeg, data: astseg.Images, path: Path, count: int = 10) -> None:
    """Input, ground truth, segmentation, reconstruction and background, as in Figure 2."""
    images, output = predict(model, data, count)
    colors = label_colors(max(model.config.slots, int(data.labels.max())) + 1)
    rows = {
        "input": channels_last(images),
        "ground truth": colors[data.labels[:count].numpy()],
        "segmentation": colors[output.weights.argmax(1).cpu().numpy()],
        "reconstruction": channels_last(output.reconstruction),
        "background": channels_last(output.background),
    }
    figure, axes = new_figure(len(rows), len(images), (1.25 * len(images), 1.3 * len(rows)))
    for axis_row, (name, pictures) in zip(axes, rows.items()):
        axis_row[0].set_ylabel(name, fontsize=11)
        for axis, picture in zip(axis_row, pictures):
            axis.imshow(picture)
    save_figure(figure, path)


def draw_slots(model: ASTSeg, data: astseg.Images, path: Path, count: int = 3) -> None:
    """For each slot of some images: attention map with its soft-argmax point, glimpse, layer."""
    images, output = predict(model, data, count)
    slots, (height, width) = model.config.slots, output.attention.shape[-2:]
    # The layer as it shows in the image: its colours where its weight is large, grey elsewhere.
    shown = output.weights[:, 1:, None] * output.layers + (1 - output.weights[:, 1:, None]) * 0.85
    glimpses = output.glimpse_masks[:, :, None] * output.glimpses
    glimpses = glimpses + (1 - output.glimpse_masks[:, :, None]) * 0.85
    figure, axes = new_figure(3 * len(images), slots + 1, (1.4 * (slots + 1), 3.6 * len(images)))
    for i in range(len(images)):
        attention_row, glimpse_row, layer_row = axes[3 * i : 3 * i + 3]
        attention_row[0].imshow(channels_last(images[i]))
        attention_row[0].set_title("input", fontsize=10)
        glimpse_row[0].axis("off")
        layer_row[0].imshow(channels_last(output.reconstruction[i]))
        layer_row[0].set_xlabel("reconstruction", fontsize=10)
        for row, name in zip(
            (attention_row, glimpse_row, layer_row), ("attention", "glimpse", "layer")
        ):
            row[1].set_ylabel(name, fontsize=10)
        for k in range(slots):
            x, y = output.attention_position[i, k].tolist()
            attention_row[k + 1].imshow(output.attention[i, k].cpu(), cmap="gray")
            attention_row[k + 1].plot(
                (x + 1) / 2 * (width - 1), (y + 1) / 2 * (height - 1), "r+", ms=12
            )
            attention_row[k + 1].set_title(f"slot {k + 1}", fontsize=10)
            glimpse_row[k + 1].imshow(channels_last(glimpses[i, k]))
            layer_row[k + 1].imshow(channels_last(shown[i, k]))
    save_figure(figure, path)


def draw_curves(history: list[dict], path: Path) -> None:
    """Losses of each phase and validation metrics against the step."""
    figure, axes = new_figure(1, 3, (13, 3.2), ticks=True)
    background, losses, scores = axes[0]
    for axis, names in [(background, ["background"]), (losses, ["foreground", "joint"])]:
        for name in names:
            lines = [line for line in history if line["name"] == name]
            axis.plot(
                [line["step"] for line in lines], [line["loss"] for line in lines], label=name
            )
    for metric in ("mIoU", "ARI-FG"):
        lines = [line for line in history if metric in line]
        scores.plot(
            [line["step"] for line in lines], [line[metric] for line in lines], label=metric
        )
    background.set(title="Phase 1: robust background loss", xlabel="step", ylabel="loss")
    losses.set(title="Phases 2 and 3: loss (22)", xlabel="step", ylabel="loss", yscale="log")
    scores.set(title="Validation", xlabel="step", ylabel="score", ylim=(0, 1))
    losses.legend()
    scores.legend()
    save_figure(figure, path)


# -------------------------------------------------------------------------------------------------
# Images of a user


def load_model(folder: Path) -> ASTSeg:
    """The trained model of a run folder, in evaluation mode."""
    for name in ("config.json", "model.safetensors"):
        if not (folder / "model" / name).exists():
            raise FileNotFoundError(
                f"{folder / 'model' / name} is missing: {folder} is no folder of a finished run"
            )
    try:
        model = ASTSeg.from_pretrained(str(folder / "model"))
    except Exception as error:  # safetensors, JSON and torch each have their own
        reason = str(error).splitlines()[0]
        raise OSError(f"the model in {folder / 'model'} is damaged ({reason})") from error
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def save_model(model: ASTSeg, folder: Path) -> None:
    """Write folder/model whole or not at all."""
    new, old = folder / "model.tmp", folder / "model.old"
    for path in (new, old):
        shutil.rmtree(path, ignore_errors=True)
    model.save_pretrained(new)
    if (folder / "model").exists():
        os.replace(folder / "model", old)
    os.replace(new, folder / "model")
    shutil.rmtree(old, ignore_errors=True)


def read_image(path: Path) -> Image.Image:
    try:
        return ImageOps.exif_transpose(Image.open(path)).convert("RGB")
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no image {path}") from None
    except (OSError, ValueError) as error:
        raise OSError(f"cannot read {path} as an image ({error})") from error


def segment_files(folder: Path, paths: list[Path], output: Path) -> None:
    """Write <stem>_labels.png, <stem>_overlay.png and <stem>_objects.json for each image.

    An image is cropped at its centre to the model's aspect; what it reports is in its own pixels.
    """
    model = load_model(folder)
    stems = [path.stem for path in paths]
    repeated = sorted({stem for stem in stems if stems.count(stem) > 1})
    if repeated:
        raise ValueError(f"two images are named {repeated[0]}: their results would collide")
    pictures = [read_image(path) for path in paths]  # all are read before anything is written
    output.mkdir(parents=True, exist_ok=True)
    height, width = model.config.size
    for path, picture in zip(paths, pictures):
        factor = min(picture.width / width, picture.height / height)  # picture pixels a pixel
        left = max(0.0, (picture.width - factor * width) / 2)  # rounding may go below 0
        top = max(0.0, (picture.height - factor * height) / 2)
        right, bottom = min(picture.width, left + factor * width), top + factor * height
        box = (left, top, right, min(picture.height, bottom))
        small = picture.resize((width, height), Image.Resampling.BILINEAR, box)
        pixels = torch.from_numpy(np.array(small)).permute(2, 0, 1)[None]
        with torch.no_grad():
            prediction = model(to_float(pixels.to(next(model.parameters()).device)))
        labels = prediction.weights[0].argmax(0).byte().cpu().numpy()
        box = [round(side) for side in box]
        crop = Image.fromarray(labels).resize((box[2] - box[0], box[3] - box[1]), Image.NEAREST)
        whole = Image.new("L", picture.size)
        whole.paste(crop, box[:2])
        labels = np.array(whole)
        objects = describe_objects(labels, prediction, (left, top), factor)
        save_segmentation(output, path.stem, picture, labels, objects, model.config.slots)
        print(f"{path}: {len(objects)} objects -> {output / path.stem}_labels.png")


def describe_objects(labels: np.ndarray, prediction: astseg.Output, corner, factor) -> list[dict]:
    """One entry for each slot that shows in the label map, in pixels of the user's image."""
    height, width = prediction.weights.shape[-2:]
    objects = []
    for label in np.unique(labels[labels > 0]).tolist():
        rows, columns = np.nonzero(labels == label)
        x, y = prediction.position[0, label - 1].tolist()
        scale_x, scale_y = prediction.scale[0, label - 1].tolist()
        objects.append(
            {
                "label": label,
                "position": [
                    corner[0] + (x + 1) / 2 * width * factor,
                    corner[1] + (y + 1) / 2 * height * factor,
                ],
                "size": [width * factor / scale_x, height * factor / scale_y],
                "activation": prediction.activation[0, label - 1].item(),
                "pixels": len(rows),
                "box": [int(v) for v in (columns.min(), rows.min(), columns.max(), rows.max())],
            }
        )
    return objects


def save_segmentation(output: Path, stem: str, picture, labels, objects, slots: int) -> None:
    colors = label_colors(slots + 1)
    overlay = np.array(picture, dtype=np.float32)
    found = labels > 0
    overlay[found] = (overlay[found] + colors[labels[found]]) / 2
    palette = Image.fromarray(labels, "P")  # pixel index = label
    palette.putpalette(colors.flatten().tolist())
    for name, image in (
        ("labels", palette),
        ("overlay", Image.fromarray(overlay.astype(np.uint8))),
    ):
        write_beside(output / f"{stem}_{name}.png", lambda p: image.save(p, format="PNG"))
    write_json(output / f"{stem}_objects.json", objects)


# -------------------------------------------------------------------------------------------------
# Command line


def parse_arguments(arguments: Optional[list[str]] = None) -> tuple[Config, Training, Run]:
    """Flags made from the dataclasses. Defaults: the data set's, or a resumed run's own."""
    parser = HfArgumentParser([Run, Config, Training], description=__doc__.splitlines()[0])
    parser.set_defaults(**PRESETS[Run.dataset])
    run, _ = parser.parse_known_args(arguments)
    parser.set_defaults(**PRESETS[run.dataset])
    if run.resume or run.evaluate:
        parser.set_defaults(**read_settings(Path(run.evaluate or run_folder(run))))
    run, config, training = parser.parse_args_into_dataclasses(arguments, look_for_args_file=False)
    if run.dataset == "shapes" and config.height != config.width:
        raise ValueError(
            f"the embedded shapes are drawn on square images, not {config.height}x{config.width}: "
            "give --height and --width the same number"
        )
    if training.pretrained and config.generator != "segformer":
        raise ValueError(
            f"pretrained is {training.pretrained!r}, but the generator is {config.generator}: "
            "only the segformer has pretrained weights"
        )
    return config, training, run


def run_folder(run) -> Path:
    return Path(run.output or f"runs/{run.dataset}")


def read_settings(folder: Path) -> dict:
    """The flat settings of a run folder: those of Config, Training and the data set."""
    path = folder / "settings.json"
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing: there is no run in that folder") from None
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error})") from error


def flat_settings(config: Config, training: Training, run: Run) -> dict:
    return {**dataclasses.asdict(config), **dataclasses.asdict(training), "dataset": run.dataset}


def check_same_settings(folder: Path, stored: dict, settings: dict) -> None:
    """A resumed run keeps its settings: name the first that differs."""
    for name, value in stored.items():
        if settings.get(name) != value:
            raise ValueError(
                f"the run in {folder} was started with {name} = {value}, not "
                f"{settings.get(name)}: leave the flag out, or train into another --output"
            )


def main(arguments: Optional[list[str]] = None) -> None:
    config, training, run = parse_arguments(arguments)
    started = time.time()
    if run.segment:
        folder, paths = Path(run.segment[0]), [Path(path) for path in run.segment[1:]]
        if not paths:
            raise ValueError("--segment needs a run folder and then at least one image")
        output = Path(run.output) if run.output else folder / "segmented"
        return segment_files(folder, paths, output)
    if run.evaluate:
        folder = Path(run.evaluate)
        model = load_model(folder)
        metrics = evaluate(model, load_data(run.dataset, "test", model.config, training))
        metrics = {name: metrics[name] for name in METRICS}
        write_json(folder / "evaluation.json", metrics)
        return print(table_row(folder.name, metrics))

    folder = run_folder(run)
    if not run.resume:
        if any(folder.glob("checkpoint*.pt")):
            raise ValueError(
                f"{folder} holds a run already: go on with --resume, or choose another --output"
            )
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "settings.json", flat_settings(config, training, run))
    job = train(config, training, run, folder)
    save_model(job.model, folder)
    draw_curves(job.progress.history, folder / "curves.png")
    test = load_data(run.dataset, "test", config, training)
    facts = dict(seconds=round(job.progress.seconds, 1), seed=training.seed)
    metrics = write_results(job.model, test, folder, **facts)
    print("\n" + table_row(f"AST-Seg-{training.scenario}", metrics))
    print(f"{folder}: {metrics['images']} test images, {time.time() - started:.0f} s in all")


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError, FloatingPointError) as error:
        sys.exit(f"train.py: {error}")
    except KeyboardInterrupt:
        sys.exit("train.py: interrupted; go on with --resume")
