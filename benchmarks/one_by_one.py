"""Caption one photograph in the tutorials' way, cold: what `benchmarks/performance.py` compares a start with.

python benchmarks/one_by_one.py MODEL PHOTO
"""

import sys

import torch
from rivals import TutorialCaptioner

from showtell.checkpoint import load_checkpoint

checkpoint = load_checkpoint(sys.argv[1])
backbone = checkpoint.model.encoder.backbone.net.to(memory_format=torch.contiguous_format)
embed, decoder = checkpoint.model.encoder.embed, checkpoint.model.decoder
captioner = TutorialCaptioner(backbone, embed, decoder, checkpoint.transform.size)
print(checkpoint.vocab.decode(captioner(sys.argv[2])))
