"""The representation of our decoder in Hugging Face Transformers, which `model.export` writes and `model.import_hf` reads.

layout.py     the Transformers class for an arm, and the names and shapes of its tensors
loaders.py    which programs load the exported model
config.py     config.json -> our configuration
tokenizer.py  our tokenizer -> tokenizer.json
modeling.py   FormulaForCausalLM, the class that evaluates a formula; it is copied into exported folders
"""
