"""The OpenAPI page: FastAPI's, with errors as they really are (problem+json, ours)."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from service.http.problems import MEDIA_TYPE
from service.http.schemas import ProblemDetails

FRAMEWORK_SCHEMAS = ("HTTPValidationError", "ValidationError")
PROBLEM = {"$ref": "#/components/schemas/ProblemDetails"}


def describe(app: FastAPI) -> dict[str, Any]:
    """Return the page; made once, then kept by the application."""
    if app.openapi_schema is None:
        page = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
        for path in page["paths"].values():
            for operation in path.values():
                _correct(operation["responses"])
        schemas = page["components"]["schemas"]
        for name in FRAMEWORK_SCHEMAS:
            schemas.pop(name, None)
        schemas["ProblemDetails"] = ProblemDetails.model_json_schema()
        app.openapi_schema = page
    return app.openapi_schema


def _correct(responses: dict[str, Any]) -> None:
    """Give errors their media type; drop the framework's 422, which never comes."""
    for status in [status for status in responses if status.startswith(("4", "5"))]:
        if "HTTPValidationError" in str(responses[status].get("content")):
            del responses[status]
        else:
            responses[status]["content"] = {MEDIA_TYPE: {"schema": PROBLEM}}
