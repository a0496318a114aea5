"""Random answers for metrics, some correct and some wrong."""

import random

import numpy as np

WORDS = "a the man dog cat riding on of wave street red blue two people".split()


def captions_for(seed, rows=60, least=0):
    """Return captions, and references for each of them."""
    draw = random.Random(seed)

    def caption():
        return " ".join(draw.choices(WORDS, k=draw.randint(least, 12)))

    right = [
        [caption() for _ in range(draw.randint(1, 5))] for _ in range(rows)
    ]
    # Some captions are correct, so that 4-grams match.
    found = [
        draw.choice(some) if draw.random() < 0.4 else caption()
        for some in right
    ]
    return found, right


def objects_for(seed):
    """Return objects of ten pictures, and detections near and far from them."""
    random_state = np.random.RandomState(seed)
    right, found = [], []
    for _ in range(10):
        corners = np.sort(random_state.rand(4, 2, 2), axis=1)
        boxes = corners.reshape(4, 4)
        labels = [("cat", "dog")[i] for i in random_state.randint(0, 2, 4)]
        right.append(
            [(tuple(b), n) for b, n in zip(boxes, labels, strict=True)]
        )
        moved = np.clip(boxes + random_state.normal(0, 0.03, boxes.shape), 0, 1)
        found.append(
            [
                (tuple(b), n, float(random_state.rand()))
                for b, n in zip(moved, labels, strict=True)
                if b[2] > b[0] and b[3] > b[1]
            ]
        )
    return found, right
