"""The HTTP service: search, embed, thumbnails, health, its OpenAPI description, and the page.

Rows are asked for by number; there is no request that takes a path. A picture is read from where it was embedded,
decoded, and made anew, so that nothing but an image that is in the index ever leaves the machine.
"""

import base64
import binascii
import hmac
import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from typing import Annotated, Any, TypeVar

import anyio
import anyio.to_thread
import numpy as np
import torch
from fastapi import Depends, FastAPI, HTTPException, Path, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from PIL import Image

from evaclip import __version__
from evaclip.encoder import Encoder
from evaclip.errors import InputError
from evaclip.search.gate import Gate
from evaclip.search.index import Index
from evaclip.search.pictures import read_image, thumbnail
from evaclip.search.query import Query, query_vector, results
from evaclip.search.readers import original
from evaclip.search.requests import Embedded, EmbedRequest, Found, Health, Problem, SearchRequest

Outcome = TypeVar("Outcome")
PAGE = {
    "/": ("page.html", "text/html"),
    "/page.js": ("page.js", "text/javascript"),
    "/page.css": ("page.css", "text/css"),
}
PROBLEMS: dict[int | str, dict[str, Any]] = {
    400: {"model": Problem, "description": "What was sent cannot be used; the sentence says why."},
    401: {"model": Problem, "description": "The token is missing or wrong."},
    404: {"model": Problem, "description": "No such row, or its image is no longer what was indexed."},
    408: {"model": Problem, "description": "The request arrived too slowly."},
    409: {"model": Problem, "description": "The vector is of another embedding space."},
    413: {"model": Problem, "description": "The request is too large."},
    503: {"model": Problem, "description": "It took too long, or too many ask at once."},
}
PICTURE: dict[int | str, dict[str, Any]] = {
    200: {"content": {"image/jpeg": {}}, "description": "At most 256 pixels a side."}
}
KEPT_THUMBNAILS = 1024
bearer = HTTPBearer(auto_error=False)
Credentials = Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)]
RowNumber = Annotated[int, Path(ge=0, description="The number of a row, as /search gives it.")]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one request may cost."""

    max_body: int = 12_000_000
    """Bytes of a request; an image in base64 has four thirds of its file's bytes."""
    max_pixels: int = 40_000_000
    """Pixels of an image."""
    seconds: float = 30.0
    """To receive a request in, and again to answer it."""
    at_once: int = 4
    """Requests that are worked on at a time; others wait."""


class Service:
    """An index and its model, asked by several threads."""

    def __init__(self, index: Index, encoder: Encoder, limits: Limits) -> None:
        self.index, self.encoder, self.limits = index, encoder, limits
        self._slots = threading.BoundedSemaphore(limits.at_once)
        self._encoding = threading.Lock()
        self.thumbnail = lru_cache(maxsize=KEPT_THUMBNAILS)(self._thumbnail)

    async def answer(self, work: Callable[[], Outcome]) -> Outcome:
        """Do the work in a thread. Raises an HTTPException for what the user can change, and when it takes too long.

        A thread cannot be stopped; one that is too late keeps its place among the `at_once` until it ends.
        """
        try:
            with anyio.fail_after(self.limits.seconds):
                return await anyio.to_thread.run_sync(lambda: self._in_turn(work), abandon_on_cancel=True)
        except TimeoutError:
            raise HTTPException(503, f"there was no answer within {self.limits.seconds:g} seconds") from None
        except InputError as error:
            raise HTTPException(400, str(error)) from None

    def search(self, asked: SearchRequest) -> Found:
        """The nearest rows. Raises InputError, or HTTPException for a row or a space that is not here."""
        began = time.perf_counter()
        for row in asked.like:
            self.row(row)
        with self._encoding:
            query = Query(
                texts=tuple(asked.text),
                images=tuple(self._image(one) for one in asked.image),
                rows=tuple(asked.like),
                without=tuple(asked.without),
            )
            vector = self._given(asked) if asked.vector else query_vector(query, self.encoder, self.index)
        found = results(self.index, vector[None], asked.top)[0]
        return Found.model_validate({"results": found, "milliseconds": 1e3 * (time.perf_counter() - began)})

    def embed(self, asked: EmbedRequest) -> Embedded:
        """Vectors of captions and images."""
        images = [self._image(one) for one in asked.image]
        with self._encoding:
            texts = self.encoder.texts(asked.text).tolist() if asked.text else []
            pixels = [self.encoder.preprocessing.pixels(image) for image in images]
            pictures = self.encoder.images(torch.stack(pixels)).tolist() if pixels else []
        return Embedded(space_id=self.index.space_id, dim=self.index.dim, text=texts, image=pictures)

    def row(self, number: int) -> dict[str, Any]:
        """What a living row stands for; anything else is not found."""
        try:
            return self.index.row(number)
        except InputError:
            raise HTTPException(404, f"there is no row {number}") from None

    def _thumbnail(self, number: int) -> bytes:
        row = self.row(number)
        if row["place"] == "line":
            raise HTTPException(404, f"row {number} is a text")
        try:
            return thumbnail(original(row), row["key"])
        except InputError:  # its sentence has a path, which is nobody's business
            raise HTTPException(404, f"the image of row {number} is gone or has changed") from None

    def _in_turn(self, work: Callable[[], Outcome]) -> Outcome:
        if not self._slots.acquire(timeout=self.limits.seconds):
            raise HTTPException(503, "too many ask at once")
        try:
            return work()
        finally:
            self._slots.release()

    def _given(self, asked: SearchRequest) -> np.ndarray:
        """A vector that was sent, if it is of this space."""
        if asked.space_id != self.index.space_id:
            raise HTTPException(409, f"the vector is of the space {asked.space_id}, the index of {self.index.space_id}")
        vector = np.array(asked.vector, np.float64)
        length = np.linalg.norm(vector)
        if vector.shape != (self.index.dim,) or not 1e-6 < length < 1e6:
            raise InputError(f"a vector has {self.index.dim} numbers and a length")
        return (vector / length).astype(np.float32)

    def _image(self, encoded: str) -> Image.Image:
        try:
            data = base64.b64decode(encoded, validate=True)
        except (binascii.Error, ValueError):
            raise InputError("the image is not base64") from None
        return read_image(data, "the image", self.limits.max_pixels)


def create_app(
    index: Index, encoder: Encoder, limits: Limits, token: str | None = None, hosts: tuple[str, ...] | None = None
) -> Any:
    """The ASGI application. `hosts`: the names it answers for, None for any; `token`: what every request must bear."""
    service = Service(index, encoder, limits)
    app = FastAPI(
        title="evaclip search", version=__version__, docs_url=None, redoc_url=None, description=(__doc__ or "").strip()
    )

    def allowed(credentials: Credentials) -> None:
        said = credentials.credentials if credentials else ""
        if token is not None and not hmac.compare_digest(said.encode(), token.encode()):
            raise HTTPException(401, "a token is needed: Authorization: Bearer ...", {"WWW-Authenticate": "Bearer"})

    guarded: dict[str, Any] = {"dependencies": [Depends(allowed)], "responses": PROBLEMS}

    @app.post("/search", response_model=Found, **guarded)
    async def search(asked: SearchRequest) -> Found:
        """The rows nearest to texts, images, other rows, or a vector."""
        return await service.answer(lambda: service.search(asked))

    @app.post("/embed", response_model=Embedded, **guarded)
    async def embed(asked: EmbedRequest) -> Embedded:
        """Unit vectors of texts and images, and the space that they are of."""
        return await service.answer(lambda: service.embed(asked))

    @app.get("/thumbnail/{row}", response_class=Response, dependencies=[Depends(allowed)], responses=PROBLEMS | PICTURE)
    async def thumbnail_of(row: RowNumber) -> Response:
        """A row's image, small."""
        picture = await service.answer(lambda: service.thumbnail(row))
        return Response(picture, media_type="image/jpeg", headers={"Cache-Control": "private, max-age=3600"})

    @app.get("/healthz", response_model=Health)
    async def healthz() -> Health:
        """Whether it is up, and what it searches."""
        return Health(status="ok", rows=len(index), space_id=index.space_id, dim=index.dim)

    @app.exception_handler(RequestValidationError)
    async def unfit(_: Request, error: RequestValidationError) -> Response:
        told = [{name: one[name] for name in ("loc", "msg", "type")} for one in error.errors()]  # not what was sent
        return Response(json.dumps({"detail": told}), 422, media_type="application/json")

    for path, (name, kind) in PAGE.items():
        _static(app, path, name, kind)
    return Gate(app, hosts, limits.max_body, limits.seconds)


def _static(app: FastAPI, path: str, name: str, kind: str) -> None:
    """One of the page's three files, read once."""
    body = (files("evaclip.search") / "page" / name).read_bytes()
    app.add_api_route(
        path, lambda: Response(body, media_type=kind), include_in_schema=False, response_class=Response, methods=["GET"]
    )
