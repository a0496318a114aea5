"""What `generate` runs: its memory and time on a layout."""

import math

from keras_paligemma.planning.job import Candidate
from keras_paligemma.planning.job import layouts_of
from keras_paligemma.sharding.layouts import Layout
from keras_paligemma.sharding.layouts import chip_bytes


class Generation:
    """The workload "one batch of answers", for the planner.

    Prefill and decoding are one program, compiled as `generate` runs it, for
    the whole batch and the longest answers.

    Args:
        job: `Job`; `batch_size` prompts are answered at a time.
    """

    trains = False
    # The compiler is asked whenever weights and cache fit.
    believed_beyond = math.inf

    def __init__(self, job):
        self.job = job
        self.backbone, _ = job.model()

    def candidates(self, machine):
        """List what a machine allows, the lowest bound of time first.

        Args:
            machine: `machines.Machine`.

        Returns:
            List of `Candidate`.
        """

        def slowness(candidate):
            return sum(self.bounds(candidate, machine).values())

        return sorted(map(Candidate, layouts_of(machine.chips)), key=slowness)

    def thriftiest(self, machine):
        """List the one candidate of the least memory."""
        return [
            min(
                self.candidates(machine),
                key=lambda candidate: sum(self.memory(candidate).values()),
            )
        ]

    def memory(self, candidate):
        """Split the memory of a chip, by arithmetic.

        Weights and cache are exact, what one block holds is rough.

        Args:
            candidate: `Candidate`.

        Returns:
            Dict of "weights", "cache" and "activations" to bytes.
        """
        job, layout, backbone = self.job, candidate.layout, self.backbone
        text = backbone.text_config
        tokens = job.image_tokens(backbone) + job.prompt_length
        split = layout.tensor_chips
        heads = text.num_key_value_heads
        heads //= split if heads % split == 0 else 1
        cached = tokens + job.response_length - 1
        cache = 2 * text.num_layers * cached * heads * text.head_dim * 2
        wide = 2 * text.hidden_dim + 2 * text.num_query_heads * text.head_dim
        wide += 2 * text.intermediate_dim
        # Of one block: what goes through it, and its attention's logits.
        block = 2 * tokens * wide + 4 * text.num_query_heads * tokens**2
        logits = 2 * 4 * text.vocabulary_size
        return {
            "weights": chip_bytes(layout, backbone.variables),
            "cache": job.batch_size * cache,
            "activations": job.batch_size * (block + logits) // split,
        }

    def flops(self, remat):
        """Return `None`: decoding is bound by memory, not by arithmetic."""
        return None

    def bounds(self, candidate, machine):
        """Bound the time of a batch of answers from below.

        Args:
            candidate: `Candidate`.
            machine: `machines.Machine`.

        Returns:
            Dict of str to seconds: "prefill", by arithmetic alone, and
            "decode", by the weights that each token reads or receives.
        """
        job, layout = self.job, candidate.layout
        kernels = sum(
            math.prod(variable.shape)
            for variable in self.backbone.text_decoder.blocks.variables
            if variable.path.endswith("kernel")
        )
        tokens = job.image_tokens(self.backbone) + job.prompt_length
        work = 2 * tokens * kernels
        whole = chip_bytes(Layout("data"), self.backbone.variables)
        part = whole / layout.tensor_chips
        reads = part / machine.bandwidth
        receives = part * (1 - 1 / layout.storage_chips) / machine.link
        return {
            "prefill": job.batch_size * work / (machine.chips * machine.flops),
            "decode": job.response_length * max(reads, receives),
        }

    def compile(self, compiler, candidate, machine):
        """Ask the compiler for the memory; see `Compiler.compile`."""
        return self._compile(
            compiler, candidate, machine, self.job.response_length
        )

    def details(self, compiler, candidate, machine):
        """Return what the first token alone needs, in bytes a chip."""
        found = self._compile(compiler, candidate, machine, responses=1)
        return {"first token": found["together"]}

    def code(self, candidate):
        """Write the settings as Python code."""
        return self.job.code(
            candidate.layout,
            None,
            [
                "model.generate(",
                '    {"images": pictures, "prompts": prompts}',
                ")",
            ],
        )

    def title(self):
        """Return the first words of a plan."""
        job = self.job
        return f"{job.preset} answers {job.batch_size} prompts on"

    def advice(self):
        """Say what needs less memory than this job."""
        return "Fewer prompts at a time, or low bits, need less."

    def _compile(self, compiler, candidate, machine, responses):
        return compiler.compile(
            self.job, candidate.layout, None, machine.topology, responses
        )
