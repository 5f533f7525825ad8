"""The models, in one place to read from. The code is in showtell/model.py and showtell/decoders.py.

EncoderCNN           an image becomes a vector of `embed_size`: a frozen ResNet-50 (He et al. 2015) and a linear layer
Backbone             the convolutional part of any encoder, by name: resnet50, inception_v3, tiny, …
DecoderRNN           1. the image is the LSTM's first input: Show and Tell (Vinyals et al. 2015), eq. 10-12
DecoderEveryStep     2. the image is an input of every step (Mao et al. 2015, m-RNN; Donahue et al. 2015, LRCN)
DecoderAttention     3. the words look at parts of the image: Show, Attend and Tell (Xu et al. 2015), section 4.2
DecoderTopDown       4. one LSTM looks, a second one speaks: Top-Down attention (Anderson et al. 2018), section 3.2
DecoderTransformer   5. self-attention in place of the LSTM: Attention Is All You Need (Vaswani et al. 2017)
CaptionModel         an encoder and a decoder together, as trained, saved and loaded
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
