"""Loaders, in one place to read from. The code is in showtell/data_loader.py.

get_loader           a DataLoader over any data set: get_loader(transform, mode="train", batch_size=…, vocab_file=…, …)
CaptionDataset       (image, caption) pairs in training, (original image, image) in testing
CoCoDataset          the course's name for it; calling it says what to write instead
LengthBatchSampler   batches of captions of one length: no padding, every caption once an epoch
ImageBatchSampler    every image once with all its captions: fine-tuning and self-critical training

The data set of the course is COCO: Chen et al. 2015, "Microsoft COCO Captions", https://arxiv.org/abs/1504.00325
"""

from showtell.data_loader import (
    CaptionDataset,
    CoCoDataset,
    ImageBatchSampler,
    LengthBatchSampler,
    get_loader,
)

__all__ = ["CaptionDataset", "CoCoDataset", "ImageBatchSampler", "LengthBatchSampler", "get_loader"]
