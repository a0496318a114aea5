"""The description of the API: OpenAPI, and a page that shows it."""

import math

_TYPES = {
    "string": {"type": "string"},
    "integer": {"type": "integer"},
    "number": {"type": "number"},
    "boolean": {"type": "boolean"},
    "strings": {
        "oneOf": [
            {"type": "string"},
            {"type": "array", "items": {"type": "string"}},
        ]
    },
    "any": {},
}

# Self-contained: it loads nothing from other sites.
PAGE = """<!doctype html><html lang="en"><meta charset="utf-8">
<title>keras_paligemma</title><h1>keras_paligemma</h1>
<p><a href="/openapi.json">openapi.json</a></p><div id="paths"></div>
<script>
fetch("/openapi.json").then(reply => reply.json()).then(api => {
  for (const [path, methods] of Object.entries(api.paths)) {
    for (const [method, one] of Object.entries(methods)) {
      const title = document.createElement("h2");
      title.textContent = `${method.toUpperCase()} ${path}`;
      const text = document.createElement("pre");
      text.textContent = JSON.stringify(one, null, 2);
      document.getElementById("paths").append(title, text);
    }
  }
});
</script></html>"""


# Why a request is refused; see `limits.Guard` and `Refused`.
_REFUSALS = {
    "400": "The request is invalid",
    "401": "The bearer token is missing or wrong",
    "403": "A page of another site asks",
    "404": "There is no such model",
    "408": "The body came too slowly",
    "413": "The body is too large",
    "415": "The body is not JSON, or compressed",
    "421": "The host name is not the server's",
    "429": "Too many requests wait; see Retry-After",
    "500": "The model failed",
    "503": "The model warms up, or the server stops",
}
_ERROR = {"type": "object", "properties": {"error": {"type": "string"}}}
_OPENAI_ERROR = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": "null"},
            },
        }
    },
}
_EDGE = {"type": "number", "description": "A share of the picture's size"}
_BOX = {
    "type": "object",
    "properties": {
        "label": {"type": "string"},
        "score": {"type": ["number", "null"]},
        **dict.fromkeys(("y1", "x1", "y2", "x2"), _EDGE),
        "mask": {"type": "string", "description": "A data: URI of a PNG"},
    },
}
_ANSWER = {
    "type": "object",
    "properties": {
        "text": {"type": "string"},
        "log_probabilities": {"type": "array", "items": {"type": "number"}},
        "finish": {"enum": ["stop", "length"]},
        "boxes": {"type": "array", "items": _BOX},
        "skipped": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {
                    "text": {"type": "string"},
                    "reason": {"type": "string"},
                },
            },
        },
    },
}
_COMPLETION = {
    "type": "object",
    "description": "As OpenAI's API describes it",
}


def openapi(posts, version):
    """Return the description of endpoints, from the tables of their fields.

    Args:
        posts: dict of path to a dict of name to `Field`.
        version: str, the package's version.

    Returns:
        Dict, OpenAPI 3.1.
    """
    paths = {path: {"post": _post(path, posts[path])} for path in posts}
    for path in ("/v1/models", "/healthz", "/readyz", "/metrics"):
        paths[path] = {"get": {"responses": {"200": {"description": "OK"}}}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "keras_paligemma", "version": version},
        "paths": paths,
    }


def _post(path, fields):
    """Return the description of an endpoint that answers."""
    is_openai = path.startswith("/v1/")
    answer, error = (
        (_COMPLETION, _OPENAI_ERROR) if is_openai else (_ANSWER, _ERROR)
    )
    good = {"description": "The answer", "content": _json(answer)}
    if "stream" in fields:
        good["content"] |= {"text/event-stream": {}}
    return {
        "requestBody": {"required": True, "content": _json(_schema(fields))},
        "responses": {
            "200": good,
            **{
                status: {"description": why, "content": _json(error)}
                for status, why in _REFUSALS.items()
            },
        },
    }


def _json(schema):
    return {"application/json": {"schema": schema}}


def _schema(fields):
    return {
        "type": "object",
        "additionalProperties": False,
        "required": [
            name for name, field in fields.items() if field.default is ...
        ],
        "properties": {
            name: _property(field) for name, field in fields.items()
        },
    }


def _property(field):
    """Return the schema of a field; `null` stands for its default."""
    schema = _TYPES[field.kind] | {
        name: limit
        for name, limit in (("minimum", field.least), ("maximum", field.most))
        if math.isfinite(limit)
    }
    if field.default is not ... and schema:
        schema = {"anyOf": [schema, {"type": "null"}]}
    if field.default not in (None, ...):
        schema["default"] = field.default
    return schema | {"description": field.about}
