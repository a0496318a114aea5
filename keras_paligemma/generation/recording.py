"""On Torch, record the operations of a part of decoding and replay them.

Torch runs Keras's layers eagerly: in a small model a step of decoding is 20 ms
of Python around 2 ms of products. In the second run of a program with inputs of
the same shapes, its parts are recorded as graphs of PyTorch's operations. Later
runs execute the graphs instead. Other backends compile instead.
"""

import contextlib
import contextvars
from collections.abc import Callable

import keras
import optree
from keras import ops

_REPLAY: contextvars.ContextVar[Callable | None] = contextvars.ContextVar(
    "replay", default=None
)
_IS_RECORDING = contextvars.ContextVar("is_recording", default=False)


def recorded(name, part, *arguments):
    """Call a function, or replay its recording for inputs of these shapes.

    Args:
        name: str, the same for the same function within a program.
        part: function of nests of tensors that depends on nothing else but
            the model's variables, and branches by `cond`.
        *arguments: nests of tensors.
    """
    replay = _REPLAY.get()
    if replay is None or _IS_RECORDING.get():
        return part(*arguments)
    return replay(name, part, arguments)


def cond(predicate, if_true, if_false):
    """Call `ops.cond`; while recording, compute both branches."""
    if _IS_RECORDING.get():
        return ops.where(predicate, if_true(), if_false())
    return ops.cond(predicate, if_true, if_false)


class Recordings:
    """The recorded parts of a program.

    Args:
        model: `keras.Model`. Its variables are inputs of the graphs, so that
            other values need no other recording.
    """

    def __init__(self, model):
        self._model = model
        self._graphs = {}

    def __len__(self):
        return sum(graph is not None for graph in self._graphs.values())

    @contextlib.contextmanager
    def scope(self):
        """Record and replay the parts that are called within this context."""
        # Freezing does not change the order of `variables`.
        variables = self._model.variables
        values = [variable.value for variable in variables]
        shapes = tuple(_shape(value) for value in values)
        of_this_run = set()

        def replay(name, part, arguments):
            tensors, structure = optree.tree_flatten(arguments)
            key = name, structure, shapes, *map(_shape, tensors)
            if key not in self._graphs:
                self._graphs[key] = None
                of_this_run.add(key)
            if key in of_this_run:
                # Recording takes longer than one answer.
                return part(*arguments)
            if self._graphs[key] is None:
                self._graphs[key] = _record(part, arguments, variables, values)
            graph, structure = self._graphs[key]
            return optree.tree_unflatten(structure, graph(*values, *tensors))

        token = _REPLAY.set(replay)
        try:
            yield
        finally:
            _REPLAY.reset(token)


def _record(part, arguments, variables, values):
    """Return a graph and the structure of its outputs."""
    from torch.fx.experimental.proxy_tensor import make_fx

    tensors, structure = optree.tree_flatten(arguments)
    found_structures = []

    def of_tensors(*inputs):
        values, inputs = inputs[: len(variables)], inputs[len(variables) :]
        mapping = list(zip(variables, values, strict=True))
        with keras.StatelessScope(state_mapping=mapping):
            found = part(*optree.tree_unflatten(structure, inputs))
        leaves, found_structure = optree.tree_flatten(found)
        found_structures.append(found_structure)
        return leaves

    token = _IS_RECORDING.set(True)
    try:
        # Recording executes in-place writes, so it gets copies.
        copies = [tensor.clone() for tensor in tensors]
        graph = make_fx(of_tensors)(*values, *copies)
    finally:
        _IS_RECORDING.reset(token)
    return graph, found_structures[0]


def _shape(tensor):
    return tuple(tensor.shape), tensor.dtype, tensor.device
