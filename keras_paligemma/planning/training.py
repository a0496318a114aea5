"""Memory, arithmetic and time of a training step on a layout."""

import math

from keras_paligemma.layers.remat import REMATS
from keras_paligemma.planning.job import Candidate
from keras_paligemma.planning.job import kernel_values
from keras_paligemma.planning.job import layouts_of
from keras_paligemma.sharding.layouts import Layout
from keras_paligemma.sharding.layouts import chip_bytes
from keras_paligemma.tuning.memory import estimate_memory


class Training:
    """The planner's workload of one step of `fit`.

    Args:
        job: `Job`.
        remats: tuple, the candidates among `layers.remat.REMATS`.
    """

    trains = True
    # Estimates of activations are rough: without compiling, a candidate is
    # rejected only if its estimate exceeds this multiple of the memory.
    believed_beyond = 1.6

    def __init__(self, job, remats=REMATS):
        _check_trainable(job)
        self.job = job
        # One model per `remat`, which is part of a model's structure.
        self.models = {remat: job.model(remat) for remat in remats}

    def candidates(self, machine):
        """Return all candidates of a machine, lowest bound of time first.

        Args:
            machine: `machines.Machine`.

        Returns:
            list of `Candidate`.
        """
        layouts = [
            layout
            for layout in layouts_of(machine.chips)
            if self.job.batch_size % layout.replicas == 0
        ]

        def slowness(candidate):
            found = self.bounds(candidate, machine)
            return (
                max(found.values()),
                found["interconnect"],
                sum(found.values()),
            )

        return sorted(
            (
                Candidate(layout, remat)
                for layout in layouts
                for remat in self.models
            ),
            key=slowness,
        )

    def thriftiest(self, machine):
        """Return the two candidates of remat "pair" with the least memory."""
        pairs = [
            candidate
            for candidate in self.candidates(machine)
            if candidate.remat == "pair"
        ]
        return sorted(
            pairs, key=lambda candidate: sum(self.memory(candidate).values())
        )[:2]

    def memory(self, candidate):
        """Estimate the memory of a chip by purpose.

        Weights and optimizer state are exact; activations are those of
        `estimate_memory`.

        Args:
            candidate: `Candidate`.

        Returns:
            dict of "weights", "adapters and optimizer" (or "trained weights
            and optimizer") and "activations" to bytes.
        """
        job, layout = self.job, candidate.layout
        backbone, optimizer = self.models[candidate.remat]
        trained = backbone.trainable_variables
        ids = {id(variable) for variable in trained}
        frozen = [
            variable
            for variable in backbone.variables
            if id(variable) not in ids
        ]
        examples = -(-job.batch_size // layout.replicas)
        rough = estimate_memory(
            backbone,
            examples,
            job.text_length,
            job.response_length,
            pictures=job.pictures,
        )
        # The gathered weights of the current layer and of the next one, which
        # is gathered in the meantime.
        gathered = 0
        if layout.replicas > 1 and layout.strategy != "data":
            gathered = 2 * _largest_layer(backbone)
        kind = "trained weights" if job.lora is None else "adapters"
        return {
            "weights": chip_bytes(layout, frozen),
            # Twice: gradients are as large as the trained weights.
            f"{kind} and optimizer": chip_bytes(layout, trained) * 2
            + chip_bytes(layout, optimizer.variables),
            "activations": rough["activations"] // layout.tensor_chips
            + rough["logits"]
            + gathered,
        }

    def flops(self, remat):
        """Count the multiplications and additions of one step.

        Args:
            remat: what the backward pass recomputes, one of
                `layers.remat.REMATS`.

        Returns:
            float, FLOP on all chips together.
        """
        job = self.job
        backbone, _ = next(iter(self.models.values()))
        vision, text = backbone.vision_config, backbone.text_config
        patches = backbone.image_sequence_length
        tokens = job.image_tokens(backbone) + job.text_length
        full = job.lora is None
        vision_trained = full or any(
            target.startswith("vision") for target in job.lora.targets
        )
        vision_flops = job.pictures * _tower_flops(
            patches,
            kernel_values(backbone, "vision_encoder/"),
            vision.num_layers * vision.hidden_dim,
            _recomputed(backbone.vision_encoder.blocks, remat),
            full,
            vision_trained,
        )
        text_flops = _tower_flops(
            tokens,
            kernel_values(backbone, "text_decoder/blocks/"),
            text.num_layers * text.num_query_heads * text.head_dim,
            _recomputed(backbone.text_decoder.blocks, remat),
            full,
        )
        head = 2 * job.response_length * text.hidden_dim * text.vocabulary_size
        # The streamed loss recomputes its products in the backward pass.
        total = vision_flops + text_flops + head * (4 if full else 3)
        return job.batch_size * total

    def bounds(self, candidate, machine):
        """Return three lower bounds of a step's time.

        Args:
            candidate: `Candidate`.
            machine: `machines.Machine`.

        Returns:
            dict of "compute", "memory" and "interconnect" to seconds.
        """
        job, layout, remat = self.job, candidate.layout, candidate.remat
        backbone, optimizer = self.models[remat]
        whole = chip_bytes(Layout("data"), backbone.variables)
        state = chip_bytes(layout, optimizer.variables)
        trained = chip_bytes(Layout("data"), backbone.trainable_variables)
        passes = {"block": 3, "pair": 3.5}.get(remat, 2)
        split = layout.tensor_chips
        # Weights are gathered in each pass, and again to recompute a block.
        received = passes * whole / split * (1 - 1 / layout.storage_chips)
        if split > 1:
            text = backbone.text_config
            tokens = job.image_tokens(backbone) + job.text_length
            tokens *= job.batch_size
            tokens /= layout.replicas
            # Two all-reduces per block and pass, of 2 bytes per value.
            sums = 2 * passes * text.num_layers * tokens * text.hidden_dim * 2
            received += 2 * sums * (1 - 1 / split)
        if layout.replicas > 1:
            received += 2 * trained / split * (1 - 1 / layout.replicas)
        # Replicas without an example of their own do not speed up the step.
        busy = min(layout.replicas, job.batch_size) * split
        return {
            "compute": self.flops(remat) / (busy * machine.flops),
            "memory": (passes * whole / split + 2 * state) / machine.bandwidth,
            "interconnect": received / machine.link,
        }

    def compile(self, compiler, candidate, machine):
        """Return the compiler's memory of the step; see `Compiler.compile`."""
        return compiler.compile(
            self.job, candidate.layout, candidate.remat, machine.topology
        )

    def details(self, compiler, candidate, machine):
        """Return `{}`: training has no further memory to report."""
        return {}

    def code(self, candidate):
        """Return Python code that uses a candidate."""
        job, adapter, lines = self.job, self.job.adapter_apart, []
        if adapter is not None:
            targets = ""
            if job.lora_targets:
                named = ", ".join(f'"{name}"' for name in job.lora_targets)
                targets = f", targets=[{named}]"
            lines.append(f"model.enable_lora(rank={adapter.rank}{targets})")
        # The default learning rate is for all weights: adapters need more.
        optimizer = "" if job.lora is None else "kp.Adam(1e-3)"
        lines += [
            f"model.compile({optimizer})",
            f"model.fit(examples, batch_size={job.batch_size})",
        ]
        return job.code(candidate.layout, candidate.remat, lines)

    def title(self):
        """Return the beginning of a plan's title."""
        return f"{self.job.preset} on"

    def advice(self):
        """Return advice on how to need less memory."""
        lines = []
        if self.job.lora is None:
            lines.append(
                "Adapters (lora_rank=8) need less than a full fine-tune."
            )
        elif not self.job.config.quantization and self.job.quantize != "int4":
            better = "int8" if self.job.quantize is None else "int4"
            lines.append(f"quantize={better!r} needs less.")
        if self.job.batch_size > 1:
            lines.append("So does a smaller batch.")
        return " ".join(lines)


def _check_trainable(job):
    """Raise on a full fine-tune that the preset does not allow."""
    if job.lora is None and job.quantization:
        raise ValueError(
            "Weights in low bits cannot be trained. Received: "
            f"{job.quantization!r} for a full fine-tune. Expected: adapters "
            "(lora_rank=8), or weights as floats, without quantize."
        )
    if job.lora is not None and job.lora_rank == 0:
        raise ValueError(
            f"{job.preset!r} has an adapter, and its weights are frozen. "
            "Received: lora_rank=0, to train all weights. Expected: no "
            "lora_rank, to train the adapter; or a preset that was saved "
            "after `model.adapters.merge()`."
        )


def _largest_layer(backbone):
    """Return the bytes of one block's weights in the compute dtype."""
    sizes = [0]
    for tower in (backbone.vision_encoder, backbone.text_decoder):
        stack = tower.blocks
        whole = sum(math.prod(variable.shape) for variable in stack.variables)
        sizes.append(2 * whole // stack.num_layers)
    return max(sizes)


def _recomputed(stack, remat):
    """Return how often products, and attention, are recomputed."""
    if remat == "pair" and stack.num_layers % 2 == 0:
        return 1.5, 1.5
    known = {"dots": (0, 1), "block": (1, 1), "pair": (1, 1)}
    return known.get(remat, (0, 0))


def _tower_flops(tokens, kernels, heads, recomputed, full, trained=True):
    """Return a tower's FLOP of one example, for kernels and attention."""
    products, attention = 2 * tokens * kernels, 4 * tokens * tokens * heads
    if not trained:
        return products + attention
    # Forward, gradients of the inputs and, if all is trained, of the weights.
    # Both inputs of attention's products need gradients.
    times = 3 if full else 2
    return products * (times + recomputed[0]) + attention * (3 + recomputed[1])
