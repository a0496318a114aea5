"""Presets of this package for `from_preset` of KerasHub's base classes."""

from keras_paligemma import presets
from keras_paligemma.compat import add_preset_loader
from keras_paligemma.models.backbone import PaliGemmaBackbone
from keras_paligemma.preprocessing.image_converter import (
    PaliGemmaImageConverter,
)
from keras_paligemma.preprocessing.preprocessor import (
    PaliGemmaCausalLMPreprocessor,
)
from keras_paligemma.preprocessing.tokenizer import PaliGemmaTokenizer


class PresetLoader:
    """The loader that KerasHub asks for, on top of our `from_preset`.

    A base class asks for the backbone's class, finds its own subclass for that
    backbone, and passes the subclass to the loader.

    Args:
        preset: str, a folder or handle.
        config: dict, its `config.json`.
    """

    def __init__(self, preset, config):
        self.preset = preset
        self.config = config

    def check_backbone_class(self):
        return PaliGemmaBackbone

    def load_backbone(self, cls, load_weights, **kwargs):
        return cls.from_preset(self.preset, load_weights, **kwargs)

    def load_task(self, cls, load_weights, load_task_weights, **kwargs):
        return cls.from_preset(self.preset, load_weights, **kwargs)

    def load_preprocessor(self, cls, config_file, **kwargs):
        return cls.from_preset(self.preset, config_file, **kwargs)

    def load_tokenizer(self, cls, config_file, **kwargs):
        return cls.from_preset(self.preset, config_file, **kwargs)

    def load_image_converter(self, cls, **kwargs):
        return cls.from_preset(self.preset, **kwargs)


def register():
    """Register our classes with KerasHub's base classes by backbone."""
    # Set here, since these classes are in layers below the models.
    for part in (
        PaliGemmaCausalLMPreprocessor,
        PaliGemmaImageConverter,
        PaliGemmaTokenizer,
    ):
        part.backbone_cls = PaliGemmaBackbone
    add_preset_loader(presets.HEADER["format"], PresetLoader)
