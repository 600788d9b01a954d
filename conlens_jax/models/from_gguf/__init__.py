"""GGUF files (llama.cpp's format) as ordinary model folders: :mod:`.folder` converts one, once.

Source of the format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""
