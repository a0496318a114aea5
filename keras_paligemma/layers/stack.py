"""One block, N times: unrolled or scanned."""

import contextlib
import re

import keras
from keras import ops

from keras_paligemma.compat import without_values
from keras_paligemma.layers.cache import empty_heads
from keras_paligemma.layers.dropout import dropout_scope
from keras_paligemma.layers.remat import check_remat
from keras_paligemma.layers.remat import rematerialize
from keras_paligemma.layers.shard_spec import as_stored
from keras_paligemma.layers.weight import Weight
from keras_paligemma.quantization.products import stacked_weights_scope

FORMS = ("auto", "unrolled", "scanned")


class LayerStack(keras.layers.Layer):
    """Repeat a block, in one of two forms with the same weights and results.

    *Unrolled* holds N blocks in a list, and is the reference for the other.
    *Scanned* holds one block's weights with a leading layer axis and runs
    `keras.ops.scan` over it: compile time does not grow with depth, and with
    `remat` only one block's activations are in memory at a time. TPUs fuse the
    slice of a layer into the product, so scanning costs nothing there; CPUs
    copy each slice, so unrolled is twice as fast there.

    Both forms use the same weight names ("attention/query/kernel"), save the
    same arrays (layer axis first) and load each other's files.

    Args:
        make_block: function of no arguments that returns a new block.
        num_layers: int N.
        form: "unrolled", "scanned" or "auto": scanned on TPU, else unrolled.
        remat: what the backward pass recomputes, see `layers.remat`.
        numbered: bool, pass each block its index as `number`.

    Call arguments:
        x: tensor, input of the first block.
        *args: passed to every block unchanged.
        cache: `None`, or the cache of `make_cache` or of the previous call.
        index: int, first cache position to write.
        last: int or `None`, with a cache: number of tokens at the end that are
            needed. In the unrolled form the last block computes only these.

    Returns:
        The last block's output; with a cache, the output and the cache.
    """

    def __init__(
        self,
        make_block,
        num_layers,
        form="auto",
        remat=None,
        numbered=False,
        **kwargs,
    ):
        # The blocks cast their own inputs.
        super().__init__(autocast=False, **kwargs)
        if form not in FORMS:
            raise ValueError(
                f"Unknown form of repetition. Received: {form!r}. Expected "
                f"one of {FORMS}."
            )
        check_remat(remat)
        self.make_block = make_block
        self.num_layers = num_layers
        self.scanned = form == "scanned" or (form == "auto" and _on_tpu())
        self.remat = remat
        # With an odd number of blocks "pair" is the same as "block".
        self.in_pairs = self.scanned and remat == "pair" and num_layers % 2 == 0
        self.numbered = numbered
        self.seed_generator = None

    def build(self, input_shape=None):
        if self.scanned:
            # The template's own variables have no values: each scan step
            # substitutes slices of the stack for them. A function hides the
            # template from Keras's tracking and saving.
            template = self.make_block()
            self._template = lambda: template
            self._stacks = {}
            self.apply_to_blocks(lambda block: block.build())
        else:
            # Tracked, but hidden from Keras's saving, which would write every
            # block separately; `save_own_variables` writes the shared names.
            for number in range(self.num_layers):
                with keras.name_scope(str(number)):
                    block = self.make_block()
                    block.build()
                self._layers.append(block)
        self.built = True

    def each_block(self):
        """Return the list of blocks of the unrolled form, first to last."""
        if self.scanned:
            raise ValueError(
                "Stacked blocks share one layer: there is no list of them. "
                "Build or load the model with `form='unrolled'`."
            )
        return list(self._layers)

    def apply_to_blocks(self, function):
        """Change the structure of every block, for example add an adapter.

        Args:
            function: called with each of the N blocks; in the scanned form
                with the template, whose new variables are then stacked.
        """
        if not self.scanned:
            for block in self._layers:
                function(block)
            return
        with without_values():
            function(self._template())
        self._tracker.unlock()
        for name, variable in _named(self._template()).items():
            if name not in self._stacks:
                self._stacks[name] = self._stack_of(name, variable)
        self._tracker.lock()

    def _stack_of(self, name, variable):
        """Create the stack of all layers for a variable of the template."""
        *parts, last = name.split("/")
        # The full path: layouts and optimizers find weights by it.
        with contextlib.ExitStack() as scopes:
            scopes.enter_context(self._open_name_scope())
            for part in parts:
                scopes.enter_context(keras.name_scope(part))
            stack = keras.Variable(
                _each_layer(variable._initializer),
                shape=(self.num_layers, *variable.shape),
                dtype=variable.dtype,
                trainable=variable.trainable,
                autocast=variable._autocast,
                name=last,
            )
        for name in ("quantized_format", "outputs_first"):
            if hasattr(variable, name):
                setattr(stack, name, getattr(variable, name))
        stack.layer_axes = 1
        return stack

    def enable_dropout(self):
        """Draw one seed per training step for the dropout of the blocks."""
        if self.seed_generator is None:
            self._tracker.unlock()
            self.seed_generator = keras.random.SeedGenerator()
            self._tracker.lock()

    def draw_seed(self, training):
        """Return a seed for `dropout_scope`; `None` if nothing is dropped."""
        if not training or self.seed_generator is None:
            return None
        return self.seed_generator.next()

    def weights_by_name(self):
        """Return a dict of name to `Weight`, the same names in both forms."""
        if self.scanned:
            return {
                name: Weight((stack,), "scanned")
                for name, stack in self._stacks.items()
            }
        blocks = [_named(block) for block in self._layers]
        return {
            name: Weight(tuple(block[name] for block in blocks), "unrolled")
            for name in blocks[0]
        }

    def save_own_variables(self, store):
        for name, weight in self.weights_by_name().items():
            store[name.replace("/", ".")] = weight.read()

    def load_own_variables(self, store):
        weights = {
            name.replace("/", "."): weight
            for name, weight in self.weights_by_name().items()
        }
        if set(store.keys()) != weights.keys():
            # Without names: where Keras fails, it looks again in an empty
            # store, and shows the second error.
            raise ValueError(
                f"The file does not fit {self.path!r}. Received: weights of "
                "a model of other sizes, norms or adapters. Expected: those "
                f"of a model with the same {len(weights)} names and shapes."
            )
        for name, weight in weights.items():
            weight.assign(store[name])

    def make_cache(self, shape_BSKH, dtype):
        """Allocate an empty key-value cache for this stack.

        Args:
            shape_BSKH: tuple (batch, cached tokens, key-value heads, head_dim).
            dtype: str, as `empty_heads` takes it.

        Returns:
            Nested arrays for the `cache` argument of a call. The batch is
            their first axis, where beam samplers expect it.
        """
        if self.scanned:
            shape = (shape_BSKH[0], self.num_layers, *shape_BSKH[1:])
            return empty_heads(shape, dtype), empty_heads(shape, dtype)
        return [
            (empty_heads(shape_BSKH, dtype), empty_heads(shape_BSKH, dtype))
            for _ in range(self.num_layers)
        ]

    def call(self, x, *args, cache=None, index=None, last=None, training=None):
        seed = self.draw_seed(training)
        if not self.scanned:
            return self._unroll(x, args, cache, index, seed, last)
        found = self._scan(x, args, cache, index, seed)
        if last is None:
            return found
        x, cache = found
        return x[:, -last:], cache

    def number_argument(self, number):
        """Return the keyword argument by which a block gets its index."""
        return {"number": number} if self.numbered else {}

    def _unroll(self, x, args, cache, index, seed, last):
        if cache is None:
            for number, block in enumerate(self._layers):
                # Defaults bind the block: remat calls the function later.
                def run(x, *args, block=block, number=number):
                    with dropout_scope(seed, number):
                        return block(x, *args, **self.number_argument(number))

                x = rematerialize(run, self.remat)(x, *args)
            return x
        written = []
        for number, (keys, values) in enumerate(cache):
            is_last = number == self.num_layers - 1
            x, (keys, values, _) = self._layers[number](
                x,
                *args,
                **self.number_argument(number),
                last=last if is_last else None,
                cache=(keys, values, None),
                index=index,
            )
            written.append((keys, values))
        return x, written

    def observe(self, function, x, *args):
        """Run the blocks, and a function of each block and its input.

        Args:
            function: called as `function(block, number, x, *args)` with each
                block, its index and its input; returns a tensor.
            x: as in a call.
            *args: as in a call.

        Returns:
            Tensor (layers, …) of the results of `function`.
        """
        if not self.scanned:
            found = []
            for number, block in enumerate(self._layers):
                found.append(function(block, number, x, *args))
                x = block(x, *args, **self.number_argument(number))
            return ops.stack(found)
        block, (scope_of, xs) = self._template(), self._layer_scopes(None)
        numbers = xs[0]
        # Results are carried, since Keras's scan on TensorFlow stacks only
        # outputs of the carry's shape. This call serves for its shape alone.
        with scope_of([stack[0] for stack in xs[1:]], numbers[0]):
            first = function(block, numbers[0], x, *args)
        results = ops.zeros((self.num_layers, *first.shape), first.dtype)

        def step(carry, number_and_slices):
            x, results = carry
            number, *slices = number_and_slices
            with scope_of(slices, number):
                result = function(block, number, x, *args)
                x = block(x, *args, **self.number_argument(number))
            here = ops.reshape(
                numbers == number, (-1,) + (1,) * len(result.shape)
            )
            return (x, ops.where(here, result[None], results)), None

        return ops.scan(step, (x, results), xs)[0][1]

    def _layer_scopes(self, seed):
        """Return the template's scopes by layer, and the tensors to scan over.

        Returns:
            Function of the slices and the index of a layer that returns the
            context in which the template has these weights; list of tensors.
        """
        template = self._template()
        named = _named(template)
        # Read here, inside the trainer's `StatelessScope`: the scope of the
        # block below replaces it.
        values = {
            name: ops.convert_to_tensor(self._stacks[name].value)
            for name in named
        }
        # Quantised weights are passed as whole stacks, the others in slices.
        stacks = {
            id(variable): (self._stacks[name], values.pop(name))
            for name, variable in named.items()
            if hasattr(variable, "quantized_format")
        }
        variables = [named[name] for name in values]
        numbers = ops.arange(self.num_layers, dtype="int32")

        def scope_of(slices, number):
            # A list, since TensorFlow's AutoGraph warns about generators.
            slices = [as_stored(weight) for weight in slices]
            mapping = list(zip(variables, slices, strict=True))
            scopes = contextlib.ExitStack()
            scopes.enter_context(keras.StatelessScope(mapping))
            scopes.enter_context(dropout_scope(seed, number))
            scopes.enter_context(stacked_weights_scope(stacks, number))
            return scopes

        return scope_of, [numbers, *values.values()]

    def _scan(self, x, args, cache, index, seed):
        template, (scope_of, xs) = self._template(), self._layer_scopes(seed)

        def block(slices, number, *args, **kwargs):
            with scope_of(slices, number):
                return template(*args, **self.number_argument(number), **kwargs)

        if cache is None:
            run = block
            if self.in_pairs:
                run = _twice(block)
                xs = [ops.reshape(x, (-1, 2, *x.shape[1:])) for x in xs]
            run = rematerialize(run, self.remat)

            def step(x, number_and_slices):
                number, *slices = number_and_slices
                return run(slices, number, x, *args), None

            return ops.scan(step, x, xs)[0]

        def cached_step(carry, number_and_slices):
            x, keys, values = carry
            number, *slices = number_and_slices
            x, (keys, values, _) = block(
                slices,
                number,
                x,
                *args,
                cache=(keys, values, number),
                index=index,
            )
            return (x, keys, values), None

        (x, *cache), _ = ops.scan(cached_step, (x, *cache), xs)
        return x, tuple(cache)


def _twice(block):
    """Return a function that runs two consecutive blocks."""

    def pair(slices, numbers, x, *args):
        # `args` are closed over: TensorFlow would sum gradients of a mask.
        def single(slices, number, x):
            return block(slices, number, x, *args)

        run = rematerialize(single, "block")
        for place in range(2):
            x = run([pair[place] for pair in slices], numbers[place], x)
        return x

    return pair


def stable_name(path):
    """Return the name that a weight has in both forms, from its path.

    Args:
        path: str, `keras.Variable.path`.

    Returns:
        str, a key of `PaliGemmaBackbone.weights_by_name`; a path outside of
        both towers is returned unchanged.

    Example:
        >>> stable_name("backbone/text_decoder/blocks/3/block/mlp/up/kernel")
        'text_decoder/blocks/mlp/up/kernel'
    """
    found = re.search(r"(vision_encoder|text_decoder)/.*", path)
    path = found[0] if found else path
    return re.sub(r"/blocks/\d+/block/", "/blocks/", path)


def _named(block):
    """Return a block's variables by their path relative to the block."""
    return {
        f"/{variable.path}".split(f"/{block.name}/", 1)[1]: variable
        for variable in block.variables
    }


def _each_layer(initializer):
    """Return an initializer that draws each layer's slice separately."""

    def initialize_layer(shape, dtype):
        if not isinstance(initializer, keras.initializers.Initializer):
            return initializer(shape, dtype=dtype)
        # A Keras initializer returns the same values in each call. A new one
        # with the same configuration draws others, unless it has a seed.
        new = type(initializer).from_config(initializer.get_config())
        return new(shape, dtype=dtype)

    def initialize(shape, dtype=None):
        return ops.stack(
            [initialize_layer(shape[1:], dtype) for _ in range(shape[0])]
        )

    return initialize


def _on_tpu():
    """Return whether the default device is a TPU, on JAX only."""
    if keras.backend.backend() != "jax":
        return False
    return keras.distribution.list_devices()[0].startswith("tpu")
