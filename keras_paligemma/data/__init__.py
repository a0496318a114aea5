"""Files and data sets to the batches that `fit` takes.

A source is any object of a length whose `[index]` gives one example, a
dictionary of `images` (a picture, or a list of frames), `prompts` (a string)
and `responses` (a string, or a list of strings of which one is drawn each
epoch). `Batches` makes batches of a source. Names are loaded on first use.
"""

from keras_paligemma.lazy import attach

_HOME = {
    "Batches": "pipeline",
    "COCOSource": "coco",
    "ConversationSource": "conversations",
    "ExampleError": "examples",
    "FieldSource": "fields",
    "JSONLSource": "jsonl",
    "ObjectSource": "object_source",
    "check": "examples",
    "convert": "converting",
    "open_objects": "opening",
    "open_source": "opening",
}

__all__ = list(_HOME)
__getattr__, __dir__ = attach(__name__, _HOME)
