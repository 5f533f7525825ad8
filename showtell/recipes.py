"""Complete settings by name, so that the command line needs few flags: `showtell train --recipe flickr8k-show-tell`."""

from __future__ import annotations

import math
import typing
from dataclasses import asdict, dataclass, fields, replace

from showtell.decoders import DECODERS
from showtell.errors import UserError
from showtell.tokenizer import TOKENIZERS
from showtell.transforms import Transform

_POSITIVE = (
    "embed_size", "hidden_size", "num_layers", "attention_size", "num_heads", "resize", "crop", "threshold",
    "batch_size", "epochs", "lr", "clip", "backbone_lr", "beam_size", "max_len",
)  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what is learnt, but the data and the seed.

    Attributes:
        encoder: a backbone by name. stride_in_1x1: see `showtell.backbones.Backbone`.
        batch_norm: batch norm behind the encoder's linear layer.
        decoder: `show-tell`, `every-step`, `attend`, `top-down` or `transformer`.
        embed_size, hidden_size: E and H. num_layers: of the LSTM, or the Transformer's blocks.
        attention_size: of the attention's perceptron. num_heads: of the Transformer.
        word_dropout: the part of the words read that is hidden, see `showtell.train.drop_words`.
        dropout: on the decoder's inputs and outputs. tie_embeddings: one matrix for reading and writing words.
        resize, squash, crop: the images' size: `resize` for the shorter side and a square `crop` of it, or, with
            `squash`, the whole image brought to `resize` x `resize`.
        random_crop, flip: augmentation; random crops need the images themselves, flips a second cache.
        tokenizer, threshold: of the vocabulary.
        group: what is batched, captions of one `length` or each `image` with all its captions, or, with
            `captions_per_image`, so many of them drawn anew each epoch.
        batch_size: captions, or images, a step. epochs: passes over the data.
        optimizer: `adam` or `adamw`. lr: its highest learning rate, reached after `warmup` steps and falling to 0 as
            half a cosine. weight_decay: AdamW's. clip: the most the gradient's norm may be.
        label_smoothing: see `caption_loss`. attention_cost: weight of the doubly stochastic penalty (Xu et al. 2015,
            eq. 14).
        fine_tune: layers of the backbone that train (`"layer4"`, `"layer3,layer4"`, `"all"`), at `backbone_lr`.
        precision: `float32`, `bfloat16`, or `auto`: bfloat16 on a GPU that has it.
        beam_size, length_penalty, max_len: of the captions that validation scores.
    """

    encoder: str = "resnet50"
    stride_in_1x1: bool = False
    batch_norm: bool = False
    decoder: str = "show-tell"
    embed_size: int = 512
    hidden_size: int = 512
    num_layers: int = 1
    attention_size: int = 512
    num_heads: int = 8
    dropout: float = 0.5
    word_dropout: float = 0.0
    tie_embeddings: bool = False
    resize: int = 256
    squash: bool = False
    crop: int = 224
    random_crop: bool = False
    flip: bool = False
    tokenizer: str = "words"
    threshold: int = 5
    group: str = "length"
    captions_per_image: int = 0
    batch_size: int = 80
    epochs: int = 15
    optimizer: str = "adam"
    lr: float = 5e-4
    warmup: int = 200
    weight_decay: float = 0.0
    clip: float = 5.0
    label_smoothing: float = 0.1
    attention_cost: float = 0.0
    fine_tune: str = ""
    backbone_lr: float = 1e-5
    precision: str = "auto"
    beam_size: int = 1
    length_penalty: float = 0.7
    max_len: int = 25

    def __post_init__(self) -> None:
        choices = {
            "decoder": tuple(DECODERS),
            "tokenizer": tuple(TOKENIZERS),
            "group": ("length", "image"),
            "optimizer": ("adam", "adamw"),
            "precision": ("auto", "float32", "bfloat16"),
        }
        for name, accepted in choices.items():
            if getattr(self, name) not in accepted:
                raise UserError(f"{name}={getattr(self, name)!r} is not known; choose one of {', '.join(accepted)}")
        for name in _POSITIVE:
            if not 0 < getattr(self, name) < math.inf:  # nan is neither
                raise UserError(f"{name}={getattr(self, name)} must be above 0; give a larger number")
        for name in ("warmup", "weight_decay", "attention_cost", "length_penalty"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"{name}={getattr(self, name)} must be 0 or more; 0 turns it off")
        for name in ("dropout", "word_dropout", "label_smoothing"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be from 0 to below 1; 0 turns it off")
        if self.num_layers > 1 and self.decoder in ("attend", "top-down"):
            raise UserError(
                f"the layers of the decoder {self.decoder} are given; leave num_layers at 1, or choose another decoder"
            )
        if self.squash and self.random_crop:
            raise UserError("squash keeps the whole image and random_crop cuts it; turn one of them off")

    def transform(self) -> Transform:
        """How images reach the network, augmentation included."""
        if self.squash:
            return Transform(resize=(self.resize, self.resize), flip=self.flip)
        return Transform(resize=self.resize, crop=self.crop, random_crop=self.random_crop, flip=self.flip)

    def model_config(self, vocab_size: int) -> dict:
        """The configuration of `CaptionModel` for a vocabulary of this size."""
        encoder = {"embed_size": self.embed_size, "backbone": self.encoder}
        encoder |= {"stride_in_1x1": self.stride_in_1x1, "batch_norm": self.batch_norm}
        decoder = {"name": self.decoder, "embed_size": self.embed_size, "hidden_size": self.hidden_size}
        decoder |= {"vocab_size": vocab_size, "dropout": self.dropout, "tie_embeddings": self.tie_embeddings}
        if self.decoder in ("attend", "top-down"):
            decoder |= {"attention_size": self.attention_size}
        else:
            decoder |= {"num_layers": self.num_layers}
        if self.decoder == "transformer":
            decoder |= {"num_heads": self.num_heads}
        return {"encoder": encoder, "decoder": decoder}

    def layers_to_train(self) -> list[str] | None:
        """What `Backbone.fine_tune` takes; the tiny backbone, which nobody pretrained, always trains whole."""
        if self.encoder == "tiny" or self.fine_tune == "all":
            return [""]
        return [layer.strip() for layer in self.fine_tune.split(",") if layer.strip()] or None

    def to_dict(self) -> dict:
        """Plain values, for a checkpoint."""
        return asdict(self)

    def with_settings(self, settings: dict[str, object]) -> Recipe:
        """A copy with some attributes changed; values may be the strings a user types.

        Raises:
            UserError: there is no such attribute, or its value is of another kind.
        """
        types = typing.get_type_hints(Recipe)
        known = {field.name for field in fields(self)}
        changes = {}
        for name, value in settings.items():
            if name not in known:
                raise UserError(f"a recipe has no setting {name!r}; it has {', '.join(sorted(known))}")
            changes[name] = _convert(name, value, types[name])
        return replace(self, **changes)


def _convert(name: str, value: object, kind: type) -> object:
    if kind is bool and isinstance(value, str):
        if value.lower() not in ("true", "false"):
            raise UserError(f"{name}={value} is not understood; write {name}=true or {name}=false")
        return value.lower() == "true"
    try:
        converted = kind(value)
        if kind is int and not isinstance(value, str) and converted != value:
            raise ValueError("it would be rounded")
        return converted
    except (TypeError, ValueError, OverflowError):
        what = {int: "a whole number", float: "a number"}.get(kind, kind.__name__)
        raise UserError(f"{name}={value!r} is not understood; {name} is {what}") from None


RECIPES: dict[str, Recipe] = {
    # Show and Tell on Flickr8k's 6,000 photographs; the whole image is squashed into the square. Batch norm brings
    # out what differs between images: with it and this rate, two epochs learn what three and a half did without.
    "flickr8k-show-tell": Recipe(resize=224, squash=True, batch_norm=True, lr=1.5e-3, epochs=12),
    # The same with the image beside the word at every step.
    "flickr8k-every-step": Recipe(
        resize=224, squash=True, batch_norm=True, decoder="every-step", lr=1.5e-3, epochs=12
    ),
    # Show, Attend and Tell; captions of an image share its grid.
    "flickr8k-attend": Recipe(
        resize=224, squash=True, batch_norm=True, decoder="attend", group="image", batch_size=16, attention_cost=1.0,
        lr=1e-3, warmup=300, epochs=7,
    ),
    # Two LSTMs, one that looks and one that speaks.
    "flickr8k-top-down": Recipe(
        resize=224, squash=True, batch_norm=True, decoder="top-down", group="image", batch_size=16, lr=1e-3
    ),
    # Two blocks of a Transformer that read the words and the grid.
    "flickr8k-transformer": Recipe(
        resize=224, squash=True, batch_norm=True, decoder="transformer", num_layers=2, dropout=0.3, tie_embeddings=True,
        group="image", batch_size=16, epochs=6, optimizer="adamw", lr=5e-4, warmup=500, weight_decay=0.01,
    ),
    # Show and Tell on COCO: images as they are, cut square in the middle.
    "coco-show-tell": Recipe(batch_size=128, epochs=10),
    # What the course's notebooks train: 256/512, Adam at 1e-3, no dropout, no smoothing, three epochs.
    "classic": Recipe(
        embed_size=256, dropout=0.0, tokenizer="treebank", batch_size=64, epochs=3, lr=1e-3, warmup=0,
        label_smoothing=0.0,
    ),
    # The embedded default: shapes, a small network from scratch, minutes on a CPU.
    "demo": Recipe(
        encoder="tiny", decoder="transformer", embed_size=128, hidden_size=128, num_layers=1, num_heads=4, dropout=0.0,
        word_dropout=0.15, resize=64, squash=True, threshold=1, group="image", captions_per_image=3, batch_size=16,
        epochs=6, optimizer="adamw", lr=2e-3, warmup=400, clip=1.0, label_smoothing=0.0, max_len=20,
    ),
}  # fmt: skip


def recipe_named(name: str) -> Recipe:
    """Returns a recipe by name.

    Raises:
        UserError: there is none of that name.
    """
    if name not in RECIPES:
        raise UserError(f"there is no recipe {name!r}; choose one of {', '.join(RECIPES)}")
    return RECIPES[name]
