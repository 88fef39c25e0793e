"""The model: a Llama-architecture transformer that owns all parameters and calls every kernel through the table.

`transformer` is the model, `precision` names the compute dtypes, `flops` counts parameters and arithmetic,
`huggingface` translates to and from `LlamaForCausalLM`.
"""

from llmmed.model.flops import flops_per_token, parameter_count
from llmmed.model.huggingface import from_hf_config_dict, from_hf_state_dict, hf_config_dict, to_hf_state_dict
from llmmed.model.precision import PRECISION_DTYPES, compute_dtype
from llmmed.model.transformer import IGNORE_INDEX, Transformer

__all__ = [
    "IGNORE_INDEX",
    "PRECISION_DTYPES",
    "Transformer",
    "compute_dtype",
    "flops_per_token",
    "from_hf_config_dict",
    "from_hf_state_dict",
    "hf_config_dict",
    "parameter_count",
    "to_hf_state_dict",
]
