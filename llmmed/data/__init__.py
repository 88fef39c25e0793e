"""Data: documents from a source, tokens from documents, batches from tokens.

`biomed` and `text` are sources, `tokenizer` trains the byte-pair encoding, `prepared` packs and caches, `batches` cuts
windows. Nothing here imports torch before the first batch.
"""

from llmmed.data.batches import Batches
from llmmed.data.prepared import Dataset, check, prepare

__all__ = ["Batches", "Dataset", "check", "prepare"]
