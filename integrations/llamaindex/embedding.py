"""`DnDEmbedding`: LlamaIndex embeddings from the encoder that a `DnD` routes with."""

from __future__ import annotations

from typing import Any

from llama_index.core.base.embeddings.base import BaseEmbedding, Embedding
from llama_index.core.bridge.pydantic import Field, PrivateAttr

from dnd_sdk.config import Home
from dnd_sdk.models import DEFAULT_ENCODER, Encoder
from dnd_sdk.session import DnD, Lazy, as_config_error, check_known, in_thread


class DnDEmbedding(BaseEmbedding):
    """Pooled, L2-normalised vectors, the same for queries and texts; a blank text raises `InputError`."""

    model_name: str = Field(DEFAULT_ENCODER, description="Embedded name, folder or Hugging Face id of the encoder.")
    home: str | None = Field(None, description="Folder of the weights; None: DND_HOME, else the user's.")
    device: str = Field("cpu", description="auto, cpu, cuda, ...; a shared encoder stays where it is.")

    _encoder: Lazy[Encoder] = PrivateAttr()

    def __init__(self, dnd: DnD | None = None, **settings: Any) -> None:
        """Share the encoder of a resident `dnd`, or load `model_name` on first use.

        Raises `ConfigError` for options that are unknown.
        """
        check_known(settings, type(self).model_fields, type(self).__name__)
        if dnd is not None:
            settings |= {"model_name": dnd.encoder.name, "home": str(dnd.home.root)}
        with as_config_error(type(self).__name__):
            super().__init__(**settings)
        self._encoder = Lazy(self._load if dnd is None else lambda: dnd.encoder)

    @classmethod
    def class_name(cls) -> str:
        """The name in serialised settings."""
        return "DnDEmbedding"

    def _load(self) -> Encoder:
        return Encoder.load(self.model_name, Home.find(self.home), self.device)

    def _get_text_embeddings(self, texts: list[str]) -> list[Embedding]:
        return self._encoder.get().embed(texts).tolist()

    def _get_text_embedding(self, text: str) -> Embedding:
        return self._get_text_embeddings([text])[0]

    def _get_query_embedding(self, query: str) -> Embedding:
        return self._get_text_embedding(query)

    async def _aget_text_embeddings(self, texts: list[str]) -> list[Embedding]:
        return await in_thread(lambda: self._get_text_embeddings(texts))

    async def _aget_text_embedding(self, text: str) -> Embedding:
        return (await self._aget_text_embeddings([text]))[0]

    async def _aget_query_embedding(self, query: str) -> Embedding:
        return await self._aget_text_embedding(query)
