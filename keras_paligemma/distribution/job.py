"""A training step to be planned: what it is, what it costs by arithmetic."""

import dataclasses
import math

from keras_paligemma.checkpoints import formats
from keras_paligemma.compat import without_values
from keras_paligemma.distribution.layouts import Layout
from keras_paligemma.distribution.layouts import chip_bytes
from keras_paligemma.layers.remat import REMATS
from keras_paligemma.models.backbone import PaliGemmaBackbone
from keras_paligemma.models.optimizers import Adam
from keras_paligemma.training.memory import estimate_memory

GIB = 2**30
# The lightest first: what is computed again costs time.


@dataclasses.dataclass(frozen=True)
class Job:
    """A fine-tune, as far as its memory and time depend on it.

    Args:
        preset: str, as `from_preset` takes it.
        batch_size: int, examples a step on all chips together.
        prompt_length: int, tokens.
        response_length: int, tokens.
        lora_rank: int; 0 trains all weights.
        lora_targets: see `enable_lora`; the decoder's attention if `None`.
        quantize: "int8", "int4" or `None`.
        dtype: dtype policy.
    """

    preset: str
    batch_size: int = 8
    prompt_length: int = 64
    response_length: int = 64
    lora_rank: int = 8
    lora_targets: tuple | None = None
    quantize: str | None = None
    dtype: str = "bfloat16"

    def __post_init__(self):
        for name in ("batch_size", "prompt_length", "response_length"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"{name} is at least 1. Received: {getattr(self, name)}."
                )
        if self.quantize and not self.lora_rank:
            raise ValueError(
                "Weights in low bits cannot be trained. Received: quantize="
                f"{self.quantize!r} for a full fine-tune. Expected: adapters "
                "(lora_rank=8), or no quantize."
            )

    @property
    def text_length(self):
        return self.prompt_length + self.response_length

    def model(self, remat="block", form="stacked"):
        """Build backbone and optimizer without values.

        Returns:
            `PaliGemmaBackbone` and built `Adam`.
        """
        config = formats.resolve(self.preset, False).config.backbone.to_dict()
        fields = {**config, "dtype": self.dtype, "remat": remat, "form": form}
        if self.quantize:
            fields["quantization"] = self.quantize
        optimizer = Adam()
        with without_values():
            backbone = PaliGemmaBackbone(**fields)
            if self.lora_rank:
                backbone.enable_lora(self.lora_rank, targets=self.lora_targets)
            optimizer.build(backbone.trainable_variables)
        return backbone, optimizer


def chip_memory(job, layout, model=None):
    """Split the memory of a chip, by arithmetic.

    Weights and state are exact; activations are `estimate_memory`'s.

    Args:
        job: `Job`.
        layout: `Layout`.
        model: what `job.model` gave, with the remat that is meant.

    Returns:
        Dict of str to bytes: "weights", "adapters and optimizer" (or
        "trained and optimizer"), "activations".
    """
    backbone, optimizer = model or job.model()
    trained = backbone.trainable_variables
    ids = {id(one) for one in trained}
    frozen = [one for one in backbone.variables if id(one) not in ids]
    examples = -(-job.batch_size // layout.replicas)
    rough = estimate_memory(
        backbone, examples, job.text_length, job.response_length
    )
    split = layout.group if layout.strategy in ("tensor", "both") else 1
    # One layer's weights are whole while it runs; twice, since the next one's
    # are gathered meanwhile. Gradients are as large as what is trained.
    gathered = 2 * _largest_layer(backbone) if layout.replicas > 1 else 0
    if layout.strategy == "data":
        gathered = 0
    return {
        "weights": chip_bytes(layout, frozen),
        _state_name(job): chip_bytes(layout, trained) * 2
        + chip_bytes(layout, optimizer.variables),
        "activations": rough["activations"] // split
        + rough["logits"]
        + gathered,
    }


def _state_name(job):
    kind = "adapters" if job.lora_rank else "trained weights"
    return f"{kind} and optimizer"


def _largest_layer(backbone):
    """Count the bytes of one block's weights in the compute dtype."""
    sizes = [0]
    for tower in (backbone.vision_encoder, backbone.text_decoder):
        stack = tower.blocks
        whole = sum(math.prod(one.shape) for one in stack.variables)
        sizes.append(2 * whole // stack.num_layers)
    return max(sizes)


def flops(job, backbone, remat):
    """Count products and sums of one training step, from the shapes.

    Args:
        job: `Job`.
        backbone: `PaliGemmaBackbone`.
        remat: what is computed again in the backward pass.

    Returns:
        float: of all chips together.
    """
    vision, text = backbone.vision_config, backbone.text_config
    patches = vision.num_image_tokens(backbone.image_size)
    tokens = patches + job.text_length
    full = not job.lora_rank
    vision_trained = full or any(
        one.startswith(("vision", "all")) for one in job.lora_targets or ()
    )
    eye = _tower(
        patches,
        _kernels(backbone.vision_encoder),
        vision.num_layers * vision.hidden_dim,
        _again(backbone.vision_encoder.blocks, remat),
        full,
        vision_trained,
    )
    mind = _tower(
        tokens,
        _kernels(backbone.text_decoder.blocks),
        text.num_layers * text.num_query_heads * text.head_dim,
        _again(backbone.text_decoder.blocks, remat),
        full,
    )
    head = 2 * job.response_length * text.hidden_dim * text.vocabulary_size
    # The loss streams: its products are computed again.
    total = eye + mind + head * (4 if full else 3)
    return job.batch_size * total


def _kernels(layer):
    return sum(
        math.prod(one.shape)
        for one in layer.variables
        if one.path.endswith("kernel")
    )


def _again(stack, remat):
    """Say how often products, and attention, are computed again."""
    if remat == "pair" and stack.num_layers % 2 == 0:
        return 1.5, 1.5
    known = {"dots": (0, 1), "block": (1, 1), "pair": (1, 1)}
    return known.get(remat, (0, 0))


def _tower(tokens, kernels, heads, again, full, trained=True):
    """Count what one example costs a tower: products, and attention's two."""
    products, attention = 2 * tokens * kernels, 4 * tokens * tokens * heads
    if not trained:
        return products + attention
    # Forward; the gradient of what goes in, and of the weights. Both inputs
    # of attention's products have gradients.
    times = 3 if full else 2
    return products * (times + again[0]) + attention * (3 + again[1])


def bounds(job, layout, machine, model, remat):
    """Bound a step's time from below, three times over.

    Args:
        job: `Job`.
        layout: `Layout`.
        machine: `machines.Machine`.
        model: what `job.model` gave.
        remat: see `flops`.

    Returns:
        Dict of str to seconds: "compute", "memory", "interconnect".
    """
    backbone, optimizer = model
    whole = chip_bytes(Layout("data"), backbone.variables)
    state = chip_bytes(layout, optimizer.variables)
    trained = chip_bytes(Layout("data"), backbone.trainable_variables)
    passes = {"block": 3, "pair": 3.5}.get(remat, 2)
    tensor = layout.strategy in ("tensor", "both")
    split = layout.group if tensor else 1
    received = 0.0
    sharers = {"weights": layout.group, "both": layout.groups}
    sharing = sharers.get(layout.strategy, 1)
    # Weights are gathered in each pass; a block's twice with remat.
    received += passes * whole / split * (1 - 1 / sharing)
    if tensor and layout.group > 1:
        text = backbone.text_config
        patches = backbone.vision_config.num_image_tokens(backbone.image_size)
        tokens = (patches + job.text_length) * job.batch_size / layout.replicas
        # Two sums over the group a block and pass, sent and received.
        sums = 2 * passes * text.num_layers * tokens * text.hidden_dim * 2
        received += 2 * sums * (1 - 1 / layout.group)
    if layout.replicas > 1:
        received += 2 * trained / split * (1 - 1 / layout.replicas)
    work = flops(job, backbone, remat)
    # A group that splits no work and has too few examples repeats it.
    busy = min(layout.replicas, job.batch_size) * split
    return {
        "compute": work / (busy * machine.flops),
        "memory": (passes * whole / split + 2 * state) / machine.bandwidth,
        "interconnect": received / machine.link,
    }


def layouts_of(chips):
    """List all layouts of so many chips."""
    layouts = [Layout("data", chips, 1)]
    groups = [one for one in range(2, chips + 1) if chips % one == 0]
    for group in groups:
        layouts.append(Layout("weights", chips // group, group))
        layouts.append(Layout("tensor", chips // group, group))
        if group < chips:
            layouts.append(Layout("both", chips // group, group))
    return layouts


def candidates(job, machine, model):
    """List the layouts that a machine allows, the fastest bound first.

    Args:
        job: `Job`.
        machine: `machines.Machine`.
        model: what `job.model` gave.

    Returns:
        List of (`Layout`, remat).
    """
    layouts = layouts_of(machine.chips)
    layouts = [one for one in layouts if job.batch_size % one.replicas == 0]

    def slowness(candidate):
        layout, remat = candidate
        found = bounds(job, layout, machine, model, remat)
        return max(found.values()), found["interconnect"], sum(found.values())

    pairs = [(layout, remat) for layout in layouts for remat in REMATS]
    return sorted(pairs, key=slowness)
