"""The README that sentence-transformers writes beside a saved model: how to use a model whose pooling is of this package."""

from __future__ import annotations

import re
from typing import Any

from .files import importing

with importing("sentence-transformers 6 or newer", "sentence-transformers"):
    from sentence_transformers.base.model import BaseModel
    from sentence_transformers.sentence_transformer.model_card import SentenceTransformerModelCardData

HERE = "."  # the README's own folder, for a model without a name on the hub
_EXAMPLE = f'SentenceTransformer("{HERE}"'
_ABOUT = """Its pooling is a module of s2sent_kernels, which has to be installed as well:

```bash
pip install 's2sent_kernels[sentence-transformers]'
```

`trust_remote_code=True` lets sentence-transformers load it, here and within every library that passes the argument on.

"""


class S2SentModelCardData(SentenceTransformerModelCardData):
    """The library's own, but for the example: it names this package, and runs as it stands. It has no examples of the training's
    data: they are for the hub's widget, which runs no module of another package, and a bar would show how they are chosen."""

    def set_widget_examples(self, dataset: Any) -> None:
        """None."""

    def generate_usage_snippet(self) -> str:
        code = re.sub(
            r'SentenceTransformer\("[^"]*"\)',
            f'SentenceTransformer("{self.model_id or HERE}", trust_remote_code=True)',
            super().generate_usage_snippet(),
        )
        return _ABOUT + (code if self.model_id else re.sub("# Download from .*", "# In the folder of this file", code))


def describe(model: BaseModel) -> None:
    """Let ``model`` write such a README. A class of the caller's own for the card, and a README that was loaded, are kept."""
    if type(model.model_card_data) is SentenceTransformerModelCardData:
        model.model_card_data.__class__ = S2SentModelCardData  # it may be the caller's object, and stays the same one
    if _EXAMPLE in (model._model_card_text or _EXAMPLE):
        model._model_card_model_id_placeholder = HERE  # the library puts the name of a pushed model in its place
