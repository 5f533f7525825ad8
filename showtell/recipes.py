"""Complete training settings by name: `showtell train --recipe flickr8k-show-tell`. This module does not load torch."""

from __future__ import annotations

import inspect
import math
import typing
from dataclasses import asdict, dataclass, fields, replace

from showtell.errors import UserError
from showtell.tokenizer import DEFAULT_TOKENIZER, TOKENIZERS

if typing.TYPE_CHECKING:
    from showtell.transforms import Transform

_FRACTIONS = ("dropout", "word_dropout", "scheduled_sampling", "label_smoothing", "ema")
_MAY_BE_ZERO = (
    "captions_per_image", "warmup", "weight_decay", "attention_cost", "bleu_weight", "xe_weight", "length_penalty",
)  # fmt: skip
# Settings that act in self-critical training only, and settings of the cross-entropy, which it may leave out.
_SELF_CRITICAL = ("samples_per_image", "baseline", "sample_with_dropout", "bleu_weight", "xe_weight")
_CROSS_ENTROPY = (
    "word_dropout", "scheduled_sampling", "captions_per_image", "label_smoothing", "attention_cost", "source_weights",
)  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """All settings that decide what a model learns, except the data and the random seed.

    Attributes:
        encoder: the name of a backbone. stride_in_1x1: see `showtell.backbones.Backbone`.
        batch_norm: whether the encoder's linear layer is followed by batch norm.
        decoder: a name in `showtell.decoders.DECODERS`, which gets those of the next settings that its constructor has.
        embed_size, hidden_size: E and H. num_layers: of an LSTM, or blocks of a Transformer.
        attention_size: hidden size of the additive attention. num_heads: of a Transformer's attention.
        dropout: on the decoder's inputs and outputs. tie_embeddings: share the embedding and classifier matrices.
        word_dropout: the part of the input words that is hidden, see `showtell.model.drop_words`.
        scheduled_sampling: the part of the input words that is predicted by the model, see
            `showtell.model.feed_predictions`; it rises linearly from 0 at the first step to this value at the last.
        resize, squash, crop: the image size: `resize` the shorter side and cut a square `crop`, or, with `squash`,
            resize the whole image to `resize` x `resize`.
        random_crop, flip: augmentation. With random crops, training cannot use cached features; flips need two caches.
        tokenizer, threshold: of the vocabulary.
        condition_on_source: whether captions begin with a start word of their data set, whose style can then be chosen.
        source_weights: of the cross-entropy of each data set's captions, in their order: `1,1,0.5`; with start words.
        group: the composition of a batch: captions of one `length`, or each `image` with all its captions, or, with
            `captions_per_image`, with that many of them, drawn again each epoch.
        batch_size: captions, or images, per batch. accumulate: batches per step and process. epochs: passes over the
            data.
        optimizer: `adam` or `adamw`. lr: the highest learning rate, reached after `warmup` steps, followed by half a
            cosine to 0. weight_decay: of AdamW. clip: the maximum norm of the gradient.
        label_smoothing: see `caption_loss`. attention_cost: weight of the doubly stochastic penalty (Xu et al. 2015,
            eq. 14).
        ema: decay of the exponential moving average of the weights, such as 0.999; validation and the saved models use
            the average.
        objective: `cross-entropy`, or `self-critical` (`showtell.self_critical`) for a second stage after it, with
            samples_per_image: captions sampled per image. baseline: of their rewards, the mean of the image's `others`
            or the reward of the `greedy` caption. sample_with_dropout: whether dropout is on while they are sampled.
            bleu_weight: of BLEU-4 in the reward, beside CIDEr-D. xe_weight: of the cross-entropy, beside the reward.
        fine_tune: layers of the backbone to train (`"layer4"`, `"layer3,layer4"`, `"all"`), at `backbone_lr`.
        precision: `float32`, `bfloat16`, or `auto`: bfloat16 on GPUs that support it.
        beam_size, length_penalty, max_len: for the captions that validation scores.
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
    scheduled_sampling: float = 0.0
    tie_embeddings: bool = False
    resize: int = 256
    squash: bool = False
    crop: int = 224
    random_crop: bool = False
    flip: bool = False
    tokenizer: str = DEFAULT_TOKENIZER
    threshold: int = 5
    condition_on_source: bool = False
    source_weights: str = ""
    group: str = "length"
    captions_per_image: int = 0
    batch_size: int = 80
    accumulate: int = 1
    epochs: int = 15
    optimizer: str = "adam"
    lr: float = 5e-4
    warmup: int = 200
    weight_decay: float = 0.0
    clip: float = 5.0
    label_smoothing: float = 0.1
    attention_cost: float = 0.0
    ema: float = 0.0
    objective: str = "cross-entropy"
    samples_per_image: int = 5
    baseline: str = "others"
    sample_with_dropout: bool = True
    bleu_weight: float = 0.0
    xe_weight: float = 0.0
    fine_tune: str = ""
    backbone_lr: float = 1e-5
    precision: str = "auto"
    beam_size: int = 1
    length_penalty: float = 0.7
    max_len: int = 25

    def __post_init__(self) -> None:
        choices = {
            "tokenizer": tuple(TOKENIZERS),
            "group": ("length", "image"),
            "optimizer": ("adam", "adamw"),
            "objective": ("cross-entropy", "self-critical"),
            "baseline": ("others", "greedy"),
            "precision": ("auto", "float32", "bfloat16"),
        }
        for name, accepted in choices.items():
            if getattr(self, name) not in accepted:
                raise UserError(f"{name}={getattr(self, name)!r} is not known; choose one of {', '.join(accepted)}")
        for field in fields(self):
            name, value = field.name, getattr(self, field.name)
            if type(field.default) not in (int, float):
                continue
            if name in _FRACTIONS:
                if not 0 <= value < 1:  # nan is out of every range
                    raise UserError(f"{name}={value} must be from 0 to below 1; 0 disables")
            elif name in _MAY_BE_ZERO:
                if not 0 <= value < math.inf:
                    raise UserError(f"{name}={value} must be 0 or more; 0 disables")
            elif not 0 < value < math.inf:
                raise UserError(f"{name}={value} must be above 0; give a larger number")
        if self.squash and self.random_crop:
            raise UserError("squash keeps the whole image and random_crop cuts it; turn one of them off")
        if self.objective == "self-critical":
            if self.group != "image":
                raise UserError("objective=self-critical needs all captions of an image together; set group=image")
            if self.baseline == "others" and self.samples_per_image == 1:
                given = "baseline=others needs other samples and samples_per_image is 1"
                raise UserError(f"{given}; set samples_per_image=2 or more, or baseline=greedy")

    def transform(self) -> Transform:
        """Return the image transform, with augmentation.

        A backbone of timm brings its mean and standard deviation and, where `resize` and `crop` have their defaults,
        its sizes.
        """
        from showtell.transforms import Transform

        resize, crop, normalisation = self.resize, self.crop, {}
        if self.encoder.startswith("timm/"):
            from showtell.backbones import timm_images

            own = timm_images(self.encoder)
            normalisation = {"mean": own.mean, "std": own.std}
            if (resize, crop) == (Recipe.resize, Recipe.crop):
                resize, crop = own.crop if self.squash else own.resize, own.crop
            if own.fixed and (side := resize if self.squash else crop) != own.crop:
                name, size = "resize" if self.squash else "crop", own.crop
                given = f"{self.encoder} takes images of {size} x {size} pixels only, and {name} is {side}"
                raise UserError(f"{given}; set {name}={size}")
        if self.squash:
            return Transform(resize=(resize, resize), flip=self.flip, **normalisation)
        return Transform(resize=resize, crop=crop, random_crop=self.random_crop, flip=self.flip, **normalisation)

    def model_config(self, vocab_size: int) -> dict:
        """Return the configuration of `CaptionModel`; the decoder gets the settings that its constructor has."""
        encoder = {"embed_size": self.embed_size, "backbone": self.encoder}
        encoder |= {"stride_in_1x1": self.stride_in_1x1, "batch_norm": self.batch_norm}
        settings = {**self.to_dict(), "vocab_size": vocab_size}
        decoder = {name: settings[name] for name in _arguments(self.decoder) if name in settings}
        return {"encoder": encoder, "decoder": {"name": self.decoder, **decoder}}

    def inherit_model(self, header: dict) -> Recipe:
        """Return a copy with the architecture, transform, tokeniser and decoding settings of a trained model.

        The schedule (epochs, learning rates, batches, fine-tuning, augmentation, …) stays this recipe's. An argument
        that the model's configuration leaves out has its constructor's default; unknown entries are ignored. `header`
        is what `showtell.checkpoint.read_header` returns.
        """
        encoder, decoder = (header["model"].get(half, {}) for half in ("encoder", "decoder"))
        found = {"stride_in_1x1": False, "batch_norm": False, **encoder, "encoder": encoder.get("backbone", "resnet50")}
        found |= {**_arguments(decoder.get("name")), **decoder, "decoder": decoder.get("name")}
        resize, crop = header["transform"].get("resize"), header["transform"].get("crop")
        if isinstance(resize, list):
            found |= {"squash": True, "resize": resize[0]}
        elif resize and crop:
            found |= {"squash": False, "resize": resize, "crop": crop}
        found["tokenizer"] = header["vocabulary"].get("tokenizer")
        recipe = header["meta"].get("recipe")
        if isinstance(recipe, dict):
            found |= {name: recipe[name] for name in ("beam_size", "length_penalty", "max_len") if name in recipe}
        return self.with_settings({name: found[name] for name in self.to_dict() if found.get(name) is not None})

    def unused_settings(self) -> list[str]:
        """Return a sentence for each setting that differs from its default but has no effect."""
        from showtell.decoders import DECODERS

        tiny, layers, accepted = self.encoder == "tiny", self.layers_to_train(), _arguments(self.decoder)
        reasons = {
            "captions_per_image": "group is length" if self.group == "length" else "",
            "crop": "squash keeps the whole image" if self.squash else "",
            "fine_tune": "the encoder tiny always trains completely" if tiny else "",
            "backbone_lr": "the encoder tiny trains at lr" if tiny else "" if layers else "fine_tune names no layers",
            "weight_decay": "optimizer is adam" if self.optimizer == "adam" else "",
            "attention_cost": "" if DECODERS[self.decoder].grid else f"the decoder {self.decoder} does not attend",
        }
        if self.objective == "cross-entropy":
            reasons |= dict.fromkeys(_SELF_CRITICAL, "objective is cross-entropy")
        else:
            reasons["condition_on_source"] = "self-critical training keeps the model's words, and its styles"
            if not self.xe_weight:
                reasons |= dict.fromkeys(_CROSS_ENTROPY, "xe_weight is 0")
        for name in set().union(*map(_arguments, DECODERS)) - accepted.keys():
            reasons[name] = f"the decoder {self.decoder} does not have it"
        return [
            f"{field.name}={getattr(self, field.name)} has no effect: {reasons[field.name]}"
            for field in fields(self)
            if reasons.get(field.name) and getattr(self, field.name) != field.default
        ]

    def layers_to_train(self) -> list[str] | None:
        """Return the argument of `Backbone.fine_tune`; the backbone tiny, not being pretrained, always trains."""
        if self.encoder == "tiny" or self.fine_tune == "all":
            return [""]
        return [layer.strip() for layer in self.fine_tune.split(",") if layer.strip()] or None

    def to_dict(self) -> dict:
        """Return plain values for a checkpoint."""
        return asdict(self)

    def with_settings(self, settings: dict[str, object]) -> Recipe:
        """Return a copy with some settings changed; the values may be strings from the command line.

        Raises:
            UserError: there is no such setting, or its value has the wrong type or range.
        """
        types = typing.get_type_hints(Recipe)
        for name in settings:
            if name not in types:
                raise UserError(f"a recipe has no setting {name!r}; it has {', '.join(sorted(types))}")
        return replace(self, **{name: _convert(name, value, types[name]) for name, value in settings.items()})


def _arguments(decoder: str) -> dict[str, object]:
    """Return the names of a decoder's constructor arguments with their defaults, `None` where there is none."""
    from showtell.decoders import find_decoder

    parameters = inspect.signature(find_decoder(decoder)).parameters.values()
    return {p.name: None if p.default is p.empty else p.default for p in parameters}


def _convert(name: str, value: object, kind: type) -> object:
    if kind is bool and isinstance(value, str):
        if value.lower() not in ("true", "false"):
            raise UserError(f"{name}={value} is not a truth value; write {name}=true or {name}=false")
        return value.lower() == "true"
    try:
        converted = kind(value)
        if kind is int and not isinstance(value, str) and converted != value:
            raise ValueError("rounded")
        return converted
    except (TypeError, ValueError, OverflowError):
        what = {int: "a whole number", float: "a number"}.get(kind, kind.__name__)
        raise UserError(f"{name}={value!r} is not {what}; give {what}") from None


_FLICKR8K = Recipe(resize=224, squash=True, batch_norm=True)  # whole images squashed to a square
_SELF_CRITICAL_STAGE = replace(
    _FLICKR8K, objective="self-critical", group="image", batch_size=16, lr=2e-5, warmup=100, epochs=5
)
# For the 113,287 training images of Karpathy's split of COCO. Sizes, learning rates and scheduled sampling are those of
# Rennie et al. 2017, arXiv 1612.00563.
_COCO = Recipe(squash=True, batch_norm=True, group="image", batch_size=32, warmup=1000)
_COCO_TUNED = replace(
    _COCO, captions_per_image=5, scheduled_sampling=0.25, fine_tune="layer3,layer4", backbone_lr=5e-5, flip=True
)
RECIPES: dict[str, Recipe] = {
    # Show and Tell on Flickr8k's 6,000 photographs. With batch norm and this rate, two epochs reach the loss that three
    # and a half reach without.
    "flickr8k-show-tell": replace(_FLICKR8K, lr=1.5e-3, epochs=12),
    # The same with the image as an input at every step.
    "flickr8k-every-step": replace(_FLICKR8K, decoder="every-step", lr=1.5e-3, epochs=12),
    # Show, Attend and Tell; the captions of an image share its grid.
    "flickr8k-attend": replace(
        _FLICKR8K, decoder="attend", group="image", batch_size=16, attention_cost=1.0, lr=1e-3, warmup=300, epochs=7,
    ),
    # An attention LSTM and a language LSTM.
    "flickr8k-top-down": replace(_FLICKR8K, decoder="top-down", group="image", batch_size=16, lr=1e-3),
    # Self-critical training of models of flickr8k-show-tell and flickr8k-attend, named by `--init`.
    "flickr8k-show-tell-self-critical": _SELF_CRITICAL_STAGE,
    "flickr8k-attend-self-critical": replace(_SELF_CRITICAL_STAGE, decoder="attend"),
    # A Transformer of two blocks.
    "flickr8k-transformer": replace(
        _FLICKR8K, decoder="transformer", num_layers=2, dropout=0.3, tie_embeddings=True, group="image", batch_size=16,
        epochs=6, optimizer="adamw", lr=5e-4, warmup=500, weight_decay=0.01,
    ),
    # Show and Tell on COCO, center crops.
    "coco-show-tell": Recipe(batch_size=128, epochs=10),
    # Show and Tell on ResNet-152, the last two stages fine-tuned.
    "coco-show-tell-152": replace(_COCO_TUNED, encoder="resnet152", resize=224),
    # Show, Attend and Tell on the 10 x 10 grid of ResNet-101, and self-critical training of it with a frozen encoder.
    "coco-attend": replace(_COCO_TUNED, encoder="resnet101", resize=320, decoder="attend", attention_cost=1.0),
    "coco-attend-self-critical": replace(
        _COCO, encoder="resnet101", resize=320, decoder="attend", objective="self-critical", lr=5e-5, epochs=10,
    ),
    # The model of the Udacity course: 256/512, Adam at 1e-3, no dropout, no label smoothing, three epochs.
    "classic": Recipe(
        embed_size=256, dropout=0.0, tokenizer="treebank", batch_size=64, epochs=3, lr=1e-3, warmup=0,
        label_smoothing=0.0,
    ),
    # Synthetic images with a small network from scratch, minutes on a CPU.
    "demo": Recipe(
        encoder="tiny", decoder="transformer", embed_size=128, hidden_size=128, num_layers=1, num_heads=4, dropout=0.0,
        word_dropout=0.15, resize=64, squash=True, threshold=1, group="image", captions_per_image=3, batch_size=16,
        epochs=6, optimizer="adamw", lr=2e-3, warmup=400, clip=1.0, label_smoothing=0.0, max_len=20,
    ),
}  # fmt: skip


def recipe_named(name: str) -> Recipe:
    """Return the recipe of this name, or raise a `UserError` that lists the names."""
    if name not in RECIPES:
        raise UserError(f"there is no recipe {name!r}; choose one of {', '.join(RECIPES)}")
    return RECIPES[name]


def warm_cosine(step: int, warmup: int, total: int) -> float:
    """Return the part of the highest learning rate: linear to 1 over the warm-up, then half a cosine to 0."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, total - warmup))))
