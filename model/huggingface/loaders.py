"""Which programs load an exported model, by its class and activation.

Read from vLLM's and llama.cpp's sources, November 2026. vLLM's model files refuse a `hidden_act` that is not the one of their
family. llama.cpp's graphs never read `hidden_act`: they compute the family's activation, so another one converts and is wrong.
"""

from __future__ import annotations

from model.huggingface.layout import APERTUS, ARCEE, FORMULA, LLAMA, QWEN3, TransformersLayout

TRANSFORMERS, REMOTE_CODE = "Transformers", "Transformers with trust_remote_code=True"
VLLM, LLAMA_CPP = "vLLM", "llama.cpp"
_ACTIVATION = {LLAMA: "silu", QWEN3: "silu", ARCEE: "relu2", APERTUS: "xielu"}  # the one of the family
# llama.cpp's converters of LLaMA's family take `add_prefix_space` from tokenizer_config.json. Qwen3's does not look, and a
# SentencePiece vocabulary then gets a space before each text.
PREFIX_OPTION = "--override-kv tokenizer.ggml.add_space_prefix=bool:false"


def loaders(layout: TransformersLayout) -> list[str]:
    """Return the programs that load a model and compute what it computes here."""
    if layout.model_type == FORMULA:
        return [REMOTE_CODE]
    family = _ACTIVATION[layout.model_type] == layout.hidden_act
    return [TRANSFORMERS, *([VLLM, LLAMA_CPP] if family else [])]


def notes(layout: TransformersLayout, sentencepiece: bool) -> list[str]:
    """Return what someone must know who loads the model with one of them.

    Args:
        sentencepiece: whether the folder holds a SentencePiece model.
    """
    if layout.model_type == FORMULA:
        return []
    if LLAMA_CPP not in loaders(layout):
        activation = _ACTIVATION[layout.model_type]
        return [f"does not load in llama.cpp, which would compute {activation} instead of {layout.hidden_act}"]
    if layout.model_type == QWEN3 and sentencepiece:
        return [f"llama.cpp puts a space before the text unless it is run with {PREFIX_OPTION}"]
    return []
