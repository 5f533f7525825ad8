"""The models. The code is in showtell/model.py and showtell/decoders.py.

EncoderCNN           encodes an image as a vector of `embed_size`: a frozen ResNet-50 (He et al. 2015), a linear layer
Backbone             the convolutional part of any encoder, by name: resnet50, inception_v3, tiny, …
DecoderRNN           1. the image is the LSTM's first input: Show and Tell (Vinyals et al. 2015), eq. 10-12
DecoderEveryStep     2. the image is an input at every step (Mao et al. 2015, m-RNN; Donahue et al. 2015, LRCN)
DecoderAttention     3. attention to grid cells at every word: Show, Attend and Tell (Xu et al. 2015), section 4.2
DecoderTopDown       4. an attention LSTM and a language LSTM: Top-Down (Anderson et al. 2018), section 3.2
DecoderTransformer   5. self-attention instead of an LSTM: Attention Is All You Need (Vaswani et al. 2017)
CaptionModel         an encoder with its decoder, as trained, saved and loaded
"""

from showtell.decoders import DecoderAttention, DecoderEveryStep, DecoderRNN, DecoderTopDown, DecoderTransformer
from showtell.model import Backbone, CaptionModel, EncoderCNN

__all__ = [
    "Backbone",
    "CaptionModel",
    "DecoderAttention",
    "DecoderEveryStep",
    "DecoderRNN",
    "DecoderTopDown",
    "DecoderTransformer",
    "EncoderCNN",
]
