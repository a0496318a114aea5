"""The variables of a backbone's adapters, created once and shared by all."""

import dataclasses
import math

import numpy as np
from keras import ops

from keras_paligemma.checkpoints.engine import BLOCKS
from keras_paligemma.layers.projection import Projection
from keras_paligemma.layers.projection import normal
from keras_paligemma.lora_config import TARGETS
from keras_paligemma.lora_config import LoraConfig


class AdapterVariables:
    """The variables of low-rank adapters, which hold one adapter at a time.

    The first adapter determines their sizes. An adapter of a lower rank, of
    fewer targets or layers leaves the rest zero, where gradients are zero too.

    Args:
        backbone: `PaliGemmaBackbone`.

    Attributes:
        capacity: `LoraConfig` of the largest adapter that they can hold; `None`
            before they are made.
    """

    def __init__(self, backbone):
        self.backbone = backbone
        self.capacity: LoraConfig | None = None

    @property
    def room(self):
        """The `capacity` of a backbone that has adapters.

        Raises:
            ValueError: the backbone has no adapters.
        """
        if self.capacity is None:
            raise ValueError(
                "There is no adapter. Expected: one; call `enable_lora` or "
                "`load_adapter`."
            )
        return self.capacity

    def make(self, lora):
        """Create the variables for an adapter, and freeze all others.

        Args:
            lora: `LoraConfig`.
        """
        for variable in self.backbone.variables:
            variable.trainable = False
        vision = self.backbone.vision_encoder
        for tower, others in (
            (self.backbone.text_decoder, []),
            (vision, [vision.projector]),
        ):
            names = {
                TARGETS[target].rsplit("/", 1)[1]
                for target in lora.targets
                if TARGETS[target].startswith(f"{tower.name}/")
            }

            def adapt(layer, names=names):
                for inner in layer._flatten_layers():
                    if isinstance(inner, Projection) and inner.name in names:
                        inner.add_adapter(
                            lora.rank, 0.0, lora.dropout, lora.bias, lora.dora
                        )

            if names:
                tower.blocks.apply_to_blocks(adapt)
                for layer in others:
                    adapt(layer)
                if lora.dropout:
                    tower.blocks.enable_dropout()
        self.capacity = dataclasses.replace(lora, ranks=None, alphas=None)

    def fits(self, lora):
        """Return whether an adapter is within the capacity."""
        return (
            lora.rank <= self.room.rank
            and {*lora.targets} <= {*self.room.targets}
            and {*lora.pieces} <= {*self.room.pieces}
        )

    def num_layers(self, target):
        """Return the number of layers of a target; 1 for the projector."""
        place = TARGETS[target]
        if BLOCKS not in place:
            return 1
        tower = getattr(self.backbone, place.split("/")[0])
        return tower.blocks.num_layers

    def weights(self, *pieces):
        """Return a dict of name to `Weight` for some of `LoraConfig.pieces`."""
        weights = self.backbone.weights_by_name()
        return {
            name: weights[name]
            for target in self.room.targets
            for piece in pieces
            for name in [f"{TARGETS[target]}/{piece}"]
        }

    def read(self):
        """Return a dict of name to array, of all pieces."""
        weights = self.weights(*self.room.pieces)
        return {name: weight.read() for name, weight in weights.items()}

    def assign(self, pieces):
        """Assign arrays by name, padded with zeros to the capacity."""
        weights = self.weights(*self.room.pieces)
        for name, weight in weights.items():
            whole = np.zeros(weight.shape, "float32")
            if name in pieces:
                value = pieces[name]
                whole[tuple(slice(size) for size in value.shape)] = value
            weight.assign(whole)

    def draw(self, lora):
        """Draw a new adapter's values: random A, zeros for the rest."""
        weights = self.weights("adapter_a")
        values = {}
        for target in lora.targets:
            name = f"{TARGETS[target]}/adapter_a"
            ranks = lora.ranks_of(target, self.num_layers(target))
            inputs = weights[name].layer_shape[:-1]
            draws = []
            for rank in ranks:
                # A new initializer for each layer: the same one would repeat
                # its values.
                draw = normal(math.prod(inputs))((*inputs, lora.rank))
                draws.append(np.array(ops.convert_to_numpy(draw)))
                draws[-1][..., rank:] = 0
            values[name] = np.stack(draws) if BLOCKS in name else draws[0]
        return values
