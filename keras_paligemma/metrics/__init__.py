"""What answers are worth, as the model card's evaluators compute it.

A metric is a function of predictions and of columns of right answers, one a
row, and returns `Scores`. Names are loaded on first use.
"""

from keras_paligemma.lazy import attach

_HOME = {
    "Scores": "scores",
    "Streamed": "streaming",
    "anls": "answers",
    "bleu": "coco_captions",
    "box_f1": "detection",
    "box_iou": "referring",
    "captions": "coco_captions",
    "cider": "coco_captions",
    "description_lengths": "descriptions",
    "judged": "judges",
    "mean_average_precision": "detection",
    "music": "kern",
    "refcoco": "referring",
    "relaxed_accuracy": "charts",
    "rouge": "coco_captions",
    "rsvqa": "remote_sensing",
    "science_qa": "choices",
    "smiles": "molecules",
    "tables": "html_tables",
    "tallyqa": "counting",
    "teds": "html_tables",
    "text_detection": "spotted_words",
    "vqa": "answers",
    "vqav2": "normalised_answers",
    "yes_or_no": "answers",
}

__all__ = list(_HOME)
__getattr__, __dir__ = attach(__name__, _HOME)
