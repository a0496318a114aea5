"""The description of the API: OpenAPI, and a page that shows it."""

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


def openapi(posts, version):
    """Return the description of endpoints, from the tables of their fields.

    Args:
        posts: dict of path to a dict of name to `Field`.
        version: str, the package's version.

    Returns:
        Dict, OpenAPI 3.1.
    """
    paths = {
        path: {
            "post": {
                "requestBody": {
                    "required": True,
                    "content": {
                        "application/json": {"schema": _schema(fields)}
                    },
                },
                "responses": {
                    "200": {"description": "The answer"},
                    "400": {"description": "The request is wrong"},
                    "429": {"description": "Too many wait; see Retry-After"},
                },
            }
        }
        for path, fields in posts.items()
    }
    for path in ("/v1/models", "/healthz", "/readyz", "/metrics"):
        paths[path] = {"get": {"responses": {"200": {"description": "Good"}}}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "keras_paligemma", "version": version},
        "paths": paths,
    }


def _schema(fields):
    return {
        "type": "object",
        "additionalProperties": False,
        "required": [
            name for name, field in fields.items() if field.default is ...
        ],
        "properties": {
            name: _TYPES[field.kind] | {"description": field.about}
            for name, field in fields.items()
        },
    }
