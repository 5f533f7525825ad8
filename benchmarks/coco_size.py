"""Train some steps of Show and Tell on a data set of COCO's size; a process of its own, so that memory is its own.

python benchmarks/coco_size.py FOLDER STEPS SIZE      prints one line of JSON

The first run writes the data set into the folder: captions made from real ones (or from drawn words), an empty file for
each image, and a feature cache of random numbers for them.
"""

from __future__ import annotations

import json
import sys
import time

STARTED = time.perf_counter()

from pathlib import Path  # noqa: E402

from showtell.run import Run  # noqa: E402
from showtell.train import CaptionDataset, CaptionLoader, Trainer  # noqa: E402


def memory(name: str) -> float:
    """Return a line of this process's status in megabytes: `VmRSS` now, `VmHWM` at most so far."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return float("nan")
    return next(int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith(name))


def main(folder: Path, n_steps: int, size_name: str) -> None:
    imported, after_imports = time.perf_counter() - STARTED, memory("VmRSS")
    from workload import SIZES, fill_cache, write_coco

    size = SIZES[size_name]
    if not (folder / "annotations").is_dir():
        write_coco(folder, size)
    run = Run(
        dataset="coco",
        data_dir=str(folder),
        out=str(folder / "run"),
        weights=size.weights,
        features=str(folder / "cache"),
    )
    trainer = Trainer(size.recipe("coco-show-tell", epochs=1, precision="bfloat16"), run)
    fill_cache(trainer, folder / "cache")
    trainer.prepare(progress=False)

    def steps(loader: CaptionLoader) -> float:
        """Return the milliseconds per 1,000 words, because batches have captions of different lengths."""
        seconds, words = 0.0, 0
        batches = iter(loader)
        trainer._train_step([next(batches)])
        for _ in range(n_steps):
            begun = time.perf_counter()
            images, captions = next(batches)
            trainer._train_step([(images, captions)])
            seconds += time.perf_counter() - begun
            words += captions[:, 1:].numel()
        return 1e6 * seconds / words

    trainer.model.train()
    trainer._train_step([next(iter(trainer.loader))])
    first = time.perf_counter() - STARTED
    few = CaptionDataset(
        trainer.train_set.subset(size.flickr_images), trainer.vocab, trainer.transform, "train", trainer.recipe.group
    )
    few.use_features(trainer.loader.dataset.cache)
    small = CaptionLoader(few, trainer.recipe.batch_size)
    pairs = [(steps(trainer.loader), steps(small)) for _ in range(size.runs)]
    found = {"imports_s": imported, "first_step_s": first, "after_imports_mb": after_imports}
    found |= {"peak_mb": memory("VmHWM"), "steps": pairs, "captions": len(trainer.loader.dataset)}
    print(json.dumps(found | {"images": len(trainer.train_set), "words": len(trainer.vocab)}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
