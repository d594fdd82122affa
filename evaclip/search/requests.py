"""What the service takes and gives, as its OpenAPI description says it."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

MOST = 32  # texts and images of a request

Text = Annotated[str, Field(min_length=1, max_length=2000)]
Base64 = Annotated[str, Field(min_length=4, description="A JPEG, PNG or WebP file in base64.")]
Texts = Annotated[list[Text], Field(max_length=MOST)]
Images = Annotated[list[Base64], Field(max_length=MOST)]
Number = Annotated[float, Field(allow_inf_nan=False)]


class _Request(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class SearchRequest(_Request):
    """What is wanted: all of it counts together."""

    text: Texts = []
    image: Images = []
    like: Annotated[list[Annotated[int, Field(ge=0)]], Field(max_length=MOST, description="Row numbers.")] = []
    without: Annotated[list[Text], Field(max_length=MOST, description="What is not wanted.")] = []
    vector: Annotated[list[Number], Field(max_length=65_536, description="In place of all these.")] = []
    space_id: Annotated[str, Field(max_length=64, description="The space of `vector`, as /embed gives it.")] = ""
    top: Annotated[int, Field(ge=1, le=1000)] = 24


class EmbedRequest(_Request):
    """What becomes vectors."""

    text: Texts = []
    image: Images = []


class Result(BaseModel):
    """A row that was found."""

    row: int
    score: float
    key: str
    caption: str
    place: str
    width: int
    height: int


class Found(BaseModel):
    """The nearest first."""

    results: list[Result]
    milliseconds: float


class Embedded(BaseModel):
    """Unit vectors, in the order of what was sent."""

    space_id: str
    dim: int
    text: list[list[float]]
    image: list[list[float]]


class Health(BaseModel):
    """Up, and with what."""

    status: str
    rows: int
    space_id: str
    dim: int


class Problem(BaseModel):
    """One sentence."""

    detail: str
