"""From measured rates to plans: captioning 10 million images, and training on COCO and CC3M on 1, 8 and 64 GPUs.

    python benchmarks/scale.py

`MEASURED` holds what was measured, `ASSUMED` what was not; every number of a plan follows from these two. The first
tables are these; the next simulates the measured runs of `showtell bulk` and says how far off the simulation is.
"""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Sequence

BLOCK = 512  # images per block of `showtell bulk`

RATE, START = "one actor, images per second", "start of Ray and of the model on a busy machine, seconds"
SPREAD = "spread of a block's time, standard deviation / mean"
SHARE = "two actors on two cores, rate per actor / rate of one alone"
# On two cores of an EPYC, small drawn images and a small model; docs/scale.md has the commands.
MEASURED = {
    RATE: 612.0,
    START: 45.0,
    SPREAD: 0.53,
    SHARE: 0.88,
    "released model on one core, images per second": 6.5,  # models/README.md: 13 on two cores
    "JPEG read, decoded and resized to 224, images per second and core": 640.0,  # docs/coco.md
    "table of captions, bytes per sample of one caption": 800.0,
    "names of images in the driver of bulk, bytes per image": 400.0,
}
RUNS = (  # actors, images, seconds from the start of the first block to the end of the last
    (1, 10_000, 16.3),
    (2, 20_000, 18.5),
    (2, 8_224, 12.3),  # what was left after an actor and then the driver were killed
)
ASSUMED = {
    "encoder, 1e9 multiply-adds per second and GPU": 16_000.0,  # docs/coco.md: an A100 in mixed precision
    "released model's encoder, 1e9 multiply-adds per image": 4.1,  # ResNet-50 at 224
    "beam search of 32 images on a GPU, seconds": 0.06,  # 12 steps of some 500 kernels of 10 µs
    "decoder's training step, seconds": 0.015,  # docs/coco.md, attention
    "processor cores per GPU": 16.0,
    "bytes per JPEG": 100_000.0,
    "read from shared storage, bytes per second and machine of 8 GPUs": 1.25e9,  # 10 Gbit/s
    "all-reduce between machines, bytes per second and machine": 12.5e9,  # 100 Gbit/s
    "all-reduce inside a machine, bytes per second and GPU": 200e9,  # NVLink
    "spread of a training step between GPUs, standard deviation / mean": 0.05,
    "dollars per GPU hour": 2.0,
    "dollars per core hour": 0.04,
    "links of CC3M that still work": 0.75,
}
# images, epochs, 1e9 multiply-adds per image and epoch, images per step and GPU, bytes of gradients, bytes per image
TRAININGS = {
    "COCO, `coco-attend`": (118_287, 15, 40.3, 32, 4 * 60e6, 160_000),
    "CC3M, the same": (int(3_318_333 * ASSUMED["links of CC3M that still work"]), 15, 40.3, 32, 4 * 60e6, 100_000),
}


def simulate(n_images: int, actors: int, rate: float, spread: float) -> float:
    """Return the seconds until actors that take blocks from one queue are done."""
    rng = random.Random(0)
    free, end = [0.0] * actors, 0.0
    for first in range(0, n_images, BLOCK):
        size = min(BLOCK, n_images - first)
        heapq.heapreplace(free, free[0] + size / rate * max(0.1, rng.gauss(1, spread)))
        end = max(end, *free)
    return end


def check() -> list[Sequence[str]]:
    """Return measured and simulated seconds of each run."""
    rate, spread, share = (MEASURED[name] for name in (RATE, SPREAD, SHARE))
    rows = []
    for actors, n_images, seconds in RUNS:
        found = simulate(n_images, actors, rate if actors == 1 else rate * share, spread)
        rows.append((str(actors), f"{n_images:,}", f"{seconds:.1f}", f"{found:.1f}", f"{found / seconds - 1:+.0%}"))
    return rows


def captioning(n_images: int, n_gpus: int = 0, n_cores: int = 0) -> Sequence[str]:
    """Return a row of the plan for captioning: as fast as the slowest of model, decoding of JPEGs, and network."""
    if n_gpus:
        machines = math.ceil(n_gpus / 8)
        compute = ASSUMED["released model's encoder, 1e9 multiply-adds per image"]
        compute /= ASSUMED["encoder, 1e9 multiply-adds per second and GPU"]
        compute += ASSUMED["beam search of 32 images on a GPU, seconds"] / 32
        limits = {"GPU": n_gpus / compute}
        jpeg = MEASURED["JPEG read, decoded and resized to 224, images per second and core"]
        limits["decode"] = n_gpus * ASSUMED["processor cores per GPU"] * jpeg
        workers, price = n_gpus, ASSUMED["dollars per GPU hour"]
    else:
        machines = math.ceil(n_cores / 64)
        limits = {"cores": n_cores * MEASURED["released model on one core, images per second"]}
        workers, price = n_cores, ASSUMED["dollars per core hour"]
    network = ASSUMED["read from shared storage, bytes per second and machine of 8 GPUs"] * machines
    limits["network"] = network / ASSUMED["bytes per JPEG"]
    slowest, second = sorted(limits, key=limits.__getitem__)[:2]
    seconds = MEASURED[START] + simulate(n_images, workers, limits[slowest] / workers, MEASURED[SPREAD])
    hours = seconds / 3600
    moved = n_images * ASSUMED["bytes per JPEG"] / 1e12
    where = f"{n_gpus} GPU" if n_gpus else f"{n_cores} cores"
    breaks = f"{slowest}; {second} at {limits[second] / limits[slowest]:.1f} times the speed"
    return where, f"{limits[slowest]:,.0f}", f"{hours:,.1f}", f"{hours * workers * price:,.0f}", f"{moved:.1f}", breaks


def training(name: str, n_gpus: int) -> Sequence[str]:
    """Return a row of the plan for training: as fast as the slowest of model, decoding of JPEGs, and network."""
    images, epochs, macs, batch, gradients, size = TRAININGS[name]
    machines = math.ceil(n_gpus / 8)
    compute = batch * macs / ASSUMED["encoder, 1e9 multiply-adds per second and GPU"]
    compute += ASSUMED["decoder's training step, seconds"]
    waiting = ASSUMED["spread of a training step between GPUs, standard deviation / mean"] * math.sqrt(
        2 * math.log(n_gpus)
    )  # the expected largest of n normal step times, approximately
    ring = 2 * gradients * (n_gpus - 1) / n_gpus  # bytes that each GPU sends
    inside = ASSUMED["all-reduce inside a machine, bytes per second and GPU"]
    between = ASSUMED["all-reduce between machines, bytes per second and machine"]
    reduce_s = ring / (between if machines > 1 else inside)
    step_s = compute * (1 + waiting) + reduce_s
    jpeg = MEASURED["JPEG read, decoded and resized to 224, images per second and core"] / 1.2  # 320 pixels
    limits = {
        "GPU": n_gpus * batch / step_s,
        "decode": n_gpus * ASSUMED["processor cores per GPU"] * jpeg,
        "network": machines * ASSUMED["read from shared storage, bytes per second and machine of 8 GPUs"] / size,
    }
    slowest, second = sorted(limits, key=limits.__getitem__)[:2]
    hours = images * epochs / limits[slowest] / 3600
    moved = (images * epochs * size + images / batch * epochs * ring) / 1e12
    breaks = f"{slowest}; {second} at {limits[second] / limits[slowest]:.1f} times the speed"
    lost = f"{1 - compute / step_s:.0%}"
    cost = hours * n_gpus * ASSUMED["dollars per GPU hour"]
    return name, str(n_gpus), f"{batch * n_gpus:,}", f"{hours:.2f}", f"{cost:,.0f}", f"{moved:.1f}", lost, breaks


def memory(n_samples: int) -> str:
    """Return a sentence on the memory that grows with the number of samples."""
    table = n_samples * MEASURED["table of captions, bytes per sample of one caption"] / 1e9
    names = n_samples * MEASURED["names of images in the driver of bulk, bytes per image"] / 1e9
    return f"{n_samples:,} samples: captions {table:.1f} GB per process, names in the driver of bulk {names:.1f} GB"


def table(header: str, rows: Sequence[Sequence[str]]) -> None:
    """Print a Markdown table."""
    print("\n| " + header.replace(",", " |") + " |\n|" + "---|" * (header.count(",") + 1))
    for row in rows:
        print(f"| {' | '.join(row)} |")


def main() -> None:
    """Print all tables."""
    for title, values in (("Measured", MEASURED), ("Assumed", ASSUMED)):
        table(f"{title},", [(name, f"{value:,g}") for name, value in values.items()])
    table("actors, images, seconds measured, simulated, difference", check())
    n = 10_000_000
    where = [captioning(n, n_cores=n_cores) for n_cores in (2, 64)] + [captioning(n, k) for k in (1, 8, 64)]
    table("10 million images on, images per second, hours, dollars, TB read, what is slowest", where)
    plans = [training(name, n_gpus) for name in TRAININGS for n_gpus in (1, 8, 64)]
    table("training, GPUs, images per step, hours, dollars, TB moved, lost to waiting, what is slowest", plans)
    print()
    for n_samples in (591_753, 2_488_749, 10_000_000, 100_000_000):
        print(memory(n_samples))


if __name__ == "__main__":
    main()
