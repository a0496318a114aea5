"""Memory and time of `generate` on a layout."""

import dataclasses
import math

import numpy as np

from keras_paligemma.generation.prefill import rows_at_once
from keras_paligemma.generation.requests import bucket
from keras_paligemma.planning.job import Candidate
from keras_paligemma.planning.job import kernel_values
from keras_paligemma.planning.job import layouts_of
from keras_paligemma.sharding.layouts import Layout
from keras_paligemma.sharding.layouts import chip_bytes


class Generation:
    """The planner's workload of generating one batch of responses.

    Prefill and decoding are one program, as in `generate`, for the whole batch
    and the longest responses.

    Args:
        job: `Job`; `batch_size` is the number of prompts at a time.
    """

    trains = False
    # Compile whenever weights and cache fit, whatever the estimate.
    believed_beyond = math.inf

    def __init__(self, job):
        self.prompts = job.batch_size
        # `generate` fills up a batch to its bucket. A new adapter would answer
        # as the model without it.
        is_new = job.lora_rank is None and not job.lora_targets
        self.job = dataclasses.replace(
            job,
            batch_size=bucket(job.batch_size),
            lora_rank=0 if is_new else job.lora_rank,
        )
        self.backbone, _ = self.job.model()

    def candidates(self, machine):
        """Return all candidates of a machine, lowest bound of time first.

        Args:
            machine: `machines.Machine`.

        Returns:
            list of `Candidate`.
        """

        def slowness(candidate):
            return sum(self.bounds(candidate, machine).values())

        return sorted(map(Candidate, layouts_of(machine.chips)), key=slowness)

    def thriftiest(self, machine):
        """Return a list with only the candidate of least memory."""
        return [
            min(
                self.candidates(machine),
                key=lambda candidate: sum(self.memory(candidate).values()),
            )
        ]

    def rows(self, layout):
        """Return the number of prompts on a chip, all if they do not divide."""
        batch, replicas = self.job.batch_size, layout.replicas
        return batch // (1 if batch % replicas else replicas)

    def memory(self, candidate):
        """Estimate the memory of a chip by purpose.

        Weights and cache are exact; activations are a rough estimate.

        Args:
            candidate: `Candidate`.

        Returns:
            dict of "weights", "cache" and "activations" to bytes.
        """
        job, layout, backbone = self.job, candidate.layout, self.backbone
        text = backbone.text_config
        tokens = job.image_tokens(backbone) + job.prompt_length
        split = layout.tensor_chips
        heads = text.num_key_value_heads
        heads //= split if heads % split == 0 else 1
        cached = tokens + job.response_length - 1
        size = np.dtype(backbone.compute_dtype).itemsize
        # A head in int8 has a float32 scale.
        head = text.head_dim + 4 if job.cache_dtype else size * text.head_dim
        cache = 2 * text.num_layers * cached * heads * head
        wide = 2 * text.hidden_dim + 2 * text.num_query_heads * text.head_dim
        wide += 2 * text.intermediate_dim
        # One block's activations, and the logits of its attention.
        block = size * tokens * wide + 4 * text.num_query_heads * tokens**2
        device = "tpu" if layout.replicas == 1 else ""
        rows = self.rows(layout)
        group = rows_at_once(rows, tokens, text.intermediate_dim, device)
        logits = 2 * 4 * text.vocabulary_size
        return {
            "weights": chip_bytes(layout, backbone.variables),
            "cache": rows * cache,
            "activations": (group * block + rows * logits) // split,
        }

    def flops(self, remat):
        """Return `None`: decoding is limited by memory, not by arithmetic."""
        return None

    def bounds(self, candidate, machine):
        """Return lower bounds of the time of a batch.

        Args:
            candidate: `Candidate`.
            machine: `machines.Machine`.

        Returns:
            dict of "prefill", bounded by arithmetic, and "decode", bounded by
            reading or receiving the weights for each token, to seconds.
        """
        job, layout = self.job, candidate.layout
        kernels = kernel_values(self.backbone, "text_decoder/blocks/")
        tokens = job.image_tokens(self.backbone) + job.prompt_length
        work = 2 * tokens * kernels
        whole = chip_bytes(Layout("data"), self.backbone.variables)
        part = whole / layout.tensor_chips
        reads = part / machine.bandwidth
        receives = part * (1 - 1 / layout.storage_chips) / machine.link
        work *= self.rows(layout)
        return {
            "prefill": work / (layout.tensor_chips * machine.flops),
            "decode": job.response_length * max(reads, receives),
        }

    def compile(self, compiler, candidate, machine):
        """Return the compiler's memory; see `Compiler.compile`."""
        return self._compile(
            compiler, candidate, machine, self.job.response_length
        )

    def details(self, compiler, candidate, machine):
        """Return the memory of the first token alone, in bytes per chip."""
        found = self._compile(compiler, candidate, machine, responses=1)
        return {"first token": found["together"]}

    def code(self, candidate):
        """Return Python code that uses a candidate."""
        dtype = self.job.cache_dtype
        cache = [f'    cache_dtype="{dtype}",'] if dtype else []
        is_apart = self.job.adapter_apart is not None
        return self.job.code(
            candidate.layout,
            None,
            [
                *(['model.load_adapter("adapter")'] if is_apart else []),
                "model.generate(",
                '    {"images": pictures, "prompts": prompts},',
                *cache,
                ")",
            ],
        )

    def title(self):
        """Return the beginning of a plan's title."""
        return f"{self.job.preset} answers {self.prompts} prompts on"

    def advice(self):
        """Return advice on how to need less memory."""
        return "Fewer prompts at a time, low bits or an int8 cache need less."

    def _compile(self, compiler, candidate, machine, responses):
        return compiler.compile(
            self.job, candidate.layout, None, machine.topology, responses
        )
