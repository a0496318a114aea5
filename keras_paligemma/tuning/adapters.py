"""Low-rank adapters of a backbone: adding, switching and merging them."""

import contextlib
import dataclasses

import numpy as np

from keras_paligemma.checkpoints.engine import BLOCKS
from keras_paligemma.checkpoints.peft import HEAD
from keras_paligemma.checkpoints.peft import TABLE
from keras_paligemma.layers.weight import Weight
from keras_paligemma.lora_config import TARGETS
from keras_paligemma.lora_config import LoraConfig
from keras_paligemma.tuning import merging
from keras_paligemma.tuning.adapter_variables import AdapterVariables
from keras_paligemma.turns import alone


class Adapters:
    """The named adapters of a backbone, one of which is loaded.

    The first adapter creates the variables; the values of adapters that are
    not loaded are kept on the host. A switch copies values and one scale per
    projection, without recompilation. Compile before training another adapter:
    the optimizer's moments belong to the previous adapter.

    Weights that an adapter replaces as a whole (PEFT's `modules_to_save` and
    `bias`) are in the backbone while the adapter is active, and the base's own
    are kept on the host. They stay frozen unless `unfreeze` names them.

    Args:
        backbone: `PaliGemmaBackbone`.

    Attributes:
        variables: `AdapterVariables`, shared by the adapters.
        configs: dict of name to `LoraConfig`.
        loaded: str, the adapter whose values the variables hold, or `None`.
        active: str, the adapter in use, or `None` if all are off.
        merged: str, the adapter that is merged into the kernels, or `None`.
    """

    def __init__(self, backbone):
        self.backbone = backbone
        self.turns = backbone.turns
        self.variables = AdapterVariables(backbone)
        self.configs = {}
        self.loaded = None
        self.active = None
        self.merged = None
        self._host_values = {}
        self._whole = {}
        self._base = {}

    @property
    def capacity(self) -> LoraConfig | None:
        """`LoraConfig` of the largest adapter that the variables can hold.

        `None` before the first adapter.
        """
        return self.variables.capacity

    def structure(self):
        """Return a hashable value that changes if variables are added."""
        head = self.backbone.token_embedding.adapter_head
        return self.capacity, head is not None

    @alone
    def add(self, name, lora, pieces=None, whole=None):
        """Add an adapter and switch to it.

        Args:
            name: str.
            lora: `LoraConfig`.
            pieces: dict of name to array, as returned by `pieces`; `None` for
                random A and zeros.
            whole: dict of name to array, weights that it replaces.

        Raises:
            ValueError: the name is taken, the adapter is larger than
                `capacity` or of another dropout, or an adapter is merged.
        """
        self._refuse_merged()
        if name in self.configs:
            raise ValueError(
                f"There is an adapter of the name {name!r} already: "
                f"{self.configs[name]}. Give another name."
            )
        for target in lora.targets:
            lora.ranks_of(target, self.variables.num_layers(target))
        if self.capacity is None:
            self.variables.make(lora)
            if pieces is None and lora.ranks:
                pieces = self.variables.draw(lora)
        elif self.variables.fits(lora):
            if lora.dropout != self.capacity.dropout:
                raise ValueError(
                    "Adapters share the dropout of the first one. Expected: "
                    f"one of dropout {self.capacity.dropout}. Received: "
                    f"{lora.dropout}."
                )
            # Parts that the adapter lacks are zeros, trained and saved too.
            lora = dataclasses.replace(
                lora, dora=self.capacity.dora, bias=self.capacity.bias
            )
            self._host_values[self.loaded] = self.variables.read()
            if pieces is None:
                pieces = self.variables.draw(lora)
        else:
            raise ValueError(
                "Adapters share the room that the first one made. Received: "
                f"{name!r} of {lora}. Expected: at most rank "
                f"{self.capacity.rank}, targets among "
                f"{self.capacity.targets}, and no pieces but "
                f"{self.capacity.pieces}. Load the preset again and add the "
                "largest adapter first."
            )
        if pieces is not None:
            self.variables.assign(pieces)
        self.configs[name], self.loaded = lora, name
        self._whole[name] = dict(whole or {})
        if any(HEAD in whole for whole in self._whole.values()):
            self._make_head()
        self.select(name)

    @alone
    def select(self, name):
        """Switch to the adapter `name`, or turn all off with `None`."""
        self._check_selectable(name)
        self._switch(self.loaded if name is None else name, name)

    @contextlib.contextmanager
    def using(self, name):
        """Use an adapter, or the bare model, within a context.

        Other threads wait until it ends. A `fit` that waits continues with
        the adapter that it trains. What is merged within is subtracted again.

        Args:
            name: str, or `None` for the bare model.

        Example:

        ```python
        with model.adapters.using("ghosts"):
            model.generate({"images": picture, "prompts": "caption en"})
        ```
        """
        with self.turns:
            before = self.loaded, self.active
            self._check_selectable(name)
            self._switch(self.loaded if name is None else name, name)
            try:
                yield
            finally:
                if self.merged is not None:
                    self.unmerge()
                self._switch(*before)

    def _switch(self, loaded, active):
        """Load the adapter `loaded`, and make `active` the one in use."""
        if self.capacity is None:
            return
        previous = self.active
        if active != previous:
            self._exchange(active)
        try:
            self._load(loaded)
        except BaseException:
            if active != previous:
                self._exchange(previous)
            raise
        self._assign_scales(active)

    def _load(self, name):
        """Assign an adapter's values to the variables; undo it on errors."""
        if name != self.loaded:
            before = self._host_values[self.loaded] = self.variables.read()
            try:
                self.variables.assign(self._host_values[name])
            except BaseException:
                self.variables.assign(before)
                raise
            self.loaded = name
            del self._host_values[name]

    def _exchange(self, name):
        """Restore the base's weights, then set those that `name` replaces."""
        weights = self.backbone.weights_by_name()
        brought = self._whole.get(name, {})
        own = {key: weights[key].read() for key in self._base}
        wanted = self._base | brought
        before = {key: weights[key].read() for key in wanted}
        try:
            for key, value in wanted.items():
                weights[key].assign(value)
        except BaseException:
            for key, value in before.items():
                weights[key].assign(value)
            raise
        if self.active is not None:
            self._whole[self.active] |= own
        self._base = {key: self._base.get(key, before[key]) for key in brought}
        self.active = name

    @alone
    def assign(self, values):
        """Assign the loaded adapter's values, in the form of `values`."""
        self._refuse_merged()
        self.variables.assign(values)

    def pieces(self, name):
        """Return an adapter's arrays in the shape of the variables."""
        return (
            self.variables.read()
            if name == self.loaded
            else self._host_values[name]
        )

    def values(self, name):
        """Return an adapter's arrays, sliced to its own rank."""
        lora, pieces = self.configs[name], self.pieces(name)
        cut = {}
        for target in lora.targets:
            place = TARGETS[target]
            for piece in lora.pieces:
                value = pieces[f"{place}/{piece}"]
                if piece == "adapter_a":
                    value = value[..., : lora.rank]
                if piece == "adapter_b":
                    axis = 1 if BLOCKS in place else 0
                    value = value[(slice(None),) * axis + (slice(lora.rank),)]
                cut[f"{place}/{piece}"] = value
        return cut

    def whole(self, name):
        """Return the arrays of the weights that an adapter replaces."""
        if name != self.active:
            return dict(self._whole[name])
        weights = self.backbone.weights_by_name()
        return {key: weights[key].read() for key in self._base}

    def base_weights(self):
        """Return `weights_by_name` of the base, without replaced weights."""
        base = {
            # On the host each weight is one array, in both forms of the blocks.
            name: Weight((array,), "scanned" if BLOCKS in name else None)
            for name, array in self._base.items()
        }
        return self.backbone.weights_by_name() | base

    def scales(self, name):
        """Return a dict of weight name to an adapter's scales; 0 for `None`."""
        scales = {}
        for target in self.variables.room.targets:
            layers = self.variables.num_layers(target)
            value = np.zeros(layers)
            if name is not None:
                value = self.configs[name].scales(target, layers)
            place = TARGETS[target]
            value = value if BLOCKS in place else value[0]
            scales[f"{place}/adapter_scale"] = value
        return scales

    def config(self):
        """Return the configuration of the adapter in use, for a preset.

        Weights that it replaces are saved in place of the base's.

        Returns:
            `LoraConfig`; `None` if there is no adapter, all are off, or it is
            merged.
        """
        if self.active is None or self.merged is not None:
            return None
        return self._stored_config()

    def get_config(self):
        """Return the state that a `.keras` file holds beside the variables.

        Of several adapters it holds the loaded one.

        Returns:
            dict of `lora`, the arguments of `enable_lora` or `None`; `active`
            and `merged`, bools.
        """
        lora = None
        if self.loaded is not None:
            lora = self._stored_config().to_dict() | {"name": self.loaded}
        return {
            "lora": lora,
            "active": self.active is not None,
            "merged": self.merged is not None,
        }

    def set_state(self, active, merged):
        """Turn the only adapter off, or note that it is merged.

        Args:
            active, merged: bools, as `get_config` returns them.
        """
        if not active:
            self.select(None)
        elif merged:
            self._assign_scales(None)
            self.merged = self.active

    def _stored_config(self):
        """Return the loaded adapter's `LoraConfig` for the whole variables."""
        lora, capacity = self.configs[self.loaded], self.variables.room
        if (lora.rank, lora.targets) != (capacity.rank, capacity.targets):
            ranks = {
                target: lora.ranks_of(target, self.variables.num_layers(target))
                for target in capacity.targets
            }
            lora = dataclasses.replace(
                lora,
                rank=capacity.rank,
                targets=capacity.targets,
                ranks=ranks,
            )
        return lora

    def has_own_head(self):
        """Return whether the adapter in use has a separate output head."""
        return HEAD in self._base

    @alone
    def merge(self):
        """Add the active adapter to the kernels, and set its scale to 0."""
        self._refuse_merged()
        if self.active is None:
            raise ValueError(
                "There is no active adapter to merge. Expected: "
                "`enable_lora` or `load_adapter` first."
            )
        merging.check_kernels_take_up(self.backbone, self.capacity)
        merging.add(self.backbone.weights_by_name(), self.capacity)
        self._assign_scales(None)
        self.merged = self.active

    @alone
    def unmerge(self):
        """Subtract the merged adapter from the kernels."""
        if self.merged is None:
            raise ValueError(
                "No adapter is merged. Expected: `adapters.merge()` first."
            )
        self._assign_scales(self.merged)
        merging.subtract(self.backbone.weights_by_name(), self.capacity)
        self.merged = None

    def _check_selectable(self, name):
        self._refuse_merged()
        if name is not None and name not in self.configs:
            raise ValueError(
                f"Unknown adapter. Received: {name!r}. Expected one of "
                f"{list(self.configs)}, or None for the bare model."
            )

    def _refuse_merged(self):
        if self.merged is not None:
            raise ValueError(
                f"The adapter {self.merged!r} is merged into the kernels. Call "
                "`adapters.unmerge()` first."
            )

    def _make_head(self):
        """Give the head a table, by default that of the embedding."""
        embedding = self.backbone.token_embedding
        if embedding.adapter_head is None:
            self._switch(self.loaded, None)
            embedding.add_head().assign(embedding.table)
        for whole in self._whole.values():
            if TABLE in whole:
                whole.setdefault(HEAD, whole[TABLE])

    def _assign_scales(self, name):
        weights = self.variables.weights("adapter_scale")
        for key, value in self.scales(name).items():
            weights[key].assign(value)
