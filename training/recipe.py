"""How a model is made, once, into a directory of the cache."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from aqnsim._errors import AqnsimError


class ModelError(AqnsimError, RuntimeError):
    """A model that cannot be fetched, or is not what it should be."""


@dataclass(frozen=True)
class Recipe:
    """How a model is made; its digest names the cache entry, so that another recipe is another entry."""

    def make(self, directory: Path, root: Path) -> None:
        """Write the model's Hugging Face files into a directory.

        Args:
            directory: exists and is empty.
            root: of the cache.
        """
        raise NotImplementedError

    def describe(self) -> dict[str, Any]:
        """The recipe as plain data."""
        return {"kind": type(self).__name__, **asdict(self)}

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of the recipe."""
        return hashlib.sha256(json.dumps(self.describe(), sort_keys=True).encode()).hexdigest()


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Write a model and its tokenizer as transformers does."""
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
