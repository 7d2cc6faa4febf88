"""Export: a finished student as a directory that plain transformers loads, with a model card written from its lineage.

Owns what leaves the factory: weights, tokenizer and chat template byte for byte as they were trained and measured, a
generation config that states the decoding of the evaluation, the card, ``lineage.json`` and the resolved recipe. Smaller
forms (int8, ONNX) are optional and must prove that they are still the same model. It refuses what is not finished.
"""
