"""Data: documents from a source, tokens from documents, batches from tokens.

`biomed`, `text` and `hub` are sources; what does not come in files is put there by `spool`. `prepared` is the cache of
packed tokens and `preparation` fills it, in steps that `shards` does to a part of the text and `parallel` spreads over
processes, each a `worker`. `batches` cuts windows, `mixture` draws them from several sources.

Nothing here imports torch before the first batch.
"""

from llmmed.data.batches import Batches
from llmmed.data.prepared import Dataset, check, prepare

__all__ = ["Batches", "Dataset", "check", "prepare"]
