"""Open weights: a run's parameters as safetensors that other people's software loads, and back.

tensors.py (which parameter is which published tensor) and layouts.py (config.json) -> files.py,
tokenizer_files.py, card.py (what lies in the folder) -> exporting.py, importing.py (the commands).
"""
