"""Streaming images: in order, each file read once, broken ones in their place, never far ahead."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from PIL import Image

from showtell.errors import MissingFileError
from showtell.image_stream import digest_of, file_stamp, map_ahead, stream_images
from showtell.transforms import BrokenImageError, Transform


def test_reading_ahead_keeps_the_order_and_its_bound():
    started: list[int] = []
    n_threads = torch.get_num_threads()
    results = map_ahead(lambda i: started.append(i) or i, range(100), workers=3, ahead=5)
    assert next(results) == 0
    time.sleep(0.05)
    assert len(started) <= 6
    assert list(results) == list(range(1, 100))
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(torch.get_num_threads).result() == torch.get_num_threads() == n_threads


@pytest.mark.parametrize("workers", [0, 3])
def test_images_come_in_order_with_digests_and_stamps_and_broken_ones_in_their_place(tmp_path, workers):
    paths = [tmp_path / f"{i}.png" for i in range(7)]
    for i, path in enumerate(paths):
        Image.new("RGB", (40, 40), (30 * i, 0, 0)).save(path)
    paths[1].write_text("not an image")
    paths[2].unlink()
    Image.new("RGB", (1, 300)).save(paths[4])
    drawn = torch.full((3, 40, 40), 200, dtype=torch.uint8)
    transform = Transform(resize=32, crop=32)
    batches = list(stream_images([*paths, lambda: drawn], transform, batch_size=3, workers=workers))
    assert [len(batch) for batch in batches] == [3, 3, 2]
    images = [image for batch in batches for image in batch]
    assert [image.index for image in images] == list(range(8))
    assert [type(image.error) for image in images[:5]] == [
        type(None), BrokenImageError, MissingFileError, type(None), BrokenImageError
    ]  # fmt: skip
    assert all(str(paths[i]) in str(images[i].error) for i in (1, 2, 4))
    for i in (0, 3, 5, 6):
        assert torch.equal(images[i].pixels, transform(paths[i]))
        assert (images[i].digest, images[i].stamp) == (digest_of(paths[i].read_bytes()), file_stamp(paths[i]))
    assert torch.equal(images[7].pixels, transform(drawn))
    assert images[7].stamp is None
    assert len({image.digest for image in images if image.error is None}) == 5
