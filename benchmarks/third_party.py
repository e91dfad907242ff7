"""Models of the Transformers package, small and untrained: code that others wrote, of many kinds."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

CLASSES, VOCABULARY, LENGTH, PIXELS, FRAMES = 100, 8192, 64, 64, 128
_TEXT: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 192, "num_hidden_layers": 4, "num_attention_heads": 4}
_DECODER = _TEXT | {"intermediate_size": 512, "use_cache": False, "num_key_value_heads": 2, "head_dim": 48}
_WHISPER: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": 192,
    **dict.fromkeys(("encoder_layers", "decoder_layers"), 3),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 512),
    **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"), 0),
    "max_source_positions": FRAMES // 2,
    "max_target_positions": LENGTH,
    "dropout": 0.0,
    "use_cache": False,
}
_T5: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": 192,
    "d_kv": 48,
    "d_ff": 512,
    "num_layers": 3,
    "num_heads": 4,
    "dropout_rate": 0.0,
    "use_cache": False,
}
_SWIN: dict[str, Any] = {
    "image_size": PIXELS,
    "embed_dim": 48,
    "depths": [2, 2, 4],
    "num_heads": [2, 4, 8],
    "window_size": 4,
    "drop_path_rate": 0.0,
}


class Logits(nn.Module):
    """A model of the package that takes one tensor, and returns its logits with the classes last.

    Args:
        model: The model.
        name: The keyword that takes the tensor.
        decoder: For a model with an encoder and a decoder, makes the decoder's tokens from the tensor.
    """

    def __init__(self, model: nn.Module, name: str, decoder: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.model, self._name, self._decoder = model, name, decoder

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the logits; shape ``(B, K)`` or ``(B, ..., K)``."""
        more = {} if self._decoder is None else {"decoder_input_ids": self._decoder(inputs)}
        logits: Tensor = self.model(**{self._name: inputs}, **more).logits
        return logits if logits.ndim < 4 else logits.movedim(1, -1)  # classes of each pixel


def _made(kind: str, head: str, **options: Any) -> nn.Module:
    """Make a model of a kind, such as Bert, with a head, from the options of the kind's configuration."""
    package: Any = importlib.import_module("transformers")
    return getattr(package, kind + head)(getattr(package, f"{kind}Config")(**options))


def _of_images(kind: str, head: str = "ForImageClassification", **options: Any) -> nn.Module:
    return Logits(_made(kind, head, num_labels=CLASSES, **options), "pixel_values")


def bert() -> nn.Module:
    """Make an encoder of text."""
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return Logits(_made("Bert", "ForMaskedLM", **_TEXT, **still, intermediate_size=512), "input_ids")


def gemma() -> nn.Module:
    """Make a decoder of text."""
    return Logits(_made("Gemma", "ForCausalLM", **_DECODER), "input_ids")


def mixtral() -> nn.Module:
    """Make a decoder with experts."""
    return Logits(_made("Mixtral", "ForCausalLM", **_DECODER, num_local_experts=4), "input_ids")


def t5() -> nn.Module:
    """Make an encoder and a decoder of text."""
    return Logits(_made("T5", "ForConditionalGeneration", **_T5), "input_ids", lambda tokens: tokens)


def whisper() -> nn.Module:
    """Make an encoder of sound and a decoder of text."""
    model = _made("Whisper", "ForConditionalGeneration", **_WHISPER)
    return Logits(model, "input_features", lambda sound: torch.zeros(len(sound), LENGTH, dtype=torch.long))


def swin() -> nn.Module:
    """Make a transformer of images in shifted windows."""
    return _of_images("Swin", **_SWIN)


def vit() -> nn.Module:
    """Make a transformer of images."""
    sizes: dict[str, Any] = {
        "hidden_size": 192,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "intermediate_size": 512,
    }
    return _of_images("ViT", **sizes, image_size=PIXELS, patch_size=8)


def convnext() -> nn.Module:
    """Make a network of depthwise convolutions."""
    return _of_images("ConvNext", hidden_sizes=[48, 96, 192], depths=[2, 2, 4], num_stages=3)


def segformer() -> nn.Module:
    """Make a model that classifies pixels, with batch normalisation in its head."""
    return _of_images("Segformer", "ForSemanticSegmentation", drop_path_rate=0.0, classifier_dropout_prob=0.0)


def resnet() -> nn.Module:
    """Make a residual network of 18 layers, with batch normalisation."""
    widths = [64, 128, 256, 512]
    return _of_images("ResNet", embedding_size=64, hidden_sizes=widths, depths=[2, 2, 2, 2], layer_type="basic")
