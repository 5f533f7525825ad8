"""The vocabulary. The code is in showtell/vocabulary.py.

Vocabulary    words to ids and back: build(captions, threshold), load, save, encode, decode, word2idx, idx2word
              `<start>` is 0, `<end>` is 1, `<unk>` is 2; the threshold of Show and Tell, section 4.3.1, is 5

Paper: Vinyals et al. 2015, "Show and Tell: A Neural Image Caption Generator", https://arxiv.org/abs/1411.4555
"""

from showtell.vocabulary import Vocabulary

__all__ = ["Vocabulary"]
