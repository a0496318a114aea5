"""A stand-in that answers with the prompt, to test the server around it."""

import threading

from keras_paligemma.serve.requests import Answered
from keras_paligemma.serve.requests import decode_picture


class PlainModel:
    """A stand-in with the interface that `Batches` uses.

    Args:
        held: bool, whether to wait for `go` before each batch.
        largest: int, maximum requests per batch.
    """

    longest = 8
    most_alternatives = 0
    hidden_dim: int | None = None
    adapters: tuple[str, ...] = ()

    def __init__(self, held=False, largest=8):
        self.largest = largest
        self.go = threading.Event()
        self.begun = threading.Event()
        self.sizes = []
        if not held:
            self.go.set()

    def read(self, picture, prompt, choice, limits):
        decode_picture(picture, limits)
        return prompt

    def key(self, request):
        return request.choice.adapter

    def warm_ups(self):
        return [], []

    def answer(self, requests, tell):
        self.begun.set()
        self.go.wait()
        self.sizes.append(len(requests))
        if any(request.inputs == "fail" for request in requests):
            raise RuntimeError("a secret")
        return [
            Answered(request.inputs, (), (7, 1), (-0.5, 0.0), "stop")
            for request in requests
        ]
