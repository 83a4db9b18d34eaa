"""Our decoder in the words of Hugging Face Transformers: what `model.export` writes and `model.import_hf` reads.

layout.py     which class holds an arm, and what tensors are called there
config.py     what a config.json says
tokenizer.py  our tokenizer as one of theirs
modeling.py   the class that carries a formula, copied into exported folders
"""
